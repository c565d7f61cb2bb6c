"""Memory that grows from update to update is named; what is made once is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptive_trainer import Trainer, compose_config
from adaptive_trainer.config.schema import RungConfig
from adaptive_trainer.errors import LadderExhausted
from adaptive_trainer.memory.leak import LEAST, SAMPLES, Growth

CPU = torch.device("cpu")
MiB = 2**20


def seen(grown: list[int], start: int = 100) -> Growth:
    growth = Growth(CPU)
    for update, held in enumerate(accumulate(grown, initial=start), start=1):
        growth.note(update, held * MiB)
    return growth


@pytest.mark.parametrize(
    ("grown", "kept", "said"),
    [
        ([20] * 5, 200, "grows by 20 MiB an update (100 MiB after update 1, 200 MiB after update 6)"),
        ([300, 0, 40, *[20] * 9], 620, "grows by 20 MiB an update"),  # optimizer state and a graph came first
        ([20, 8, 20, 8, 20, 8], 184, "grows by 14 MiB an update"),  # a last, smaller batch of each epoch
        ([20] * 5, 110, ""),  # garbage: it was gone when memory ran out
        ([300, 200, 0, 0, 0, 0], 600, ""),
        ([20, 20, 20, 20, -80, 20, 20, 20], 200, ""),  # garbage that Python collects now and then
        ([0] * 9, 100, ""),
        ([20] * (LEAST - 2), 200, ""),
        ([], 100, ""),
    ],
)
def test_what_grows(grown: list[int], kept: int, said: str) -> None:
    text = seen(grown).text(kept * MiB)
    assert said in text
    assert bool(text) == bool(said)


def test_long_trainings_are_looked_at_now_and_then() -> None:
    growth = Growth(CPU)
    due = []
    for number in range(1, 1000):
        if growth.is_due(number, 50):
            growth.note(number, 1)
            due.append(number)
    assert due[:SAMPLES] == list(range(1, SAMPLES + 1))
    assert due[SAMPLES:] == list(range(100, 1000, 50))


class Keeps(nn.Module):
    """Keeps something of every update in training."""

    def __init__(self, classes: int, keep: Callable[[Tensor, list[Any]], None]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
        self.head = nn.Linear(16, classes)
        self.keep, self.kept = keep, list[Any]()

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        if self.training:
            self.keep(features, self.kept)
        out: Tensor = self.head(features.mean((2, 3)))
        return out


def outputs(features: Tensor, kept: list[Any]) -> None:
    kept.append(features.detach())


def graphs(features: Tensor, kept: list[Any]) -> None:
    kept.append(features.detach().requires_grad_().exp().sum())


def cycles(features: Tensor, kept: list[Any]) -> None:
    ring: list[Any] = [features.detach()]
    ring.append(ring)


def train(keep: Callable[[Tensor, list[Any]], None], folder: Path, limit: str) -> dict[str, Any]:
    cfg = compose_config([
        "data=fakedata", "data.train.size=400", "data.val.size=4", "data.image_size=64", "data.num_workers=0",
        "trainer.batch_size=8", "trainer.epochs=1", "device=cpu", f"memory.limit={limit}", "ladder=none",
    ])  # fmt: skip
    cfg.ladder.rungs = [RungConfig("four", ["trainer.batch_size=4"]), RungConfig("small", ["data.image_size=48"])]
    Trainer(cfg, model=lambda _, classes: Keeps(classes, keep), output_dir=folder).fit()
    return dict(json.loads((folder / "result.json").read_text()))


@pytest.mark.parametrize(("keep", "named"), [(outputs, "8 x 16 x 64 x 64, float32"), (graphs, "one number, float32")])
def test_a_leak_is_named_and_not_a_smaller_model(
    keep: Callable[[Tensor, list[Any]], None], named: str, tmp_path: Path
) -> None:
    with pytest.raises(LadderExhausted) as caught:
        train(keep, tmp_path, "96MiB")
    text = str(caught.value)
    assert "memory held after updates grows by" in text
    assert "no rung helps against that" in text
    assert named in text
    assert "a smaller model.name" not in text
    events = json.loads((tmp_path / "result.json").read_text())["events"]
    assert sum("memory held after updates grows by" in event for event in events) == 1


def test_what_is_garbage_and_a_model_that_is_too_large_are_no_leak(tmp_path: Path) -> None:
    result = train(cycles, tmp_path / "cycles", "96MiB")
    assert not [event for event in result["events"] if "grows by" in event]
    with pytest.raises(LadderExhausted, match=r"a smaller model\.name"):
        train(lambda *_: None, tmp_path / "large", "2MiB")
