"""What a run consists of: its phases, and what these share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from adaptive_trainer.config.overrides import apply_overrides
from adaptive_trainer.config.schema import Config
from adaptive_trainer.data.datasets import DataSets
from adaptive_trainer.ladder.resolve import resolve
from adaptive_trainer.ladder.rung import Rung
from adaptive_trainer.planning.judge import Judge
from adaptive_trainer.report.record import Record
from adaptive_trainer.training.epochs.stopping import StopSignal
from adaptive_trainer.training.session import Parts


@dataclass(frozen=True)
class Phase:
    """One stage of a run: its settings, and the ladder that they stand for."""

    name: str
    settings: DictConfig
    ladder: tuple[Rung[Config], ...]

    @property
    def asked(self) -> Config:
        """The settings of rung 0."""
        return self.ladder[0].settings

    def overridden(self, override: str) -> Phase:
        """The phase with another setting."""
        settings = apply_overrides(self.settings, [override])
        return Phase(self.name, settings, resolve(settings))


@dataclass(frozen=True)
class Run:
    """What all phases share.

    Attributes:
        accept: called once nothing is refused any more: then the record of an earlier run may go.
    """

    parts: Parts
    data: DataSets
    record: Record
    stop: StopSignal
    judge: Judge
    accept: Callable[[], Any]
