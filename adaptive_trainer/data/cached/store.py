"""Decoded images in memory or on disk: the arrays, the files, and whether a file can be believed.

A cache on disk is a folder that is put in place whole, under the digest of everything it depends on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
PIXELS, ROWS, HEAD = "images.u8", "rows.npz", "head.json"
CHECKED = 256  # images whose checksum is looked at when a cache is opened


@dataclass(frozen=True)
class Decoded:
    """Images of a data set, decoded.

    Attributes:
        images: uint8, (N, 3, S, S); those that could not be read are black.
        labels: int64, (N,).
        sizes: height and width before they were squashed, int64 (N, 2).
        is_sound: whether it could be read, bool (N,).
        checksums: CRC-32 of each image, uint32 (N,).
    """

    images: Array
    labels: Array
    sizes: Array
    is_sound: Array
    checksums: Array


@dataclass(frozen=True)
class Stored:
    """A data set whose images are stored decoded: sample number i is row `rows[i]`."""

    decoded: Decoded
    rows: Array

    @property
    def size(self) -> int:
        """Height and width of the stored images."""
        return int(self.decoded.images.shape[-1])


def open_decoded(folder: Path, count: int, size: int) -> Decoded | None:
    """Map the images in `folder` into memory; None where there are none, or their sizes or checksums are wrong."""
    try:
        head = json.loads((folder / HEAD).read_text(encoding="utf-8"))
        rows = (folder / ROWS).read_bytes()
        if head != _head(count, size, rows) or (folder / PIXELS).stat().st_size != count * 3 * size * size:
            return None
        with np.load(folder / ROWS, allow_pickle=False) as found:
            parts = dict(found)
        images = np.asarray(np.memmap(folder / PIXELS, np.uint8, "r", shape=(count, 3, size, size)))
    except (OSError, ValueError, KeyError) as error:
        if getattr(error, "errno", None) == errno.ENOMEM:  # which says nothing of the files
            raise
        return None
    looked_at = np.unique(np.linspace(0, count - 1, min(count, CHECKED)).astype(int))
    is_damaged = any(zlib.crc32(images[i].data) != parts["checksums"][i] for i in looked_at)
    return None if is_damaged else Decoded(images, **parts)


def _head(count: int, size: int, rows: bytes) -> dict[str, Any]:
    return {"count": count, "size": size, "rows": hashlib.sha256(rows).hexdigest()}


def written(folder: Path, size: int, fill: Callable[[Callable[[int, Array], object]], dict[str, Array]]) -> None:
    """Put a cache in place at `folder`, whole or not at all (OSError).

    Args:
        fill: is given a function that takes images in order, each time with the number of the first, and returns the
            other arrays of `Decoded`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():  # damaged, or another user's: then it is known now, not after all images are decoded
        shutil.rmtree(folder)
    closed = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".part", dir=folder.parent))
    part = closed / "made"
    try:
        part.mkdir()  # open to whom the user's umask lets in
        with (part / PIXELS).open("wb") as file:
            # not through a memory map: where the disk is full, a write says so and a map kills the process
            rows: dict[str, Any] = fill(lambda _, images: file.write(images.data))
            file.flush()
            os.fsync(file.fileno())  # before the head says that it is there
        with (part / ROWS).open("wb") as file:
            np.savez(file, **rows)
        head = _head(len(rows["labels"]), size, (part / ROWS).read_bytes())
        (part / HEAD).write_text(json.dumps(head), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # of a process that did the same, where there are no locks
        part.rename(folder)  # whole, or not at all
    finally:
        shutil.rmtree(closed, ignore_errors=True)


def removed_leftovers(folder: Path) -> None:
    """Remove what killed processes have left of `folder`; only for who holds its lock."""
    for part in folder.parent.glob(f"{folder.name}.*.part"):
        shutil.rmtree(part, ignore_errors=True)


def available_memory() -> int | None:
    """Bytes of RAM that a process can still take, by the kernel and by its control group; None where unknown."""
    found, group = [], Path("/sys/fs/cgroup")
    with suppress(OSError, KeyError):
        found.append(1024 * _figures(Path("/proc/meminfo"))["MemAvailable:"])
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # "max" is no number
            free = int((group / limit).read_text()) - int((group / used).read_text())
            # its files in memory are what the kernel gives up first
            found.append(free + _figures((group / limit).with_name("memory.stat")).get("inactive_file", 0))
    return min(found, default=None)  # the tighter of the two


def _figures(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text(encoding="ascii").splitlines())
    return {words[0]: int(words[1]) for words in lines}
