"""The memory of one update, operator by operator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from adaptive_trainer.prediction.timeline import REST, WEIGHTS, timeline
from adaptive_trainer.prediction.tracer import TraceSpec


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))


@pytest.mark.parametrize("parts", [(32,), (16, 16)])
def test_the_layers_at_the_peak_make_the_peak(parts: tuple[int, ...]) -> None:
    line = timeline(TraceSpec(net, lambda model: torch.optim.AdamW(model.parameters()), (64,), parts, cuda=False))
    assert max(line.live) == sum(size for _, size in line.peak)
    assert line.holders == len(line.peak)
    held = dict(line.peak)
    weights = sum(parameter.nbytes for parameter in net().parameters())
    assert 3 * weights <= held[WEIGHTS] < 3.1 * weights  # and two moments of AdamW
    assert held["0"] >= parts[0] * 256 * 4  # its output, which the layer behind needs
    assert set(held) <= {WEIGHTS, REST, "0", "1", "2"}
    assert 0 < line.backward < line.step < line.operators


def test_of_many_layers_the_largest_are_named() -> None:
    deep = [nn.Linear(64, 64) for _ in range(20)]
    line = timeline(
        TraceSpec(
            lambda: nn.Sequential(*deep), lambda model: torch.optim.SGD(model.parameters()), (64,), (32,), cuda=False
        )
    )
    assert len(line.peak) == 10
    assert line.holders > 20
    assert sum(size for _, size in line.peak) < max(line.live)


def test_the_first_update_counts_the_state_from_its_beginning() -> None:
    makers: list[Callable[[nn.Module], torch.optim.Optimizer]] = [
        lambda model: torch.optim.SGD(model.parameters()),
        lambda model: torch.optim.AdamW(model.parameters()),
    ]
    sizes = [timeline(TraceSpec(net, make, (64,), (8,), cuda=False)).live[0] for make in makers]
    weights = sum(parameter.nbytes for parameter in net().parameters())
    assert sizes[1] - sizes[0] == pytest.approx(2 * weights, rel=0.01)
