"""`data.cache`: decode and resize every image once, keep the bytes in memory or on disk, and know when they are stale.

Where there is no room for them, training goes on without, and the reason is recorded.
"""

from __future__ import annotations

import hashlib
import shutil
import time
import zlib
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
import torchvision
from torch import Tensor
from torch.utils.data import Subset

from adaptive_trainer import oom
from adaptive_trainer.data.cached.fingerprint import fingerprint, refuse_own_transforms
from adaptive_trainer.data.cached.store import (
    Decoded,
    Stored,
    available_memory,
    open_decoded,
    removed_leftovers,
    written,
)
from adaptive_trainer.data.datasets import DataSets
from adaptive_trainer.data.loader import LOADING, SampleLoader, fewer_workers, in_order, resumed
from adaptive_trainer.data.samples import NOT_THE_FILE, Samples, check_label
from adaptive_trainer.data.splitting import source
from adaptive_trainer.errors import AdaptiveTrainerError, ConfigError, DataError, explained
from adaptive_trainer.memory.usage import format_bytes
from adaptive_trainer.utils.files import alone, default_folder
from adaptive_trainer.utils.progress import Progress

Array = np.ndarray[Any, Any]
FORMAT = 2  # of the stored images: counted up when what is stored for the same files changes
LIBRARIES = (torch.__version__, torchvision.__version__, PIL.__version__)  # they decode and resize
SHARE = 0.8  # of what is free, that a cache may take
BATCH = 16  # images that a worker hands over at a time
LITTLE_MEMORY = "the host has too little memory ({})"


class _NoRoom(AdaptiveTrainerError):
    """The cache is not built; says why."""


def with_cache(
    data: DataSets, size: int, *, event: Callable[[str], None], poll: Callable[[], None] = lambda: None
) -> DataSets:
    """Store the images of the data sets at `size` x `size` pixels, as `data.cache` asks, where there is room.

    Args:
        event: records what was decided, and why.
        poll: is called between batches, and may raise to end the work.

    Raises:
        ConfigError: the data set cannot be cached in this way.
        DataError: a sample cannot be used (`SampleError`), or no sample of the data can be read.
    """
    try:
        stored = oom.attempt(_Builder(data, size, event, poll).stored, kinds=LOADING)
        if not isinstance(stored, oom.Failure):
            return replace(data, stored=stored)
        problem = LITTLE_MEMORY.format(stored.text)
    except _NoRoom as error:
        problem = str(error)
    event(f"data.cache={data.config.cache} is not used: {problem}; images are decoded anew in every epoch")
    return data


class _Part(NamedTuple):
    """Some images, and the other arrays of `Decoded` for them."""

    images: Tensor
    rows: dict[str, Array]
    samples: int


@dataclass(frozen=True)
class _Base:
    """The samples of one data set, below all subsets, that are used."""

    data: Any
    used: Array


