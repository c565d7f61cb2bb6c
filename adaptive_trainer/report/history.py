"""What a report needs of a run, heard while it goes on and bounded in size."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from adaptive_trainer.ladder.descent import Attempt, Outcome
from adaptive_trainer.report.listeners import Answers, Candidate, Listener, Sample

MOST_SAMPLES = 1000  # every other one is dropped above it, and half as many are kept from then on


@dataclass
class History(Listener):
    """Keeps samples of memory, loss and speed, epochs, moments out of memory, and the last evaluation.

    Attributes:
        samples: with the seconds since the run began, in order.
        epochs: their rows, of this process alone.
        out_of_memory: seconds, and peak of reserved bytes.
        room: bytes that training may use; None where that is not known.
    """

    clock: Callable[[], float] = time.perf_counter
    samples: list[tuple[float, Sample]] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    out_of_memory: list[tuple[float, int]] = field(default_factory=list)
    room: int | None = None
    last: Answers | None = None

    def __post_init__(self) -> None:
        """Begin to count seconds."""
        self._began = self.clock()
        self._every, self._heard = 1, 0

    def candidate(self, rung: Candidate) -> None:
        """Keep how much memory there is."""
        self.room = rung.room

    def attempt(self, entry: Attempt) -> None:
        """Keep an attempt, and when memory ran out."""
        self.attempts.append(entry)
        if entry.outcome == Outcome.OOM:
            self.out_of_memory.append((self.clock() - self._began, entry.peak_reserved_bytes or 0))

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """Keep an epoch's figures."""
        self.epochs.append(row)

    def sample(self, sample: Sample) -> None:
        """Keep a sample, or one of several where there are many."""
        self._heard += 1
        if self._heard % self._every:
            return
        self.samples.append((self.clock() - self._began, sample))
        if len(self.samples) >= MOST_SAMPLES:
            self.samples = self.samples[::2]
            self._every *= 2

    def epoch_of(self, score: float | None) -> int | None:
        """The epoch of the last network that has reached this accuracy first, or this loss with a minus."""
        last = self.epochs[-1:]
        rows = [row for row in self.epochs if all(row[key] == last[0][key] for key in ("stage", "model"))]
        return next((row["epoch"] for row in rows if score in (row["val_accuracy"], -row["val_loss"])), None)

    def answers(self, answers: Answers) -> None:
        """Keep the last evaluation."""
        self.last = answers
