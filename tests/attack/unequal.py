"""Ranks with simulated cards of different sizes, which take parts of each batch by `trainer.shares`.

Usage: torchrun --nproc-per-node=N -m tests.attack.unequal FOLDER LIMIT,LIMIT,... [OVERRIDE ...]
       python -m tests.attack.unequal FOLDER PART,PART,... [OVERRIDE ...]

Rank N trains on a card of the N-th limit. Without torchrun one rank trains, in micro-batches as large as these parts.
"""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

from torch import nn

from adaptive_trainer import Trainer, compose_config
from adaptive_trainer.config.schema import ModelConfig
from adaptive_trainer.data.position import shares
from adaptive_trainer.errors import AdaptiveTrainerError
from adaptive_trainer.step.program import Program

SETTINGS = [
    "data=fakedata", "data.train.size=50", "data.val.size=21", "data.num_workers=0", "data.image_size=64",
    "device=cpu", "trainer.epochs=2", "trainer.batch_size=12", "trainer.deterministic=true", "report=false",
]  # fmt: skip


def make_model(_: ModelConfig, num_classes: int) -> nn.Module:
    """About 4 MiB a sample, and next to nothing beside."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 8, 3, stride=2), nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )  # fmt: skip


def in_parts(weights: tuple[int, ...]) -> AbstractContextManager[Any]:
    """Updates on one rank whose micro-batches are the parts that several would have."""
    return patch.object(Program, "parts", lambda _, samples: [part for part in shares(samples, weights) if part])


def main() -> None:
    folder, numbers, *overrides = sys.argv[1:]
    rank = os.environ.get("RANK")
    limit = "none" if rank is None else numbers.split(",")[int(rank)]
    config = compose_config([*SETTINGS, f"memory.limit={limit}", f"output_dir={folder}", *overrides])
    try:
        with in_parts(tuple(map(int, numbers.split(",")))) if rank is None else nullcontext():
            Trainer(config, model=make_model).fit()
    except AdaptiveTrainerError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
