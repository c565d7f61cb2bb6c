"""What a run came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from adaptive_trainer.ladder.descent import Attempt
from adaptive_trainer.ladder.rung import Change
from adaptive_trainer.recipe import Recipe


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
