"""Data sets by configuration: handwritten digits, folders of images, any other map-style data set of (image, label)."""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import distribution
from textwrap import shorten
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset

from adaptive_trainer.config.schema import LARGEST, Config, DataConfig
from adaptive_trainer.data.cached.store import Stored
from adaptive_trainer.data.images.folders import check_root
from adaptive_trainer.data.images.transforms import build_transform
from adaptive_trainer.data.splitting import RANDOM, STRATIFIED, Split, held_out, known_labels
from adaptive_trainer.errors import ConfigError, DataError, UserError, explained
from adaptive_trainer.utils.progress import Progress

log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
NUMBERED = "number the classes from 0, and name them in an attribute `classes`"
SCAN_LIMIT = 4096  # samples whose labels are read one by one where there is no list of them


class MapDataset(Protocol):
    """Anything with a length that gives (image, label) for an index."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int, /) -> Any:
        """A PIL image or a tensor (C, H, W), and a whole number."""


@dataclass(frozen=True)
class DataSets:
    """Map-style data sets of (image, label) and what the trainer must know about them.

    Attributes:
        num_classes: width of the model's head; labels are 0 to num_classes - 1.
        classes: their names, in order.
        config: how images are transformed and what happens to broken ones.
        stored: the training and the validation set decoded, where `data.cache` keeps them.
        split: how the validation set was held out of the training set; None where it is a set of its own.
        test: a set that is evaluated once, at the end of training; None where there is none.
        notes: what was noticed or decided on the way, in words.
    """

    train: MapDataset
    val: MapDataset
    num_classes: int
    classes: tuple[str, ...]
    config: DataConfig
    stored: tuple[Stored, Stored] | None = None
    split: Split | None = None
    test: MapDataset | None = None
    notes: tuple[str, ...] = ()


@dataclass(eq=False)
class Digits(Dataset[tuple[Image.Image, int]]):
    """Grey PIL images made from an array (N, H, W) of bytes."""

    images: Array
    targets: list[int]
    classes = tuple("0123456789")

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """An image and its digit."""
        return Image.fromarray(self.images[index]), self.targets[index]


def digits() -> Digits:
    """1,797 images of handwritten digits, 8 x 8 pixels, that come with scikit-learn."""
    # Its file alone: scikit-learn and scipy take half a second to import.
    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    table = np.loadtxt(str(file), delimiter=",")  # a row: 64 shades from 0 to 16, and the digit
    images = table[:, :-1].reshape(-1, 8, 8)
    return Digits((images * (255 / 16)).astype(np.uint8), [int(label) for label in table[:, -1]])


def build_datasets(
    config: Config,
    train: Dataset[Any] | None = None,
    val: Dataset[Any] | None = None,
    *,
    split: Split | None = None,
) -> DataSets:
    """The data sets of the configuration, or the given ones, checked, and with a validation set in any case.

    Where there is none, `data.val_fraction` of every class of the training set is held out for it, chosen by the seed.

    Args:
        split: how an earlier run held it out, which is done again.

    Raises:
        ConfigError: the configuration does not name a data set, or contradicts it.
        DataError: the data is missing, empty, of one class, or its parts do not belong together.
    """
    data, test = config.data, None
    build_transform(data, data.image_size, training=True)  # what is wrong with its settings is found now
    if train is None:
        check_root(data)
        train = _instantiate(data.train, "train")
        val = val if val is not None or not data.val else _instantiate(data.val, "val")
        test = _instantiate(data.test, "test") if data.test else None
    training = _map_style(train, "training")
    names, labels = _class_names(training), known_labels(training)
    if labels is None and not names and not _counted(training) and config.model.num_classes is None:
        labels = _read_labels(training)
    if val is None:
        parts, split = _split(training, labels, data.val_fraction, split or Split(STRATIFIED, config.seed))
    else:
        validation = _map_style(val, "validation")
        parts, split = (_Part(training, labels), _Part(validation, known_labels(validation))), None
        names = _common_names(training, validation, "validation")  # else labels of the two mean different classes
    check_batch_size(config, len(parts[0].data))
    count = _class_count(training, names, labels, config.model.num_classes)
    ours, theirs = (_checked(part, name, count) for part, name in zip(parts, ("training", "validation"), strict=True))
    classes = (*names, *map(str, range(len(names), count)))  # a network may have more outputs than there are names
    known = classes if names else ()
    notes = [*_of_split(split, labels, training), *_of_classes(ours, theirs, known, count)]
    if test is not None:
        testing = _map_style(test, "test")
        _common_names(training, testing, "test")
        _checked(_Part(testing, known_labels(testing)), "test", count)
    return DataSets(ours.data, theirs.data, count, classes, data, split=split, test=test, notes=tuple(notes))


def check_batch_size(config: Config, samples: int) -> None:
    """Raise a ConfigError for a batch that is larger than the training set."""
    if config.trainer.batch_size != LARGEST and config.trainer.batch_size > samples:
        raise ConfigError(
            f"trainer.batch_size={config.trainer.batch_size} is above the {samples} samples of the training set; "
            "make it smaller"
        )


def described(data: DataSets) -> tuple[str, list[str]]:
    """Describe how much there is of what; what of it is not used, and what else was noticed."""
    source = "of a set of their own" if data.split is None else "held out of the training set"
    names = shorten(", ".join(data.classes), 200, placeholder="...")
    test = "" if data.test is None else f", and {len(data.test)} test images"
    counts = (
        f"{len(data.train)} training and {len(data.val)} validation images, {source}{test}; {data.num_classes} classes"
    )
    others = [part for part in (None if data.split else data.val, data.test) if part is not None]
    parts = [_base(part) for part in (data.train, *others)]
    return f"{counts}: {names}", [text for part in parts for text in getattr(part, "not_used", ())] + [*data.notes]


def _common_names(training: MapDataset, other: MapDataset, name: str) -> tuple[str, ...]:
    ours, theirs = _class_names(training), _class_names(other)
    if ours and theirs and ours != theirs:
        only = [sorted(set(a) - set(b)) for a, b in ((ours, theirs), (theirs, ours))]
        raise DataError(
            f"training and {name} set differ in their classes: only in training {only[0]}, only in {name} {only[1]}; "
            "both need the same, in the same order"
        )
    return ours


def _instantiate(node: dict[str, Any], name: str) -> Any:
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    if not node.get("_target_"):
        raise ConfigError(f"data.{name} has no _target_; choose data=digits, imagefolder, cifar10, ... or name a class")
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        original, text = error.__cause__, str(error).splitlines()[0]
    about, reason = f"data.{name}: {node['_target_']}", str(original)
    if original is None or (isinstance(original, ImportError) and "locating" in text):
        raise ConfigError(f"{about} cannot be used: {text}")
    if isinstance(original, UserError):
        raise type(original)(reason)  # a new one, which keeps nothing of Hydra's
    if isinstance(original, TypeError) and "argument" in reason:
        raise ConfigError(f"{about} was given other arguments than it takes: {reason}")
    if isinstance(original, OSError) or "not found or corrupted" in reason:
        raise DataError(f"{about} cannot get its data: {reason}")
    raise original  # of the user's own code


def _map_style(data: Any, name: str) -> MapDataset:
    is_other = isinstance(data, str | bytes | IterableDataset)  # which have these two, and not what is meant
    if is_other or not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise ConfigError(f"the {name} set is a {type(data).__name__}; one with a length and an index is needed")
    what, advice = f"the {name} set cannot say how long it is", "look at data.train and data.val"
    with explained(lambda error: ConfigError(f"{what} ({error}); {advice}"), (TypeError, ValueError)):
        count = len(data)
    if not count:
        raise DataError(f"the {name} set is empty")
    return data  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Part:
    """A training or validation set, and its labels (N,) where there is a list of them."""

    data: MapDataset
    labels: Array | None


def _split(data: Any, labels: Array | None, fraction: float, wanted: Split) -> tuple[tuple[_Part, _Part], Split]:
    if len(data) < 2:
        raise DataError("the training set has 1 sample, and a validation set is to be split from it; give more")
    chosen, split = held_out(len(data), fraction, wanted, labels)
    rest = np.setdiff1d(np.arange(len(data)), chosen, assume_unique=True).tolist()
    train, val = (_Part(Subset(data, part), None if labels is None else labels[part]) for part in (rest, chosen))
    return (train, val), split


def _of_split(split: Split | None, labels: Array | None, data: Any) -> list[str]:
    if split is None or split.kind != RANDOM:
        return []
    why = "as in the run that is resumed"
    if labels is None:
        why = f"since {type(_base(data)).__name__} has no list of its labels (`targets`)"
    elif len(np.unique(labels)) == len(labels):
        why = "since every class has one image only"
    return [f"validation images are held out at random, and not a share of every class, {why}"]


def _of_classes(train: _Part, val: _Part, names: tuple[str, ...], count: int) -> list[str]:
    """Name the classes without images to train on, or to validate on, as far as there are lists of labels."""
    if train.labels is None:
        return []
    notes, seen = [], np.bincount(train.labels, minlength=count)
    if len(absent := np.flatnonzero(seen == 0)):
        note = f"classes without training images: {_listed(absent, names)}; the network cannot learn them"
        if not names:
            note += (
                f". The labels are {_listed(np.flatnonzero(seen), names)}, and the network gets {count} outputs: leave "
                "out the samples of a label that means none, and number the others from 0 without gaps"
            )
        notes.append(note)
    if val.labels is None:
        return notes
    absent = np.flatnonzero((np.bincount(val.labels, minlength=count) == 0) & (seen > 0))
    if len(absent):
        few = absent[seen[absent] == 1]
        note = f"classes without validation images: {_listed(absent, names)}; they are trained on and not validated"
        notes.append(note + (f" ({len(few)} have a single image)" if len(few) else ""))
    return notes


def _listed(classes: Array, names: tuple[str, ...]) -> str:
    """The names of classes, or their numbers as ranges."""
    if names:
        return shorten(", ".join(names[number] for number in classes), 200, placeholder=" ...")
    runs = np.split(classes, np.flatnonzero(np.diff(classes) > 1) + 1)
    texts = [f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return shorten(", ".join(texts), 200, placeholder=" ...")


def _checked(part: _Part, name: str, count: int) -> _Part:
    """Refuse labels that are no classes; leave out a list of labels where the data set gives others."""
    if part.labels is None:
        return part
    wrong = np.flatnonzero((part.labels < 0) | (part.labels >= count))
    if not len(wrong):
        return part
    given = None
    with suppress(Exception):  # a broken sample, say, which is met again when it is its turn
        given = int(part.data[int(wrong[0])][1])
    if given != part.labels[wrong[0]]:  # the list is of something else
        return replace(part, labels=None)
    values, found = np.unique(part.labels[wrong], return_counts=True)
    each = ", ".join(f"{value} ({number} samples)" for value, number in zip(values[:5], found[:5], strict=True))
    raise DataError(
        f"the {name} set has labels that are no classes: {each}{', ...' if len(values) > 5 else ''}; allowed are 0 to "
        f"{count - 1} ({count} classes). Leave those samples out, correct the labels, or set model.num_classes"
    )


def _base(data: Any) -> Any:
    return _base(data.dataset) if isinstance(data, Subset) else data  # a part has no names of its own


def sample_name(data: Any, index: int) -> str:
    """The path of a sample where the data set lists them (`samples`), else its number."""
    if isinstance(data, Subset):
        return sample_name(data.dataset, data.indices[index])
    listed = getattr(data, "samples", None)
    if isinstance(listed, list) and index < len(listed) and isinstance(listed[index], tuple):
        return str(listed[index][0])
    return f"sample {index}"


def _class_names(data: Any) -> tuple[str, ...]:
    found = getattr(_base(data), "classes", None)
    return tuple(str(name) for name in found) if isinstance(found, list | tuple) else ()


def labels_of(data: Any) -> Array:
    """The label of every sample, (N,): from a list of them, or read one by one where the data set has none."""
    known = known_labels(data)
    return np.array([int(data[index][1]) for index in range(len(data))]) if known is None else known


def _class_count(data: Any, names: tuple[str, ...], labels: Array | None, asked: int | None) -> int:
    """The number of classes: of their names, as the data set says, by its labels, or as asked for."""
    if (listed := known_labels(_base(data))) is not None:
        labels = listed  # those of the whole, of which this is a part
    found = len(names) or _counted(data) or (asked or 0 if labels is None else int(labels.max()) + 1)
    if asked is not None and asked < found:
        raise ConfigError(f"model.num_classes={asked} and the data has {found} classes; use null or {found}")
    if found < 2:
        raise DataError("the data has one class only; two or more are needed")
    return asked or found


def _counted(data: Any) -> int:
    known = getattr(_base(data), "num_classes", None)
    return known if isinstance(known, int) else 0


def _read_labels(data: Any) -> Array:
    kind, count = type(_base(data)).__name__, len(data)
    if count > SCAN_LIMIT:
        raise ConfigError(f"{kind} has no `classes` or `targets`; give model.num_classes")
    what = f"all {count} samples are read once to count the classes; model.num_classes=N spares that"
    log.info("%s has neither `classes` nor `targets`: %s", kind, what)
    labels = np.zeros(count, dtype=np.int64)
    with Progress("counting classes:", count) as progress:
        for index in range(count):
            with explained(partial(_unusable, data, index), (OSError, TypeError)):
                labels[index] = labelled(data[index])[1]
            progress.advance(1)
    return labels


def _unusable(data: Any, index: int, error: Exception) -> DataError:
    problem = f"cannot be used: {error}"
    if isinstance(error, OSError):
        problem = f"cannot be read ({error}); repair it, or give model.num_classes"
    return DataError(f"{sample_name(data, index)} {problem}")


def labelled(sample: Any) -> tuple[Any, int]:
    """The image and the label of a sample; a TypeError says in words that it is something else."""
    if isinstance(sample, Mapping):
        keys = ", ".join(map(str, sample))
        raise TypeError(
            f"it is a {type(sample).__name__} of {keys}; wrap the data set in one that gives (image, label)"
        )
    is_list = isinstance(sample, tuple | list)
    if not is_list or len(sample) != 2:
        much = f" of {len(sample)}" if is_list else ""
        raise TypeError(f"it is a {type(sample).__name__}{much}, and not a pair (image, label)")
    image, label = sample
    if isinstance(label, str):
        raise TypeError(f"its label is the text {label!r}; {NUMBERED}")
    return image, operator.index(label)  # whole numbers of NumPy and torch too
