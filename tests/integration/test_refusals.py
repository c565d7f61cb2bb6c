"""What a network refuses on the way down: its override is left out, and what follows is kept, in plans and training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from adaptive_trainer import Trainer, compose_config
from adaptive_trainer.cli.plan import run_plan
from adaptive_trainer.config.schema import RungConfig
from adaptive_trainer.errors import LadderExhausted
from adaptive_trainer.ladder.resolve import recipe, resolve
from adaptive_trainer.utils.device import precision_refusal

MiB = 2**20
Steps = dict[str, list[str]]
VIT = ["model.name=vit_tiny_patch16_224", "+model.kwargs.depth=1", "data.image_size=224", "trainer.batch_size=8"]
NORMED = ["model.name=test_efficientnet", "data.image_size=32", "trainer.batch_size=8"]
HALF = {"amp": ["trainer.precision=fp16"], "parts": ["trainer.micro_batch_size=4"]}

# what is asked for, the rungs, and of each what is left
CASES: dict[str, tuple[list[str], Steps, dict[str, list[str]], str]] = {
    "size": (
        VIT,
        {"small": ["data.image_size=192"], "smaller": ["data.image_size=160"], **HALF},
        {"small": [], "smaller": [], **HALF},
        "data.image_size=192 is left out: vit_tiny_patch16_224 refuses data.image_size=192: ",
    ),
    "a part of a rung": (
        VIT,
        {"small": ["data.image_size=192", "trainer.batch_size=4", "trainer.precision=bf16"]},
        {"small": ["trainer.batch_size=4", "trainer.precision=bf16"]},
        "data.image_size=192 is left out: vit_tiny_patch16_224 refuses data.image_size=192: ",
    ),
    "one sample": (
        NORMED,
        {"one": ["trainer.micro_batch_size=1"], "small": ["data.image_size=24"], **HALF},
        {"one": [], "small": ["data.image_size=24"], **HALF},
        "trainer.micro_batch_size=1 is left out: trainer.micro_batch_size=1 leaves BatchNorm a single sample",
    ),
    "batch of one": (
        NORMED,
        {"one": ["trainer.batch_size=1"], **HALF},
        {"one": [], **HALF},
        "trainer.batch_size=1 is left out: trainer.batch_size=1 leaves BatchNorm a single sample",
    ),
    "larger network": (
        NORMED,
        {"wide": ["model.name=resnet10t"], **HALF},
        {"wide": [], **HALF},
        "model.name=resnet10t is left out: it is no step down from test_efficientnet: ",
    ),
    "network and size": (
        NORMED,
        {"fixed": ["model.name=vit_tiny_patch16_224"], **HALF},
        {"fixed": [], **HALF},
        "model.name=vit_tiny_patch16_224 is left out: vit_tiny_patch16_224 refuses data.image_size=32: ",
    ),
    "settings of another network": (
        ["model.name=test_vit", "+model.kwargs.img_size=64", "data.image_size=64", "trainer.batch_size=8"],
        {"other": ["model.name=test_efficientnet"], **HALF},
        {"other": [], **HALF},
        "model.name=test_efficientnet is left out: test_efficientnet does not take model.kwargs={'img_size': 64}: ",
    ),
    "settings of another optimizer": (
        [*NORMED, "+optimizer.kwargs.betas=[0.9,0.95]"],
        {"plain": ["optimizer.kwargs={betas: [2.0, 0.9]}"], **HALF},
        {"plain": [], **HALF},
        "optimizer.kwargs={betas: [2.0, 0.9]} is left out: optimizer.name=adamw with optimizer.kwargs=",
    ),
}


def settings(overrides: list[str], steps: Steps, limit: str) -> DictConfig:
    cfg = compose_config([
        "data=fakedata", "data.train.size=16", "data.val.size=8", "data.num_workers=0", "device=cpu", "ladder=none",
        f"memory.limit={limit}", *overrides,
    ])  # fmt: skip
    cfg.ladder.rungs = [RungConfig(name, texts) for name, texts in steps.items()]
    return cfg


def attempts(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "attempts.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("asked", "steps", "left", "reason"), CASES.values(), ids=CASES)
def test_a_refused_override_is_left_out_and_what_follows_is_kept(
    asked: list[str], steps: Steps, left: dict[str, list[str]], reason: str, tmp_path: Path
) -> None:
    """In 2 MiB nothing fits, so all rungs are come to; the plan and the training say the same of each."""
    cfg = settings(asked, steps, "2MiB")
    kept = {name: texts for name, texts in left.items() if texts}
    expected = {rung.name: str(recipe(rung.settings)) for rung in resolve(settings(asked, kept, "2MiB"))}
    rows = {row.rung: row for row in run_plan(cfg, tmp_path / "plan").rows}
    tried, events = exhausted(cfg, tmp_path / "out")
    assert list(rows) == list(tried) == ["requested", *steps]
    assert {name: rows[name].recipe for name in expected} == expected
    for name, texts in left.items():
        assert (rows[name].verdict == "skipped") == (not texts), name
        assert (tried[name]["predicted_bytes"] is None) == (not texts), name
    name = next(name for name, texts in left.items() if texts != steps[name])
    if left[name]:
        assert any(event.startswith(f"rung {name}: {reason}") for event in events)
    else:
        assert rows[name].reason.startswith(reason)
        assert tried[name]["reason"].startswith(reason)


def exhausted(cfg: DictConfig, folder: Path, **how: Any) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The attempts and the events of a training for which nothing is small enough."""
    with pytest.raises(LadderExhausted):
        Trainer(cfg, output_dir=folder, **how).fit()
    found = [json.loads(line) for line in (folder / "attempts.jsonl").read_text().splitlines()]
    return {entry["rung"]: entry for entry in found}, json.loads((folder / "result.json").read_text())["events"]


