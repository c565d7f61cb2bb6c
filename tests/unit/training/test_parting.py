"""What parts of a batch are in proportion to; several ranks are in tests/integration/test_ranks.py."""

from __future__ import annotations

import pytest
import torch

from adaptive_trainer import compose_config
from adaptive_trainer.config.overrides import typed
from adaptive_trainer.config.schema import Config
from adaptive_trainer.data.position import shares
from adaptive_trainer.errors import ConfigError
from adaptive_trainer.ladder.resolve import recipe, resolve
from adaptive_trainer.memory.limit import limited
from adaptive_trainer.planning.device_spec import spec_of
from adaptive_trainer.planning.judge import Judge
from adaptive_trainer.planning.predictor import Predictor
from adaptive_trainer.planning.recomputation import Planner
from adaptive_trainer.training.parting import Parting

SMALL = ["model.name=resnet10t", "data.image_size=64", "trainer.batch_size=24", "ladder=none"]


def test_numbers_are_those_of_the_ranks() -> None:
    rung = resolve(compose_config([*SMALL, "trainer.shares=[8,16]"]))[0]
    with limited(torch.device("cpu"), "none") as capacity, pytest.raises(ConfigError, match=r"has 2 numbers.*here 1"):
        Parting(Judge(capacity, 10), 50, None).planned(rung)
    assert recipe(rung.settings).weights(1) == (1,)  # a plan is for the whole batch


@pytest.mark.parametrize("value", ["[]", "[0,0]", "[-1,3]", "[1.5,2]", "fair"])
def test_what_are_no_shares(value: str) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.shares"):
        resolve(compose_config([*SMALL, f"trainer.shares={value}"]))


def test_a_faster_card_has_more_of_the_batch() -> None:
    config = typed(compose_config(SMALL))

    def speed(card: str) -> float:
        named: Config = typed(compose_config([*SMALL, f"card={card}"]))
        return 1 / Planner(Predictor(spec_of(named), num_classes=10)).seconds(config)

    small, large = shares(24, (speed("t4"), speed("a100-40gb")))
    assert 0 < small < large
