"""Techniques that save memory: each has its setting, and off is as if it had never been on."""

from __future__ import annotations

import pytest

from adaptive_trainer.config.schema import Config, ModelConfig, TrainerConfig
from adaptive_trainer.ladder.resolve import recipe
from adaptive_trainer.models.savers import SAVERS, Saver, apply_savers, compile_refusal, saver_settings
from adaptive_trainer.models.zoo import build_model

ON: dict[str, object] = {"recompute": "blocks"}  # what switches a technique on, where that is not `true`


def test_every_technique_has_a_setting_of_its_own() -> None:
    keys = [saver.KEY for saver in SAVERS]
    assert len(set(keys)) == len(keys)
    assert saver_settings(TrainerConfig()).keys() == set(keys)


@pytest.mark.parametrize("saver", SAVERS, ids=lambda saver: saver.KEY)
def test_what_is_switched_off_leaves_nothing(saver: Saver) -> None:
    model, on, off = build_model(ModelConfig("torchvision/resnet18"), 2), TrainerConfig(), TrainerConfig()
    setattr(on, saver.KEY, ON.get(saver.KEY, True))
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    apply_savers(model, on)
    assert isinstance(compile_refusal(model), str)
    apply_savers(model, off)
    assert compile_refusal(model) == ""
    assert [module.__dict__.get("forward") for module in model.modules()] == forwards


def test_every_technique_is_part_of_the_recipe() -> None:
    used = recipe(Config(trainer=TrainerConfig(recompute="blocks")))
    assert {technique.key for technique in used.techniques} == {saver.KEY for saver in SAVERS}
    assert used.reported().keys() >= {saver.KEY for saver in SAVERS}
    assert str(used).endswith(", activations recomputed")
    assert used.no_step_down_to(recipe(Config())) == "it would keep all activations"


def test_recomputed_blocks_are_not_compiled() -> None:
    model, on = build_model(ModelConfig("torchvision/resnet18"), 2), TrainerConfig(recompute="blocks")
    apply_savers(model, on)
    assert "recompute" in compile_refusal(model)
