"""Down the ladder until a rung fits: try, record, release, next.

`descend` serves the Trainer and, with `make_ladder`, any training loop of one's own:

    ladder = make_ladder({"batch": 64}, {"half": {"batch": 32}, "quarter": {"batch": 16}})
    found = descend(ladder, lambda settings: train(**settings))
    print(found.rung.name, found.value)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch

from adaptive_trainer import oom
from adaptive_trainer.errors import LadderExhausted, OutOfMemory
from adaptive_trainer.ladder.rung import Rung, own
from adaptive_trainer.memory.usage import is_short

T = TypeVar("T")
R = TypeVar("R")
UNTRIED = "not tried by this run"


class Outcome(StrEnum):
    """What became of a rung."""

    FITS = "fits"
    OOM = "oom"  # out of memory
    SKIPPED = "skipped"  # not tried
    FAILED = "failed"  # with an error that is not about memory


IN_WORDS = {Outcome.OOM: "out of memory", Outcome.SKIPPED: "predicted not to fit"}


@dataclass(slots=True)
class Attempt:
    """The record of one rung tried; phase (where it ended) and reason are words for people."""

    # Plain data, never an exception: its frames would hold the model that did not fit.
    rung: str
    outcome: Outcome
    phase: str = ""
    reason: str = ""
    predicted_bytes: int | None = None  # smallest capacity it was expected to need; None: it was not predicted
    peak_allocated_bytes: int | None = None  # of the try; None: nothing counts
    peak_reserved_bytes: int | None = None
    seconds: float = 0.0


class Meter(Protocol):
    """What measures an attempt's memory."""

    def reset_peaks(self) -> None:
        """Start counting peaks anew."""

    def peaks(self) -> tuple[int | None, int | None]:
        """Peak allocated and peak reserved bytes since the last reset; None where nothing counts."""


@dataclass(frozen=True, slots=True)
class Found(Generic[T, R]):
    """The rung that fits, what its try returned, and every attempt on the way."""

    rung: Rung[T]
    value: R
    attempts: list[Attempt] = field(default_factory=list)


def descend(
    ladder: Iterable[Rung[T]],
    attempt: Callable[[T], R],
    *,
    judge: Callable[[Rung[T]], tuple[str, int | None]] | None = None,
    meter: Meter | None = None,
    on_attempt: Callable[[Attempt], Any] | None = None,
    device: torch.device | None = None,
) -> Found[T, R]:
    """Call `attempt` with the settings of one rung after another until one does not run out of memory.

    Args:
        ladder: the rungs, largest first; the next is asked for when one is given up.
        attempt: tries one rung's settings; what it returns is the value of the result. It may raise any out-of-memory
            of the device, which on a CPU is the host's, and `LadderExhausted` of a descent within. Dictionaries and
            lists of the settings are its own to change.
        judge: says of a rung why it need not be tried ("" when it must be) and how many bytes it is expected to need.
        meter: measures each attempt's peaks.
        on_attempt: gets each attempt's record as it happens.
        device: what to free after a failed attempt; the current CUDA device, or the CPU, where None.

    Raises:
        LadderExhausted: no rung fits; the message lists every attempt.
        Exception: whatever `attempt` raises that is not about memory, unchanged.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attempts: list[Attempt] = []

    def record(entry: Attempt) -> None:
        attempts.append(entry)
        if on_attempt is not None:
            on_attempt(entry)

    for rung in ladder:
        entry = Attempt(rung.name, Outcome.SKIPPED, reason=rung.passed_over)
        if judge is not None and not rung.passed_over:
            entry.reason, entry.predicted_bytes = judge(rung)
        if entry.reason:
            record(entry)
            continue
        before = oom.held(device)
        # The try may change its settings, and the next rung must not inherit that.
        value = _tried(entry, partial(attempt, own(rung.settings)), device, meter, record)
        if value is None:
            oom.release(device, before)
        record(entry)
        if value is not None:
            return Found(rung, value[0], attempts)
    raise LadderExhausted(exhausted_message(attempts))


def _tried(
    entry: Attempt,
    work: Callable[[], R],
    device: torch.device,
    meter: Meter | None,
    record: Callable[[Attempt], None],
) -> tuple[R] | None:
    """What the work returns, in a tuple of one; None where memory ran out. The entry says how it went."""
    value: tuple[R] | None = None  # in a tuple, for None is a value that work may return
    started = time.perf_counter()
    if meter is not None:
        meter.reset_peaks()
    try:
        value = (work(),)
        entry.outcome = Outcome.FITS
    except OutOfMemory as error:
        entry.outcome, entry.phase, entry.reason = Outcome.OOM, error.phase, error.reason
    except Exception as error:
        failure = oom.describe(error, pressure=lambda: is_short(device))
        entry.outcome, entry.phase, entry.reason = Outcome.OOM, "attempt", failure.text
        if not failure.fills(device):  # no smaller rung would mend it
            entry.outcome = Outcome.FAILED
            record(entry)
            raise
    entry.seconds = round(time.perf_counter() - started, 3)
    if meter is not None:
        entry.peak_allocated_bytes, entry.peak_reserved_bytes = meter.peaks()
    return value


def outcomes(rungs: Sequence[Rung[Any]], attempts: Sequence[Attempt]) -> str:
    """What became of each of these rungs, as its last attempt says, in words."""
    last = {entry.rung: entry for entry in attempts}
    found: dict[str, list[str]] = {}
    for rung in rungs:
        said, name = _outcome(rung, last.get(rung.name))
        found.setdefault(said, []).append(name)
    return "; ".join(f"{said}: {', '.join(names)}" for said, names in found.items())


def _outcome(rung: Rung[Any], entry: Attempt | None) -> tuple[str, str]:
    if entry is None:
        return ("passed over", f"{rung.name} ({rung.passed_over})") if rung.passed_over else (UNTRIED, rung.name)
    if entry.outcome == Outcome.SKIPPED and entry.predicted_bytes is None:  # what is foretold has a number
        return "passed over", f"{rung.name} ({entry.reason})"
    return IN_WORDS.get(entry.outcome, entry.outcome), rung.name


def exhausted_message(attempts: Sequence[Attempt]) -> str:
    """Every rung with its outcome, peak and reason, a line each; those that were predicted not to fit in one."""
    lines = ["no rung of the ladder fits:"]
    foretold = [entry for entry in attempts if entry.outcome == Outcome.SKIPPED and entry.predicted_bytes is not None]
    if foretold:
        names = ", ".join(entry.rung for entry in foretold)
        needs = ", ".join(f"{(entry.predicted_bytes or 0) / 2**20:.0f}" for entry in foretold)
        lines.append(f"  {IN_WORDS[Outcome.SKIPPED]}: {names} ({needs} MiB)")
    for entry in attempts:
        if entry in foretold:
            continue
        peak = "" if entry.peak_allocated_bytes is None else f", peak {entry.peak_allocated_bytes / 2**20:.0f} MiB"
        where = f" in {entry.phase}" if entry.phase else ""
        lines.append(f"  {entry.rung}: {entry.outcome}{where}{peak}: {entry.reason}")
    return "\n".join(lines)
