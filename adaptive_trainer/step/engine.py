"""Which way updates run: operator by operator (eager), by compiled code, or as one CUDA graph.

Where the optimizer's step cannot be recorded, the graph is of forward and backward alone. Compiled code and graph are a
luxury: where they cannot be had, or their memory is wanted for something else, updates go on without, and the reason is
recorded.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_trainer import oom
from adaptive_trainer.errors import OutOfMemory
from adaptive_trainer.models.savers import compile_refusal
from adaptive_trainer.step.backends.compiled import compile_forward, run_compiled
from adaptive_trainer.step.backends.cuda_graph import Graph, GraphRefused, refusal, step_refusal, synchronizing_refused
from adaptive_trainer.step.program import Accumulate
from adaptive_trainer.step.update import Update

T = TypeVar("T")
TIMED = 5  # updates of each kind that `auto` compares
IN_STEP = ("clipping", "optimizer step")  # phases after forward and backward


class Engine:
    """Runs the updates of one rung in training.

    Where the optimizer's step cannot be recorded, the graph is of forward and backward, and what follows runs operator
    by operator. So do a batch of another size than the whole one (the last of an epoch) and evaluation.

    Args:
        update: the transaction that runs operator by operator.
        name: `eager`, `graph`, `auto`, which times both and keeps the faster, or `compile`: compiled at the first whole
            batch, and on a CUDA card recorded as a graph too.
        batch_size: samples in a whole batch.
        event: is told what was decided, and why.
    """

    def __init__(self, update: Update, name: str, batch_size: int, event: Callable[[str], None]) -> None:
        self.update = update
        self._program = update.program
        self.name = name
        self.batch_size = batch_size
        self._event = event
        self._graph: Graph | None = None
        self._compiled: Accumulate | None = None  # makes the gradients by compiled code
        self._is_to_compile = name == "compile"
        on_cuda = self._program.device.type == "cuda"
        self._rounds = name != "eager" and on_cuda
        self._is_settled = name == "eager" or (name != "graph" and not on_cuda)  # nothing to choose from
        self._is_checked = False
        self._step_reason = ""  # why the step is not recorded
        self._seconds: dict[str, list[float]] = {"eager": [], "graph": []}

    def run(self, images: Tensor, labels: Tensor, *, samples: int) -> None:
        """One update, as `Update.run`.

        Raises:
            OutOfMemory: it does not fit, with nothing else held; the state is as before.
            DeviceUnusable: the device answers nothing any more.
            Exception: whatever is not about memory, unchanged.
        """
        if self._rounds:
            self._round_rates()
        if len(labels) != self.batch_size:
            self.beside_graph(lambda: self.update.run(images, labels, samples=samples))
        elif self._is_to_compile:
            self._compile(images, labels, samples)
        elif self._is_settled and self._graph is None:
            self._run_kernels(images, labels, samples)
        else:
            self._run_whole(images, labels, samples)

    def evaluate(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float, float]:
        """One evaluation batch, as `Update.evaluate`."""
        return self.beside_graph(lambda: self.update.evaluate(model, images, labels))

    def _round_rates(self) -> None:
        """To what a graph's tensor can hold, so that updates of both kinds have the same bits."""
        for group in self._program.state.optimizer.param_groups:
            group["lr"] = float(np.float32(group["lr"]))

    def _run_whole(self, images: Tensor, labels: Tensor, samples: int) -> None:
        if self._graph is None and self._is_checked and (self.name != "auto" or self._is_timed("eager")):
            self._record(images, labels)
        if self._graph is not None and self._graph.suits(images, labels):
            self._timed("graph", lambda: self.beside_graph(lambda: self._replay(images, labels, samples)))
            self._settle()
        elif self._is_settled:
            self.beside_graph(lambda: self._run_kernels(images, labels, samples))
        elif not self._is_checked:
            self._check(images, labels, samples)
        else:
            self._timed("eager", lambda: self._run_kernels(images, labels, samples))

    def _run_kernels(self, images: Tensor, labels: Tensor, samples: int, accumulate: Accumulate | None = None) -> None:
        """A whole batch, its kernels launched one by one; where compiled code fails, once more without it."""
        accumulate = accumulate or self._compiled
        if self._compiled is None or accumulate is None:
            self.update.run(images, labels, samples=samples, accumulate=accumulate)
            return
        reason = run_compiled(self.update, accumulate, images, labels, samples=samples)
        if reason:
            self._run_uncompiled(images, labels, samples, reason)

    def _compile(self, images: Tensor, labels: Tensor, samples: int) -> None:
        self._is_to_compile = False
        if self.update.capacity.card is not None:
            reason = (
                "a simulated card counts operators, which compiled code is not made of (memory.limit=none lifts it)"
            )
        elif not (reason := compile_refusal(self._program.state.model)):
            self._event(f"engine: compiling for batches of {self.batch_size}, as trainer.engine=compile asks")
            started = time.perf_counter()
            forward = compile_forward(self._program.state.model)
            self._compiled = partial(self._program.accumulate, forward=forward)
            reason = run_compiled(self.update, self._compiled, images, labels, samples=samples, is_first=True)
        if reason:
            self._run_uncompiled(images, labels, samples, reason)
        else:
            self._event(f"engine: compiled, with the first update in {time.perf_counter() - started:.1f} s")

    def _run_uncompiled(self, images: Tensor, labels: Tensor, samples: int, reason: str) -> None:
        """Give up what was compiled, and with it the thought of a graph."""
        self._compiled = None
        self._is_settled = True
        oom.release(self._program.device)
        self._event(f"engine: eager, not compiled: {reason}")
        self.update.run(images, labels, samples=samples)

    def _replay(self, images: Tensor, labels: Tensor, samples: int) -> None:
        """The update by what was recorded; kernel by kernel where that had to make room for the step."""
        if self._graph is None:
            self._run_kernels(images, labels, samples)
        elif self._graph.with_step:
            after = self._program.state.position.advance(samples)
            self._graph.replay(images, labels)
            self.update.commit(after)
        else:
            self._replay_beside_step(self._graph, images, labels, samples)

    def _replay_beside_step(self, graph: Graph, images: Tensor, labels: Tensor, samples: int) -> None:
        """Gradients from the graph, the rest kernel by kernel; all of it so where a replay would do harm."""
        try:
            self.update.run(images, labels, samples=samples, accumulate=graph.replay)
            return
        except GraphRefused as error:
            reason = str(error)
        self._give_up(reason)
        self._run_kernels(images, labels, samples)

    def _check(self, images: Tensor, labels: Tensor, samples: int) -> None:
        """An update kernel by kernel that shows what speaks against a graph, once the optimizer has made its state."""
        reason = refusal(self._program)
        if not reason and self.update.step_memory.may_allocate is None:
            self._run_kernels(images, labels, samples)
            return
        self._is_checked = True
        if not reason:
            self._step_reason = step_refusal(self._program)
            reason = self._run_checked(images, labels, samples)
            if not reason:
                return
            if self._is_of_the_step(reason):
                reason = ""
        if reason:
            self._refuse(reason)
        self._run_kernels(images, labels, samples)

    def _run_checked(self, images: Tensor, labels: Tensor, samples: int) -> str:
        """An update in which nothing that is to be recorded may wait for the card; why it was rolled back."""
        try:
            if self._step_reason:
                self._run_kernels(images, labels, samples, self._accumulate_checked)
            else:
                with synchronizing_refused():
                    self._run_kernels(images, labels, samples)
        except GraphRefused as error:
            return str(error)
        return ""

    def _accumulate_checked(self, images: Tensor, labels: Tensor) -> None:
        with synchronizing_refused():
            (self._compiled or self._program.accumulate)(images, labels)

    def _is_of_the_step(self, reason: str) -> bool:
        """Whether what has just failed came as far as the step; then forward and backward may be recorded alone."""
        if self._step_reason or self._program.phase not in IN_STEP:
            return False
        self._step_reason = reason
        return True

    def _record(self, images: Tensor, labels: Tensor) -> None:
        reason = self._try_to_record(images, labels)
        if reason and self._is_of_the_step(reason):
            reason = self._try_to_record(images, labels)
        if reason:
            self._refuse(reason)
        elif self.name != "auto":
            self._is_settled = True
            self._tell_recorded(f"from here on, as trainer.engine={self.name} asks")

    def _try_to_record(self, images: Tensor, labels: Tensor) -> str:
        """Why it failed."""
        try:
            self._graph = Graph(self.update, images, labels, self._compiled, with_step=not self._step_reason)
        except GraphRefused as error:
            return str(error)
        return ""

    def _tell_recorded(self, why: str) -> None:
        what = "forward and backward are" if self._step_reason else "the whole update is"
        rest = f"; the optimizer's step is not: {self._step_reason}" if self._step_reason else ""
        self._event(f"engine: {what} one CUDA graph {why}{rest}")

    def _refuse(self, reason: str) -> None:
        self._is_settled = True
        kind = "eager" if self._compiled is None else "compiled"
        self._event(f"engine: {kind}, not a CUDA graph: {reason}")

    def _settle(self) -> None:
        """Keep the faster of the two, once both are timed."""
        if self._is_settled or not self._is_timed("graph"):
            return
        self._is_settled = True
        eager, graph = (1e3 * statistics.median(self._seconds[kind]) for kind in ("eager", "graph"))
        if graph < eager:
            self._tell_recorded(f"from here on, {graph:.1f} ms an update, against {eager:.1f} ms eager (auto)")
        else:
            self._graph = None
            oom.release(self._program.device)
            self._event(f"engine: eager, {eager:.1f} ms an update, against {graph:.1f} ms as a CUDA graph (auto)")

    def _timed(self, kind: str, work: Callable[[], None]) -> None:
        if self.name != "auto" or self._is_settled:
            work()
            return
        torch.cuda.synchronize(self._program.device)
        started = time.perf_counter()
        work()
        torch.cuda.synchronize(self._program.device)
        self._seconds[kind].append(time.perf_counter() - started)

    def _is_timed(self, kind: str) -> bool:
        return len(self._seconds[kind]) >= TIMED

    def beside_graph(self, work: Callable[[], T]) -> T:
        """What the work returns; where memory runs out beside the graph, once more without it."""
        reason = ""
        try:
            return work()
        except OutOfMemory as error:
            if self._graph is None:
                raise
            reason = f"its memory was wanted in {error.phase}"
        self._give_up(reason)
        return work()

    def _give_up(self, reason: str) -> None:
        """Go on without the graph."""
        self._graph = None
        oom.release(self._program.device)
        self._refuse(reason)
