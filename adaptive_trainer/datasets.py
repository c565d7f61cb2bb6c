"""Data sets by configuration: handwritten digits, folders of images, any other map-style data set of (image, label)."""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import shorten
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from adaptive_trainer.config import LARGEST, Config, DataConfig
from adaptive_trainer.errors import ConfigError, DataError, UserError
from adaptive_trainer.folders import check_root
from adaptive_trainer.image_files import image_folder
from adaptive_trainer.position import key_seed
from adaptive_trainer.store import Stored
from adaptive_trainer.transforms import build_transform

__all__ = ["DataSets", "MapDataset", "build_datasets", "described", "digits", "image_folder", "sample_name"]

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
        is_held_out: whether the validation set was taken from the training set here.
    """

    train: MapDataset
    val: MapDataset
    num_classes: int
    classes: tuple[str, ...]
    config: DataConfig
    stored: tuple[Stored, Stored] | None = None
    is_held_out: bool = False


class Digits(Dataset[tuple[Image.Image, int]]):
    """Grey PIL images made from an array (N, H, W) of bytes."""

    classes = tuple("0123456789")

    def __init__(self, images: np.ndarray[Any, Any], targets: list[int]) -> None:
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """An image and its digit."""
        return Image.fromarray(self.images[index]), self.targets[index]


def digits() -> Digits:
    """1,797 images of handwritten digits, 8 x 8 pixels, that come with scikit-learn."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return Digits((data.images * (255 / 16)).astype(np.uint8), [int(label) for label in data.target])


def build_datasets(config: Config, train: Dataset[Any] | None = None, val: Dataset[Any] | None = None) -> DataSets:
    """The data sets of the configuration, or the given ones, checked, and with a validation set in any case.

    Where there is none, `data.val_fraction` of the training set is taken for it, chosen by the seed.

    Raises:
        ConfigError: the configuration does not name a data set, or contradicts it.
        DataError: the data is missing, empty, of one class, or its parts do not belong together.
    """
    data = config.data
    build_transform(data, data.image_size, training=True)  # what is wrong with its settings is found now
    if train is None:
        check_root(data)
        train = _instantiate(data.train, "train")
        val = val if val is not None or not data.val else _instantiate(data.val, "val")
    training = _map_style(train, "training")
    if val is None:
        training, validation = _split(training, data.val_fraction, config.seed)
    else:
        validation = _map_style(val, "validation")
    check_batch_size(config, len(training))
    names = _common_names(training, validation)
    count = _class_count(training, names, config.model.num_classes)
    classes = names or tuple(str(n) for n in range(count))
    return DataSets(training, validation, count, classes, data, is_held_out=val is None)


def check_batch_size(config: Config, samples: int) -> None:
    """Refuse a batch that is larger than the training set.

    Raises:
        ConfigError: it is.
    """
    if config.trainer.batch_size != LARGEST and config.trainer.batch_size > samples:
        raise ConfigError(
            f"trainer.batch_size={config.trainer.batch_size} is above the {samples} samples of the training set; make "
            "it smaller"
        )


def described(data: DataSets) -> tuple[str, list[str]]:
    """How much there is of what, and what of it is not used, in words."""
    source = "held out of the training set" if data.is_held_out else "of a set of their own"
    names = shorten(", ".join(data.classes), 200, placeholder="...")
    counts = f"{len(data.train)} training and {len(data.val)} validation images, {source}; {data.num_classes} classes"
    parts = [_source(part, 0)[0] for part in (data.train, *(() if data.is_held_out else (data.val,)))]
    return f"{counts}: {names}", [text for part in parts for text in getattr(part, "not_used", ())]


def _common_names(training: MapDataset, validation: MapDataset) -> tuple[str, ...]:
    ours, theirs = _class_names(training), _class_names(validation)
    if ours and theirs and ours != theirs:
        only = [sorted(set(a) - set(b)) for a, b in ((ours, theirs), (theirs, ours))]
        raise DataError(
            f"training and validation set differ in their classes: only in training {only[0]}, only in validation "
            f"{only[1]}; both need the same, in the same order"
        )
    return ours


