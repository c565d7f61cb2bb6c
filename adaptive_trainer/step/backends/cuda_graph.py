"""One update, or its forward and backward passes, as CUDA graphs: recorded once, then replayed with new samples.

A small batch leaves a card waiting for Python to launch its kernels. A graph launches them all at once, and as its
memory is its own, a replay allocates nothing: it cannot run out of memory. Between replays that memory can be lent.
"""

from __future__ import annotations

import pickle
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from adaptive_trainer import oom
from adaptive_trainer.errors import AdaptiveTrainerError, DeviceUnusable, explained
from adaptive_trainer.memory.compaction import compact
from adaptive_trainer.memory.kernels import Kernels
from adaptive_trainer.memory.limit import Capacity
from adaptive_trainer.models.recomputing.following import host_memory_of
from adaptive_trainer.step.agreement import Agreement
from adaptive_trainer.step.backends.host_state import HostState
from adaptive_trainer.step.backends.pool import Pool
from adaptive_trainer.step.copies import Places
from adaptive_trainer.step.program import Accumulate, Change, Program
from adaptive_trainer.step.update import Update
from adaptive_trainer.utils.belongings import Belongings
from adaptive_trainer.utils.device import synchronizing
from adaptive_trainer.utils.random import state_of

TIGHT = 1.05  # of the large blocks: with less room than that, what lies between the weights is wanted
SYNCHRONIZES = "called a synchronizing CUDA operation"  # what torch's sync debug mode says


class GraphRefused(AdaptiveTrainerError):
    """The update cannot be recorded; says why."""


class NoRoom(GraphRefused):
    """There is no memory for the recording."""


class Graph:
    """An update recorded for batches of one shape.

    Args:
        update: what is recorded. Its optimizer has made all of its state, and an update of this shape has run before.
        images: (N, C, H, W), the shape that is recorded; the values do not matter.
        labels: (N,).
        accumulate: makes the gradients.
        with_step: record all of the update; otherwise only what makes the gradients, forward and backward.
        in_one: the size of the piece of memory that large blocks are cut from, in times of what they take at the most;
            no more than there is.

    Attributes:
        is_spoiled: what was done in the memory that it lent has left something there, which a replay would write over.

    Raises:
        GraphRefused: it cannot be recorded, or (NoRoom) there is no memory for it; the training state is as before.
            `Update.phase` says how far the recording came.
    """

    def __init__(
        self,
        update: Update,
        images: Tensor,
        labels: Tensor,
        accumulate: Accumulate,
        *,
        with_step: bool = True,
        in_one: float = 1.0,
    ) -> None:
        program = self._program = update.program
        self.with_step = with_step
        self.groups = program.state.optimizer.param_groups if with_step else []
        self.gradients: list[tuple[nn.Parameter, Tensor]] = []
        self._holders = _Holders()
        self._lane: _Lane | None = None
        self._pool = Pool(program.device)
        # with several ranks their gradients are summed between two
        self._agreement = update.agreement if with_step and update.agreement.gather else None
        self._graphs = [torch.cuda.CUDAGraph() for _ in range(1 if self._agreement is None else 2)]
        self.is_spoiled = False
        program.phase = "begin"
        oom.release(program.device)  # while a graph is recorded the allocator cannot flush its cache
        failed = self._attempt(update, program, (images, labels), accumulate, in_one)
        oom.clear_workspaces(program.device)  # or a later graph would use memory that goes with this one
        if failed is not None:
            vars(self).clear()  # the graph, and with it its memory
            oom.release(program.device)
            update.kernels.restore()
            raise failed
        self._held = self._pool.held()
        if images.is_pinned():
            with suppress(torch.OutOfMemoryError):  # a graph can do without
                self._lane = _Lane(self.images, self.labels)

    def _attempt(
        self, update: Update, program: Program, batch: tuple[Tensor, Tensor], accumulate: Accumulate, in_one: float
    ) -> GraphRefused | None:
        """Record; return why that failed, as an error that knows no frame of the failure."""
        device, capacity = program.device, update.capacity
        try:
            self.images, self.labels = (torch.zeros_like(each, device=device) for each in batch)
            large, room = _make_room(capacity, lambda: (*update.tensors(), self.images, self.labels))
            size = int(min(in_one * large, room))
            with update.rolled_back(), _unchanged_host(program):
                self._record(program, accumulate, size, update.kernels)
        except GraphRefused as error:
            return GraphRefused(str(error))
        except DeviceUnusable:
            raise
        except Exception as error:
            failure = oom.describe(error, pressure=capacity.pressure)
            if failure.kind is oom.Kind.POISONED:
                raise
            return (NoRoom if failure.fills(device) else GraphRefused)(failure.text)
        return None

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Inside, operators run in the graph's memory; what they make there is to be gone at the end."""
        try:
            with self._pool.opened():
                yield
        finally:
            oom.clear_workspaces(self._pool.device)  # it was made inside, and is no harm
            self.is_spoiled = self._pool.held() > self._held

    def shrink(self) -> bool:
        """Give back what a replay can do without; whether there was anything."""
        had, self._lane = self._lane is not None, None
        return had

    def suits(self, images: Tensor, labels: Tensor) -> bool:
        """Whether it was recorded for such a batch."""
        mine, given = (self.images, self.labels), (images, labels)
        return all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(mine, given, strict=True))

    def replay(self, images: Tensor, labels: Tensor) -> None:
        """The update on these samples, at the learning rates that the optimizer's groups hold now.

        Without the step: the gradients, which stay the graph's own and are overwritten by the next replay.

        Raises:
            GraphRefused: the optimizer has kept such a gradient for a later step; nothing was replayed.
        """
        if self._holders.have_grown([gradient for _, gradient in self.gradients]):
            raise GraphRefused("the optimizer keeps gradients for later steps, and a replay would write over them")
        if self._lane is not None and self._lane.suits(images, labels):
            images, labels = self._lane.carry(images, labels)
        self.images.copy_(images, non_blocking=True)
        self.labels.copy_(labels, non_blocking=True)
        if self._lane is not None:
            self._lane.clear()
        for rate, group in zip(self.rates, self.groups, strict=True):
            rate.fill_(group["lr"])
        self._graphs[0].replay()
        if self._agreement is not None:
            self._agreement.add(with_weights=bool(self._counted[0]))
            self._graphs[1].replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        self._program.counted = self._counted

    def _record(self, program: Program, accumulate: Accumulate, size: int, kernels: Kernels) -> None:
        self.rates = [torch.tensor(float(group["lr"]), device=program.device) for group in self.groups]
        for group, rate in zip(self.groups, self.rates, strict=True):  # whoever records puts the groups back
            group.update({"lr": rate} | ({"capturable": True} if "capturable" in group else {}))
        for generator in Belongings(program.state.owners()).generators.values():
            if isinstance(generator, torch.Generator) and generator.device.type == "cuda":
                for graph in self._graphs:
                    graph.register_generator_state(generator)  # else each replay would draw the same numbers

        def step(change: Change) -> None:
            program.follow_layouts()  # as any update does; what has moved is a reason then, and no operator's error
            change()

        def work(cut: Callable[[], None]) -> None:
            kernels.begin()
            if self.with_step:
                gather = None if self._agreement is None else partial(_cut_between, self._agreement, cut)
                program.run(self.images, self.labels, accumulate, step, gather)
            else:
                accumulate(self.images, self.labels)
            kernels.check()

        self._pool.capture(self._graphs, work, size)
        if not self.with_step:
            self.gradients = [(p, p.grad) for p in program.state.model.parameters() if p.grad is not None]
        self._counted = program.counted  # a replay fills the tensors anew
        self._host_memory = host_memory_of(program.state.model)  # which replays copy to and from


