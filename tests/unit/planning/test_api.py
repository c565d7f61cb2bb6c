"""`predict` in Python: settings, and networks of the user's own."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from adaptive_trainer import compose_config, predict
from adaptive_trainer.config.overrides import apply_overrides
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
    with pytest.raises(ConfigError, match=r"predict knows no precison; for a network there are micro_batch_size"):
        predict(network(), adamw, SHAPE, precison="bf16")  # type: ignore[call-overload]
    anything: Any = predict
    for wrong in ({"precision": "bf16"}, {"optimizer": adamw}, {"input_shape": SHAPE}):
        given = [wrong.pop(key, default) for key, default in (("optimizer", None), ("input_shape", ()))]
        with pytest.raises(ConfigError, match="are for a network"):
            anything(compose_config(), *given, **wrong)
    with pytest.raises(ConfigError, match=r"takes settings .* or a network, and was given a str"):
        anything("resnet50", adamw, SHAPE)
    with pytest.raises(ModelError, match="efficientnet_b9: did you mean"):
        predict(compose_config(["model.name=efficientnet_b9"]))


def test_what_is_around_makes_no_difference() -> None:
    plain = predict(network(), adamw, SHAPE, device="cpu").live_bytes
    with torch.inference_mode():
        assert predict(network(), adamw, SHAPE, device="cpu").live_bytes == plain
    with torch.no_grad(), torch.autograd.set_detect_anomaly(True):
        assert predict(network(), adamw, SHAPE, device="cpu").live_bytes == plain
    with initialize_config_dir(str(Path(__file__).parent), version_base="1.3"):  # a program of someone else's
        assert predict(network(), adamw, SHAPE, device="rtx2060").live_bytes is not None
        assert compose_config(["optimizer=sgd"]).optimizer.name == "sgd"
        assert apply_overrides(compose_config(), ["optimizer=lion"]).optimizer.name == "lion"
        assert compose(overrides=["+x=1"]).x == 1


def test_random_numbers_stay_where_they_are() -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x) * (random.random() + np.random.rand())
            torch.set_default_dtype(torch.float64)
            return out

    model = Draws()
    states = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
    assert predict(model, adamw, (8, 4), device="cpu").reason == ""
    assert (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()) == states
    assert torch.get_default_dtype() is torch.float32


def test_a_loss_that_uses_the_network_itself_is_unknown() -> None:
    model = network()

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        return output.mean() + sum(p.square().sum() for p in model.parameters())

    found = predict(model, adamw, SHAPE, loss=loss, device="cpu")
    assert found.reason == "the loss or the network uses these very parameters"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_attention_with_dropout_keeps_no_matrix_on_cuda() -> None:
    class Attention(nn.Module):
        def __init__(self, dropout: float) -> None:
            super().__init__()
            self.layer, self.dropout = nn.Linear(64, 64), dropout

        def forward(self, x: Tensor) -> Tensor:
            q = self.layer(x).unflatten(-1, (4, 16)).transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=self.dropout).mean((1, 2))

    plain, dropped = (predict(Attention(p), adamw, (2, 1024, 64), device="t4").live_bytes for p in (0.0, 0.1))
    assert plain is not None
    assert dropped is not None
    assert dropped < 1.05 * plain


def test_lstms_and_strange_optimizers_are_unknown() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(8, 8, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x)[0][:, -1]
            return out

    reason = predict(Recurrent(), adamw, (4, 6, 8), device="t4").reason
    assert reason == "the memory that kernels of LSTMs take is not known"
    stranger = adamw(network().parameters())
    assert "none of the network's parameters" in predict(network(), stranger, SHAPE, device="cpu").reason