def test_training_lands_on_a_rung_below_the_refused_ones(tmp_path: Path) -> None:
    steps = {"small": ["data.image_size=192"], **HALF}
    rows = run_plan(settings(VIT, steps, "1GiB"), tmp_path / "plan").rows
    limit = 2 + (rows[-1].min_capacity_bytes or 0) // MiB
    cfg = settings([*VIT, "trainer.epochs=1"], steps, f"{limit}MiB")
    result = Trainer(cfg, output_dir=tmp_path / "out").fit()
    assert result.rung == "parts"
    assert (result.used.image_size, result.used.precision, result.used.micro_batch_size) == (224, "fp16", 4)


class Fixed(nn.Module):
    """Takes images of one size, and says so by an error of any kind."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Linear(3 * 32 * 32, 500)
        self.head = nn.Linear(500, classes)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == 32, "made for 32 pixels"
        out: Tensor = self.head(self.body(x.flatten(1)))
        return out


def test_a_network_of_the_callers_own_refuses_sizes_too(tmp_path: Path) -> None:
    asked = ["data.image_size=32", "trainer.batch_size=8"]
    steps = {"small": ["data.image_size=16", "trainer.batch_size=4"], **HALF}
    cfg = settings(asked, steps, "2MiB")
    tried, events = exhausted(cfg, tmp_path, model=lambda _, classes: Fixed(classes))
    assert [name for name, entry in tried.items() if entry["predicted_bytes"] is None] == ["parts"]
    assert "already" in tried["parts"]["reason"]
    said = "rung small: data.image_size=16 is left out: Fixed refuses data.image_size=16: made for 32 pixels"
    assert events.count(said) == 1


def test_a_precision_that_a_device_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(precision_refusal(torch.device("cpu"), precision) for precision in ("fp32", "bf16", "fp16"))

    def refuses(*_: object) -> None:
        raise RuntimeError("Current CUDA Device does not support bfloat16. Please switch dtype to float16.")

    monkeypatch.setattr(torch, "autocast", refuses)
    refusal = precision_refusal(torch.device("cuda", 0), "bf16")
    assert refusal is not None
    assert "cuda:0 does not take trainer.precision=bf16: " in refusal
    assert not precision_refusal(torch.device("cuda", 0), "fp32")


def test_without_refusals_every_rung_is_what_it_was() -> None:
    cfg = compose_config([])
    assert resolve(cfg, refuse=lambda *_: "") == resolve(cfg)