def _cut_between(
    agreement: Agreement, cut: Callable[[], None], weights: list[Tensor], samples: int, is_sum: bool
) -> bool:
    """End the graph whose gradients are to be summed, and begin the one that takes the sum."""
    agreement.collect(weights)
    cut()
    agreement.hand_out(with_weights=bool(weights))
    return True


class _Holders:
    """Notices who keeps a gradient that is written over: the tensor itself, or its memory by another one."""

    def __init__(self) -> None:
        self._counts: list[int] = []

    def have_grown(self, tensors: list[Tensor]) -> bool:
        """Whether one of these tensors, the same ones each time, has more holders than the first time."""
        counts = [sys.getrefcount(tensor) for tensor in tensors]
        counts += [torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) for tensor in tensors]
        self._counts = self._counts or counts
        return any(now > first for now, first in zip(counts, self._counts, strict=True))


class _Lane:
    """Takes a batch from the host to the device while the replay before it still runs.

    Args:
        images, labels: the graph's own, which that replay reads.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.there = torch.empty_like(images), torch.empty_like(labels)
        self.device = images.device
        self.side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self.cleared = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.clear()

    def suits(self, images: Tensor, labels: Tensor) -> bool:
        """Whether all of the batch is on the host, and lies there as on the device: else a copy takes more memory."""
        return not (images.is_cuda or labels.is_cuda) and images.stride() == self.there[0].stride()

    def carry(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The batch on the device; what the current stream is given from now on comes after its arrival."""
        self.side.wait_event(self.cleared)
        try:
            with torch.cuda.stream(self.side):
                for there, here in zip(self.there, (images, labels), strict=True):
                    there.copy_(here, non_blocking=True)
        finally:
            torch.cuda.current_stream(self.device).wait_stream(self.side)
        return self.there

    def clear(self) -> None:
        """The next batch may come once the current stream has done what it was given so far."""
        self.cleared.record(torch.cuda.current_stream(self.device))


