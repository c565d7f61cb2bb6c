"""`predict` in Python: settings, and networks of the user's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptive_trainer import compose_config, predict
from adaptive_trainer.errors import ConfigError, ModelError

MiB = 2**20
SHAPE = (8, 3, 32, 32)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(64, 10),
    )  # fmt: skip


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1, fused=True)


def test_settings() -> None:
    small = ["model.name=mobilenetv3_small_050", "data.image_size=64"]
    by_settings = predict(compose_config([*small, "card=rtx2060"]))
    assert by_settings.live_bytes is not None
    assert by_settings.live_bytes > 5 * MiB
    assert predict(compose_config(small), device="rtx2060").live_bytes == by_settings.live_bytes
    on_the_cpu = predict(compose_config(small), device="cpu")
    assert on_the_cpu.live_bytes not in (None, by_settings.live_bytes)


def test_a_network_and_its_optimizer_stay_as_they_are() -> None:
    model = network()
    optimizer = adamw(model.parameters())
    model(torch.randn(SHAPE)).sum().backward()
    optimizer.step()
    before = [t.clone() for t in model.state_dict().values()]
    rng = torch.get_rng_state()
    found = predict(model, optimizer, SHAPE, device="cpu")
    assert found.reason == ""
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert all(parameter.grad is not None and parameter.device.type == "cpu" for parameter in model.parameters())
    assert len(optimizer.state) == len(list(model.parameters()))
    assert torch.equal(rng, torch.get_rng_state())
    assert found.live_bytes == predict(model, adamw, SHAPE, device="cpu").live_bytes


def test_each_setting_of_a_network_counts() -> None:
    whole = predict(network(), adamw, SHAPE, device="t4").live_bytes
    parts = predict(network(), adamw, SHAPE, micro_batch_size=4, device="t4").live_bytes
    half = predict(network(), adamw, SHAPE, precision="bf16", device="t4").live_bytes
    plain = predict(network(), torch.optim.SGD, SHAPE, device="t4").live_bytes
    assert None not in (whole, parts, half, plain)
    assert len({whole, parts, half, plain}) == 4

    def squared(output: Tensor, labels: Tensor) -> Tensor:
        return (output.square() * output.exp()).mean()

    assert predict(network(), adamw, (8, 3, 8, 8), loss=squared, device="t4").reason == ""


class Looks(nn.Module):
    """Does other things for other values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out if out.sum() > 0 else -out


def test_a_network_that_looks_at_values_is_unknown() -> None:
    found = predict(Looks(), adamw, (8, 4), device="cpu")
    assert found.live_bytes is None
    assert "DataDependent" in found.reason


def test_what_makes_no_sense() -> None:
    with pytest.raises(ConfigError, match=r"input shape \(8,\) is none: samples first"):
        predict(network(), adamw, (8,))
    with pytest.raises(ConfigError, match=r"precision='fp8' is none of fp32, bf16, fp16"):
        predict(network(), adamw, SHAPE, precision="fp8")
    with pytest.raises(ConfigError, match="micro_batch_size=9 must be from 1 to the 8 samples"):
        predict(network(), adamw, SHAPE, micro_batch_size=9)
    with pytest.raises(ConfigError, match="rtx9999"):
        predict(compose_config(), device="rtx9999")
    with pytest.raises(ModelError, match="efficientnet_b9: did you mean"):
        predict(compose_config(["model.name=efficientnet_b9"]))
