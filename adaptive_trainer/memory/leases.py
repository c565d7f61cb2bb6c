"""Leases of a card's memory, by which several trainings share one card.

A lease is two files of the user's cache folder: its bytes, and a lock that is held as long as the training lives. The
system frees the lock of a process that dies, however it dies.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from uuid import uuid4

import torch
from filelock import FileLock, Timeout

from adaptive_trainer.config.limit import LEAST
from adaptive_trainer.errors import ConfigError
from adaptive_trainer.memory.limit import Capacity
from adaptive_trainer.memory.usage import format_bytes
from adaptive_trainer.utils.files import default_folder, refused_by_disk, write_whole

log = logging.getLogger(__name__)

MARGIN = 1.1  # times the peak of a dry run: training finds its blocks in another order


class Lease:
    """The memory of a card that one training may take.

    One process at a time chooses: from `choose` to `take` it knows what the others hold.

    Args:
        folder: of all leases of the card.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._choosing = FileLock(folder / "choosing")
        self._file = folder / uuid4().hex
        self._life = FileLock(_lock_of(self._file))

    def __enter__(self) -> Lease:
        """Nothing is held yet."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Give back what is held."""
        self._choosing.release()
        self._file.unlink(missing_ok=True)
        self._life.release(force=True)
        _lock_of(self._file).unlink(missing_ok=True)

    def choose(self) -> int:
        """Wait until no other training chooses; returns the bytes that the others hold."""
        try:
            self._choosing.acquire(timeout=0)
        except Timeout:
            log.info("another training on this card is choosing its rung: waiting for it")
            self._choosing.acquire()
        return sum(map(_held, self._folder.glob("*.lock")))

    def take(self, nbytes: int) -> None:
        """Hold so many bytes from now on, in place of what was held; another training may choose."""
        self._life.acquire()
        write_whole(self._file, str(nbytes))
        self._choosing.release()


def _lock_of(file: Path) -> Path:
    return file.with_suffix(".lock")  # locking empties a file, so that it can have no content


def _held(lock: Path) -> int:
    """Bytes of the lease with this lock, whose files go where its process has died."""
    file = lock.with_suffix("")
    try:
        with FileLock(lock, timeout=0):
            file.unlink(missing_ok=True)
    except Timeout:
        try:
            return int(file.read_text())
        except FileNotFoundError:  # it has just been given back
            return 0
    lock.unlink(missing_ok=True)
    return 0


@contextmanager
def shared(capacity: Capacity, event: Callable[[str], None]) -> Iterator[None]:
    """Limit a training to what others on its card leave, and from `capacity.settle` on to what its rung takes.

    Args:
        event: is told what was leased.

    Raises:
        ConfigError: the card has no limit, or nothing of it is left; there is no cache folder, or it has no locks.
    """
    folder, size = default_folder(), capacity.size
    if folder is None or size is None:
        lacks = "a cache folder (ADAPTIVE_TRAINER_CACHE)" if folder is None else "a limit (memory.limit=6GiB)"
        raise ConfigError(f"memory.shared=true needs {lacks}, and there is none; memory.shared=false does without")
    with ExitStack() as stack:
        refused = partial(refused_by_disk, ConfigError, f"memory.shared=true: {folder} takes no leases")
        with refused():
            lease = stack.enter_context(Lease(folder / "leases" / _card(capacity, size)))
            others = lease.choose()
        left = min(size - others, capacity.room() or 0)
        if left < LEAST:
            raise ConfigError(
                f"memory.shared=true: other trainings hold {format_bytes(others)} of the {format_bytes(size)} of this "
                "card; wait for one to end"
            )
        capacity.cap(left)
        if others:
            capacity.description += f", of which other trainings hold {format_bytes(others)}"

        def settle() -> None:
            nbytes = min(capacity.size or left, int(MARGIN * (capacity.peaks()[1] or left)))
            with refused():
                lease.take(nbytes)
            capacity.cap(nbytes)
            event(
                f"memory.shared=true: this training takes {format_bytes(nbytes)} of the {format_bytes(size)} of its "
                f"card, of which others held {format_bytes(others)}"
            )

        capacity.settle = settle
        yield


def _card(capacity: Capacity, size: int) -> str:
    if capacity.device.type == "cuda":
        return str(torch.cuda.get_device_properties(capacity.device).uuid)
    return f"simulated-{size}-{platform.node()}"
