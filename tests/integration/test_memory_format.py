"""The memory format where the settings leave it open."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from adaptive_trainer import Trainer, compose_config, predict
from adaptive_trainer.config.schema import Config, DataConfig, TrainerConfig
from adaptive_trainer.models import memory_format as layout
from adaptive_trainer.models.memory_format import channels_last_pays, to_channels_last
from adaptive_trainer.models.zoo import build_model

SMALL = [
    "model.name=mobilenetv3_small_050", "data=fakedata", "data.train.size=16", "data.val.size=4", "data.num_workers=0",
    "data.image_size=160", "trainer.batch_size=8", "trainer.epochs=1", "device=cpu", "memory.limit=none",
    "ladder=none",
]  # fmt: skip
NONE, TURING, HOPPER = (0, 0), (7, 5), (9, 0)


LONG = 50_000  # images of 224 x 224


@pytest.mark.parametrize(
    ("precision", "capability", "expected"),
    [
        ("fp32", NONE, False), ("bf16", NONE, False), ("fp32", (6, 1), False), ("fp16", (6, 1), False),
        ("fp32", TURING, False), ("fp16", TURING, True), ("fp32", HOPPER, True), ("bf16", (12, 0), True),
    ],
)  # fmt: skip
def test_card_and_precision_decide(precision: str, capability: tuple[int, int], expected: bool) -> None:
    config = Config(trainer=TrainerConfig(precision=precision))
    assert channels_last_pays(config, capability, images=LONG) is expected


def test_fp32_without_tf32_was_not_measured() -> None:
    for tf32, precision, expected in ((False, "fp32", False), (True, "fp32", True), (False, "bf16", True)):
        config = Config(trainer=TrainerConfig(tf32=tf32, precision=precision))
        assert channels_last_pays(config, HOPPER, images=LONG) is expected


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
    assert channels_last_pays(config, HOPPER, images=LONG**2) is expected


@pytest.mark.parametrize(
    ("images", "size", "expected"), [(LONG, 224, True), (LONG - 1, 224, False), (LONG, 223, False)]
)
def test_a_short_run_does_not_wait_for_its_kernels(images: int, size: int, expected: bool) -> None:
    assert channels_last_pays(Config(data=DataConfig(image_size=size)), HOPPER, images=images) is expected


def test_only_what_is_four_dimensional_is_laid_out_anew() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv3d(1, 4, (3, 3, 1)))
    to_channels_last(model)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[operator]
    assert all(t.is_contiguous() for t in (*model[1].state_dict().values(), *model[2].parameters()))


def test_a_network_with_other_convolutions_is_predicted() -> None:
    how = ["model.name=lambda_resnet26t", "trainer.precision=bf16", "trainer.batch_size=2", "data.image_size=128"]
    prediction = predict(compose_config([*how, "trainer.channels_last=true"]), device="rtx2060")
    assert prediction.reason == ""
    assert prediction.allocated_bytes is not None


def test_a_run_that_it_makes_faster_is_in_it_at_all_rungs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("adaptive_trainer.training.trainer.capability_of", lambda _: HOPPER)
    monkeypatch.setattr(layout, "LEAST_IN_RUN", 2 * 16 * 160**2)  # two epochs of 16 images
    last = "trainer.channels_last"
    for name, more, own, expected in [
        ("long", ["trainer.epochs=2"], False, True),
        ("short", [], False, False),
        ("asked", ["trainer.epochs=2", f"{last}=false"], False, False),
        ("own", ["trainer.epochs=2"], True, False),
        ("stages", ["phases.stages=[{name: a, overrides: []}, {name: b, overrides: []}]"], False, True),
        (
            "kept",
            [f"phases.stages=[{{name: a, overrides: []}}, {{name: b, overrides: ['{last}=false']}}]"],
            False,
            False,
        ),
    ]:
        make = (lambda config, classes: build_model(config, classes)) if own else None
        trainer = Trainer(compose_config([*SMALL, *more]), model=make, output_dir=tmp_path / name)
        result = trainer.fit()
        assert trainer.model is not None
        kernel = trainer.model.get_parameter("conv_stem.weight")
        assert kernel.is_contiguous(memory_format=torch.channels_last) is expected, name
        told = any(f"{last}=true" in event for event in result.events)
        assert told is (expected or name == "kept"), result.events
        assert [change for change in result.changes if "channels_last" in change.key] == []
        assert any(f"stage b: {last}=False" in event for event in result.events) is (name == "kept")


def test_it_is_the_same_at_all_rungs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("adaptive_trainer.training.trainer.capability_of", lambda _: HOPPER)
    monkeypatch.setattr(layout, "LEAST_IN_RUN", 0)
    limited = ["ladder=default", "memory.limit=80MiB", "trainer.batch_size=16"]
    trainer = Trainer(compose_config([*SMALL[:-2], *limited]), output_dir=tmp_path)
    assert trainer.fit().rung != "requested"
    assert trainer.model is not None
    assert trainer.model.get_parameter("conv_stem.weight").is_contiguous(memory_format=torch.channels_last)


def test_a_resumed_run_keeps_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("adaptive_trainer.training.trainer.capability_of", lambda _: HOPPER)
    for least, expected in ((0, True), (3 * 16 * 160**2, False)):  # in any run, and in one of three epochs
        monkeypatch.setattr(layout, "LEAST_IN_RUN", least)
        for epochs in (1, 3):
            more = [f"trainer.epochs={epochs}", "resume=auto"]
            trainer = Trainer(compose_config([*SMALL, *more]), output_dir=tmp_path / str(least))
            result = trainer.fit()
            assert result.metrics["epoch"] == epochs
            assert not any("another trainer.channels_last" in event for event in result.events), result.events
            assert trainer.model is not None
            kernel = trainer.model.get_parameter("conv_stem.weight")
            assert kernel.is_contiguous(memory_format=torch.channels_last) is expected
