"""Compiled code (`torch.compile`) for the forward and backward pass, without waiting for it.

Another process compiles while this one trains by a graph, on a CPU operator by operator. When it is ready this process
takes the code from torch's cache, and keeps whichever way is the faster.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from adaptive_trainer import oom
from adaptive_trainer.data.position import updates_per_epoch
from adaptive_trainer.errors import DeviceUnusable, OutOfMemory
from adaptive_trainer.models.recomputing.following import plan_in
from adaptive_trainer.models.savers import compile_refusal
from adaptive_trainer.step.backends.compiler import Order, explained
from adaptive_trainer.step.backends.compiling import Compiling, lacks_room
from adaptive_trainer.step.backends.eager import Eager
from adaptive_trainer.step.backends.passes import Captured, NotCompiled, Settings
from adaptive_trainer.step.backends.recorded import Recorded
from adaptive_trainer.step.backends.timing import TIMED, Timed
from adaptive_trainer.step.program import Accumulate
from adaptive_trainer.step.update import Update

T = TypeVar("T")

LEAST_SECONDS = 20.0  # of training that must be left for a compiler to be started: none takes less
GAIN = 0.25  # of an update's time that compiled code is expected to gain, until it is timed
LOADING = 8.0  # seconds until a CUDA device has loaded and tuned the kernels, measured on an H200
ANY = (Exception,)  # errors that may be the compiler's when its code runs for the first time
KEPT = 0.7  # of the memory of an update that recomputes: what its compiled forward pass may keep


class Compiled(Eager):
    """Trains by a graph, on a CPU operator by operator, and by compiled code once that is ready and faster.

    Attributes:
        now: makes the updates meanwhile.
    """

    def __init__(self, update: Update, name: str, event: Callable[[str], None]) -> None:
        super().__init__(update, name, event)
        self.now: Eager = (Recorded if update.on_cuda() else Eager)(update, name, event)
        self.before, self.after = Timed(self.program.device), Timed(self.program.device)
        self._captured: Captured | None = None  # held by nothing else, so that it can go
        self._compiling: Compiling | None = None
        self._advance = self._look

    def run(self, images: Tensor, labels: Tensor, samples: int) -> Eager:
        """Make one update, and come nearer to compiled code beside it."""
        return self._or_alone(lambda: self._advance(images, labels, samples))

    def beside(self, work: Callable[[], T], *, stays: bool) -> T:
        """Do what is no update of a whole batch, beside what makes the updates now."""
        return self._or_alone(lambda: self.now.beside(work, stays=stays))

    def make_room(self, phase: str) -> bool:
        """Give back memory that is wanted in `phase`, first that of the other process; whether there was any."""
        if self._compiling is None:
            return self.now.make_room(phase)
        self.give_up(f"the memory of the process that compiles was wanted in {phase}")
        self._advance = self._go_on
        return True

    def close(self) -> None:
        """End the process that compiles."""
        if self._compiling is not None:
            self._compiling.close()
            self._compiling = None

    # ---- what happens at one whole batch after the other -----------------------------------------------------------

    def _look(self, images: Tensor, labels: Tensor, samples: int) -> Eager:
        """Make an update and see how long it takes."""
        if reason := self._refusal():
            return self.give_up(reason).run(images, labels, samples)
        with self.before.one():
            self._run_now(images, labels, samples)
        self._advance = self._capture
        return self

    def _capture(self, images: Tensor, labels: Tensor, samples: int) -> Eager:
        """Make an update whose forward pass is captured, and let another process compile it."""
        if reason := self._too_short(labels) or lacks_room(self.update.capacity):
            return self.give_up(reason).run(images, labels, samples)
        self._captured = Captured(self.program.state.model)
        kernels = _Kernels(self, self._captured, ANY)
        done = kernels.run(images, labels, samples)
        if done is not kernels:
            return done
        if reason := _failed(self._start):
            return self.give_up(reason)  # these samples are done
        self.event(
            f"engine: another process compiles for batches of {len(labels)}, as trainer.engine={self.name} asks; "
            f"training goes on meanwhile, {self.now.label}"
        )
        self.before = Timed(self.program.device)
        self._advance = self._wait
        return self

    def _wait(self, images: Tensor, labels: Tensor, samples: int) -> Eager:
        """Make an update, until the other process has answered."""
        assert self._compiling is not None
        answer = self._compiling.answer()
        if answer is None:
            self._run_now(images, labels, samples)
            return self
        self.close()  # before training stands still
        if answer.reason:
            return self.give_up(answer.reason).run(images, labels, samples)
        self._answer = answer
        self._advance = self._time
        return self.run(images, labels, samples)

    def _time(self, images: Tensor, labels: Tensor, samples: int) -> Eager:
        """Time the updates of now, then change over if enough of them are left."""
        if len(self.before) < TIMED:
            self._timed(self.before, images, labels, samples)
            return self
        if reason := self._too_late(labels):
            return self.give_up(reason).run(images, labels, samples)
        return self._change(images, labels, samples)

    def _change(self, images: Tensor, labels: Tensor, samples: int) -> Eager:
        """Make an update by compiled code."""
        captured = self._captured
        assert captured is not None
        self._started = time.perf_counter()
        if isinstance(self.now, Recorded):
            self.now.drop()  # two graphs would take the memory of both
        if reason := _failed(lambda: captured.compile(self._answer.budget)):
            return self.give_up(reason).run(images, labels, samples)
        kernels = _Kernels(self, captured, ANY)
        done = kernels.run(images, labels, samples)
        if done is not kernels:
            return done
        kernels.expected = (OutOfMemory, TorchDynamoException, NotCompiled)  # of another shape, or of too little memory
        self._plain = self.now
        on_cuda = self.update.on_cuda()
        self.now = Recorded(self.update, self.name, self.event, kernels=kernels) if on_cuda else kernels
        self._advance = self._compare
        return self

    def _compare(self, images: Tensor, labels: Tensor, samples: int) -> Eager:
        """Time the updates by compiled code, and keep the faster way."""
        if len(self.after) < TIMED:
            self._timed(self.after, images, labels, samples)
            return self.now if self._captured is None else self  # it may have failed after all
        took = time.perf_counter() - self._started - TIMED * self.after.seconds
        if self.after.is_faster(self.before):
            self.event(
                f"engine: compiled in {self._answer.seconds:.0f} s; {self.after.text} an update from here on, against "
                f"{self.before.text}; changing over took {took:.1f} s"
            )
            return self.now.run(images, labels, samples)
        reason = f"{self.after.text} an update, against {self.before.text} without"
        self.now = self._plain
        return self.give_up(reason).run(images, labels, samples)

    def _go_on(self, images: Tensor, labels: Tensor, samples: int) -> Eager:
        """Go on without compiled code."""
        return self.now.run(images, labels, samples)

    # ---- parts of it -----------------------------------------------------------------------------------------------

    def _or_alone(self, work: Callable[[], T]) -> T:
        """What the work returns; where memory runs out beside the process that compiles, once more without it."""
        try:
            return work()
        except OutOfMemory as error:
            phase = error.phase
            if self._compiling is None:
                raise
        self.make_room(phase)  # not before: the error's frames hold tensors
        return work()

    def _refusal(self) -> str:
        """Why nothing is to be compiled."""
        if self.update.capacity.simulated is not None:
            return "a simulated card counts operators, which compiled code is not made of (memory.limit=none lifts it)"
        return compile_refusal(self.program.state.model)

    def _too_short(self, labels: Tensor) -> str:
        """Why it is vain to compile; empty where it may not be."""
        left = self._left(len(labels))
        if left is None or left * self.before.seconds >= LEAST_SECONDS:
            return ""
        return f"{left} updates are left, {left * self.before.seconds:.1f} s in all, and compiling takes longer"

    def _too_late(self, labels: Tensor) -> str:
        """Why it is vain to change over to what is compiled; empty where it may not be."""
        left, cost = self._left(len(labels)), self._answer.again + (LOADING if self.update.on_cuda() else 0.0)
        if left is None or left * self.before.seconds * GAIN >= cost:
            return ""
        return (
            f"it was ready after {self._answer.seconds:.0f} s, and {left} updates are left, "
            f"{left * self.before.seconds:.1f} s in all; changing over would take about {cost:.1f} s"
        )

    def _start(self) -> None:
        """Let another process compile what was captured."""
        assert self._captured is not None
        device = self.program.device
        index = (device.index or 0) if device.type == "cuda" else None
        workers = max(2, (os.cpu_count() or 2) // 2)  # as many again are left to the loader
        self._compiling = Compiling(Order(tuple(self._captured.passes), Settings.now(), index, workers, self._room()))

    def _room(self) -> int | None:
        """Bytes that compiled code may keep where the network recomputes, about as it does; None where it keeps all."""
        if plan_in(self.program.state.model).is_empty:
            return None
        used = self.update.capacity.usage()
        return int(KEPT * (used.peak_allocated - used.allocated))

    def _left(self, batch: int) -> int | None:
        """Updates that are left of the run; None where its length is not known."""
        if self.epochs is None:
            return None
        position = self.program.state.position
        return self.epochs * updates_per_epoch(position.size, batch) - position.schedule_step(batch)

    def _run_now(self, images: Tensor, labels: Tensor, samples: int) -> None:
        self.now = self.now.run(images, labels, samples)

    def _timed(self, timed: Timed, images: Tensor, labels: Tensor, samples: int) -> None:
        """Make an update, which is timed unless something is prepared in it."""
        now = self.now
        if isinstance(now, Recorded) and not now.is_recorded_for(images, labels):
            self._run_now(images, labels, samples)
            return
        with timed.one():
            self._run_now(images, labels, samples)

    def give_up(self, reason: str) -> Eager:
        """Let compiled code go, and return what goes on without."""
        self.close()
        self._captured = None
        oom.release(self.program.device)
        self.event(f"engine: {self.now.label}, not compiled: {reason}")
        return self.now


class _Kernels(Eager):
    """Makes updates with a captured forward pass; where that fails, once more without.

    Attributes:
        expected: errors that are taken for failures of it.
    """

    label = "compiled"

    def __init__(self, owner: Compiled, captured: Captured, expected: tuple[type[Exception], ...]) -> None:
        super().__init__(owner.update, owner.name, owner.event)
        self.expected = expected
        self._captured: Captured | None = captured
        self._owner, self._instead = owner, owner.now

    def accumulate(self, images: Tensor, labels: Tensor) -> None:
        """Make the gradients by compiled code, where there is some."""
        self.program.accumulate(images, labels, None if self._captured is None else self._captured.forward)

    def run_with(self, accumulate: Accumulate, images: Tensor, labels: Tensor, samples: int) -> Eager:
        """Make one update with gradients from this function; where that fails, once more without compiled code."""
        try:
            with _warnings_ignored() if self.expected == ANY else nullcontext():
                return super().run_with(accumulate, images, labels, samples)
        except self.expected as error:
            if isinstance(error, DeviceUnusable) or oom.describe(error).kind is oom.Kind.POISONED:
                raise
            reason = explained(error)
        self._captured = None
        self._owner.now = self._instead
        return self._owner.give_up(reason).run(images, labels, samples)


def _failed(work: Callable[[], None]) -> str:
    """Why the work could not be done; empty where it was. Compilers may raise anything."""
    try:
        with _warnings_ignored():
            work()
    except Exception as error:
        if oom.describe(error).kind is oom.Kind.POISONED:
            raise
        return explained(error)
    return ""


@contextmanager
def _warnings_ignored() -> Iterator[None]:
    """The compiler warns of its own modules, and of the TF32 that it would like."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
