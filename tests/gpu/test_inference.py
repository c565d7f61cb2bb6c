"""Predictions, evaluations, exports and the doctor on a real card, under real caps."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from adaptive_trainer import LadderExhausted, Trainer, compose_config, oom
from adaptive_trainer.cli.doctor import VARIABLES
from adaptive_trainer.inference.predict import Prediction
from adaptive_trainer.memory.processes import processes_on
from adaptive_trainer.training.epochs.answers import Gathered
from scripts.gpu_checks import CUDA
from tests.support.forking import Ended, Launcher
from tests.unit.inference.conftest import fill

pytestmark = pytest.mark.gpu
MiB = 2**20
EACH = 90  # photos of a class
BATCH = 256  # images of a batch, which take about 1800 MiB
CAP = 900  # MiB in which that does not fit, and a small batch has room for any workspace
EXACT = 1e-4  # of a probability: batches of another size take other kernels
HALVED = f"out of memory: batches of {BATCH} -> {BATCH // 2} images, the same images again"
SETTINGS = (
    "device=cuda", "data=imagefolder", "model.name=resnet18", "data.image_size=224", "trainer.batch_size=16",
    "data.num_workers=0", "ladder=none", "trainer.tf32=false", "report=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos, and a run on the card whose test images were evaluated."""
    folder = tmp_path_factory.mktemp("here")
    for split, each, first in (("train", 16, 0), ("val", 4, 1000), ("test", EACH, 2000)):
        fill(folder / "photos" / split, each, first)
    result = trainer(folder).fit()
    assert result.metrics.keys() >= {"test_accuracy", "test_f1"}
    return folder


def trainer(folder: Path, batch: int = 8) -> Trainer:
    settings = [*SETTINGS, f"data.root={folder / 'photos'}", f"trainer.eval_batch_size={batch}"]
    return Trainer(compose_config(settings), output_dir=folder / "run")


def allocated() -> int:
    oom.release(CUDA)
    return torch.cuda.memory_allocated(CUDA)


@contextmanager
def capped(mib: int) -> Iterator[None]:
    """No more than that beside what is there; afterwards no more is there than before."""
    before = allocated()
    cap = torch.cuda.memory_reserved(CUDA) + mib * MiB
    torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.get_device_properties(CUDA).total_memory, CUDA)
    fraction = torch.cuda.get_per_process_memory_fraction(CUDA)
    try:
        yield
        assert torch.cuda.get_per_process_memory_fraction(CUDA) == fraction, "the caller's cap stays"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, CUDA)
    assert allocated() == before


def close(found: list[Prediction], wanted: list[Prediction]) -> bool:
    """Whether each photo has the same probability for each class, whose order may change where they are equal."""
    return [each.path for each in found] == [each.path for each in wanted] and all(
        dict(zip(ours.classes, ours.probabilities, strict=True))
        == pytest.approx(dict(zip(theirs.classes, theirs.probabilities, strict=True)), abs=EXACT)
        for ours, theirs in zip(found, wanted, strict=True)
    )


@pytest.fixture(scope="module")
def wanted(trained: Path) -> list[Prediction]:
    """The predictions on the card without a cap."""
    before = allocated()
    found = trainer(trained).predict(trained / "photos" / "test")
    assert allocated() == before
    assert len(found) == 3 * EACH
    return found


def test_predictions_under_a_cap_are_those_of_the_whole_card(trained: Path, wanted: list[Prediction]) -> None:
    with capped(CAP):
        found = trainer(trained).predict(trained / "photos" / "test")
    assert found == wanted


def test_a_batch_that_does_not_fit_steps_down(
    trained: Path, wanted: list[Prediction], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "adaptive_trainer")
    with capped(CAP):
        found = trainer(trained, BATCH).predict(trained / "photos" / "test")
    assert HALVED in caplog.messages
    assert close(found, wanted)


