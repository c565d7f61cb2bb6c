"""Techniques that save memory: each has its setting, and off is as if it had never been on."""

from __future__ import annotations

from typing import Any

import pytest

from adaptive_trainer.config.schema import Config, ModelConfig, TrainerConfig
from adaptive_trainer.ladder.resolve import recipe
from adaptive_trainer.models.recomputing.following import is_offloading, own_forward, plan_in, suspended
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
    both = recipe(Config(trainer=TrainerConfig(recompute="blocks", offload=True)))
    assert str(both).endswith(", activations recomputed, activations offloaded")
    assert used.no_step_down_to(both) == ""
    assert used.no_step_down_to(recipe(Config())) == "it would keep all activations"


def test_offloaded_activations_are_not_compiled() -> None:
    model = build_model(ModelConfig("torchvision/resnet18"), 2)
    apply_savers(model, TrainerConfig(offload=True))
    assert "offload" in compile_refusal(model)


@pytest.mark.parametrize("settings", [{"recompute": "blocks"}, {"offload": True}, {}])
def test_what_is_suspended_comes_back(settings: dict[str, Any]) -> None:
    model = build_model(ModelConfig("torchvision/resnet18"), 2)
    apply_savers(model, TrainerConfig(**settings))
    forward = model.__dict__.get("forward")
    with suspended(model):
        assert "forward" not in model.__dict__
    assert model.__dict__.get("forward") is forward


def test_techniques_come_and_go_without_each_other() -> None:
    """The two share a wrapper of the network's forward pass, and each leaves the other's setting as it is."""
    model = build_model(ModelConfig("torchvision/resnet18"), 2)
    for recomputes, offloads in ((True, False), (True, True), (False, True), (True, True), (True, False)):
        apply_savers(model, TrainerConfig(recompute="blocks" if recomputes else "none", offload=offloads))
        assert plan_in(model).is_empty is not recomputes
        assert is_offloading(model) is offloads
        assert own_forward(model) is None
