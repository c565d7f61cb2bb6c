"""Earlier runs by their folders: which one `resume=auto` means, and what becomes of one that is in the way."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from textwrap import shorten
from typing import Any

from adaptive_trainer.config.overrides import is_running_ours
from adaptive_trainer.errors import CheckpointError, override
from adaptive_trainer.utils.files import alone, as_json, existing_checkpoint, refused_by_disk, write_whole
from adaptive_trainer.utils.launch import command
from adaptive_trainer.utils.screen import nearby

DAY = re.compile(r"\d{4}-\d\d-\d\d")  # only Hydra's ROOT/DATE/TIME says that the folders beside are runs as well
LAST = Path("checkpoints", "last.pt")
BEST = "best.pt"
SETTINGS, RESULT = "config.yaml", "result.json"
OF_A_RUN = (
    LAST.parent,
    "attempts.jsonl",
    "metrics.csv",
    "report.html",
    "plots",
    "evaluation.json",
    RESULT,
    SETTINGS,
)  # settings last: see set_aside
KILLED = "it was killed before the first one, or is still at it"


@dataclass(frozen=True)
class Earlier:
    """The run that a resumed one goes on from.

    Attributes:
        checkpoint: what it has saved; None where it was stopped before it had saved anything, and for a fresh start.
        settings: the file with its settings, where there is no checkpoint; None for a fresh start.
        events: what was decided on the way to it, in words.
    """

    checkpoint: Path | None = None
    settings: Path | None = None
    events: tuple[str, ...] = ()


def find(resume: str | None, output_dir: Path, *, may_begin: bool = True) -> Earlier:
    """The run that `resume` means.

    `auto` is the run in `output_dir`, or the last one that was set aside there; else, where `output_dir` is
    `ROOT/DATE/TIME`, the newest of all runs in ROOT. One that was stopped before its first checkpoint begins anew with
    its settings; one that has failed, or is still at it, is passed over.

    Args:
        may_begin: where there is none to go on with, a new run begins.

    Raises:
        CheckpointError: there is no such checkpoint; or none to go on with, and no new run may begin.
    """
    if resume is None:
        return Earlier()
    if resume != "auto":
        return Earlier(existing_checkpoint(resume, ", or resume=auto for a run's own"))
    passed: list[Path] = []
    for run in _candidates(output_dir):
        if (run / LAST).exists():
            return Earlier(run / LAST, events=_told(passed))
        if _can_begin_anew(run, output_dir):
            anew = f"resume=auto: {run} has left no checkpoint ({_end(run)}): its settings begin anew here"
            return Earlier(None, run / SETTINGS, (*_told(passed), anew))
        passed.append(run)
    told, nothing = _told(passed), f"resume=auto: there is no earlier run to go on with in {_looked_in(output_dir)}"
    if not may_begin:
        raise CheckpointError(
            f"{'; '.join([*told, nothing])}; type output_dir=FOLDER or resume=PATH/last.pt for a run elsewhere, or "
            "name the data (data=imagefolder data.root=FOLDER) for a new one"
        )
    return Earlier(events=(*told, f"{nothing}: a new run begins"))


def _looked_in(output_dir: Path) -> str:
    here = output_dir.absolute()
    return nearby(here.parent.parent if DAY.fullmatch(here.parent.name) else here)


def _candidates(output_dir: Path) -> Iterator[Path]:
    """The folders of runs to go on from, the likeliest first."""
    for folder in (output_dir, *reversed(_set_aside(output_dir))):  # a fresh start here may have died at once
        if (folder / LAST).exists() or (folder / SETTINGS).exists():
            yield folder
    yield from sorted(_runs(output_dir), key=_time, reverse=True)


def _told(passed: list[Path]) -> tuple[str, ...]:
    if not passed:
        return ()
    more = f", and {len(passed) - 1} more before it" if len(passed) > 1 else ""
    return (f"resume=auto: {passed[0]} is passed over{more}: it has left no checkpoint ({_end(passed[0])})",)


def _can_begin_anew(run: Path, output_dir: Path) -> bool:
    if not (run / SETTINGS).stat().st_size or not _end(run).startswith(("interrupted", KILLED)):
        return False  # one that has failed would fail again
    return run.is_relative_to(output_dir) or not _is_at_work(run)  # the lock on one's own folder is taken later


def _time(run: Path) -> float:
    return (run / LAST if (run / LAST).exists() else run / SETTINGS).stat().st_mtime


def _end(run: Path) -> str:
    with suppress(OSError, ValueError, KeyError, TypeError):
        result = json.loads((run / RESULT).read_text(encoding="utf-8"))
        return shorten(f"{result['outcome']}: {result['message']}", 200, placeholder=" ...")
    return KILLED  # a process that is killed writes no result


def _is_at_work(run: Path) -> bool:
    def busy() -> None:
        raise BlockingIOError

    try:
        if (run / ".run.lock").exists():  # else `alone` would make one in a folder that is not ours
            with alone(run / ".run", busy):
                return False
    except BlockingIOError:
        return True
    except OSError:  # a disk without locks, or another user's folder
        return False
    return False


def is_within(path: Path | None, output_dir: Path) -> bool:
    """Whether a checkpoint is one of the run in `output_dir`, which then goes on."""
    return path is not None and path.resolve().is_relative_to((output_dir / LAST).resolve().parent)


def left_by_earlier(output_dir: Path) -> list[Path]:
    """The files and folders of an earlier run in this folder; settings or a failure alone are no record."""
    left = [path for name in OF_A_RUN if (path := output_dir / name).exists()]
    did_nothing = left in ([output_dir / SETTINGS], [output_dir / RESULT])
    earlier = _set_aside(output_dir)
    is_cut_short = bool(earlier) and not (earlier[-1] / SETTINGS).exists()  # a move, of which the settings are last
    return [] if did_nothing and not is_cut_short else left


def begin(output_dir: Path, settings: str) -> None:
    """Keep the settings of a run that begins, so that it can begin anew wherever it is stopped.

    What an earlier run has left in the folder is not touched.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    if left_by_earlier(output_dir):
        return
    with refused_by_disk(CheckpointError, f"cannot write the record of this run in {output_dir}"):
        output_dir.mkdir(parents=True, exist_ok=True)
        write_whole(output_dir / SETTINGS, settings)
        (output_dir / RESULT).unlink(missing_ok=True)  # or a kill would read as the failure of the run before


