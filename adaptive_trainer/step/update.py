"""One optimizer update as a transaction: it happens wholly, or it leaves no trace.

`Update.run` copies what the update will change, runs the program, and commits position and counters last. On an
out-of-memory everything is rolled back, what the failed update held is freed, and the same samples are tried once more
(an out-of-memory can be spurious); a second failure is raised as `OutOfMemory` for the descent to answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from adaptive_trainer import oom
from adaptive_trainer.data.position import Position
from adaptive_trainer.distributed.peers import ELSEWHERE, PeerFailed, Site, voted
from adaptive_trainer.errors import DeviceUnusable, OutOfMemory
from adaptive_trainer.memory.kernels import Kernels
from adaptive_trainer.memory.limit import Capacity
from adaptive_trainer.memory.one_piece import OnePiece
from adaptive_trainer.models.losses import Criterion, Loss
from adaptive_trainer.models.stepping import StepMemory
from adaptive_trainer.recipe import Recipe
from adaptive_trainer.step.agreement import Agreement, is_elsewhere
from adaptive_trainer.step.copies import layout
from adaptive_trainer.step.program import Accumulate, Change, Program, See
from adaptive_trainer.step.undo import Progress, TrainState, Undo

log = logging.getLogger(__name__)

T = TypeVar("T")


class Update:
    """Runs updates on one state under one recipe.

    Attributes:
        program: what an update does.
        kernels: whether they are the same with little memory.
        free_memory: in one piece or in several.
        step_memory: what is known of the memory that a step takes.
        agreement: of the ranks.
        tensors: gives all that lies on the device from one update to the next.

    Args:
        state: what is trained.
        loss: of (output, labels), see `losses`.
        recipe: how.
        device: where it runs.
        capacity: the memory it may use.
    """

    def __init__(
        self, state: TrainState, loss: Loss | Criterion, recipe: Recipe, *, device: torch.device, capacity: Capacity
    ) -> None:
        self.state = state
        self.program = Program(state, loss, recipe, device)
        self.capacity = capacity
        self.kernels = Kernels(device, is_strict=capacity.same_kernels)
        self._device = device
        self._held: int | None = None  # bytes, before the updates of a dry run
        self._is_dry_run = False
        self._token = object()  # tells the work of this update from that of another with the same shapes
        self._undo = Undo(state, device)
        self._undo.begin()  # its copies are made now, so that no update has to
        self._undo.end()
        self.step_memory = StepMemory(state.optimizer, self._undo.parameters, device)
        self.agreement = Agreement(self.program, self.step_memory, self._undo.parameters)
        weights = (parameter.nbytes for parameter in self._undo.parameters)
        self.tensors = partial(_staying, self._undo, self.agreement)
        self.free_memory = OnePiece(capacity, weights, self.tensors, is_wanted=self.kernels.is_watched)

    @property
    def phase(self) -> str:
        """How far the last update has come, in words."""
        return self.program.phase

    def run(self, images: Tensor, labels: Tensor, *, samples: int, accumulate: Accumulate | None = None) -> None:
        """One update on images (N, C, H, W) and labels (N,), after which `samples` more count as done.

        Args:
            accumulate: makes the gradients instead of `Program.accumulate`.

        Raises:
            OutOfMemory: it failed twice; the state is as before, bit for bit, and what it held is freed.
            DeviceUnusable: the device answers nothing any more.
            Exception: whatever is not about memory, unchanged, after a roll-back.
        """
        after = self.state.position.advance(samples)  # now, as nothing may fail between a step and its count
        if self.agreement.begin(len(labels), samples):
            kind, gather = self._kind(images, labels), self.agreement.gather
            self._transact("begin", kind, lambda: self.program.run(images, labels, accumulate, self._guard, gather))
            for parameter in self._undo.parameters:
                parameter.grad = None
        self.commit(after)

    def commit(self, position: Position) -> None:
        """Count an update as done, after which training has come to this position."""
        self.state.position = position
        self.state.updates += 1

    def evaluate(
        self, model: nn.Module, images: Tensor, labels: Tensor, see: See | None = None
    ) -> tuple[float, float, float]:
        """Sum of the loss, its denominator and number of right answers of one evaluation batch.

        The last is NaN where the output is no scores.

        Args:
            see: is given scores (N, classes) and labels (N,) on the device, where there are scores; it keeps nothing
                that lies there. Twice, where the batch is evaluated once more.

        Raises:
            OutOfMemory: it failed twice; what it changed is as before, and what it held is freed.
        """
        kind = self._kind(images, labels, evaluated=model)

        def work() -> tuple[float, float, float]:
            found = self.program.evaluate(model.eval(), images, labels, see) if len(labels) else (0.0, 0.0, 0.0)
            self.kernels.check()
            self.agreement.evaluated()
            return found

        return self._transact("evaluation", kind, work)

    def accepts(self, samples: int) -> bool:
        """Whether an update on so many samples makes sense: BatchNorm cannot train on one."""
        return samples != 1 or not self.program.avoid_single

    def outgrowing(self, usual: int, sizes: Iterable[int]) -> int:
        """Of these sizes of updates, the one that has the largest forward pass on this rank.

        0 where on no rank one is larger than in an update of the usual size: all ranks then make no further update.
        """

        def largest(size: int) -> list[int]:  # on each rank
            return [max(self.program.parts(part), default=0) for part in self.agreement.parts(size)]

        before = largest(usual)
        if not any(now > then for size in sizes for now, then in zip(largest(size), before, strict=True)):
            return 0
        return max(sorted(sizes), key=lambda size: largest(size)[self.agreement.peers.rank])

    def on_cuda(self) -> bool:
        """Whether it runs on a CUDA card."""
        return self._device.type == "cuda"

    def take_note(self) -> str:
        """What is to be said of the loss, in words, once; empty where there is nothing."""
        note, self.program.criterion.note = self.program.criterion.note, ""
        return note

    def free_copies(self) -> None:
        """Give back the memory of the copies, which the next update makes anew."""
        self._undo.free_copies()

    @contextmanager
    def dry_running(self) -> Iterator[None]:
        """Updates inside count all of their memory. What their steps do to the values of weights and optimizer state is
        the caller's to undo, until the step is known to allocate.
        """
        self._is_dry_run = True
        try:
            yield
        finally:
            self._held, self._is_dry_run = None, False
            self.free_memory.begin()
            self.step_memory.forget()
            self._undo.forget_tensors()

    def note_held(self) -> None:
        """Note what a dry run holds before its updates: where no more is left of a failed one, it is gone."""
        self._held = oom.held(self._device)

    @contextmanager
    def rolled_back(self) -> Iterator[None]:
        """Afterwards everything is as before, except the values of weights and optimizer state."""
        self.program.phase = "begin"
        self._undo.begin()
        self._undo.before_step(copies=False)  # a recorded step may bind tensors that no kernel has filled
        try:
            yield
        finally:
            self._undo.roll_back()
            self._undo.end()

    def _guard(self, change: Change) -> None:
        """Change the weights, once what is needed to undo that is kept."""
        self.kernels.check()
        if self._undo.can_move:
            self.program.follow_layouts()  # before the step, in which no memory may be needed that was not seen
        memory, agreement = self.step_memory, self.agreement
        agreement.look()
        if agreement.may_allocate is not False:
            is_unknown = agreement.may_allocate is None
            self._undo.before_step(on_host=is_unknown, copies=not (is_unknown and self._is_dry_run))
        if memory.is_warm and memory.may_allocate is None:
            memory.measure(change)
        else:
            change(agreement.entering)
        agreement.after_step()

    def _transact(self, phase: str, kind: Hashable, work: Callable[[], T]) -> T:
        """What the work returns, which is done wholly or leaves no trace; once more where memory runs out.

        Raises:
            OutOfMemory: it failed twice; what it held is freed.
        """
        try:
            self.free_memory.before_work()
            done = self._attempt(phase, kind, work)
            if isinstance(done, oom.Failure) and not done.exact:
                if not _is_of_peer(done):
                    self.free_memory.before_retry()
                log.warning("out of memory in %s (%s): rolled back, the same samples once more", self.phase, done.text)
                done = self._attempt(phase, kind, work)
        finally:
            self._undo.end()
        if isinstance(done, oom.Failure):
            phase = ELSEWHERE if _is_of_peer(done) else self.phase
            raise OutOfMemory(done.text, phase=phase, is_final=done.exact)
        return done

    def _attempt(self, phase: str, kind: Hashable, work: Callable[[], T]) -> T | oom.Failure:
        """What the work returns, or the reason why it was rolled back."""
        self.program.phase = phase
        try:
            self.kernels.begin()
            self._undo.begin()
            with self.capacity.device_work(kind):
                return work()
        except BaseException as error:
            failure = oom.describe(error, pressure=self.capacity.pressure)
            if not failure.fills(self._device) or is_elsewhere(error):
                if failure.kind is not oom.Kind.POISONED:
                    self._undo.roll_back()
                raise
            heard = voted(error, *Site)
        self._recover(failure)  # after the handler, where nothing holds the frames of the failed work
        # last: where a peer is lost, what is left here is saved
        return self.agreement.settled(failure, heard, Site.EVALUATION if phase == "evaluation" else Site.UPDATE)

    def _recover(self, failure: oom.Failure) -> None:
        if self.phase == "optimizer step" and self._undo.progress is not Progress.STEPPING:
            raise DeviceUnusable(
                "out of memory in an optimizer step whose kind allocates nothing, so no copy was kept: "
                f"{failure.text}. The weights may be half updated; go on from the last checkpoint with resume=auto"
            )
        self._undo.roll_back()
        if not oom.probe(self._device):
            raise DeviceUnusable(f"{self._device} answers nothing any more after: {failure.text}")
        oom.release(self._device, self._held)
        self.free_memory.released()
        self.kernels.restore()

    def _kind(self, images: Tensor, labels: Tensor, evaluated: nn.Module | None = None) -> Hashable:
        """What a simulated card need not count again: the same shapes, once the optimizer has made its state."""
        if self._is_dry_run or (evaluated is None and not self.step_memory.is_warm):
            return None
        return self._token, id(evaluated), layout(images), layout(labels)


def _is_of_peer(failure: oom.Failure) -> bool:
    return failure.type_name == PeerFailed.__name__


def _staying(undo: Undo, agreement: Agreement) -> list[Tensor]:
    return [*undo.tensors(), *agreement.tensors]
