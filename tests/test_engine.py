"""Which way updates run, on a machine without a card; with one, see `test_gpu.py`."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from adaptive_trainer import Trainer, compose_config
from adaptive_trainer.config import ModelConfig, RungConfig
from adaptive_trainer.errors import ConfigError
from adaptive_trainer.graph import GraphRefused, _unchanged_host
from adaptive_trainer.memory.capacity import limited
from adaptive_trainer.models import build_model
from adaptive_trainer.position import Position
from adaptive_trainer.process import private_process_state
from adaptive_trainer.transaction import TrainState
from adaptive_trainer.update import Update

POSITION = Position(0, 0, 0, 4)
SMALL = [
    "model.name=mobilenetv3_small_050", "data=fakedata", "data.train.size=16", "data.val.size=4", "data.num_workers=0",
    "data.image_size=32", "trainer.batch_size=4", "device=cpu", "memory.limit=none",
]  # fmt: skip


def train(folder: Path, engine: str) -> tuple[list[str], torch.Tensor]:
    trainer = Trainer(compose_config([*SMALL, f"trainer.engine={engine}"]), output_dir=folder)
    result = trainer.fit()
    assert trainer.model is not None
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return [event for event in result.events if event.startswith("engine")], weights


def test_a_graph_without_a_card_is_refused_with_the_reason_and_changes_nothing(tmp_path: Path) -> None:
    said, weights = train(tmp_path / "graph", "graph")
    assert said == ["engine: eager, not a CUDA graph: graphs need a CUDA card, and this is cpu"]
    for engine in ("auto", "eager"):
        quiet, same = train(tmp_path / engine, engine)
        assert quiet == []
        assert torch.equal(weights, same)


def test_an_unknown_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.engine=warp is none of auto, eager, graph, compile"):
        train(tmp_path, "warp")


class Changes(nn.Module):
    """Changes something on the host in every forward pass; `what` is the name of the method that does."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.body, self.what = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), what
        self.generator, self.torch_generator = random.Random(0), torch.Generator()
        self.count, self.history, self.counts, self.mean = 0, [1.0], {"n": 0}, torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        match self.what:
            case "count":
                self.count += 1
            case "history":
                self.history.append(2.0)
            case "counts":
                self.counts["n"] += 1
            case "mean":
                self.mean = 0.9 * self.mean + x.mean()
            case "generator":
                self.generator.random()
            case "torch_generator":
                torch.rand(1, generator=self.torch_generator)
            case "torch":
                torch.rand(1)
            case "python":
                random.random()
            case "numpy":
                np.random.rand()
        output: Tensor = self.body(x)
        return output


@pytest.mark.parametrize(
    "what",
    ["count", "history", "counts", "mean", "generator", "torch_generator", "torch", "python", "numpy", "nothing"],
)
@pytest.mark.parametrize("in_loss", [False, True])
def test_what_a_replay_would_not_repeat_is_seen(what: str, in_loss: bool) -> None:
    model = Changes("nothing" if in_loss else what)
    odd = Changes(what if in_loss else "nothing")
    state = TrainState(model, torch.optim.SGD(model.parameters()), GradScaler("cpu", enabled=False), None, POSITION)
    with limited(torch.device("cpu"), "none") as capacity:
        update = Update(
            state,
            odd,
            device=torch.device("cpu"),
            capacity=capacity,
            micro_batch_size=2,
            precision="fp32",
            clip_grad=None,
        )

        def attempt() -> None:
            with _unchanged_host(update):
                model(torch.zeros(2, 3, 2, 2))
                odd(torch.zeros(2, 3, 2, 2))

        if what == "nothing":
            attempt()
        else:
            with pytest.raises(GraphRefused, match="on the host"):
                attempt()


def test_channels_last_reaches_weights_images_and_nothing_else(tmp_path: Path) -> None:
    seen: list[bool] = []

    def watched(settings: ModelConfig, classes: int) -> nn.Module:
        model = build_model(settings, classes)
        model.register_forward_pre_hook(lambda _, inputs: seen.append(is_channels_last(inputs[0])))
        return model

    losses = {}
    for wanted in (True, False):
        seen.clear()
        trainer = Trainer(
            compose_config([*SMALL, f"trainer.channels_last={wanted}"]),
            model=watched,
            output_dir=tmp_path / str(wanted),
        )
        losses[wanted] = trainer.fit().metrics["train_loss"]
        assert trainer.model is not None
        assert any(is_channels_last(p) for p in trainer.model.parameters()) is wanted
        assert seen, "training and evaluation"
        assert set(seen) == {wanted}
    assert losses[True] == pytest.approx(losses[False], rel=0.02)  # the same, added up in another order


def is_channels_last(tensor: Tensor) -> bool:
    dense = tensor.is_contiguous()
    return tensor.ndim == 4 and not dense and tensor.is_contiguous(memory_format=torch.channels_last)


# ---- TF32 ------------------------------------------------------------------------------------------------------------


def precisions() -> tuple[str, ...]:
    on: Any = torch.backends
    newer = on.cuda.matmul.fp32_precision, on.cudnn.conv.fp32_precision, on.mkldnn.matmul.fp32_precision
    return (*newer, str(on.cuda.matmul.allow_tf32), str(on.cudnn.allow_tf32), torch.get_float32_matmul_precision())


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
@pytest.mark.parametrize(("wanted", "inside"), [("true", "tf32"), ("false", "ieee"), ("null", None)])
def test_tf32_is_as_asked_in_the_run_and_as_before_after_it(
    before: str, wanted: str, inside: str | None, tmp_path: Path
) -> None:
    seen: set[tuple[str, ...]] = set()

    def watched(*_: object) -> nn.Module:
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
        model.register_forward_pre_hook(lambda *_: seen.add(precisions()))
        return model

    default = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(before)
    try:
        outside = precisions()
        trainer = Trainer(compose_config([*SMALL, f"trainer.tf32={wanted}"]), model=watched, output_dir=tmp_path)
        used = trainer.fit().used
        assert precisions() == outside
    finally:
        torch.set_float32_matmul_precision(default)
    assert used.tf32 is {"true": True, "false": False, "null": None}[wanted]
    [found] = seen
    assert found[:2] == ((inside, inside) if inside else outside[:2])


def test_tf32_set_by_the_newer_interface_alone_is_put_back() -> None:
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        with private_process_state(deterministic=False, tf32=False):
            assert (matmul.fp32_precision, matmul.allow_tf32) == ("ieee", False)
        assert matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before


def test_no_rung_changes_tf32(tmp_path: Path) -> None:
    config = compose_config(SMALL)
    config.ladder.rungs = [RungConfig("fast", ["trainer.tf32=true"])]
    with pytest.raises(ConfigError, match=r"trainer\.tf32"):
        Trainer(config, output_dir=tmp_path).fit()
