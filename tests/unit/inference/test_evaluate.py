"""An evaluation is that of a plain loop and of scikit-learn; the classes are the network's, whatever the folder has."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics
from torch import Tensor, nn
from torch.utils.data import Dataset

from adaptive_trainer import CheckpointError, DataError, Interrupted, Stopped, Trainer, compose_config, load_model
from adaptive_trainer.inference.evaluate import Evaluated, evaluate, of_folder
from adaptive_trainer.inference.model import load
from adaptive_trainer.inference.passes import opened
from tests.unit.inference.conftest import COLOURS, SETTINGS, fill


def evaluated(best: Path, root: Path, batch: int = 4) -> Evaluated:
    trained = load(best)
    trained.config.trainer.eval_batch_size = batch
    with opened(trained, trained.config, print) as passes:
        return evaluate(passes, *of_names(of_folder(trained, root), trained.classes))


def of_names(found: tuple[Any, str], names: tuple[str, ...]) -> tuple[Any, tuple[str, ...], str]:
    return found[0], names, found[1]


def plain(best: Path, folder: Path) -> tuple[list[int], list[int]]:
    """Labels and answers of a loop over files."""
    network: Any = load_model(best)
    labels, answers = [], []
    for label, name in enumerate(network.classes):
        for path in sorted((folder / name).glob("*")):
            with Image.open(path) as image, torch.no_grad():
                answers.append(int(network(network.transform(image)[None]).argmax()))
            labels.append(label)
    return labels, answers


def test_it_is_that_of_a_plain_loop_and_scikit_learn(best: Path, photos: Path) -> None:
    labels, answers = plain(best, photos / "test")
    found = evaluated(best, photos)
    assert 0 < found.accuracy < 1  # else nothing could be mixed up
    assert (found.data, found.images, found.unreadable) == (str(photos / "test"), 21, [])
    assert found.accuracy == metrics.accuracy_score(labels, answers)
    assert found.f1 == metrics.f1_score(labels, answers, average="macro")
    matrix = metrics.confusion_matrix(labels, answers, labels=[0, 1, 2])
    assert found.confusion == [  # with no zeros, of which many classes have very many
        (COLOURS[a], COLOURS[b], matrix[a, b]) for a, b in np.argwhere(matrix)
    ]
    report = metrics.classification_report(labels, answers, target_names=COLOURS, output_dict=True, zero_division=0)
    for each in found.classes:
        wanted = report[each.name]
        assert (each.images, each.precision, each.recall, each.f1) == (
            wanted["support"], wanted["precision"], wanted["recall"], wanted["f1-score"],
        )  # fmt: skip
    assert found.top5 is None  # of three classes
    assert len(found.mistakes) == sum(a != b for a, b in zip(labels, answers, strict=True))
    assert [each.probability for each in found.mistakes] == sorted(
        (each.probability for each in found.mistakes), reverse=True
    )
    assert Counter((each.label, each.predicted) for each in found.mistakes) == Counter(
        (COLOURS[a], COLOURS[b]) for a, b in zip(labels, answers, strict=True) if a != b
    )
    assert all(Path(each.name).parent.name == each.label for each in found.mistakes)


class Scores(nn.Module):
    """Scores that the brightness of an image decides."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3, classes)

    def forward(self, images: torch.Tensor) -> Any:
        return self.linear(images.mean((2, 3)))


class Random(Dataset[Any]):
    """Images of one colour each, with labels that have nothing to do with it."""

    classes = tuple("abcdefgh")

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(size)
        self.images = torch.rand(size, 3, 1, 1, generator=generator).expand(-1, -1, 8, 8)
        self.targets = torch.randint(8, (size,), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], self.targets[index]


def test_top_5_and_a_trainers_own_data(tmp_path: Path) -> None:
    train, val = Random(40), Random(90)
    settings = ("data.image_size=8", "data.transforms=none", "trainer.batch_size=8", "memory.limit=none", "seed=1")
    cfg = compose_config([*settings, "data.num_workers=0"])
    trainer = Trainer(
        cfg, model=lambda _, classes: Scores(classes), train_data=train, val_data=val, output_dir=tmp_path
    )
    with pytest.raises(CheckpointError, match=r"there is no .*best.pt; fit\(\) makes it"):
        trainer.evaluate()
    result = trainer.fit()
    found = trainer.evaluate()
    assert found.data == "the validation set"
    assert found.accuracy == result.metrics["val_accuracy"]
    network = load_model(tmp_path / "checkpoints" / "best.pt", lambda _, classes: Scores(classes))
    with torch.no_grad():
        scores = network(val.images)
    wanted = metrics.top_k_accuracy_score(val.targets, scores.numpy(), k=5, labels=range(8))
    assert found.top5 == pytest.approx(wanted, abs=0)
    assert 0.3 < wanted < 0.9
    assert set(found.metrics) == {"test_accuracy", "test_top5", "test_f1"}


def test_images_that_cannot_be_read_are_named_and_left_out(best: Path, photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos / "test", tmp_path / "photos")
    broken = tmp_path / "photos" / "green" / "3.jpg"
    broken.write_text("no picture")
    found = evaluated(best, tmp_path / "photos")
    assert (found.unreadable, found.images) == ([str(broken)], 20)
    assert [each.images for each in found.classes] == [7, 6, 7]


@pytest.mark.parametrize(
    ("folders", "used"),
    [(("test", "val", "train"), "test"), (("Testing",), "Testing"), (("train", "valid"), "valid"), ((".",), ".")],
)
def test_which_folder_is_evaluated(folders: tuple[str, ...], used: str, best: Path, tmp_path: Path) -> None:
    for name in folders:
        fill(tmp_path / name, 1)
    data, what = of_folder(load(best), tmp_path)
    assert Path(what) == tmp_path / used
    assert len(data) == 3


