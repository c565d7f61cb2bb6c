"""One sample by its key (seed, epoch, index): read, checked and transformed, the same in whatever process and order.

A sample that cannot be read ends the run with its name, or is left out and named in its batch (`data.on_error`).
"""

from __future__ import annotations

import errno
import functools
import random
import re
import struct
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from adaptive_trainer import oom
from adaptive_trainer.config.schema import DataConfig
from adaptive_trainer.data.datasets import MapDataset, labelled, sample_name
from adaptive_trainer.data.images.transforms import TOO_LARGE, Transform, to_rgb, wrong_range
from adaptive_trainer.data.position import Key, key_seed
from adaptive_trainer.errors import DataError, explained
from adaptive_trainer.utils.belongings import Belongings
from adaptive_trainer.utils.random import put_all, seed, states_of

BROKEN = (OSError, SyntaxError, EOFError, struct.error, *TOO_LARGE)  # what PIL raises for a bad file
NOT_THE_FILE = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)
EVALUATION = -1  # stands for the epoch in the key of an evaluation sample


class SampleError(DataError):
    """A sample cannot be used."""

    def __init__(self, message: str) -> None:
        # A data worker wraps its traceback around the message.
        super().__init__(message.rpartition("SampleError: ")[2].strip())


@dataclass(frozen=True)
class Samples(Dataset[Any]):
    """What a loader sees: key -> (image, label), or the name of a broken sample to be left out."""

    data: Any
    transform: Transform
    num_classes: int
    config: DataConfig

    def __getitem__(self, key: Key) -> tuple[Tensor, int] | str:
        """Draw it."""
        # It is seeded by its key alone, also where it draws from generators that the data set or a transform owns.
        sample = self._draw(key)
        if not self._belongings.keep():  # it has made generators meanwhile: once more, with those seeded as well
            sample = self._draw(key)
        return sample

    def __getstate__(self) -> dict[str, Any]:
        """All but the generators: a copy has its own."""
        return {key: value for key, value in vars(self).items() if key != "_belongings"}

    @functools.cached_property
    def _belongings(self) -> Belongings:
        """The generators that data set and transform own, in this process."""
        found = Belongings({"data": self.data, "transform": self.transform}, into_data=True)
        found.keep()
        return found

    def _draw(self, key: Key) -> tuple[Tensor, int] | str:
        seeded = _seeded(key_seed(*key), self._belongings.generators.values())
        with seeded, _pixels_allowed(self.config.max_pixels):
            sample = self._read(key[2])
            if isinstance(sample, str):
                return sample
            image, label = sample
            check_label(self.data, key[2], label, self.num_classes)
            return self.transform(image), label

    def _read(self, index: int) -> tuple[Image.Image | Tensor, int] | str:
        advice = "repair or remove it"
        try:
            return self._pair(index)
        except BROKEN as error:
            if getattr(error, "errno", None) in NOT_THE_FILE or oom.describe(error).is_of_loading:
                raise
            problem = f"{type(error).__name__}: {error}"
            if isinstance(error, TOO_LARGE):  # Pillow's text names the number of pixels
                pixels = re.search(r"\d+", problem)
                advice = f"make it smaller, allow it with data.max_pixels={pixels[0] if pixels else 'NUMBER'}"
        name = sample_name(self.data, index)
        if self.config.on_error == "skip":
            return name
        raise SampleError(f"{name} cannot be read ({problem}); {advice}, or use data.on_error=skip")

    def _pair(self, index: int) -> tuple[Image.Image | Tensor, int]:
        sample, what = self.data[index], "is not a pair of an image and a whole number as its label"
        name = partial(sample_name, self.data, index)
        with explained(lambda error: SampleError(f"{name()} {what}: {error}"), (TypeError, ValueError)):
            image, label = labelled(sample)
            pair = to_rgb(image), label
        if problem := wrong_range(image, self.config):
            raise SampleError(f"{name()} {problem}")
        return pair


@dataclass(frozen=True)
class Both(Dataset[Any]):
    """Training and validation set; the key tells which is meant."""

    train: Samples
    val: Samples

    def __getitem__(self, key: Key) -> tuple[Tensor, int] | str:
        """A sample, as `Samples` gives it."""
        return (self.val if key[1] == EVALUATION else self.train)[key]


def check_label(data: MapDataset, index: int, label: int, num_classes: int) -> None:
    """Raise a SampleError for a label that is no class."""
    if not 0 <= label < num_classes:
        raise SampleError(
            f"{sample_name(data, index)} has label {label}; allowed are 0 to {num_classes - 1} "
            f"({num_classes} classes): correct the label or set model.num_classes"
        )


@contextmanager
def _seeded(number: int, own: Iterable[Any]) -> Iterator[None]:
    """Seed torch's, Python's and numpy's random numbers, and own generators; put back what they were."""
    # In the main process they are the run's own.
    own = list(own)
    # Data sets that call `torch.manual_seed` would seed the GPUs as well, so theirs are put back too.
    cuda = torch.cuda.default_generators if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    of_process = random.random.__self__, np.random.rand.__self__, torch.default_generator  # type: ignore[attr-defined]
    before = states_of([*of_process, *cuda, *own])
    try:
        for place, generator in enumerate(own, start=1):
            seed(generator, (number + place) % 2**63)
        random.seed(number)
        np.random.seed(number % 2**32)
        torch.default_generator.manual_seed(number)
        yield
    finally:
        put_all(before)


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