def _make_room(capacity: Capacity, staying: Callable[[], Iterable[Tensor]]) -> tuple[int, int]:
    """Make room for a recording; return the bytes of large blocks that it will hold at the most, and those there are.

    The first are what updates that ran operator by operator have held beside what is there still.

    Args:
        staying: gives the tensors that lie on the device from one update to the next.
    """
    stats = torch.cuda.memory_stats(capacity.device)
    large = int(stats["allocated_bytes.large_pool.peak"] - stats["allocated_bytes.large_pool.current"])
    small = int(stats["reserved_bytes.small_pool.peak"] - stats["allocated_bytes.small_pool.current"])  # lie elsewhere
    if TIGHT * large > capacity.unreserved() - small:  # gaps, and small blocks of other batches, take some of it
        with suppress(torch.OutOfMemoryError):  # then what lies between the weights is left unused
            compact(staying(), capacity.device)
    return large, max(0, capacity.unreserved() - small)


@contextmanager
def _unchanged_host(program: Program) -> Iterator[None]:
    """Put back what is changed on the host, and refuse an update that does so, which a replay would not repeat."""
    model, loss, places = program.state.model, program.criterion.loss, Places(_tensors(program))
    model.train()  # as any update does; after an evaluation that would be a change
    host, drawn = HostState([model, loss] if isinstance(loss, nn.Module) else [model]), _drawn(program)
    try:
        yield
        changed = host.changes() or [path for path, state in _drawn(program).items() if drawn.get(path) != state]
        has_moved = not places.hold(_tensors(program))
    finally:
        host.put_back()
    if changed:
        program.phase = "forward"  # the step has run since, and is not to be blamed
        raise GraphRefused(f"its forward pass changes {', '.join(changed)} on the host, which a graph does not repeat")
    if has_moved:
        raise GraphRefused("it puts a tensor of its state elsewhere, or gives it another shape, and a graph does not")


def _drawn(program: Program) -> dict[str, bytes]:
    """The states of all generators on the host that the network, the loss, the optimizer and the average own."""
    owned = Belongings(program.state.owners()).generators
    on_host = {path: each for path, each in owned.items() if getattr(each, "device", torch.device("cpu")).type == "cpu"}
    return {path: pickle.dumps(state_of(each)) for path, each in on_host.items()}


def _tensors(program: Program) -> list[Tensor]:
    """What a replay finds where the recording left it."""
    state = program.state
    owners = [state.model, *([] if state.ema is None else [state.ema.module])]
    made = [leaf for values in state.optimizer.state.values() for leaf in tree_leaves(values)]
    named = [tensor for owner in owners for tensor in (*owner.parameters(), *owner.buffers())]
    return [tensor for tensor in (*named, *made) if isinstance(tensor, Tensor)]


def refusal(program: Program) -> str:
    """Why no part of the update can be a graph; empty where nothing speaks against trying."""
    if program.device.type != "cuda":
        return f"graphs need a CUDA card, and this is {program.device.type}"
    if torch.cuda.get_allocator_backend() != "native":
        return "graphs need torch's own allocator"
    loss = program.criterion.loss
    if not isinstance(loss, nn.Module) and not loss.__module__.startswith("torch."):
        return "what a loss function changes on the host cannot be seen; a loss that is an nn.Module can be recorded"
    return ""


def step_refusal(program: Program) -> str:
    """Why the optimizer's step cannot be a part of the graph; empty where nothing speaks against trying."""
    optimizer = program.state.optimizer
    name = type(optimizer).__name__
    fused_sgd = isinstance(optimizer, torch.optim.SGD) and all(group["fused"] for group in optimizer.param_groups)
    if not fused_sgd and not all("capturable" in group for group in optimizer.param_groups):
        return f"{name} has no implementation that can be recorded with a changing learning rate"
    leaves = [leaf for values in optimizer.state.values() for leaf in tree_leaves(values)]
    if any(not isinstance(leaf, Tensor) or leaf.device.type != program.device.type for leaf in leaves):
        has_fused = any("fused" in group for group in optimizer.param_groups)
        advice = "; its fused implementation does not" if has_fused else ""
        return f"{name} keeps a part of its state on the host{advice}"
    return ""


@contextmanager
def synchronizing_refused() -> Iterator[None]:
    """Refuse operators that wait for the card, which no graph can hold.

    Raises:
        GraphRefused: one was called; whoever ran the update has rolled it back.
    """
    with synchronizing(is_allowed=False), explained(_waiting, (RuntimeError,)):
        yield


def _waiting(error: Exception) -> GraphRefused | None:
    if SYNCHRONIZES not in str(error):
        return None
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(frame.filename).name}, line {frame.lineno}: {frame.line}"
    return GraphRefused(f"an operator of the update waits for the card ({where})")
