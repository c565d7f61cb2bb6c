"""Updates as a CUDA graph: whether one can be recorded, when it is, who borrows its memory, and when it has to go."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from adaptive_trainer import oom
from adaptive_trainer.errors import OutOfMemory, PeerLost
from adaptive_trainer.step.backends.cuda_graph import (
    Graph,
    GraphRefused,
    NoRoom,
    refusal,
    step_refusal,
    synchronizing_refused,
)
from adaptive_trainer.step.backends.eager import Eager
from adaptive_trainer.step.update import Update

T = TypeVar("T")
IN_STEP = ("clipping", "optimizer step")  # phases after forward and backward
# Where blocks leave gaps in a piece of one size, they may leave none in one of another: so it is tried.
IN_ONE = (1.0, math.inf, 0.98, 0.95, 0.9, 0.8, 0.7, 0.5)
PAYS = 20  # replays that make up for the time of a recording
VAIN = 3  # recordings in a row that do not pay, after which there is no other


class Recorded(Eager):
    """Replays a graph of the whole update; of forward and backward alone where the optimizer's step cannot be recorded.

    Attributes:
        kernels: makes the updates before the recording, and those after the graph was given up.
        graph: what was recorded.
        is_checked: an update has shown that nothing speaks against recording.
        is_over: no graph is to be recorded any more.
    """

    label = "graph"

    def __init__(self, update: Update, name: str, event: Callable[[str], None], kernels: Eager | None = None) -> None:
        super().__init__(update, name, event)
        self.kernels = kernels or Eager(update, name, event)
        self.graph: Graph | None = None
        self.is_checked = self.is_over = False
        self._step_reason = ""  # why the step is not recorded
        self._replays = self._vain = 0  # of this graph; recordings before it that did not pay
        self._lends: bool | None = None  # its memory to other work: once that has found none elsewhere
        self._is_announced = False
        self._wanted: set[str] = set()  # phases in which its memory was wanted

    def run(self, images: Tensor, labels: Tensor, samples: int) -> Eager:
        """Make one update: at first one that is checked, then record, then replay."""
        if self.is_over:
            return self.kernels.run(images, labels, samples)
        if not self.is_checked and self.graph is None:
            return self._check(images, labels, samples)
        if self.graph is None:
            reason = self.record(images, labels)
            if reason:
                return self.give_up(reason).run(images, labels, samples)
            self.announce(f"from here on, as trainer.engine={self.name} asks")
        return self.replay(images, labels, samples)

    def record(self, images: Tensor, labels: Tensor) -> str:
        """Record the graph, of less where the step is in the way; why that failed, else nothing."""
        while True:
            made = self._recorded(images, labels)
            if isinstance(made, Graph):
                return self._take(made)
            if not self._is_of_the_step(made):
                return made

    def _take(self, made: Graph) -> str:
        self.graph, self._replays = made, 0
        self.update.free_memory.may_move = False
        return ""

    def is_recorded_for(self, images: Tensor, labels: Tensor) -> bool:
        """Whether there is a graph of batches of this shape."""
        return self.graph is not None and self.graph.suits(images, labels)

    def announce(self, why: str) -> None:
        """Log what is a graph now, the first time."""
        if self._is_announced:
            return
        self._is_announced = True
        what = "forward and backward are" if self._step_reason else "the whole update is"
        rest = f"; the optimizer's step is not: {self._step_reason}" if self._step_reason else ""
        self.event(f"engine: {what} one CUDA graph {why}{rest}")

    def replay(self, images: Tensor, labels: Tensor, samples: int) -> Eager:
        """Make the update by what was recorded; kernel by kernel for a batch of another shape."""
        # No name of its own for the graph: it would keep the memory of one that is given up.
        if self.graph is not None and self.graph.with_step and self.graph.suits(images, labels):
            after = self.program.state.position.advance(samples)
            try:
                self.graph.replay(images, labels)
            except PeerLost as error:
                error.is_whole = False  # statistics have changed, and weights have not
                raise
            self.update.commit(after)
            self._replays += 1
            return self
        try:
            return self.aside(lambda: self._replay_passes(images, labels, samples))
        except GraphRefused as error:  # a replay would do harm
            reason = str(error)
        return self.give_up(reason).run(images, labels, samples)

    def beside(self, work: Callable[[], T], *, stays: bool) -> T:
        """Do the work beside the graph; where memory runs out in the graph's own memory, then without a graph.

        The graph is recorded again at the next whole batch.
        """
        while self.graph is not None:
            try:
                return self._beside(work, stays=stays)
            except OutOfMemory as error:
                phase = error.phase
            self._make_way(phase, stays=stays)  # not before: the error's frames hold tensors
        return work()

    def _beside(self, work: Callable[[], T], *, stays: bool) -> T:
        """Do the work beside the graph, or in the memory that it lends."""
        if self.graph is None or stays or not self._lends:
            return work()
        with self.graph.lent():
            done = work()
        if self.graph.is_spoiled:  # it goes before a replay writes over what is there
            self._lends = False
            self._give_way(f"{self.update.phase}, which leaves tensors there")
        return done

    def _make_way(self, phase: str, *, stays: bool) -> None:
        """Have the graph lend its memory from now on, or give back what it can, or go."""
        if self._lends is None and not stays:
            self._lends = True
        else:
            self.make_room(phase)

    def make_room(self, phase: str) -> bool:
        """Give back what the graph can do without, else the graph; whether there was one."""
        if self.graph is None:
            return False
        if self.graph.shrink():
            oom.release(self.program.device)
        else:
            self._give_way(phase)
        return True

    def give_up(self, reason: str) -> Eager:
        """Give up the graph, or the thought of it, and return what goes on without."""
        self.drop()
        self.is_over = True
        self.event(f"engine: {self.kernels.label}, not a CUDA graph: {reason}")
        return self.kernels

    def _give_way(self, phase: str) -> None:
        """Drop the graph for the moment; for good where it has had to go again and again, soon after its recording."""
        self._vain = 0 if self._replays >= PAYS else self._vain + 1
        if self._vain == VAIN:
            self.give_up(f"its memory was wanted in {phase} as soon as it was recorded, {VAIN} times in a row")
            return
        self.drop()
        if phase not in self._wanted:  # once, and not in every epoch
            self._wanted.add(phase)
            self.event(f"engine: the CUDA graph goes when its memory is wanted in {phase}, and is recorded again")

    def drop(self) -> None:
        """Give back the graph's memory."""
        if self.graph is not None:
            self.graph = None
            self.update.free_memory.may_move = True
            oom.release(self.program.device)

    def _recorded(self, images: Tensor, labels: Tensor) -> Graph | str:
        """A graph, or why there is none."""
        accumulate, with_step, reason = self.kernels.accumulate, not self._step_reason, ""
        for in_one in IN_ONE:
            try:
                return Graph(self.update, images, labels, accumulate, with_step=with_step, in_one=in_one)
            except NoRoom as error:
                reason = str(error)
            except GraphRefused as error:
                return str(error)
        return reason

    def _check(self, images: Tensor, labels: Tensor, samples: int) -> Eager:
        """Make an update that shows what speaks against a graph, once the optimizer has made its state."""
        reason = refusal(self.program)
        if reason:
            return self.give_up(reason).run(images, labels, samples)
        if self.update.step_memory.may_allocate is None:  # the optimizer has not made all of its state
            return self._run_kernels(images, labels, samples)
        self.is_checked = True
        self._step_reason = step_refusal(self.program)
        done = _refused(lambda: self._run_checked(images, labels, samples))
        if isinstance(done, Eager):
            return done
        if self._is_of_the_step(done):
            return self._run_kernels(images, labels, samples)
        return self.give_up(done).run(images, labels, samples)

    def _run_checked(self, images: Tensor, labels: Tensor, samples: int) -> Eager:
        """Make an update in which nothing that is to be recorded may wait for the card.

        Raises:
            GraphRefused: something does; the update was rolled back.
        """
        if self._step_reason:
            return self._or_self(self.kernels.run_with(self._accumulate_checked, images, labels, samples))
        with synchronizing_refused():
            return self._run_kernels(images, labels, samples)

    def _accumulate_checked(self, images: Tensor, labels: Tensor) -> None:
        with synchronizing_refused():
            self.kernels.accumulate(images, labels)

    def _replay_passes(self, images: Tensor, labels: Tensor, samples: int) -> Eager:
        """Make the update with the gradients of a replay, where there is a graph of such a batch."""
        if self.graph is None or not self.graph.suits(images, labels):
            return self._run_kernels(images, labels, samples)
        self._replays += 1
        return self.run_with(self.graph.replay, images, labels, samples)

    def _run_kernels(self, images: Tensor, labels: Tensor, samples: int) -> Eager:
        return self._or_self(self.kernels.run(images, labels, samples))

    def _or_self(self, done: Eager) -> Eager:
        """What the kernels gave way to, and with it the thought of a graph; else itself."""
        return self if done is self.kernels else done

    def _is_of_the_step(self, reason: str) -> bool:
        """Whether what has just failed came as far as the step; then forward and backward may be recorded alone."""
        # Where the step was left out already, nothing smaller is left to record.
        if self._step_reason or self.program.phase not in IN_STEP:
            return False
        self._step_reason = reason
        return True


def _refused(work: Callable[[], T]) -> T | str:
    """What the work returns, or why no graph can do it."""
    try:
        return work()
    except GraphRefused as error:
        return str(error)
