"""What one rung trains with, and what of it the next one goes on with."""

from __future__ import annotations

import torch
from torch import nn

from adaptive_trainer.config import compose_config
from adaptive_trainer.ladder import resolve
from adaptive_trainer.memory.capacity import Capacity
from adaptive_trainer.session import Parts, enter
from tests.runs import CPU


def parts(capacity: Capacity) -> Parts:
    return Parts(
        lambda config, classes: nn.Linear(4, classes), lambda *_: nn.CrossEntropyLoss(), "", 3, 64, CPU, capacity
    )


def test_corrected_weight_decay_follows_the_base_rate_of_the_rung(capacity: Capacity) -> None:
    """timm relates it to the largest learning rate, which it takes for the one it was made with."""
    scaled = ["optimizer.name=adamc", "optimizer.lr=0.04", "trainer.batch_size=32", "trainer.lr_policy=linear"]
    ladder = resolve(compose_config([*scaled, "ladder.rungs=[{name: less, overrides: ['trainer.batch_size=8']}]"]))
    above = enter(ladder[0].settings, parts(capacity))
    below = enter(ladder[1].settings, parts(capacity), above)
    assert below.state.optimizer is above.state.optimizer
    weight = next(p for p in below.state.model.parameters() if p.ndim > 1)
    before = weight.detach().clone()
    for parameter in below.state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    below.schedule.apply(0)
    below.state.optimizer.step()
    assert torch.allclose(weight, before * (1 - 0.01 * 0.05))


def test_samples_are_counted_beyond_what_single_precision_holds(capacity: Capacity) -> None:
    session = enter(resolve(compose_config(["trainer.batch_size=3"]))[0].settings, parts(capacity))
    session.state.meters["seen"].fill_(2**24)
    session.update.run(torch.rand(3, 4), torch.arange(3), samples=3)
    assert session.state.meters["seen"] == 2**24 + 3
