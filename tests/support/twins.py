"""Two ranks in one process."""

from __future__ import annotations

from typing import TypeVar

from adaptive_trainer.distributed.peers import Peers, Site, Status

T = TypeVar("T")


class Twins(Peers):
    """Two ranks, of which the other does all that this one does."""

    size = 2

    def vote(self, site: Site, status: Status = Status.WELL, *numbers: float) -> Status:
        self.numbers = [list(numbers)] * self.size
        return status

    def gathered(self, value: T) -> list[T]:
        return [value] * self.size
