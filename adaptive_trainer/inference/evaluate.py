"""How often a trained network is right, on a test set: accuracy, top-5, F1, confusion matrix, by scikit-learn."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from adaptive_trainer.config.schema import Config, DataConfig
from adaptive_trainer.data.datasets import MapDataset, build_datasets, sample_name
from adaptive_trainer.data.images.files import ImageFiles
from adaptive_trainer.data.images.folders import TARGET, class_folders, evaluation_folder, split_folder
from adaptive_trainer.errors import ConfigError, DataError
from adaptive_trainer.inference.model import Trained
from adaptive_trainer.inference.passes import Passes
from adaptive_trainer.report.result import OfClass
from adaptive_trainer.utils.files import as_json, refused_by_disk, write_whole

log = logging.getLogger(__name__)

TOP = 5
MISTAKES = 20  # that are listed
FILE = "evaluation.json"


@dataclass(frozen=True, slots=True)
class Mistake:
    """An image taken for another class than its own, with the probability that the network gave that class."""

    name: str
    label: str
    predicted: str
    probability: float


@dataclass(frozen=True, slots=True)
class Evaluated:
    """How often a network is right: plain data.

    Attributes:
        data: which images these are, in words.
        images: how many could be read.
        accuracy: share of right answers.
        top5: share of images whose class is among the five likeliest; None with five classes or fewer.
        f1: mean of the classes' F1 (macro), of those that occur among labels or answers.
        classes: the classes of the network, in order.
        confusion: what the confusion matrix has beside zeros: (class, answer, images). Of 20,000 classes all of it has
            400 million numbers.
        mistakes: the most confident ones.
        unreadable: images that were left out.
    """

    data: str
    images: int
    accuracy: float
    top5: float | None
    f1: float
    classes: list[OfClass]
    confusion: list[tuple[str, str, int]]
    mistakes: list[Mistake]
    unreadable: list[str]

    @property
    def metrics(self) -> dict[str, float]:
        """The figures of the whole, for a record."""
        found = {"test_accuracy": self.accuracy, "test_top5": self.top5, "test_f1": self.f1}
        return {name: value for name, value in found.items() if value is not None}

    def __str__(self) -> str:
        """One line for people."""
        top5 = "" if self.top5 is None else f", top-5 {100 * self.top5:.2f} %"
        return f"accuracy {100 * self.accuracy:.2f} %{top5}, F1 {self.f1:.3f} (macro), {self.images} images"


def evaluate(passes: Passes, data: MapDataset, names: Sequence[str], what: str) -> Evaluated:
    """Evaluate a data set of (image, label).

    Args:
        names: of the classes.
        what: says in words which images these are.

    Raises:
        DataError: no image can be read.
        LadderExhausted: a single image does not fit.
    """
    labels: list[int] = []
    answers: list[list[int]] = []  # the likeliest classes of each image
    unreadable: list[str] = []
    mistakes: list[tuple[float, int, int, int]] = []  # probability, place, label, answer
    for part in passes.run(data, "evaluation:"):
        found = part.scores.softmax(1).topk(min(TOP, len(names)))
        labels += part.labels.tolist()
        answers += found.indices.tolist()
        unreadable += [sample_name(data, place) for place in part.skipped]
        rows = zip(
            found.values[:, 0].tolist(), part.places, part.labels.tolist(), found.indices[:, 0].tolist(), strict=True
        )
        mistakes = heapq.nlargest(MISTAKES, [*mistakes, *(row for row in rows if row[2] != row[3])])
    if not labels:
        raise DataError(f"no image of {what} can be read; repair the files, or name another data.root")
    listed = [Mistake(sample_name(data, place), names[label], names[answer], p) for p, place, label, answer in mistakes]
    return _measured(np.array(labels), np.array(answers), names, what, listed, unreadable)


def _measured(
    labels: Any, answers: Any, names: Sequence[str], what: str, mistakes: list[Mistake], unreadable: list[str]
) -> Evaluated:
    from sklearn import metrics  # half a second, which most runs do without

    first, every = answers[:, 0], range(len(names))
    by_class = metrics.precision_recall_fscore_support(labels, first, labels=every, zero_division=0)
    rows = zip(names, by_class[3], *by_class[:3], strict=True)
    pairs = zip(*np.unique(np.stack([labels, first], 1), axis=0, return_counts=True), strict=True)
    return Evaluated(
        data=what,
        images=len(labels),
        accuracy=float(metrics.accuracy_score(labels, first)),
        top5=float((answers == labels[:, None]).any(axis=1).mean()) if len(names) > TOP else None,
        f1=float(metrics.f1_score(labels, first, average="macro", zero_division=0)),
        classes=[OfClass(name, int(images), *map(float, shares)) for name, images, *shares in rows],
        confusion=[(names[label], names[answer], int(count)) for (label, answer), count in pairs],
        mistakes=mistakes,
        unreadable=unreadable,
    )


def of_folder(trained: Trained, root: str | Path) -> tuple[MapDataset, str]:
    """The images in ROOT/test/CLASS, else ROOT/val/CLASS, else ROOT/CLASS, labelled as the network's classes.

    Those of the folder that the network was trained on are evaluated too, and a warning says what they are.

    Raises:
        DataError: there are none, or the network does not know one of the classes.
    """
    folder = evaluation_folder(root, trained.classes)
    _check_classes(class_folders(folder, least=1), trained, str(folder))
    data = ImageFiles(folder, trained.classes)
    if not len(data):
        raise DataError(f"{folder} has no images in its class folders; give one with CLASS/image.jpg")
    if _is_of_training(folder, trained.config.data):
        log.warning("%s was trained on: the figures say little about new images", folder)
    return data, str(folder)


def _is_of_training(folder: Path, data: DataConfig) -> bool:
    root = data.train.get("root")
    if data.train.get("_target_") != TARGET or not root or not Path(root).expanduser().is_dir():  # it may have moved
        return False
    train = split_folder(root, "train")
    return train is not None and train.samefile(folder)


def of_settings(
    trained: Trained, config: Config, train: Dataset[Any] | None = None, val: Dataset[Any] | None = None
) -> tuple[MapDataset, str]:
    """The test set of these settings, or of a caller's own data sets; the validation set where there is none.

    Raises:
        ConfigError: the settings name no data.
        DataError: the classes are not the network's; or the validation images are others than in its training.
    """
    trainer = replace(config.trainer, batch_size=1)  # a training set smaller than a batch can be evaluated
    config = replace(config, trainer=trainer, model=replace(config.model, num_classes=None))
    data = build_datasets(config, train, val, split=trained.split)
    _check_classes(data.classes, trained, f"the data set {config.data.train.get('_target_', '')}".rstrip())
    if data.classes != trained.classes[: len(data.classes)]:
        raise DataError(
            f"the data has its classes in another order than {trained.path}; give the data it was trained on"
        )
    if data.test is not None:
        return data.test, "the test set"
    if trained.split is not None and data.split != trained.split:
        raise DataError(
            f"other images would be held out for validation than in the training of {trained.path}, which has seen "
            "some of them; name a folder of other images: data.root=FOLDER"
        )
    return data.val, "the validation set"


def _check_classes(names: Sequence[str], trained: Trained, what: str) -> None:
    if unknown := [name for name in names if name not in trained.classes]:
        few, known = (shorten(", ".join(each), 200, placeholder=" ...") for each in (unknown, trained.classes))
        raise DataError(
            f"{what} has classes that the network does not know: {few}. It knows {known}. Rename or leave out the "
            "others, or name another folder of images: data.root=FOLDER"
        )


def write(found: Evaluated, folder: Path, model: Path) -> None:
    """Write evaluation.json.

    Raises:
        ConfigError: the folder cannot be written.
    """
    with refused_by_disk(ConfigError, f"cannot write the evaluation in {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / FILE, as_json({"model": str(model), **asdict(found)}, indent=2) + "\n")
