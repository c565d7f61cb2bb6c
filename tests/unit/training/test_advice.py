"""Further options of a run: typed beside what was asked for, each gives the recipe that was predicted."""

from __future__ import annotations

import pytest
import torch

from adaptive_trainer import compose_config
from adaptive_trainer.config.overrides import typed
from adaptive_trainer.config.schema import Config
from adaptive_trainer.ladder.resolve import recipe
from adaptive_trainer.memory.limit import limited
from adaptive_trainer.planning.judge import Judge
from adaptive_trainer.training import advice
from adaptive_trainer.training.advice import advice as options_of

ASKED = ("model.name=test_resnet", "trainer.batch_size=16", "data.image_size=96")
USED = ("trainer.batch_size=8", "data.image_size=64")


def settings(*overrides: str) -> Config:
    return typed(compose_config([*ASKED, *overrides]))


@pytest.mark.slow
def test_an_option_is_typed_with_what_was_stepped_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "SECONDS", 1e9)
    used = settings(*USED)
    with limited(torch.device("cpu"), "64MiB") as capacity:
        judge = Judge(capacity, 10)
        options = options_of(recipe(settings()), used, judge)
        assert options
        for option in options:
            again = settings(*option.typed.split())
            assert judge.assess(again)[1] == option.need
