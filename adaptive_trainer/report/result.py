"""What a run came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from adaptive_trainer.ladder.descent import Attempt
from adaptive_trainer.ladder.rung import Change
from adaptive_trainer.memory.usage import format_bytes
from adaptive_trainer.recipe import Recipe, in_words
from adaptive_trainer.utils.tables import html


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to: plain data.

    Attributes:
        outcome: `trained`.
        rung: the rung that fits at the end.
        requested, used: what was asked for and what trained.
        changes: every setting that differs, and why.
        events: what else was decided on the way, in words, in order.
        images: how they were normalised, cropped and resampled: `mean`, `std`, ... of the settings of `data`.
        metrics: of the last evaluation, plus the best one.
        attempts: every rung tried, in order.
        stages: for staged training, name, rung and metrics of each stage.
        output_dir: where the record and the checkpoints are.
        ranks: device and peak of each.
    """

    outcome: str
    rung: str
    requested: Recipe
    used: Recipe
    changes: list[Change]
    events: list[str]
    metrics: dict[str, float]
    attempts: list[Attempt]
    output_dir: str
    stages: list[dict[str, Any]] = field(default_factory=list)
    images: dict[str, Any] = field(default_factory=dict)
    ranks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def world_size(self) -> int:
        """How many ranks have trained."""
        return max(1, len(self.ranks))

    def _repr_html_(self) -> str:
        """What a notebook shows: rung and metrics, the rungs tried, what changed and why."""
        shown = {name: value for name, value in self.metrics.items() if name.startswith(("val_", "test_"))}
        metrics = ", ".join(f"{name} {value:.3f}" for name, value in shown.items())
        attempts: list[Sequence[object]] = [("rung", "outcome", "predicted", "peak")]
        for entry in self.attempts:
            sizes = (entry.predicted_bytes, entry.peak_allocated_bytes)
            attempts.append((entry.rung, entry.outcome, *(format_bytes(size) if size else None for size in sizes)))
        changes: list[Sequence[object]] = [("setting", "asked", "used", "why")]
        for change in self.changes:
            values = (in_words(change.key, value) for value in (change.asked, change.used))
            changes.append((change.key, *values, change.why))
        head = f"<b>{self.outcome} on rung {escape(self.rung)}</b>: {escape(f'{self.used}; {metrics}')}"
        return f"<p>{head}</p>{html(attempts)}{html(changes) if self.changes else ''}"


@dataclass(frozen=True, slots=True)
class OfClass:
    """How the images of one class fare; 0 where a share is not defined."""

    name: str
    images: int
    precision: float
    recall: float
    f1: float
