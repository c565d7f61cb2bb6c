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
from pathlib import Path
from typing import Any

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
from adaptive_trainer.data.loader import NOT_THE_FILE, check_label, end_workers, fewer_workers, plain_loader
from adaptive_trainer.data.splitting import source
from adaptive_trainer.errors import ConfigError, DataError
from adaptive_trainer.memory.usage import format_bytes
from adaptive_trainer.utils.files import alone, default_folder
from adaptive_trainer.utils.progress import Progress

Array = np.ndarray[Any, Any]
FORMAT = 2  # of the stored images: counted up when what is stored for the same files changes
LIBRARIES = (torch.__version__, torchvision.__version__, PIL.__version__)  # they decode and resize
SHARE = 0.8  # of what is free, that a cache may take
BATCH = 16  # images that a worker hands over at a time


class _NoRoom(Exception):
    """The cache is not built; says why."""


def with_cache(
    data: DataSets, size: int, *, event: Callable[[str], None], poll: Callable[[], None] = lambda: None
) -> DataSets:
    """The data sets with their images stored at `size` x `size` pixels, as `data.cache` asks.

    Where there is no room they come back as they are, and `event` is told why.

    Args:
        event: is told what was decided, and why.
        poll: is called between batches, and may raise to end the work.

    Raises:
        ConfigError: the data set cannot be cached in this way.
        DataError: a sample cannot be used (`SampleError`), or no sample of the data can be read.
    """
    builder = _Builder(data, size, event, poll)
    problem = ""
    try:
        return replace(data, stored=builder.stored())
    except _NoRoom as error:
        problem = str(error)
    except Exception as error:
        failure = oom.describe(error)
        if not failure.is_of_loading:
            raise
        problem = f"the host has too little memory ({failure.text})"
    event(f"data.cache={data.config.cache} is not used: {problem}; images are decoded anew in every epoch")
    return data


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
        """Those of both sets. Parts of one data set share what is stored.

        Raises:
            _NoRoom: they do not fit.
        """
        sources = [source(part) for part in (self.sets.train, self.sets.val)]
        bases: dict[int, _Base] = {}
        for base, index in sources:
            known = bases.get(id(base))
            used = index if known is None else np.concatenate((known.used, index))
            bases[id(base)] = _Base(base, np.unique(used))
        for each in bases.values():
            refuse_own_transforms(each.data, self.sets.config.cache)
        make = self._in_memory if self.sets.config.cache == "ram" else self._on_disk
        decoded = dict(zip(bases, make(list(bases.values())), strict=True))
        found = [Stored(decoded[id(base)], np.searchsorted(bases[id(base)].used, index)) for base, index in sources]
        for part, stored in zip((self.sets.train, self.sets.val), found, strict=True):
            self._check_labels(part, stored)
        return found[0], found[1]

    def _nbytes(self, base: _Base) -> int:
        return len(base.used) * 3 * self.size * self.size

    def _in_memory(self, bases: list[_Base]) -> list[Decoded]:
        need, free = sum(map(self._nbytes, bases)), available_memory()
        if free is not None and need > SHARE * free:
            raise _NoRoom(
                f"the images take {format_bytes(need)}, above {SHARE:.0%} of the {format_bytes(free)} of free memory"
            )
        found = []
        for base in bases:
            images = np.empty((len(base.used), 3, self.size, self.size), np.uint8)
            rows = self._decode(base, _filler(images))
            found.append(Decoded(images, **rows))
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
        problem = ""
        try:
            with alone(folder, self.poll) as is_alone:
                if is_alone:
                    removed_leftovers(folder)
                found = open_decoded(folder, len(base.used), self.size)
                if found is not None and self._are_still_broken(base, found):
                    self.event(f"data.cache=disk: {len(base.used)} images are taken from {folder}")
                    return found
                self._check_disk(base, folder.parent)
                written(folder, self.size, lambda write: self._decode(base, write))
                found = open_decoded(folder, len(base.used), self.size)
        except OSError as error:
            if error.errno in NOT_THE_FILE:
                raise
            problem = f"{folder} cannot be written: {error}"
            if isinstance(error, PermissionError):
                problem += " (another user's? ADAPTIVE_TRAINER_CACHE=FOLDER names a folder of your own)"
        if problem or found is None:
            raise _NoRoom(problem or f"{folder} does not hold what was written to it")
        return found

    def _check_disk(self, base: _Base, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        need, free = self._nbytes(base), shutil.disk_usage(folder).free
        if need > SHARE * free:
            raise _NoRoom(
                f"the images take {format_bytes(need)}, above {SHARE:.0%} of the {format_bytes(free)} that are free in "
                f"{folder}"
            )

    def _key(self, base: _Base) -> str:
        """A digest of everything that the stored images depend on."""
        digest = hashlib.sha256(repr((FORMAT, LIBRARIES, self.size)).encode())
        for text in fingerprint(base.data, base.used):
            digest.update(text)
        return digest.hexdigest()[:32]

    def _are_still_broken(self, base: _Base, found: Decoded) -> bool:
        """Whether the samples that could not be read cannot be read now; raises for them where none is to be broken."""
        broken = base.used[~found.is_sound]
        if not len(broken):
            return True
        loader = self._loader(_Base(base.data, broken), num_workers=0)
        return not any(part["is_sound"].any() for _, part in loader)

    def _loader(self, base: _Base, num_workers: int, start: int = 0) -> Any:
        data: Any = Subset(base.data, base.used.tolist())
        return plain_loader(
            data, _Squash(self.size), self.sets.config, self.sets.num_classes, collate=_Collate(self.size),
            batch_size=BATCH, num_workers=num_workers, start=start,
        )  # fmt: skip

    def _decode(self, base: _Base, write: Callable[[Array], None]) -> dict[str, Array]:
        """Hand every image to `write`, in order; returns the other arrays of `Decoded`."""
        started, count = time.perf_counter(), len(base.used)
        parts: list[dict[str, Array]] = []
        with (
            Progress("decoding:", count) as progress,
            closing(self._batches(base)) as batches,
        ):
            for images, rows in batches:
                write(images)
                parts.append(rows)
                progress.advance(len(images))
                self.poll()
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

    def _batches(self, base: _Base) -> Generator[tuple[Array, dict[str, Array]], None, None]:
        """All batches; after a failure for want of memory the rest with fewer workers, without any once more."""
        workers, done, retried_at = self.sets.config.num_workers, 0, -1
        while done < len(base.used):
            failure = None
            iterator = None
            try:
                iterator = iter(self._loader(base, workers, done))
                for images, rows in iterator:
                    yield images.numpy(), rows
                    done += len(images)
            except Exception as error:
                failure = oom.describe(error)
                if not failure.is_of_loading or (not workers and done == retried_at):
                    raise
            finally:
                end_workers(iterator)
            if failure is not None and not workers:
                iterator = None
                retried_at = done
                oom.release(torch.device("cpu"))
                self.event(f"out of memory in decoding images ({failure.text}): the same samples once more")
            elif failure is not None:
                fewer = fewer_workers(workers)
                self.event(
                    f"a data worker failed ({failure.text}): data.num_workers {workers} -> {fewer} for the cache"
                )
                workers = fewer

    def _check_labels(self, part: Any, stored: Stored) -> None:
        labels = stored.decoded.labels[stored.rows]
        wrong = np.flatnonzero((labels < 0) | (labels >= self.sets.num_classes))
        for number in wrong:
            check_label(part, int(number), int(labels[number]), self.sets.num_classes)


def _filler(images: Array) -> Callable[[Array], None]:
    done = 0

    def write(more: Array) -> None:
        nonlocal done
        images[done : done + len(more)] = more
        done += len(more)

    return write


@dataclass(frozen=True)
class _Squash:
    """From an RGB image (PIL, or a tensor) to uint8 (3, size, size), with its height and width before."""

    size: int

    def __call__(self, image: Any) -> Any:
        from torchvision.transforms import v2

        height, width = v2.functional.get_size(image)
        pixels = v2.functional.pil_to_tensor(image) if not isinstance(image, Tensor) else image
        small = v2.functional.resize(pixels, [self.size, self.size], antialias=True)
        return v2.functional.to_dtype(small, torch.uint8, scale=True), height, width


@dataclass(frozen=True)
class _Collate:
    """Arrays of a batch: (images, the other arrays of `Decoded`)."""

    size: int

    def __call__(self, samples: list[Any]) -> tuple[Tensor, dict[str, Array]]:
        images = np.zeros((len(samples), 3, self.size, self.size), np.uint8)
        labels, sizes = np.zeros(len(samples), np.int64), np.ones((len(samples), 2), np.int64)
        is_sound = np.zeros(len(samples), bool)
        for row, sample in enumerate(samples):
            if not isinstance(sample, str):
                (pixels, *sizes[row]), labels[row] = sample
                images[row], is_sound[row] = pixels.numpy(), True
        checksums = np.array([zlib.crc32(image.data) for image in images], np.uint32)
        return torch.from_numpy(images), {
            "labels": labels,
            "sizes": sizes,
            "is_sound": is_sound,
            "checksums": checksums,
        }
