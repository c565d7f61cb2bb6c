"""Loaders that start at any position and give the same samples whatever the workers and the batch sizes.

A sample's augmentation is seeded by its key (seed, epoch, index) alone, also where it draws from generators that the
data set or a transform owns, and loading in the main process leaves all random numbers as they were. A sample that
cannot be read ends the run with its name, or is left out and named in its batch (`data.on_error`).
"""

from __future__ import annotations

import errno
import functools
import random
import re
import signal
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from adaptive_trainer import oom
from adaptive_trainer.config.schema import DataConfig
from adaptive_trainer.data.datasets import (
    DataSets,
    MapDataset,
    labelled,
    sample_name,
)
from adaptive_trainer.data.position import Key, Position, key_seed, updates_per_epoch
from adaptive_trainer.data.transforms import TOO_LARGE, Transform, build_transform, to_rgb, wrong_range
from adaptive_trainer.errors import DataError
from adaptive_trainer.utils.belongings import Belongings
from adaptive_trainer.utils.random import put_all, states_of
from adaptive_trainer.utils.random import seed as seed_generator

BROKEN = (OSError, SyntaxError, EOFError, struct.error, *TOO_LARGE)  # what PIL raises for a bad file
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


class Loader:
    """Batches of training and of evaluation, by the same workers in one pass after another, until it is closed.

    They start with the first pass. A pass ends the one before it, wherever that has come to.
    """

    def __init__(self, data: DataSets, *, batch_size: int, image_size: int, num_workers: int, pin_memory: bool) -> None:
        self._sizes = len(data.train), len(data.val)
        self._batch_size = batch_size
        self._keys = _Keys()
        self._running: Iterator[Batch] | None = None
        train, val = (
            _View(part, build_transform(data.config, image_size, training=training), data.num_classes, data.config)
            for part, training in ((data.train, True), (data.val, False))
        )
        most = max(updates_per_epoch(size, batch_size) for size in self._sizes)  # more would have nothing to do
        self._loader = _loader(_Both(train, val), self._keys, min(num_workers, most), pin_memory)

    def train(self, position: Position) -> Iterator[Batch]:
        """The rest of the epoch from `position` on, one batch an update, augmented."""
        return self._start(position.batches(self._batch_size))

    def evaluate(self, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """The validation set in order, from sample `start` on, not augmented."""
        return self._start(_in_order(start, self._sizes[1], batch_size))

    def _start(self, batches: Iterable[list[Key]]) -> Iterator[Batch]:
        self._keys.batches = batches
        self._running = iter(self._loader)  # with workers it is the same object each time
        return self._running

    def close(self) -> None:
        """End the workers."""
        end_workers(self._running)


def end_workers(running: Iterator[Batch] | None) -> None:
    """Now, and not when the last reference to a loader's iterator goes: the frames of an error keep it alive."""
    shut_down = getattr(running, "_shutdown_workers", None)
    if shut_down is not None:
        shut_down()


def _in_order(start: int, stop: int, batch_size: int) -> list[list[Key]]:
    keys = [(0, EVALUATION, index) for index in range(start, stop)]
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
    batches = _in_order(start, len(data), batch_size)
    view = _View(data, transform, num_classes, config)
    return _loader(view, _Keys(batches), min(num_workers, len(batches)), False, collate)


@dataclass
class _Keys:
    """The keys of each batch of the next pass: what a DataLoader, whose sampler cannot be changed, iterates anew."""

    batches: Iterable[list[Key]] = field(default_factory=list)

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.batches)


