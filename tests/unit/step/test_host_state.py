"""What an update changes on the host is seen, also where an object takes the place of another, and put back."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from adaptive_trainer.step.backends.host_state import HostState


class Counter:
    """An object of the user's own."""

    def __init__(self) -> None:
        self.number = 0


class Holds(nn.Module):
    """Holds something of every kind."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 2)
        self.register_buffer("mean", torch.zeros(2))
        self.calls, self.rate, self.shape = 0, float("nan"), torch.Size((1, 2))
        self.history, self.named, self.marks = [1, [2]], {"a": {"b": 1}}, {1}
        self.last, self.array, self.tail = torch.zeros(3), np.zeros(3), deque([1])
        self.random, self.generator, self.counter = random.Random(0), torch.Generator(), Counter()
        self.weights = [self.body.weight]
        self.numpy, self.older = np.random.default_rng(0), np.random.RandomState(0)
        self.space, self.pair = SimpleNamespace(n=0), ([1], 2)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "Holds.calls": lambda m: setattr(m, "calls", 1),
    "Holds.shape": lambda m: setattr(m, "shape", torch.Size((1, 3))),
    "Holds.history": lambda m: m.history[1].append(3),
    "Holds.named": lambda m: m.named["a"].update(b=2),
    "Holds.marks": lambda m: m.marks.add(2),
    "Holds.last": lambda m: m.last.add_(1),
    "Holds.array": lambda m: m.array.__iadd__(1),
    "Holds.tail": lambda m: m.tail.append(2),
    "Holds.random": lambda m: m.random.random(),
    "Holds.generator": lambda m: torch.rand(1, generator=m.generator),
    "Holds.counter": lambda m: setattr(m.counter, "number", 1),
    "Holds.numpy": lambda m: m.numpy.random(),
    "Holds.older": lambda m: m.older.rand(),
    "Holds.space": lambda m: setattr(m.space, "n", 1),
    "Holds.pair": lambda m: m.pair[0].append(2),
    "Holds.new": lambda m: setattr(m, "new", torch.ones(1)),
    "Holds._buffers": lambda m: setattr(m, "mean", m.mean + 1),
    "torch's random numbers": lambda m: torch.rand(1),
    "Python's random numbers": lambda m: random.random(),
    "numpy's random numbers": lambda m: np.random.rand(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_named_and_put_back(name: str) -> None:
    module = Holds()
    host = HostState([module])
    assert host.changes() == []
    CHANGES[name](module)
    assert host.changes() == [name]
    host.put_back()
    if name.startswith("Holds"):
        assert host.changes() == ([name] if name == "Holds.last" else [])  # its version says that it was written to
        assert module.last.tolist() == [0, 0, 0]


def test_what_is_the_same_is_no_change() -> None:
    """New objects that say the same, and what an update is there to change."""
    module = Holds()
    host = HostState([module])
    module.rate, module.shape, module.named = float("nan"), torch.Size((1, 2)), {"a": {"b": 1}}
    module.mean += 1
    with torch.no_grad():
        module.body.weight += 1
    assert host.changes() == []


class Loud:
    """Answers no question about itself."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


def test_what_a_library_or_a_data_set_holds_is_not_looked_into() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    data = TensorDataset(torch.zeros(2))
    module.data, module.loud = data, Loud()  # type: ignore[assignment]
    host = HostState([module])
    data.note = 1  # type: ignore[attr-defined]
    assert host.changes() == []
    module[0].note = 1  # type: ignore[assignment]
    assert host.changes() == ["Linear.note"]


@pytest.mark.parametrize("times", [1, 2, 3, 4])
def test_an_object_at_the_address_of_a_replaced_one_is_another(times: int) -> None:
    module = nn.Module()
    module.steps = torch.zeros(())
    for _ in range(5):
        host, before = HostState([module]), module.steps
        for _ in range(times):
            module.steps = module.steps + 1
        assert host.changes() == ["Module.steps"]
        host.put_back()
        assert module.steps is before
