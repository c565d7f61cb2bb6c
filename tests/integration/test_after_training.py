"""`task=predict` and `task=evaluate` as they are typed: files, exit codes, messages."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.forking import Ended, Launcher
from tests.unit.inference.conftest import SETTINGS, fill


@pytest.fixture(scope="module")
def trained(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos and a run trained on them."""
    folder = tmp_path_factory.mktemp("here")
    for split, each, first in (("train", 8, 0), ("val", 4, 1000), ("test", 5, 2000)):
        fill(folder / "photos" / split, each, first)
    ended = launcher.run(*SETTINGS, "data.root=photos", "trainer.epochs=1", "hydra.run.dir=run", folder=folder)
    assert ended.code == 0, ended.text
    return folder


@pytest.fixture
def cli(launcher: Launcher, trained: Path) -> Any:
    def run(*args: str) -> Ended:
        env = {"PWD": str(trained)}  # as a shell would say it
        return launcher.run(
            *args, "model.weights=run/checkpoints/best.pt", "hydra.run.dir=out", folder=trained, env=env
        )

    return run


def narrow(ended: Ended) -> list[str]:
    assert ended.code == 0, ended.text
    lines = ended.out.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    return lines


def test_predict(cli: Any, trained: Path) -> None:
    (trained / "photos" / "broken.jpg").write_text("no picture")
    lines = narrow(cli("task=predict", "data.root=photos", "memory.limit=none", "verbosity=normal"))
    assert "cannot be read, and left out: photos/broken.jpg" in lines
    assert lines[-1] == "predictions: out/predictions.csv, and predictions.json beside it"
    with (trained / "out" / "predictions.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * (8 + 4 + 5) + 1
    assert [row["class_1"] for row in rows if row["path"] == "photos/broken.jpg"] == [""]
    content = json.loads((trained / "out" / "predictions.json").read_text())
    assert [each["path"] for each in content["predictions"]] == [row["path"] for row in rows]
    (trained / "photos" / "broken.jpg").unlink()


def test_predict_a_single_photo(cli: Any) -> None:
    lines = narrow(cli("task=predict", "data.root=photos/test/red/0.jpg", "memory.limit=none"))
    assert lines[-2].endswith("photos/test/red/0.jpg")


def test_evaluate(cli: Any, trained: Path) -> None:
    lines = narrow(cli("task=evaluate", "data=imagefolder", "data.root=photos", "memory.limit=none"))
    assert lines[0] == "images: 15 of photos/test"
    found = json.loads((trained / "out" / "evaluation.json").read_text())
    result = json.loads((trained / "run" / "result.json").read_text())
    assert found["accuracy"] == result["metrics"]["test_accuracy"]
    assert f"accuracy {100 * found['accuracy']:.2f} %, F1 {found['f1']:.3f} (macro), 15 images" in lines


def test_evaluate_what_it_was_trained_on(cli: Any) -> None:
    lines = narrow(cli("task=evaluate", "data.root=photos/train", "memory.limit=none"))
    assert lines[0] == "photos/train was trained on: the figures say little about new images"
    assert "trained on" not in " ".join(narrow(cli("task=evaluate", "data.root=photos/val", "memory.limit=none")))


def test_export(cli: Any, trained: Path) -> None:
    lines = narrow(cli("task=export"))
    assert lines[0].startswith("out/model.pt2: its scores are the network's; largest difference ")
    assert lines[-1] == "out/model.json: classes and preprocessing"
    assert json.loads((trained / "out" / "model.json").read_text())["classes"] == ["blue", "green", "red"]


def test_evaluate_the_data_of_settings(launcher: Launcher, tmp_path: Path) -> None:
    """The validation images of the same data are the ones of the training."""
    data = ("data=fakedata", "data.train.size=30", "data.train.image_size=[3,32,32]", "data.val=null")
    small = (
        "model.name=test_resnet",
        "data.image_size=32",
        "data.num_workers=0",
        "trainer.batch_size=8",
        "ladder=none",
    )
    assert launcher.run(*data, *small, "hydra.run.dir=run", folder=tmp_path).code == 0
    weights = "model.weights=run/checkpoints/best.pt"
    ended = launcher.run("task=evaluate", *data, weights, "hydra.run.dir=out", folder=tmp_path)
    assert ended.code == 0, ended.text
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (found["images"], found["accuracy"]) == (6, result["metrics"]["val_accuracy"])
    assert found["top5"] >= found["accuracy"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("task=predict",), "data.root has no value; give a photo, or a folder of photos"),
        (("task=predict", "data.root=gone"), "gone is neither a file nor a folder"),
        (("task=predict", "data.root=photos", "data.image_size=64"), "task=predict does not take data.image_size=64"),
        (("task=evaluate", "data.root=photos", "trainer.epochs=3"), "task=evaluate does not take trainer.epochs=3"),
        (("task=evaluate",), "the data set adaptive_trainer.data.digits has classes that the network does not know: 0"),
        (("task=evaluate", "data.root=gone"), "gone is no folder; give one with ROOT/CLASS/image.jpg"),
        (("task=export", "data.root=photos"), "task=export does not take data.root=photos"),
        (("task=predict", "data.root=photos", "trainer.precision=fp8"), "trainer.precision=fp8 is none of fp32"),
    ],
)
def test_mistakes(args: tuple[str, ...], said: str, cli: Any) -> None:
    ended = cli(*args)
    assert ended.code == 2, ended.text
    assert f"error: {said}" in ended.err
    assert "Traceback" not in ended.err


def test_without_a_checkpoint(launcher: Launcher, tmp_path: Path) -> None:
    for more, said in (
        ((), "task=predict needs a trained network: model.weights=PATH/checkpoints/best.pt"),
        (("model.weights=gone.pt",), "there is no checkpoint gone.pt"),
    ):
        ended = launcher.run("task=predict", "data.root=.", *more, folder=tmp_path)
        assert (ended.code, said in ended.err) == (2, True), ended.text


STOPPED = """
import signal
from adaptive_trainer.__main__ import main
from adaptive_trainer.inference.passes import Passes

signal.signal(signal.SIGINT, signal.default_int_handler)
Passes._forward = lambda self, images: signal.raise_signal(signal.SIGINT)
main()
"""


@pytest.mark.parametrize("task", ["predict", "evaluate"])
def test_an_interrupt_gives_two_lines(task: str, trained: Path, launcher: Launcher) -> None:
    script = trained / "stopped.py"
    script.write_text(STOPPED)
    typed = (f"task={task}", "data.root=photos", "model.weights=run/checkpoints/best.pt", "hydra.run.dir=stopped")
    ended = launcher.run(*typed, script=script, folder=trained)
    said = f"stopped by Ctrl-C\ntask={task} is not finished, and has to begin again\n"
    assert (ended.code, ended.err) == (130, said)
    assert list((trained / "stopped").glob("*.csv*")) == []
