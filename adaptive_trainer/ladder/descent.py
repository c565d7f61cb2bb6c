"""Down the ladder until a rung fits: try, record, release, next.

Knows nothing of models, epochs or data: it is given rungs and a function that tries one. `descend` serves the Trainer
and, with `ladder.make_ladder`, any training loop of one's own:

    ladder = make_ladder({"batch": 64}, {"half": {"batch": 32}, "quarter": {"batch": 16}})
    found = descend(ladder, lambda settings: train(**settings))
    print(found.rung.name, found.value)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch

from adaptive_trainer import oom
from adaptive_trainer.errors import LadderExhausted, OutOfMemory
from adaptive_trainer.ladder.resolve import Rung, own
from adaptive_trainer.memory.usage import is_short

T = TypeVar("T")
R = TypeVar("R")


@dataclass(slots=True)
class Attempt:
    """The record of one rung tried: plain data, never an exception.

    Attributes:
        rung: its name.
        outcome: `fits`, `oom`, `skipped` (not tried) or `failed` (an error that is not about memory).
        phase: where it ended, in words.
        reason: why, in words.
        predicted_bytes: smallest capacity the rung was expected to need; None where it was not predicted.
        peak_allocated_bytes, peak_reserved_bytes: measured while it was tried; None where there is no meter.
        seconds: how long the try took.
    """

    rung: str
    outcome: str
    phase: str = ""
    reason: str = ""
    predicted_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    seconds: float = 0.0


class Meter(Protocol):
    """What measures an attempt's memory."""

    def reset_peaks(self) -> None:
        """Start counting peaks anew."""

    def peaks(self) -> tuple[int, int]:
        """Peak allocated and peak reserved bytes since the last reset."""


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
        on_attempt: is told each attempt's record as it happens.
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
        reason, predicted = (rung.passed_over, None) if rung.passed_over or judge is None else judge(rung)
        if reason:
            record(Attempt(rung.name, "skipped", reason=reason, predicted_bytes=predicted))
            continue
        before = oom.held(device)
        entry, value = _try(rung, attempt, device, meter, record)
        entry.predicted_bytes = predicted
        if entry.outcome == "oom":
            oom.release(device, before)
        record(entry)
        if value is not None:
            return Found(rung, value[0], attempts)
    raise LadderExhausted(exhausted_message(attempts))


def _try(
    rung: Rung[T],
    attempt: Callable[[T], R],
    device: torch.device,
    meter: Meter | None,
    record: Callable[[Attempt], None],
) -> tuple[Attempt, tuple[R] | None]:
    """One rung tried: its record, and the value in a tuple of one when it fits."""
    entry = Attempt(rung.name, "fits")
    started = time.perf_counter()
    value: tuple[R] | None = None
    if meter is not None:
        meter.reset_peaks()
    try:
        value = (attempt(own(rung.settings)),)
    except OutOfMemory as error:
        entry.outcome, entry.phase, entry.reason = "oom", error.phase, error.reason
    except Exception as error:
        failure = oom.describe(error, pressure=lambda: is_short(device))
        entry.outcome, entry.phase, entry.reason = "oom", "attempt", failure.text
        if not failure.fills(device):
            entry.outcome = "failed"
            record(entry)
            raise
    entry.seconds = round(time.perf_counter() - started, 3)
    if meter is not None:
        entry.peak_allocated_bytes, entry.peak_reserved_bytes = meter.peaks()
    return entry, value


def outcomes(rungs: Sequence[Rung[Any]], attempts: Sequence[Attempt]) -> str:
    """What became of each of these rungs, as its last attempt says, in words."""
    last = {entry.rung: entry for entry in attempts}
    found: dict[str, list[str]] = {}
    for rung in rungs:
        entry = last.get(rung.name)
        if entry is None and not rung.passed_over:
            found.setdefault("not tried by this run", []).append(rung.name)
        elif entry is None or (entry.outcome == "skipped" and entry.predicted_bytes is None):
            reason = rung.passed_over if entry is None else entry.reason
            found.setdefault("passed over", []).append(f"{rung.name} ({reason})")
        else:
            said = {"oom": "out of memory", "skipped": "predicted not to fit"}.get(entry.outcome, entry.outcome)
            found.setdefault(said, []).append(rung.name)
    return "; ".join(f"{said}: {', '.join(names)}" for said, names in found.items())


def exhausted_message(attempts: Sequence[Attempt]) -> str:
    """Every rung with its outcome, peak and reason, a line each."""
    lines = ["no rung of the ladder fits:"]
    for entry in attempts:
        peak = "" if entry.peak_allocated_bytes is None else f", peak {entry.peak_allocated_bytes / 2**20:.0f} MiB"
        where = f" in {entry.phase}" if entry.phase else ""
        lines.append(f"  {entry.rung}: {entry.outcome}{where}{peak}: {entry.reason}")
    return "\n".join(lines)
