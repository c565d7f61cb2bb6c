"""Checkpoint files: written whole, and once more where memory runs out; read as data, never as code."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from adaptive_trainer import oom
from adaptive_trainer.errors import CheckpointError, explained, override, remedy
from adaptive_trainer.utils.files import existing_checkpoint, replacing

T = TypeVar("T")
FORMAT = "adaptive_trainer checkpoint"
VERSION = 1
DAMAGE = (zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError, KeyError)  # what reading it raises


def beside_memory(explain: Callable[[Exception], CheckpointError]) -> Callable[[Exception], CheckpointError | None]:
    """For `explained`: let errors pass that are about memory, which are no fault of a checkpoint."""
    return lambda error: explain(error) if oom.describe(error).kind is oom.Kind.OTHER else None


def save(path: Path, content: dict[str, Any]) -> None:
    """Write `content` (tensors, plain values, dicts, lists) to `path`, atomically; once more where memory runs out.

    Raises:
        CheckpointError: it cannot be written; the file that was there before is untouched.
    """
    retried(path, lambda: _write(path, content))


def retried(path: Path, work: Callable[[], T]) -> T:
    """Do a piece of work for the checkpoint at `path`; once more where memory runs out.

    Raises:
        CheckpointError: it ran out again; the file that was there before is untouched.
    """
    # a card is released only where one is in use: asking it would create a context of hundreds of MiB
    device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")  # type: ignore[no-untyped-call]
    done = oom.retry(work, device, f"writing {path}", kinds=(oom.Kind.DEVICE, oom.Kind.HOST))
    if isinstance(done, oom.Failure):
        raise _not_written(path, f"out of memory ({done.text})", "Free some memory")
    return done


def _write(path: Path, content: dict[str, Any]) -> None:
    with explained(beside_memory(partial(_refused, path)), (RuntimeError, OSError)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, durable=True) as file:  # flushed: after a power cut the old one or the new one is there
            torch.save({"format": FORMAT, "version": VERSION, **content}, file)


def _refused(path: Path, error: Exception) -> CheckpointError:
    if isinstance(error, OSError):
        return _not_written(path, str(error), remedy(error))
    # torch's zip writer loses the system's own error
    problem = f"the disk is full, or refuses to take more ({str(error).splitlines()[0]})"
    return _not_written(path, problem, "Free some disk space")


def _not_written(path: Path, problem: str, advice: str) -> CheckpointError:
    kept, last = "there is no earlier one", path.with_name("last.pt")  # also where best.pt was to be written
    if last.exists():
        kept = f"the last good one is kept in {last}"
        advice = f"{advice}; {override('resume', last)} goes on from it"
    return CheckpointError(f"cannot write checkpoint {path}: {problem}; {kept}. {advice}")


def load(path: Path, *, to_resume: bool = False) -> dict[str, Any]:
    """The content of a checkpoint, tensors on the CPU.

    Args:
        to_resume: a run is to go on from it, for which a model alone does not do.

    Raises:
        CheckpointError: there is none, or it is damaged, or something else.
    """
    existing_checkpoint(path, ", or resume=auto for a run's own" if to_resume else "")

    def unreadable(error: Exception) -> CheckpointError:
        beside = _sound_beside(path, to_resume=to_resume)
        return CheckpointError(f"cannot read checkpoint {path}: {_damage(error)}; {beside}")

    with explained(beside_memory(unreadable)):
        content = _read(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of adaptive_trainer; give one of its .pt files")
    if content.get("version") != VERSION:
        raise CheckpointError(f"{path} has version {content.get('version')}, this program reads {VERSION}")
    return content


def _read(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()  # torch.load compares no checksums: flipped bits would be trained on
    if damaged is not None:
        raise ValueError(f"its part {damaged} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)  # data, never code


def _damage(error: Exception) -> str:
    if isinstance(error, zipfile.BadZipFile):
        return "it is cut short, or no checkpoint"
    if isinstance(error, DAMAGE):
        return (str(error) or type(error).__name__).splitlines()[0]
    return f"it holds something that is not plain data ({type(error).__name__})"  # the unpickler's own type is private


def _sound_beside(path: Path, *, to_resume: bool) -> str:
    found = []
    for other in sorted(set(path.parent.glob("*.pt")) - {path}):
        content = None
        with suppress(Exception):  # it may be damaged as well
            content = _read(other)
        if isinstance(content, dict) and content.get("format") == FORMAT:
            is_whole = "optimizer" in content  # best.pt has no more than the network
            resumed = override("resume", other) if is_whole else f"load_model reads {other}, which is sound"
            found.append(resumed if to_resume else f"use {other}, which is sound")
    return "; ".join(found) or "use another one"