def test_a_class_that_is_called_test_is_no_split(best: Path, tmp_path: Path) -> None:
    trained = replace(load(best), classes=("blue", "red", "test"))
    for name in ("blue", "test"):
        (tmp_path / name).mkdir()
        shutil.copy(best, tmp_path / name / "1.jpg")  # what is in it does not matter here
    data: Any = of_folder(trained, tmp_path)[0]
    assert [label for _, label in data.samples] == [0, 2]  # by the network's classes, one of which is not there


def test_classes_that_the_network_does_not_know(best: Path, tmp_path: Path) -> None:
    fill(tmp_path, 1)
    (tmp_path / "mauve").mkdir()
    with pytest.raises(DataError, match=r"does not know: mauve\. It knows blue, green, red\. Rename or leave out"):
        of_folder(load(best), tmp_path)


def test_a_folder_of_the_classes_without_images(best: Path, tmp_path: Path) -> None:
    (tmp_path / "red").mkdir()
    with pytest.raises(DataError, match="has no images in its class folders"):
        of_folder(load(best), tmp_path)


def test_a_test_folder_is_evaluated_once_at_the_end(best: Path, photos: Path) -> None:
    folder = best.parents[1]
    wanted = evaluated(best, photos)
    written = json.loads((folder / "evaluation.json").read_text())
    assert written["model"] == str(best)
    assert written | {"data": ""} == json.loads(json.dumps(asdict(wanted))) | {"model": str(best), "data": ""}
    result = json.loads((folder / "result.json").read_text())
    assert result["metrics"]["test_accuracy"] == wanted.accuracy
    assert result["metrics"]["test_f1"] == wanted.f1


def test_a_test_folder_with_other_classes_is_refused_before_training(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "test" / "red").rename(tmp_path / "photos" / "test" / "mauve")
    trainer = Trainer(compose_config([*SETTINGS, f"data.root={tmp_path / 'photos'}"]), output_dir=tmp_path / "out")
    with pytest.raises(DataError, match=r"training and test set differ in their classes: .* only in test \['mauve'\]"):
        trainer.fit()


def test_a_test_set_that_cannot_be_evaluated_does_not_cost_the_run(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    for path in (tmp_path / "photos" / "test").rglob("*.jpg"):
        path.write_text("no picture")
    cfg = compose_config([*SETTINGS, f"data.root={tmp_path / 'photos'}", "trainer.epochs=1"])
    result = Trainer(cfg, output_dir=tmp_path / "out").fit()
    assert result.outcome == "trained"
    assert "the test images are not evaluated: no image of the test set can be read" in result.events[-1]


class StoppedInTest(nn.Module):
    """Ctrl-C is pressed so often where it answers once result.json is written: the run tests."""

    def __init__(self, folder: Path, times: int) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)
        self.folder, self.times = folder, times

    def forward(self, images: Tensor) -> Any:
        if (self.folder / "result.json").exists():
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)
        return self.head(images.mean((2, 3)))


@pytest.mark.long
@pytest.mark.parametrize(("times", "kind"), [(1, Interrupted), (2, Stopped)])
def test_an_interrupt_in_the_test_keeps_the_result_of_training(
    times: int, kind: type[BaseException], photos: Path, tmp_path: Path
) -> None:
    small = [*SETTINGS, f"data.root={photos}", "trainer.epochs=1", "report=false", "trainer.eval_batch_size=4"]
    make: Any = lambda _, classes: StoppedInTest(tmp_path, times)  # noqa: E731
    with pytest.raises(
        kind, match=r"stopped by .*; (evaluate them with|go on from the last checkpoint with) resume=auto"
    ):
        Trainer(compose_config(small), model=make, output_dir=tmp_path).fit()
    stopped = json.loads((tmp_path / "result.json").read_text())
    assert stopped["outcome"] == "trained"
    assert stopped["events"][-1].startswith("interrupted after training")
    assert set(stopped["metrics"]) & {"val_accuracy", "test_accuracy"} == {"val_accuracy"}
    make = lambda _, classes: StoppedInTest(tmp_path, 0)  # noqa: E731
    trainer = Trainer(compose_config([*small, "resume=auto"]), model=make, output_dir=tmp_path)
    result = trainer.fit()
    assert result.metrics == stopped["metrics"] | trainer.evaluate().metrics


def test_a_trainer_of_another_process_evaluates_and_predicts(best: Path, photos: Path, tmp_path: Path) -> None:
    """By the folder of the run alone; the data of the settings are the default."""
    trainer = Trainer(compose_config([*SETTINGS, f"data.root={photos}"]), output_dir=best.parents[1])
    assert asdict(trainer.evaluate()) == asdict(evaluated(best, photos)) | {"data": "the test set"}
    assert trainer.evaluate(photos / "val").images == 12
    assert [each.path for each in trainer.predict([photos / "test" / "red" / "1.jpg"])] == [
        str(photos / "test" / "red" / "1.jpg")
    ]


def test_images_that_were_trained_on_are_no_validation_images(tmp_path: Path) -> None:
    settings = ("data=fakedata", "data.train.size=40", "data.val=null", "data.train.image_size=[3,8,8]")
    small = (*settings, "data.image_size=8", "data.num_workers=0", "trainer.batch_size=8", "ladder=none")
    make: Any = lambda _, classes: Scores(classes)  # noqa: E731
    first = Trainer(compose_config(list(small)), model=make, output_dir=tmp_path)
    first.fit()
    assert first.evaluate().images == 8
    other = Trainer(compose_config([*small, "data.val_fraction=0.5"]), model=make, output_dir=tmp_path)
    with pytest.raises(DataError, match="other images would be held out for validation"):
        other.evaluate()
