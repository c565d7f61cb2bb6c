"""Which way updates run, on a machine without a card; with one, see `test_gpu.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adaptive_trainer import Trainer, compose_config
from adaptive_trainer.errors import ConfigError

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
    with pytest.raises(ConfigError, match=r"trainer\.engine=warp is none of auto, eager, graph"):
        train(tmp_path, "warp")
