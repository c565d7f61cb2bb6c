"""Loaders that start at any position and give the same samples whatever the workers and the batch sizes.

A sample's augmentation is seeded by (seed, epoch, index) alone, and loading in the main process leaves its random
numbers as they were. A sample that cannot be read ends the run with its name, or is left out and named in its batch
(`data.on_error`).
"""

from __future__ import annotations

import errno
import operator
import random
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from adaptive_trainer.config import DataConfig
from adaptive_trainer.datasets import DataSets, MapDataset, build_datasets, digits, image_folder, sample_name
from adaptive_trainer.errors import DataError
from adaptive_trainer.position import Key, Position, key_seed, updates_per_epoch
from adaptive_trainer.transforms import Transform, build_transform, to_rgb

__all__ = [
    "Batch",
    "DataSets",
    "SampleError",
    "build_datasets",
    "check_label",
    "digits",
    "eval_loader",
    "fewer_workers",
    "image_folder",
    "plain_loader",
    "train_loader",
]

BROKEN = (OSError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)  # what PIL raises for a bad file
NOT_THE_FILE = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)
SECONDS_AFTER_SIGTERM = 30
FEWER_WORKERS = {4: 2, 2: 0, 1: 0}
EVALUATION = -1  # stands for the epoch in the key of an evaluation sample


class SampleError(DataError):
    """A sample cannot be used. The traceback that a data worker wraps around the message is cut away."""

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition("SampleError: ")[2].strip())


class Batch(NamedTuple):
    """The samples of one update.

    Attributes:
        images: float, (N, 3, size, size).
        labels: int64, (N,).
        samples: how many of the data set it stands for: N and those left out.
        skipped: names of those left out.
    """

    images: Tensor
    labels: Tensor
    samples: int
    skipped: list[str]


def train_loader(
    data: DataSets, position: Position, *, batch_size: int, image_size: int, num_workers: int, pin_memory: bool
) -> DataLoader[Batch]:
    """The rest of the epoch from `position` on, one batch an update, augmented."""
    transform = build_transform(data.config, image_size, training=True)
    view = _View(data.train, transform, position.seed, data.num_classes, data.config.on_error == "skip")
    return _loader(view, _Updates(position, batch_size), num_workers, pin_memory)


def eval_loader(
    data: DataSets, *, batch_size: int, image_size: int, num_workers: int, pin_memory: bool, start: int = 0
) -> DataLoader[Batch]:
    """The validation set in order, from sample `start` on, not augmented."""
    transform = build_transform(data.config, image_size, training=False)
    view = _View(data.val, transform, 0, data.num_classes, data.config.on_error == "skip")
    return _loader(view, _in_order(start, len(view), batch_size), num_workers, pin_memory)


def _in_order(start: int, stop: int, batch_size: int) -> list[list[Key]]:
    keys = [(EVALUATION, index) for index in range(start, stop)]
    return [keys[first : first + batch_size] for first in range(0, len(keys), batch_size)]


def plain_loader(
    data: MapDataset,
    transform: Transform,
    config: DataConfig,
    num_classes: int,
    *,
    collate: Callable[[list[Any]], Any],
    batch_size: int,
    num_workers: int,
    start: int = 0,
) -> DataLoader[Any]:
    """The samples from `start` on, in order, through a transform and a collate function of the caller's.

    The collate function is given (transformed image, label), or the name of a broken sample to be left out.
    """
    view = _View(data, transform, 0, num_classes, config.on_error == "skip")
    return _loader(view, _in_order(start, len(view), batch_size), num_workers, False, collate)


@dataclass(frozen=True)
class _Updates:
    """The keys of each update; a new pass gives the same again."""

    position: Position
    batch_size: int

    def __iter__(self) -> Iterator[list[Key]]:
        return self.position.batches(self.batch_size)

    def __len__(self) -> int:
        return updates_per_epoch(self.position.size - self.position.cursor, self.batch_size)


