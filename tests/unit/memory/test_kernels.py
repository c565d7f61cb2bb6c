"""Kernels that torch chose for lack of memory: how many choices it keeps, and what a failure to displace them does."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn

from adaptive_trainer.errors import OutOfMemory
from adaptive_trainer.memory import kernels
from adaptive_trainer.memory.limit import Capacity
from adaptive_trainer.utils import kernel_choices
from tests.support.faults import differences, dump
from tests.support.runs import CPU, Case, start

WARM = Case("adamw-foreach", "fp32", warm=True)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, 10_000), ("1000", 1000), (" 20 ", 20), ("+7", 7), ("7x", 7), ("0", 0), ("-1", -1)]
    + [(text, 10_000) for text in ("", "many", "x7", "99999999999")],
)
def test_the_number_is_read_as_torch_reads_it(
    value: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(kernel_choices.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(kernel_choices.VARIABLE, value)
    assert kernel_choices.kept() == expected


def test_the_number_that_a_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernel_choices.VARIABLE, "5")
    kernel_choices.keep_few()
    assert kernel_choices.kept() == 5
    monkeypatch.delenv(kernel_choices.VARIABLE)
    kernel_choices.keep_few()
    assert kernel_choices.kept() == 1000


class Card:
    """Counts failed allocations, as a card does.

    Attributes:
        full_for: how many tries to displace choices will find no memory.
        displaced: how often they were.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failures = self.displaced = self.full_for = 0
        monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"num_ooms": self.failures})
        monkeypatch.setattr(kernels, "_displace", self._displace)

    def _displace(self, device: torch.device) -> None:
        if self.full_for:
            self.full_for -= 1
            self.refuse()
        self.displaced += 1

    def refuse(self) -> None:
        self.failures += 1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    monkeypatch.setattr(kernels, "_stale", set[torch.device]())
    return Card(monkeypatch)


def watched() -> kernels.Kernels:
    found = kernels.Kernels(CPU, is_strict=True)
    found.is_watched = True  # what only a CUDA device is
    return found


def test_choices_are_displaced_where_nobody_was_told_of_a_failure(card: Card) -> None:
    found = watched()
    found.begin()
    card.failures += 1
    with pytest.raises(torch.OutOfMemoryError, match="took another kernel"):
        found.check()
    found.restore()
    found.begin()
    assert card.displaced == 1
    with suppress(torch.OutOfMemoryError):
        card.refuse()
    found.restore()
    assert card.displaced == 1


def test_no_work_begins_with_stale_choices_whoever_left_them(card: Card) -> None:
    found = watched()
    found.begin()
    card.failures, card.full_for = 2, 6  # each displacement is tried twice
    found.restore()
    for each in (found, watched()):  # that of the next rung
        with pytest.raises(torch.OutOfMemoryError, match="are displaced: CUDA out of memory"):
            each.begin()
    kernels.Kernels(CPU, is_strict=False).begin()
    assert card.displaced == 0
    for _ in range(2):
        watched().begin()
    assert card.displaced == 1


@pytest.mark.parametrize("full_for", [2, 4])
def test_a_recovery_without_memory_to_displace_choices_goes_on(full_for: int, card: Card, capacity: Capacity) -> None:
    """Until the second try of the update, where there may be memory again."""
    run = start(WARM, capacity)
    update = run.update()
    update.kernels = watched()
    before = dump(run.state)
    card.full_for = full_for

    class Lacking(nn.Module):
        def forward(self, output: Tensor, labels: Tensor) -> Tensor:
            if card.displaced == 0:
                card.failures += 1  # a kernel's workspace
                card.refuse()
            return nn.functional.cross_entropy(output, labels)

    update.program.criterion.loss = Lacking()
    if full_for == 2:
        run.advance(update)
        assert run.state.updates == 2
        return
    with pytest.raises(OutOfMemory, match="are displaced"):
        run.advance(update)
    assert differences(dump(run.state), before) == []
