"""Updates of several ranks as CUDA graphs: one makes the gradients, the ranks sum them, one makes the step.

Nothing in a replay can fail, so one vote before it is enough. All ranks have graphs or none: an update without one has
votes of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import TypeVar

from torch import Tensor

from adaptive_trainer.distributed.peers import ELSEWHERE
from adaptive_trainer.errors import OutOfMemory
from adaptive_trainer.step.backends.eager import Eager
from adaptive_trainer.step.backends.recorded import Recorded
from adaptive_trainer.step.update import Update

T = TypeVar("T")


class Mode(IntEnum):
    """What a rank can do with a batch. All do the least of it."""

    OVER = 0  # no graph any more
    KERNELS = 1
    RECORD = 2
    REPLAY = 3


class Ranked(Recorded):
    """Replays graphs on all ranks together, and gives them up together."""

    def __init__(self, update: Update, name: str, event: Callable[[str], None]) -> None:
        super().__init__(update, name, event)
        self._agreement = update.agreement
        self._reason = ""  # why it was given up here
        if name == "compile":
            event("engine: nothing is compiled for several ranks; a CUDA graph where one can be recorded")

    def run(self, images: Tensor, labels: Tensor, samples: int) -> Eager:
        """Make one update in the way that all ranks can."""
        mode = self._agreement.least(self._mode(images, labels, samples))
        if mode == Mode.KERNELS:
            first = self._run_kernels if self.is_checked else self._check
            self.aside(lambda: first(images, labels, samples))
        if mode == Mode.RECORD:
            self._agreement.begin(len(labels), samples)
            self._reason = "" if self.graph is not None else self.record(images, labels)
            mode = self._agreement.least(Mode.OVER if self._reason else Mode.REPLAY)
            if mode == Mode.REPLAY:
                self.announce(f"from here on, on each of {self._agreement.peers.size} ranks")
        if mode == Mode.OVER:
            reasons = enumerate(self._agreement.peers.gathered(self._reason))
            why = "; ".join(f"{reason} (rank {rank})" for rank, reason in reasons if reason)
            return super().give_up(why).run(images, labels, samples)
        if mode == Mode.REPLAY:
            self.replay(images, labels, samples)
        return self  # also where it is over here, of which the others hear before the next update

    def aside(self, work: Callable[[], T]) -> T:
        """Do an update or an evaluation; where it runs out of memory that a graph of some rank has, all do it again."""
        while True:
            try:
                return self._beside(work, stays=False)
            except OutOfMemory as error:
                failed = error.reason, error.phase, error.is_final
            reason, phase, is_final = failed
            is_helped = self.graph is not None and phase != ELSEWHERE
            if is_final or self._agreement.least(not is_helped):
                raise OutOfMemory(reason, phase=phase, is_final=is_final)
            if is_helped:
                self._make_way(phase, stays=False)

    def record(self, images: Tensor, labels: Tensor) -> str:
        """Record the graphs; why that failed, else nothing. Less than all of the update would be other votes."""
        made = self._recorded(images, labels)
        return made if isinstance(made, str) else self._take(made)

    def give_up(self, reason: str) -> Eager:
        """Give up the graph here; the others hear of it before the next update."""
        self._reason = reason
        return super().give_up(reason)

    def _run_checked(self, images: Tensor, labels: Tensor, samples: int) -> Eager:
        """Make an update whose passes may not wait for the card; in its step a refusal would come between votes."""
        return self._or_self(self.kernels.run_with(self._accumulate_checked, images, labels, samples))

    def _mode(self, images: Tensor, labels: Tensor, samples: int) -> Mode:
        if self.is_over:
            return Mode.OVER
        here = len(labels)
        if not here or not self.is_checked or here != self._agreement.part(self._agreement.whole(here, samples)):
            return Mode.KERNELS  # there is nothing to record, or images that cannot be read are missing
        if self.graph is None:
            return Mode.RECORD
        return Mode.REPLAY if self.graph.suits(images, labels) else Mode.KERNELS
