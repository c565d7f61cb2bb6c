"""What a way to run updates has to offer, and the plainest way: operator by operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from adaptive_trainer.step.program import Accumulate
from adaptive_trainer.step.update import Update

T = TypeVar("T")


class Eager:
    """Runs updates on whole batches, one kernel after the other. Other ways derive from it, see `choose.BACKENDS`.

    Args:
        update: the transaction.
        name: what `trainer.engine` asks for.
        event: logs what was decided, and why.
    """

    label = "eager"
    graph: object = None  # a recorded one
    epochs: int | None = None  # of the whole run, where that is known

    def __init__(self, update: Update, name: str, event: Callable[[str], None]) -> None:
        self.update = update
        self.name = name
        self.event = event
        self.program = update.program

    def accumulate(self, images: Tensor, labels: Tensor) -> None:
        """Make the gradients."""
        self.program.accumulate(images, labels)

    def run(self, images: Tensor, labels: Tensor, samples: int) -> Eager:
        """Make one update, as `Update.run`, and return what makes the next one: itself, or what it gave way to."""
        return self.run_with(self.accumulate, images, labels, samples)

    def run_with(self, accumulate: Accumulate, images: Tensor, labels: Tensor, samples: int) -> Eager:
        """Make one update with gradients from this function."""
        self.update.run(images, labels, samples=samples, accumulate=accumulate)
        return self

    def beside(self, work: Callable[[], T], *, stays: bool) -> T:
        """Do what is no update of a whole batch, and return what it returns.

        Args:
            stays: something on the device that the work makes is needed later.
        """
        return work()

    def aside(self, work: Callable[[], T]) -> T:
        """Do an update or an evaluation that is not replayed, of which all ranks know how it ends."""
        return self.beside(work, stays=False)

    def make_room(self, phase: str) -> bool:
        """Give back memory that updates can do without, which is wanted in `phase`; whether there was any."""
        return False

    def close(self) -> None:
        """End what was begun for later updates."""