@dataclass(frozen=True)
class _Builder:
    """Finds or makes the stored images of the training and the validation set."""

    sets: DataSets
    size: int
    event: Callable[[str], None]
    poll: Callable[[], None]

    def stored(self) -> tuple[Stored, Stored]:
        """Those of both sets. Parts of one data set share what is stored."""
        parts = self.sets.train, self.sets.val
        sources = [source(part) for part in parts]
        bases: dict[int, _Base] = {}
        for data, index in sources:
            known = [bases[id(data)].used] if id(data) in bases else []  # both parts may be of one data set
            bases[id(data)] = _Base(data, np.unique(np.concatenate([*known, index])))
        for base in bases.values():
            refuse_own_transforms(base.data, self.sets.config.cache)
        make = self._in_memory if self.sets.config.cache == "ram" else self._on_disk
        decoded = dict(zip(bases, make(list(bases.values())), strict=True))
        train, val = (
            Stored(decoded[id(data)], np.searchsorted(bases[id(data)].used, index)) for data, index in sources
        )
        self._check_labels(self.sets.train, train)
        self._check_labels(self.sets.val, val)
        return train, val

    def _nbytes(self, base: _Base) -> int:
        return len(base.used) * 3 * self.size * self.size

    def _in_memory(self, bases: list[_Base]) -> list[Decoded]:
        _check_room(sum(map(self._nbytes, bases)), available_memory(), "of free memory")
        found = []
        for base in bases:
            images = np.empty((len(base.used), 3, self.size, self.size), np.uint8)
            found.append(Decoded(images, **self._decode(base, partial(_fill, images))))
        return found

    def _on_disk(self, bases: list[_Base]) -> list[Decoded]:
        top = default_folder()
        if top is None:
            raise ConfigError(
                "data.cache=disk has no folder: ADAPTIVE_TRAINER_CACHE is empty; give it one, or use data.cache=ram"
            )
        return [self._file(base, top / "images" / self._key(base)) for base in bases]

    def _file(self, base: _Base, folder: Path) -> Decoded:
        """The images in `folder`, which one process makes while others wait."""

        def refused(error: Exception) -> _NoRoom | None:
            if getattr(error, "errno", None) in NOT_THE_FILE:
                return None
            own = " (another user's? ADAPTIVE_TRAINER_CACHE=FOLDER names a folder of your own)"
            return _NoRoom(f"{folder} cannot be written: {error}{own if isinstance(error, PermissionError) else ''}")

        count = len(base.used)
        with explained(refused, (OSError,)), alone(folder, self.poll) as is_alone:
            if is_alone:
                removed_leftovers(folder)
            found = open_decoded(folder, count, self.size)
            if found is not None and self._are_still_broken(base, found):
                self.event(f"data.cache=disk: {count} images are taken from {folder}")
                return found
            folder.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder.parent).free
            _check_room(self._nbytes(base), free, f"that are free in {folder.parent}")
            written(folder, self.size, partial(self._decode, base))
            found = open_decoded(folder, count, self.size)
        if found is None:
            raise _NoRoom(f"{folder} does not hold what was written to it")
        return found

    def _key(self, base: _Base) -> str:
        """A digest of everything that the stored images depend on."""
        digest = hashlib.sha256(repr((FORMAT, LIBRARIES, self.size)).encode())
        for text in fingerprint(base.data, base.used):
            digest.update(text)
        return digest.hexdigest()[:32]

    def _are_still_broken(self, base: _Base, found: Decoded) -> bool:
        # one that cannot be read is refused here, unless data.on_error=skip
        broken = base.used[~found.is_sound]
        if not len(broken):
            return True
        return not any(part.rows["is_sound"].any() for part in self._read(_Base(base.data, broken), num_workers=0))

    def _decode(self, base: _Base, write: Callable[[int, Array], object]) -> dict[str, Array]:
        """Hand all images to `write`, some at a time, with the number of the first; give the rest of `Decoded`."""
        started, count, done = time.perf_counter(), len(base.used), 0
        parts: list[dict[str, Array]] = []
        with Progress("decoding:", count) as progress, closing(self._batches(base)) as batches:
            for batch in batches:
                write(done, batch.images.numpy())
                done += batch.samples
                parts.append(batch.rows)
                progress.advance(batch.samples)
                self.poll()  # a signal ends it here
        rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if not rows["is_sound"].any():
            raise DataError("no image of the data set can be read; repair the files, or name another data.root")
        seconds, sound = time.perf_counter() - started, int(rows["is_sound"].sum())
        broken = f"; {count - sound} cannot be read" if sound < count else ""
        self.event(
            f"data.cache={self.sets.config.cache}: {sound} images decoded and stored at {self.size} x {self.size} "
            f"pixels in {seconds:.1f} s, {format_bytes(self._nbytes(base))}{broken}"
        )
        return rows

    def _batches(self, base: _Base) -> Generator[_Part, None, None]:
        """All batches; after a failure for want of memory the rest with fewer workers, without any once more."""
        workers, retried_at = self.sets.config.num_workers, -1

        def answer(failure: oom.Failure, done: int) -> None:
            nonlocal workers, retried_at
            if workers:
                was, workers = workers, fewer_workers(workers)
                what = f"data.num_workers {was} -> {workers} for the cache"
                self.event(f"a data worker failed ({failure.text}): {what}")
            elif done == retried_at:
                raise _NoRoom(LITTLE_MEMORY.format(failure.text))
            else:
                retried_at = done
                oom.release(torch.device("cpu"))
                self.event(f"out of memory in decoding images ({failure.text}): the same samples once more")

        return resumed(len(base.used), lambda done: self._read(base, workers, done), answer)

    def _read(self, base: _Base, num_workers: int, start: int = 0) -> Generator[_Part, None, None]:
        data: Any = Subset(base.data, base.used.tolist())
        batches = in_order(start, len(data), BATCH)
        samples = Samples(data, _Squash(self.size), self.sets.num_classes, self.sets.config)
        with closing(SampleLoader(samples, min(num_workers, len(batches)), collate=_Collate(self.size))) as loader:
            yield from loader.start(batches)

    def _check_labels(self, part: Any, stored: Stored) -> None:
        labels = stored.decoded.labels[stored.rows]
        wrong = np.flatnonzero((labels < 0) | (labels >= self.sets.num_classes))
        for number in wrong:
            check_label(part, int(number), int(labels[number]), self.sets.num_classes)


def _check_room(need: int, free: int | None, where: str) -> None:
    if free is not None and need > SHARE * free:
        raise _NoRoom(f"the images take {format_bytes(need)}, above {SHARE:.0%} of the {format_bytes(free)} {where}")


def _fill(images: Array, first: int, some: Array) -> None:
    images[first : first + len(some)] = some


@dataclass(frozen=True)
class _Squash:
    """From an RGB image (PIL, or a tensor) to uint8 (3, size, size), with its height and width before."""

    size: int

    def __call__(self, image: Any) -> Any:
        from torchvision.transforms import v2

        height, width = v2.functional.get_size(image)
        pixels = v2.functional.pil_to_tensor(image) if not isinstance(image, Tensor) else image
        small = v2.functional.resize(pixels, [self.size, self.size], antialias=True)  # a window maps to it exactly
        return v2.functional.to_dtype(small, torch.uint8, scale=True), height, width


@dataclass(frozen=True)
class _Collate:
    """From what a loader gives of each sample to the arrays of a batch."""

    size: int

    def __call__(self, samples: list[Any]) -> _Part:
        images = np.zeros((len(samples), 3, self.size, self.size), np.uint8)
        labels, sizes = np.zeros(len(samples), np.int64), np.ones((len(samples), 2), np.int64)
        is_sound = np.zeros(len(samples), bool)
        for row, sample in enumerate(samples):
            if not isinstance(sample, str):
                (pixels, *sizes[row]), labels[row] = sample
                images[row], is_sound[row] = pixels.numpy(), True
        checksums = np.array([zlib.crc32(image.data) for image in images], np.uint32)
        rows = {"labels": labels, "sizes": sizes, "is_sound": is_sound, "checksums": checksums}
        return _Part(torch.from_numpy(images), rows, len(samples))
