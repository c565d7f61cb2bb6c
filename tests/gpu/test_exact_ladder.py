"""`ladder=exact` on a card: the bits of the uncapped run under a real cap, and another plan when memory is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adaptive_trainer import Trainer, compose_config
from adaptive_trainer.memory.limit import Capacity
from adaptive_trainer.report.result import Result
from adaptive_trainer.step.update import Update
from tests.gpu.test_gpu import everything

pytestmark = pytest.mark.gpu
MiB = 2**20
BASE = (
    "data=fakedata", "data.train.size=240", "data.val.size=48", "data.num_workers=4", "trainer.deterministic=true",
    "trainer.channels_last=false", "device=cuda",
)  # fmt: skip


def fit(folder: Path, *overrides: str) -> Result:
    return Trainer(compose_config([*BASE, *overrides]), output_dir=folder).fit()


def differing(one: Path, other: Path) -> list[int]:
    ends = (everything(folder / "checkpoints" / "last.pt") for folder in (one, other))
    return [i for i, (a, b) in enumerate(zip(*ends, strict=True)) if not torch.equal(a, b)]


@pytest.mark.parametrize(
    ("recipe", "cap"),
    [
        (("trainer.epochs=5",), 900),
        (("trainer.epochs=5",), 700),
        (("trainer.epochs=5", "trainer.precision=fp16"), 560),
        (("model.name=efficientnet_b3", "data.image_size=300", "trainer.epochs=2"), 2400),
        (("model.name=efficientnet_b4", "data.image_size=380", "trainer.batch_size=16", "trainer.epochs=2"), 3600),
    ],
    ids=["b0-900", "b0-700", "b0-fp16-560", "b3-2400", "b4-3600"],
)
def test_the_bits_of_the_uncapped_run_under_a_cap(recipe: tuple[str, ...], cap: int, tmp_path: Path) -> None:
    """Weights, buffers, optimizer and position after whole epochs with their evaluations."""
    fit(tmp_path / "whole", "ladder=none", *recipe)
    result = fit(tmp_path / "exact", "ladder=exact", f"memory.limit={cap}MiB", *recipe)
    assert result.rung in ("recompute", "recompute-most")
    assert [change.key for change in result.changes] == ["trainer.recompute"]
    assert result.metrics["peak_reserved_bytes"] <= cap * MiB
    assert differing(tmp_path / "whole", tmp_path / "exact") == []


@pytest.mark.parametrize("climb", [False, True])
def test_memory_taken_in_mid_run_is_answered_by_another_plan(
    climb: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cap is lowered after update 5, as when another process takes memory, and raised after update 25."""
    after = {5: 900, 25: 1500} if climb else {5: 900}
    commit = Update.commit

    def committed(update: Update, position: Any) -> None:
        commit(update, position)
        if not update._is_dry_run and (size := after.pop(update.state.updates, None)):
            torch.cuda.empty_cache()
            _cap(update.capacity, size * MiB)

    how = ("trainer.engine=eager", "trainer.epochs=5")
    fit(tmp_path / "whole", "ladder=none", *how)
    monkeypatch.setattr(Update, "commit", committed)
    limits = ("ladder=exact", "memory.limit=1500MiB", f"ladder.climb={climb}")
    result = fit(tmp_path / "exact", *limits, *how)
    assert "rung recompute is planned anew for the memory that is left, from this update on" in result.events
    assert any("there is room again" in event for event in result.events) == climb
    needs = [entry.predicted_bytes or 0 for entry in result.attempts if entry.outcome == "fits"]
    assert needs[1] < needs[0]
    assert not climb or needs[2] > needs[1]
    assert differing(tmp_path / "whole", tmp_path / "exact") == []


def _cap(capacity: Capacity, size: int) -> None:
    assert capacity.total is not None
    capacity.bytes = size
    torch.cuda.set_per_process_memory_fraction((size + 0.5) / capacity.total, capacity.device)


def test_the_largest_batch_with_recomputation_is_larger(tmp_path: Path) -> None:
    how = ("ladder=none", "memory.limit=1300MiB", "trainer.batch_size=max")
    sizes = [fit(tmp_path / plan, f"trainer.recompute={plan}", *how).used.batch_size for plan in ("none", "auto")]
    assert sizes[1] >= 2 * sizes[0]
