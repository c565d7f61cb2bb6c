"""The memory format where the settings leave it open."""

from __future__ import annotations

import pytest
import torch
from omegaconf import DictConfig
from torch import nn

from adaptive_trainer import compose_config, predict
from adaptive_trainer.config import Config, DataConfig, TrainerConfig, typed
from adaptive_trainer.ladder import resolve
from adaptive_trainer.layout import to_channels_last, uses_channels_last, with_layout
from adaptive_trainer.planning import Planner
from adaptive_trainer.target import target_of

NONE, TURING, HOPPER = (0, 0), (7, 5), (9, 0)


@pytest.mark.parametrize(
    ("precision", "capability", "by_name", "expected"),
    [
        ("fp32", NONE, True, False), ("bf16", NONE, True, False),
        ("fp32", (6, 1), True, False), ("fp16", (6, 1), True, False),
        ("fp32", TURING, True, False), ("fp16", TURING, True, True),
        ("fp32", HOPPER, True, True), ("bf16", (12, 0), True, True),
        ("fp32", HOPPER, False, False), ("bf16", HOPPER, False, False),
    ],
)  # fmt: skip
def test_where_it_is_left_open_card_precision_and_network_decide(
    precision: str, capability: tuple[int, int], by_name: bool, expected: bool
) -> None:
    assert (
        uses_channels_last(Config(trainer=TrainerConfig(precision=precision)), capability, by_name=by_name) is expected
    )
    for asked in (True, False):
        config = Config(trainer=TrainerConfig(precision=precision, channels_last=asked))
        assert uses_channels_last(config, capability, by_name=by_name) is asked


def test_fp32_without_tf32_was_not_measured() -> None:
    for tf32, precision, expected in ((False, "fp32", False), (True, "fp32", True), (False, "bf16", True)):
        config = Config(trainer=TrainerConfig(tf32=tf32, precision=precision))
        assert uses_channels_last(config, HOPPER, by_name=True) is expected


@pytest.mark.parametrize(
    ("batch", "micro", "size", "expected"),
    [
        (8, None, 160, True), (8, None, 159, False), (24, 4, 160, False), (24, 4, 227, True),
        (1, None, 452, False), (1, None, 453, True), ("max", None, 32, True),
    ],
)  # fmt: skip
def test_where_little_is_computed_at_a_time_it_does_not_pay(
    batch: int | str, micro: int | None, size: int, expected: bool
) -> None:
    config = Config(trainer=TrainerConfig(batch_size=batch, micro_batch_size=micro), data=DataConfig(image_size=size))
    assert uses_channels_last(config, HOPPER, by_name=True) is expected


def test_only_what_is_four_dimensional_is_laid_out_anew() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv3d(1, 4, (3, 3, 1)))
    to_channels_last(model)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[operator]
    assert all(t.is_contiguous() for t in (*model[1].state_dict().values(), *model[2].parameters()))


def test_a_network_with_other_convolutions_is_predicted() -> None:
    how = ["model.name=lambda_resnet26t", "trainer.precision=bf16", "trainer.batch_size=2", "data.image_size=128"]
    prediction = predict(settings(*how), device="rtx2060")
    assert prediction.reason == ""
    assert prediction.allocated_bytes is not None


def settings(*overrides: str) -> DictConfig:
    return compose_config(["ladder=default", *overrides])


@pytest.mark.parametrize(
    ("asked", "capability", "expected"),
    [
        ("fp32", TURING, False), ("fp32", HOPPER, True), ("fp16", TURING, True),
    ],
)  # fmt: skip
def test_it_is_the_same_at_all_rungs(asked: str, capability: tuple[int, int], expected: bool) -> None:
    cfg = with_layout(settings(f"trainer.precision={asked}"), capability, by_name=True)
    rungs = [rung.settings.trainer for rung in resolve(cfg)]
    assert {trainer.channels_last for trainer in rungs} == {expected}
    assert "fp16" in {trainer.precision for trainer in rungs}


def test_what_is_asked_for_stays() -> None:
    cfg = settings("trainer.channels_last=false")
    assert with_layout(cfg, HOPPER, by_name=True) is cfg


def test_predictions_decide_as_training_does() -> None:
    on_card, on_cpu = (Planner(target_of(typed(settings(name)))) for name in ("device=auto", "device=cpu"))
    half, full = (typed(settings(f"trainer.precision={precision}")) for precision in ("bf16", "fp32"))
    for planner in (on_card, on_cpu):
        for config in (half, full):
            expected = uses_channels_last(config, planner.target.capability, by_name=True)
            assert planner.key(config)["channels_last"] is expected
    assert on_cpu.key(half)["channels_last"] is False
    own = Planner(on_card.target, make_model=lambda *_: None)  # type: ignore[arg-type]
    assert own.key(half)["channels_last"] is False