def _instantiate(node: dict[str, Any], name: str) -> Dataset[Any] | None:
    """What the `_target_` makes. Errors about data become a DataError, those of the user's own code pass unchanged."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    if not node.get("_target_"):
        raise ConfigError(f"data.{name} has no _target_; choose data=digits, imagefolder, cifar10, ... or name a class")
    original: BaseException | None = None
    try:
        result: Dataset[Any] | None = instantiate(node, _convert_="all")
        return result
    except InstantiationException as error:
        original, text = error.__cause__, str(error).splitlines()[0]
    about = f"data.{name}: {node['_target_']}"
    if original is None or (isinstance(original, ImportError) and "locating" in text):
        raise ConfigError(f"{about} cannot be used: {text}")
    reason = str(original)
    if isinstance(original, UserError):
        raise type(original)(reason)
    if isinstance(original, TypeError) and "argument" in reason:
        raise ConfigError(f"{about} was given other arguments than it takes: {reason}")
    if isinstance(original, OSError) or "not found or corrupted" in reason:
        raise DataError(f"{about} cannot get its data: {reason}")
    raise original


def _map_style(data: Any, name: str) -> MapDataset:
    is_other = isinstance(data, str | bytes | IterableDataset)  # which have these two, and not what is meant
    if is_other or not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise ConfigError(f"the {name} set is a {type(data).__name__}; one with a length and an index is needed")
    problem = ""
    try:
        count = len(data)
    except (TypeError, ValueError) as error:
        problem = str(error)
    if problem:
        raise ConfigError(f"the {name} set cannot say how long it is ({problem}); look at data.train and data.val")
    if not count:
        raise DataError(f"the {name} set is empty")
    checked: MapDataset = data
    return checked


def _split(data: Any, fraction: float, seed: int) -> tuple[MapDataset, MapDataset]:
    total = len(data)
    if total < 2:
        raise DataError("the training set has 1 sample, and a validation set is to be split from it; give more")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(key_seed(seed))).tolist()
    held_out = min(max(1, round(total * fraction)), total - 1)
    return Subset(data, sorted(order[held_out:])), Subset(data, sorted(order[:held_out]))


def _source(data: Any, index: int) -> tuple[Any, int]:
    """The data set below all subsets, and the index there."""
    while isinstance(data, Subset):
        data, index = data.dataset, data.indices[index]
    return data, index


def sample_name(data: Any, index: int) -> str:
    """The path of a sample where the data set has a list of them (`samples`), else its number."""
    base, number = _source(data, index)
    listed = getattr(base, "samples", None)
    if isinstance(listed, list) and number < len(listed) and isinstance(listed[number], tuple):
        return str(listed[number][0])
    return f"sample {number}"


def _class_names(data: Any) -> tuple[str, ...]:
    """The names of the classes where the data set has a list of them, else none."""
    base, _ = _source(data, 0)
    found = getattr(base, "classes", None)
    return tuple(str(name) for name in found) if isinstance(found, list | tuple) else ()


def _class_count(data: Any, names: tuple[str, ...], asked: int | None) -> int:
    """The number of classes, by names, a list of labels, or reading them.

    Raises:
        ConfigError: `model.num_classes` is smaller, or has to be given because labels cannot be read quickly.
        DataError: there is only one class.
    """
    found = len(names) or _largest_label(data, asked) + 1
    if asked is not None and asked < found:
        raise ConfigError(f"model.num_classes={asked} and the data has {found} classes; use null or {found}")
    if found < 2:
        raise DataError("the data has one class only; two or more are needed")
    return asked or found


def _largest_label(data: Any, asked: int | None) -> int:
    base, _ = _source(data, 0)
    known = getattr(base, "num_classes", None)
    if isinstance(known, int):
        return known - 1
    for name in ("targets", "labels"):
        if (listed := getattr(base, name, None)) is not None:
            return int(np.asarray(listed).max())
    if isinstance(base, TensorDataset):
        return int(base.tensors[-1].max())
    if asked is not None:
        return asked - 1
    if len(data) > SCAN_LIMIT:
        raise ConfigError(f"{type(base).__name__} has no `classes` or `targets`; give model.num_classes")
    return max(int(data[index][1]) for index in range(len(data)))