def test_an_evaluation_that_does_not_fit_steps_down(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = json.loads((trained / "run" / "result.json").read_text())
    caplog.set_level(logging.INFO, "adaptive_trainer")
    whole = trainer(trained).evaluate()
    with capped(CAP):
        found = trainer(trained, BATCH).evaluate()
    assert HALVED in caplog.messages
    assert (found.accuracy, found.f1, found.confusion) == (whole.accuracy, whole.f1, whole.confusion)
    assert found.metrics == {key: result["metrics"][key] for key in found.metrics}, "as at the end of the training"


def test_weights_that_do_not_fit(trained: Path) -> None:
    with capped(8), pytest.raises(LadderExhausted, match="the network alone does not fit"):
        trainer(trained).predict(trained / "photos" / "test")
    assert trainer(trained).evaluate(trained / "photos" / "val").images == 12


def test_answers_in_training_lie_on_the_host() -> None:
    before, gathered = allocated(), Gathered()
    scores, labels = torch.rand(64, 1000, device=CUDA), torch.zeros(64, dtype=torch.int64, device=CUDA)
    gathered.see(scores, labels)
    del scores, labels
    assert torch.cuda.memory_allocated(CUDA) == before


# -- as it is typed


def typed(launcher: Launcher, folder: Path, *args: str) -> Ended:
    weights = f"model.weights={folder / 'run' / 'checkpoints' / 'best.pt'}"
    ended = launcher.run(*args, weights, "hydra.run.dir=out", folder=folder)
    assert ended.code == 0, ended.text
    return ended


def test_task_predict(launcher: Launcher, trained: Path, wanted: list[Prediction]) -> None:
    limits = (f"memory.limit={CAP}MiB", f"trainer.eval_batch_size={BATCH}")
    ended = typed(launcher, trained, "task=predict", "data.root=photos/test", "device=cuda", *limits)
    said = " ".join(ended.out.split())
    assert "limited to 900 MiB by memory.limit" in said
    assert "out of memory: batches of" in said
    rows = json.loads((trained / "out" / "predictions.json").read_text())["predictions"]
    found = [Prediction(str(trained / row["path"]), tuple(row["classes"]), tuple(row["probabilities"])) for row in rows]
    assert close(found, wanted)


def test_task_evaluate(launcher: Launcher, trained: Path) -> None:
    limits = (f"memory.limit={CAP}MiB", f"trainer.eval_batch_size={BATCH}")
    ended = typed(launcher, trained, "task=evaluate", "data.root=photos", "device=cuda", *limits)
    assert "out of memory: batches of" in " ".join(ended.out.split())
    found = json.loads((trained / "out" / "evaluation.json").read_text())
    result = json.loads((trained / "run" / "result.json").read_text())
    assert found["accuracy"] == result["metrics"]["test_accuracy"]


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch's own, of what it reads
def test_task_export(launcher: Launcher, trained: Path) -> None:
    """What was trained on a card is exported for any device; the program runs on the card too."""
    typed(launcher, trained, "task=export")
    program = torch.export.load(trained / "out" / "model.pt2").module()
    about = json.loads((trained / "out" / "model.json").read_text())
    assert about["classes"] == ["blue", "green", "red"]
    images = torch.rand(3, 3, 224, 224)
    on_card = program.to(CUDA)(images.to(CUDA)).cpu()
    torch.testing.assert_close(on_card, program.to("cpu")(images), atol=0.05, rtol=0.05)  # TF32 may be on here


# -- the doctor


def doctor(launcher: Launcher, folder: Path) -> Ended:
    clean = {**dict.fromkeys(VARIABLES, ""), "ADAPTIVE_TRAINER_CACHE": str(folder / "cache"), "COLUMNS": "200"}
    return launcher.run("task=doctor", "device=cuda", "hydra.run.dir=out", folder=folder, env=clean)


def test_the_doctor_names_the_card_and_finds_nothing_that_is_not_wrong(launcher: Launcher, tmp_path: Path) -> None:
    free, total = torch.cuda.mem_get_info(CUDA)
    users = processes_on(CUDA)  # this process among them, and not the doctor's
    ended = doctor(launcher, tmp_path)
    text = " ".join(ended.text.split())
    assert ended.code == 0, ended.text
    major, minor = torch.cuda.get_device_capability(CUDA)
    name = re.escape(torch.cuda.get_device_name(CUDA))
    said = re.search(rf"card: {name}, compute capability {major}\.{minor}, (\d+) MiB of (\d+) MiB free", text)
    assert said is not None, ended.text
    assert int(said[2]) == round(total / MiB)
    assert abs(int(said[1]) - free / MiB) < 1024, "but for the doctor's own context"
    assert "result: nothing prevents training here" in text
    assert "problem:" not in text
    notes = [note for note in text.split("note: ")[1:] if "holds memory of the card" not in note]
    assert notes == [], ended.text
    if not isinstance(users, str):
        assert set(map(int, re.findall(r"\(pid (\d+)", text))) <= {each.pid for each in users}


def test_the_doctor_of_a_full_card(launcher: Launcher, tmp_path: Path) -> None:
    oom.release(CUDA)
    free, _ = torch.cuda.mem_get_info(CUDA)
    held = torch.empty(free - 150 * MiB, dtype=torch.uint8, device=CUDA)
    try:
        ended = doctor(launcher, tmp_path)
    finally:
        del held
        oom.release(CUDA)
    assert ended.code == 2, ended.text
    assert "the card is full" in " ".join(ended.text.split())
