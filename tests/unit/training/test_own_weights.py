"""A training that starts from the weights of an earlier one, with the same classes or with others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from adaptive_trainer import CheckpointError, ConfigError, Trainer, UserError, compose_config, load_model
from adaptive_trainer.config.schema import ModelConfig
from adaptive_trainer.training.own_weights import own_weights

SMALL = (
    "model.name=test_resnet", "data.image_size=32", "data.num_workers=0", "trainer.batch_size=8", "memory.limit=none",
    "ladder=none",
)  # fmt: skip
FROZEN = ("optimizer.lr=0", "optimizer.weight_decay=0")  # what is trained stays as it began, but for BatchNorm


class Images(Dataset[Any]):
    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.targets = [index % len(classes) for index in range(24)]

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(index)), self.targets[index]


def fit(folder: Path, classes: Sequence[str], *overrides: str, **how: Any) -> Any:
    trainer = Trainer(compose_config([*SMALL, *overrides]), train_data=Images(classes), output_dir=folder, **how)
    return trainer, trainer.fit()


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    fit(folder, ("cat", "dog", "hen"), "data.mean=[0.1,0.2,0.3]", "data.std=[0.4,0.5,0.6]", "trainer.ema_decay=0.5")
    return folder / "checkpoints" / "best.pt"


def parameters(network: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def test_the_same_classes_take_all_of_it(best: Path, tmp_path: Path) -> None:
    trainer, result = fit(tmp_path, ("cat", "dog", "hen"), *FROZEN, f"model.weights={best}")
    wanted = parameters(load_model(best))
    found = parameters(trainer.model)
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []
    assert any("its classes are the same" in event for event in result.events)
    assert result.images["mean"] == [0.1, 0.2, 0.3]  # as the network was trained


@pytest.mark.long
@pytest.mark.parametrize(
    "classes", [("cat", "dog", "hen", "pig"), ("cat", "dog"), ("hen", "dog", "cat"), ("a", "b", "c")]
)
def test_with_other_classes_the_head_starts_anew(classes: tuple[str, ...], best: Path, tmp_path: Path) -> None:
    trainer, result = fit(tmp_path, classes, *FROZEN, f"model.weights={best}")
    wanted = parameters(load_model(best))
    found = parameters(trainer.model)
    other = [
        name for name in wanted if found[name].shape != wanted[name].shape or not torch.equal(found[name], wanted[name])
    ]
    assert other == ["fc.weight", "fc.bias"]
    assert len(found["fc.weight"]) == len(classes)
    assert any("the classes are others, so its last layer starts anew" in event for event in result.events)


def test_what_is_typed_beats_what_the_weights_were_trained_with(best: Path, tmp_path: Path) -> None:
    _, result = fit(tmp_path, ("cat", "dog"), f"model.weights={best}", "data.mean=[0.7,0.7,0.7]")
    assert (result.images["mean"], result.images["std"]) == ([0.7] * 3, [0.4, 0.5, 0.6])


def test_a_network_of_the_callers_own(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.body, self.last = nn.Linear(3, 5), nn.Linear(5, classes)
            self.scale = float(self.body.weight.detach().sum()) and 1.0  # which has no value without memory

        def forward(self, x: Tensor) -> Any:
            return self.last(self.body(x.mean((2, 3))) * self.scale)

    def make(_: Any, classes: int) -> nn.Module:
        return Net(classes)

    first, _ = fit(tmp_path / "first", ("a", "b"), model=make)
    path = tmp_path / "first" / "checkpoints" / "best.pt"
    second, _ = fit(tmp_path / "second", ("a", "b", "c"), *FROZEN, f"model.weights={path}", model=make)
    wanted, found = (parameters(each.model) for each in (first, second))
    assert torch.equal(found["body.weight"], wanted["body.weight"])
    assert found["last.weight"].shape == (3, 5)


@pytest.mark.long
def test_a_resumed_run_does_not_need_them(best: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied.pt"
    copied.write_bytes(best.read_bytes())
    fit(tmp_path / "run", ("cat", "dog"), f"model.weights={copied}")
    copied.unlink()
    _, result = fit(tmp_path / "run", ("cat", "dog"), "resume=auto", "trainer.epochs=2")
    assert result.outcome == "trained"
    assert any("resumed at epoch 2" in event for event in result.events)
    assert not any("starts from the weights" in event for event in result.events)


@pytest.mark.parametrize(
    ("overrides", "kind", "said"),
    [
        (
            ["model.name=test_vit"],
            ConfigError,
            "is of test_resnet, and model.name=test_vit; type model.name=test_resnet",
        ),
        (["+model.kwargs.layers=[1,1,1,2]"], CheckpointError, "does not fit test_resnet"),
        (["model.pretrained=true"], ConfigError, "are two beginnings; leave one out"),
        (["model.weights=gone.pt"], CheckpointError, "there is no checkpoint gone.pt"),
    ],
)
def test_mistakes(overrides: list[str], kind: type[UserError], said: str, best: Path, tmp_path: Path) -> None:
    with pytest.raises(kind, match=said):
        fit(tmp_path, ("cat", "dog"), f"model.weights={best}", *overrides)


def test_a_smaller_model_below_does_not_start_from_them(
    best: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Greedy(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Any:
            return self.network(x)

    def make(config: ModelConfig, classes: int) -> nn.Module:
        network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, classes))
        return network if config.name == "test_vit" else Greedy(network)

    fit(tmp_path / "first", ("a", "b"), model=make)
    path = tmp_path / "first" / "checkpoints" / "best.pt"
    rungs = "ladder.rungs=[{name:small,overrides:['model.name=test_vit']}]"

    def greedy(config: ModelConfig, classes: int) -> nn.Module:
        network = make(config, classes)
        if config.name != "test_vit":
            network.register_forward_pre_hook(refuse)
        return network

    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Injected")

    caplog.set_level(logging.INFO)
    _, result = fit(tmp_path / "second", ("a", "b"), f"model.weights={path}", rungs, model=greedy)
    assert result.rung == "small"
    assert any(event == f"test_vit does not start from model.weights={path}" for event in result.events)


def test_no_stage_may_set_them(best: Path, tmp_path: Path) -> None:
    stage = f"phases.stages=[{{name:a,overrides:['model.weights={best}']}}]"
    with pytest.raises(ConfigError, match=r"model\.weights"):
        fit(tmp_path, ("cat", "dog"), stage)


def test_nothing_is_drawn_for_it(best: Path) -> None:
    """The numbers that a training draws are the same with and without."""
    before = torch.get_rng_state()
    found = own_weights(ModelConfig(name="test_resnet", weights=str(best)), ("cat", "dog"))
    assert found is not None
    assert found.head == {"fc.weight", "fc.bias"}
    assert torch.equal(torch.get_rng_state(), before)
