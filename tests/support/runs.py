"""Small trainings in a known state, for tests of updates."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from adaptive_trainer.config.schema import ScheduleConfig
from adaptive_trainer.data.position import Position
from adaptive_trainer.memory.limit import Capacity
from adaptive_trainer.models.optimizers import Schedule, build_schedule
from adaptive_trainer.recipe import Recipe
from adaptive_trainer.step.program import Accumulate
from adaptive_trainer.step.undo import TrainState
from adaptive_trainer.step.update import Update
from tests.support.faults import Net

CPU = torch.device("cpu")
METERS = ("loss", "correct", "seen", "skipped")

OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4),
    "adamw-single": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False),
    "adamw-foreach": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True),
    "adamw-fused": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True),
    "lion": lambda model: create_optimizer_v2(model, "lion", lr=1e-3, weight_decay=0.1),
}


@dataclass(frozen=True)
class Case:
    """One combination of what an update can be made of; `accumulate` makes micro-batches of 4 and 3 samples."""

    optimizer: str
    precision: str
    warm: bool
    ema: bool = True
    clip: bool = True
    accumulate: bool = True
    scale: float = 2.0**10
    model: str = ""
    image_size: int = 8

    def __str__(self) -> str:
        on = [name for name in ("warm", "ema", "clip", "accumulate") if getattr(self, name)]
        scale = ["overflow"] if self.scale > 2**20 else []
        return " ".join([*([self.model] if self.model else []), self.optimizer, self.precision, *scale, *on])


@dataclass
class Run:
    """A training that has come to the update under test."""

    case: Case
    capacity: Capacity
    state: TrainState
    schedule: Schedule
    images: Tensor
    labels: Tensor

    def update(self, micro_batch_size: int | None = None) -> Update:
        """What a rung with this micro-batch size runs its updates with."""
        return Update(
            self.state,
            nn.functional.cross_entropy,
            Recipe(
                batch_size=7,
                micro_batch_size=micro_batch_size or (4 if self.case.accumulate else 7),
                precision=self.case.precision,
                clip_grad=0.5 if self.case.clip else None,
            ),
            device=CPU,
            capacity=self.capacity,
        )

    def advance(
        self,
        update: Update,
        fault: AbstractContextManager[Any] | None = None,
        accumulate: Accumulate | None = None,
    ) -> None:
        """One update on the samples that come next, at the learning rate of its number."""
        self.schedule.apply(self.state.position.schedule_step(7))
        start = self.state.position.cursor
        images, labels = self.images[start : start + 7].clone(), self.labels[start : start + 7].clone()
        with fault or nullcontext():
            update.run(images, labels, samples=7, accumulate=accumulate)


def start(case: Case, capacity: Capacity, network: Callable[[], nn.Module] | None = None) -> Run:
    """The same run in the same state each time it is called."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = timm.create_model(case.model, num_classes=5, drop_path_rate=0.2) if case.model else (network or Net)()
    state = TrainState(
        model,
        OPTIMIZERS[case.optimizer](model),
        GradScaler("cpu", init_scale=case.scale, growth_interval=2, enabled=case.precision == "fp16"),
        ModelEmaV3(model, decay=0.9) if case.ema else None,
        Position(0, 0, 0, 70),
        meters={name: torch.zeros((), dtype=torch.float64) for name in METERS},
    )
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(70, 3, case.image_size, case.image_size, generator=generator)
    cosine = ScheduleConfig(name="cosine", warmup_epochs=0.5)
    schedule = build_schedule(state.optimizer, cosine, lr=0.01, epochs=2, updates_per_epoch=10)
    run = Run(case, capacity, state, schedule, images, torch.randint(5, (70,), generator=generator))
    if case.warm:
        run.advance(run.update())
    schedule.apply(state.position.schedule_step(7))
    return run
