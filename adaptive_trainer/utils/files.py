"""Small files written whole or not at all, JSON and CSV for them, and what is said where the disk refuses."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from adaptive_trainer.errors import CheckpointError, UserError, explained, remedy

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1


def existing_checkpoint(path: str | Path, or_else: str = "") -> Path:
    """The path of a checkpoint, which is there.

    Args:
        or_else: what else may be given, in words.

    Raises:
        CheckpointError: it is not there.
    """
    found = Path(path).expanduser()
    if not found.is_file():
        raise CheckpointError(f"there is no checkpoint {found}; give the path of a .pt file{or_else}")
    return found


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """Give a file to write, which takes the place of `path` at the end, and if `durable` is then on the disk."""
    # A name of its own, as several processes and threads may write the same entry of a cache.
    part = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_native_id()}.part")
    try:
        with part.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        part.replace(path)
        if durable and os.name == "posix":  # Windows has no such call
            _flush_folder(path.parent)  # the rename itself
    finally:
        with suppress(OSError):  # mostly because it is in its place
            part.unlink()


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a small file as `replacing` does."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def append(path: Path, text: str) -> None:
    """Add whole lines to a text file; where they cannot be written whole, the file is as it was."""
    with path.open("ab") as file:
        before = file.tell()
        try:
            file.write(text.encode())
            file.flush()
        except OSError:
            file.truncate(before)  # half a line would spoil the next one
            raise


@contextmanager
def refused_by_disk(kind: type[UserError], what: str) -> Iterator[None]:
    """Raise `kind` for an OSError of the block: what cannot be done, why, and what to do."""
    with explained(lambda error: kind(f"{what}: {error}. {remedy(error)}"), (OSError,)):
        yield


def as_csv(rows: Sequence[dict[str, Any]], *, with_header: bool = True) -> str:
    """CSV of rows with the keys of the first."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    if with_header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON of plain data, letters of all languages as they are; a number that is not finite is null."""
    text = json.dumps(_plain(value), indent=indent, allow_nan=False, default=str, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()  # names of files may hold bytes that are no text


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):  # Python would write NaN, which no other reader takes
        return None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def default_folder() -> Path | None:
    """`$ADAPTIVE_TRAINER_CACHE`, else the user's cache folder; None where there is none, or that variable is empty."""
    chosen = os.environ.get("ADAPTIVE_TRAINER_CACHE")
    if chosen is not None:
        return Path(chosen) if chosen else None
    base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    with suppress(RuntimeError):  # a user without a home
        return (Path(base) if base else Path.home() / ".cache") / "adaptive_trainer"
    return None


@contextmanager
def alone(folder: Path, poll: Callable[[], None]) -> Iterator[bool]:
    """Hold the lock on `folder` for the block; yields whether it is held.

    Args:
        poll: is called while another process holds it, and may raise.
    """
    try:
        import fcntl  # whose locks end with their process, however it ends: none is left behind
    except ImportError:
        yield False  # Windows: processes may do the same work twice
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _opened(folder.with_suffix(".lock")) as file:
        is_held = has_waited = False
        while not is_held:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_held = True
            except BlockingIOError:
                poll()
                if not has_waited:
                    log.info("another process is at work on %s: waiting for it", folder)
                has_waited = True
                time.sleep(POLL_SECONDS)
            except OSError:  # a network's disk without locks: as on Windows
                break
        try:
            yield is_held
        finally:
            if is_held:  # processes that were forked meanwhile hold the file too
                fcntl.flock(file, fcntl.LOCK_UN)


def _opened(lock: Path) -> TextIO:
    try:
        return lock.open("w")
    except PermissionError:
        if not lock.exists():
            raise
    return lock.open("r")  # another user's; to be held it need not be written to