@dataclass(frozen=True)
class _View(Dataset[Any]):
    """What a loader sees: key -> (image, label), or the name of a broken sample to be left out."""

    data: Any
    transform: Transform
    num_classes: int
    config: DataConfig

    def __getitem__(self, key: Key) -> tuple[Tensor, int] | str:
        sample = self._draw(key)
        if not self._belongings.keep():  # it has made generators meanwhile: once more, with those seeded as well
            sample = self._draw(key)
        return sample

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_belongings"}  # a copy has its own

    @functools.cached_property
    def _belongings(self) -> Belongings:
        """The generators that data set and transform own, in this process."""
        found = Belongings({"data": self.data, "transform": self.transform}, into_data=True)
        found.keep()
        return found

    def _draw(self, key: Key) -> tuple[Tensor, int] | str:
        index = key[2]
        problem, advice = "", "repair or remove it"
        seeded = _seeded(key_seed(*key), self._belongings.generators.values())
        with seeded, _pixels_allowed(self.config.max_pixels):
            try:
                image, label = self._pair(self.data[index], index)
            except BROKEN as error:
                if getattr(error, "errno", None) in NOT_THE_FILE or oom.describe(error).is_of_loading:
                    raise
                problem = f"{type(error).__name__}: {error}"
                if isinstance(error, TOO_LARGE):
                    advice = f"make it smaller, allow it with data.max_pixels={_pixels(problem)}"
            if not problem:
                check_label(self.data, index, label, self.num_classes)
                return self.transform(image), label
        name = sample_name(self.data, index)
        if self.config.on_error == "skip":
            return name
        raise SampleError(f"{name} cannot be read ({problem}); {advice}, or use data.on_error=skip")

    def _pair(self, sample: Any, index: int) -> tuple[Image.Image | Tensor, int]:
        problem = ""
        try:
            image, label = labelled(sample)
            pair = to_rgb(image), label
            problem = wrong_range(image, self.config)
            if not problem:
                return pair
        except (TypeError, ValueError) as error:
            problem = f"is not a pair of an image and a whole number as its label: {error}"
        raise SampleError(f"{sample_name(self.data, index)} {problem}")


@dataclass(frozen=True)
class _Both(Dataset[Any]):
    """Training and validation set; the key tells which is meant."""

    train: _View
    val: _View

    def __getitem__(self, key: Key) -> tuple[Tensor, int] | str:
        return (self.val if key[1] == EVALUATION else self.train)[key]


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
def _seeded(seed: int, own: Iterable[Any] = ()) -> Iterator[None]:
    """Seed torch's, Python's and numpy's random numbers, and own generators, for the block; put back what they were.

    So a sample's draws depend on nothing but its key, whichever process asks for it and whatever was asked before.

    Data sets that call `torch.manual_seed` would seed the GPUs as well, so theirs are put back too.
    """
    generator = torch.default_generator
    python, numpy, cpu = random.getstate(), np.random.get_state(), generator.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    of_own = states_of(own)
    try:
        for number, (each, _) in enumerate(of_own, start=1):
            seed_generator(each, (seed + number) % 2**63)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        generator.manual_seed(seed)
        yield
    finally:
        put_all(of_own)
        random.setstate(python)
        np.random.set_state(numpy)
        generator.set_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def _pixels_allowed(most: int | None) -> Iterator[None]:
    """Pillow raises for images of more pixels than these, and is silent about the others; None: it does as it likes."""
    if most is None:
        yield
        return
    before = Image.MAX_IMAGE_PIXELS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # which it raises from twice the limit on
            Image.MAX_IMAGE_PIXELS = most
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _pixels(problem: str) -> str:
    """The number of pixels that Pillow names."""
    found = re.search(r"\d+", problem)
    return found[0] if found else "NUMBER"


class _DataLoader(DataLoader[Any]):
    """More workers than cores are the user's choice, and no reason for a warning."""

    def check_worker_number_rationality(self) -> None:
        pass

    def _get_iterator(self) -> Any:
        return _Workers(self) if self.num_workers else super()._get_iterator()


class _Workers(_MultiProcessingDataLoaderIter):
    """Leaves no process behind where one of them, or a thread beside them, could not be started."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        try:
            super().__init__(loader)
        except BaseException:
            self._shutdown_workers()
            raise

    def _shutdown_workers(self) -> None:
        if hasattr(self, "_workers_status"):  # the last that is made
            super()._shutdown_workers()
            return
        for worker in getattr(self, "_workers", ()):
            worker.kill()  # torch would ask it to end, which it puts off
            worker.join()


def fewer_workers(num_workers: int) -> int:
    """Data workers after one has failed."""
    return FEWER_WORKERS.get(num_workers, 4 if num_workers > 4 else 0)


def _loader(
    view: _View | _Both,
    keys: _Keys,
    num_workers: int,
    pin_memory: bool,
    collate: Callable[[list[Any]], Any] | None = None,
) -> DataLoader[Any]:
    return _DataLoader(
        view,
        batch_sampler=keys,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
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