@dataclass(frozen=True)
class _View(Dataset[Any]):
    """What the loader sees: key (epoch, index) -> (image, label), or the name of a broken sample to be left out."""

    data: Any
    transform: Transform
    seed: int
    num_classes: int
    skip_broken: bool

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: Key) -> tuple[Tensor, int] | str:
        epoch, index = key
        problem = ""
        with _seeded(key_seed(self.seed, epoch, index)):
            try:
                sample = self.data[index]
            except BROKEN as error:
                if getattr(error, "errno", None) in NOT_THE_FILE:
                    raise
                problem = f"{type(error).__name__}: {error}"
            if not problem:
                return self._prepared(sample, index)
        name = sample_name(self.data, index)
        if self.skip_broken:
            return name
        raise SampleError(f"{name} cannot be read ({problem}); repair or remove it, or use data.on_error=skip")

    def _prepared(self, sample: Any, index: int) -> tuple[Tensor, int]:
        problem = ""
        try:
            image, label = sample if isinstance(sample, tuple | list) else (sample, None)
            image, number = to_rgb(image), operator.index(label)
        except (TypeError, ValueError) as error:
            problem = str(error)
        if problem:
            raise SampleError(
                f"{sample_name(self.data, index)} is not a pair of an image and a whole number as its label: {problem}"
            )
        check_label(self.data, index, number, self.num_classes)
        return self.transform(image), number


def check_label(data: MapDataset, index: int, label: int, num_classes: int) -> None:
    """Refuse a label that is no class.

    Raises:
        SampleError: it is not.
    """
    if not 0 <= label < num_classes:
        raise SampleError(
            f"{sample_name(data, index)} has label {label}; allowed are 0 to {num_classes - 1} "
            f"({num_classes} classes): correct the label or set model.num_classes"
        )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's, Python's and numpy's random numbers for the block, and put back what they were.

    Data sets that call `torch.manual_seed` would seed the GPUs as well, so theirs are put back too.
    """
    generator = torch.default_generator
    python, numpy, cpu = random.getstate(), np.random.get_state(), generator.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    random.seed(seed)
    np.random.seed(seed % 2**32)
    generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        generator.set_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


class _Loader(DataLoader[Any]):
    """More workers than cores are the user's choice, and no reason for a warning every epoch."""

    def check_worker_number_rationality(self) -> None:
        pass


def fewer_workers(num_workers: int) -> int:
    """Data workers after one has failed."""
    return FEWER_WORKERS.get(num_workers, 4 if num_workers > 4 else 0)


def _loader(
    view: _View,
    batches: _Updates | list[list[Key]],
    num_workers: int,
    pin_memory: bool,
    collate: Callable[[list[Any]], Any] | None = None,
) -> DataLoader[Any]:
    return _Loader(
        view,
        batch_sampler=batches,
        num_workers=min(num_workers, len(batches)),  # more would have nothing to do
        collate_fn=collate or _collate,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        generator=torch.Generator().manual_seed(0),  # else a loader draws its workers' seeds from the run's own numbers
    )


def _collate(samples: list[tuple[Tensor, int] | str]) -> Batch:
    pairs = [sample for sample in samples if not isinstance(sample, str)]
    images = torch.stack([image for image, _ in pairs]) if pairs else torch.empty(0, 3, 1, 1)
    labels = torch.tensor([label for _, label in pairs], dtype=torch.int64)
    return Batch(images, labels, len(samples), [sample for sample in samples if isinstance(sample, str)])


def _start_worker(_: int) -> None:
    """Ctrl-C, and a scheduler's SIGTERM, reach every process of the group; only the main one answers them.

    A second SIGTERM ends the worker at once, and the first after a while: it may be the way to get rid of one that
    hangs, and whoever sends it may wait for the end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _ignore_once)


def _ignore_once(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    if hasattr(signal, "alarm"):
        signal.alarm(SECONDS_AFTER_SIGTERM)