def fail(output_dir: Path, outcome: str, message: str) -> None:
    """Write result.json for a run that ended before it had a record."""
    if not left_by_earlier(output_dir):
        with suppress(OSError):  # the first error is the one to show
            output_dir.mkdir(parents=True, exist_ok=True)
            write_whole(output_dir / RESULT, failure(outcome, message))


def failure(outcome: str, message: str, attempts: Sequence[Any] = (), events: Sequence[str] = ()) -> str:
    """The content of result.json for a run that did not end well."""
    content = {"outcome": outcome, "message": message, "attempts": [*attempts], "events": [*events]}
    return as_json(content, indent=2) + "\n"


def set_aside(output_dir: Path) -> str:
    """Move what an earlier run has left in the folder into one within, so that a fresh start mixes nothing with it.

    Returns:
        What was done, in words; empty where there was nothing.

    Raises:
        CheckpointError: it cannot be moved.
    """
    left, earlier = left_by_earlier(output_dir), _set_aside(output_dir)
    if not left:
        return ""
    aside = output_dir / f"earlier-{len(earlier) + 1}"
    # a move that was cut short is gone on with: what is left and what was moved make one run
    if earlier and not any((earlier[-1] / path.name).exists() for path in (output_dir / SETTINGS, *left)):
        aside = earlier[-1]
    with refused_by_disk(CheckpointError, f"cannot move an earlier run to {aside}"):
        aside.mkdir(exist_ok=True)
        for path in left:  # the settings last: without them in the folder the move is unfinished
            path.replace(aside / path.name)
    return f"the earlier run in {output_dir} is kept in {aside.name}"


def _set_aside(output_dir: Path) -> list[Path]:
    """The folders of earlier runs within, the oldest first."""
    return list(takewhile(Path.exists, (output_dir / f"earlier-{number}" for number in count(1))))


def _runs(output_dir: Path) -> list[Path]:
    """The folders of all other trainings in ROOT, where `output_dir` is ROOT/DATE/TIME."""
    here = output_dir.absolute()
    if not DAY.fullmatch(here.parent.name):
        return []
    # a plan writes no config.yaml, and is none of them
    others = [path.parent for path in here.parent.parent.glob("*/*/config.yaml")]
    return [run for run in others if DAY.fullmatch(run.parent.name) and run != here]


def way_on(output_dir: Path) -> str:
    """The overrides with which the run in this folder goes on."""
    is_usual = DAY.fullmatch(output_dir.absolute().parent.name)
    return "resume=auto" if is_usual else f"resume=auto {override('output_dir', nearby(output_dir))}"


def to_type(output_dir: Path) -> str:
    """What the run in this folder goes on with: a command in a shell; overrides in Python, where code belongs to it."""
    return f"{command()} {way_on(output_dir)}" if is_running_ours() else way_on(output_dir)
