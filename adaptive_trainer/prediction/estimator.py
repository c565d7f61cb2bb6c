"""How much memory an update will need, and whether it fits: a trace replayed through the model of the allocator.

What a trace cannot show is added at replay, each with its reason:

- cuBLAS takes a workspace for matrix products: 32 MiB from compute capability 9.0 on, else 8.125 MiB. Up to torch 2.14
  each thread that multiplies (the caller's, and the one that runs backward) keeps its own; from 2.15 on it is held only
  during the product.
- cublasLt, which multiplies and adds a bias in one go, takes another 1 MiB.
- cuDNN's tensor-core kernels want channels last. For other layouts they copy all operands of a convolution into a
  workspace. If it does not get one it takes another kernel, so a workspace alone never makes an update fail.
- For the weight gradient of a 1x1 convolution cuDNN likes to make one float32 gradient per sample and add them up.
- A sum over many rows, such as the gradient of a bias, leaves partial sums in global memory.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from adaptive_trainer.memory.allocator import LARGE_SEGMENT, SMALL_SEGMENT, AllocatorFull, CachingAllocator
from adaptive_trainer.prediction.recorder import Kind
from adaptive_trainer.prediction.tracer import Trace, TraceError, Tracer, TraceSpec, no_collection
from adaptive_trainer.prediction.workspaces import MULTIPROCESSORS, Scratch

MiB = 1 << 20
# As `step.dry_run.prove`: the first makes the optimizer's state, the second meets the full peak and shows whether a
# step allocates. Only then are copies made beside the weights, and these stay: two more updates.
UPDATES = COPYING_UPDATES = 2
CAPACITY_STEP = 2 * MiB  # segments are multiples of it, so nothing changes in between
# Shares of the smallest capacity. Predictions were 4.3 % too low and 2.0 % too high at the worst on the card they were
# compared with (docs/gpu-results.md); a rung given up for nothing costs more than one that is tried for nothing.
FITS_ABOVE, HOPELESS_BELOW = 1.07, 0.90
SPLIT_LIMIT = {Kind.SPLIT: 5, Kind.SPLIT_HALF: 10}  # of the operands' bytes: more than 5 times their elements


@dataclass(frozen=True)
class Prediction:
    """What an update, and an evaluation batch, will need on one kind of card, in bytes of the allocator.

    The CUDA context and other processes are not in it.

    Attributes:
        live_bytes: peak of the bytes asked for.
        allocated_bytes: peak of the blocks handed out, as `torch.cuda.max_memory_allocated`.
        reserved_bytes: peak of the segments with no limit, as `torch.cuda.max_memory_reserved`.
        min_capacity_bytes: the smallest limit under which the update still runs. An evaluation that does not fit
            takes smaller batches, so it does not count here.
        seconds: what the prediction took.
        reason: why nothing is known; then the four sizes are None.
    """

    live_bytes: int | None
    allocated_bytes: int | None
    reserved_bytes: int | None
    min_capacity_bytes: int | None
    seconds: float
    reason: str = ""


def predict(
    spec: TraceSpec,
    *,
    capability: tuple[int, int] = (9, 0),
    multiprocessors: int = MULTIPROCESSORS,
    version: str = torch.__version__,
    tracer: Tracer | None = None,
) -> Prediction:
    """Predict the memory that `spec` needs. Uses no GPU and never raises for a network that cannot be traced.

    Args:
        spec: the update.
        capability: compute capability of the card, such as (8, 6).
        multiprocessors: how many the card has.
        version: version of torch that will train.
        tracer: remembers traces; pass the same one for all rungs of a ladder.
    """
    start = time.perf_counter()
    reason = ""
    try:
        trace = (tracer or Tracer()).trace(spec)
    except TraceError as error:
        reason = str(error)
    if reason:
        return Prediction(None, None, None, None, time.perf_counter() - start, reason)
    major, minor = version.split(".")[:2]
    scratch = Scratch.of(capability, multiprocessors, (int(major), int(minor)))
    with no_collection():
        free = _Replay(trace, scratch)
        free.run()
        free.evaluate()
        peaks = free.allocator
        least = _min_capacity(trace, scratch, peaks.peak_reserved, retried=spec.undo)
    return Prediction(
        peaks.peak_requested, peaks.peak_allocated, peaks.peak_reserved, least, time.perf_counter() - start
    )


def verdict(prediction: Prediction, capacity_bytes: int) -> str:
    """ "fits", "unsure" or "hopeless" in a capacity (bytes for the allocator), or "unknown" where nothing is predicted.

    It fits from 1.07 times the smallest capacity on, and is hopeless below 0.90 times; in between, and within one
    segment of the smallest capacity, it is unsure.
    """
    least = prediction.min_capacity_bytes
    if least is None:
        return "unknown"
    # Blocks that are placed otherwise than predicted take, or save, a whole segment, however small the network is.
    segment = SMALL_SEGMENT if least < LARGE_SEGMENT else LARGE_SEGMENT
    if capacity_bytes >= max(least * FITS_ABOVE, least + segment):
        return "fits"
    return "hopeless" if capacity_bytes < min(least * HOPELESS_BELOW, least - segment) else "unsure"


def _min_capacity(trace: Trace, scratch: Scratch, at_most: int, *, retried: bool) -> int:
    low, high = 0, -(-at_most // CAPACITY_STEP)
    while low < high:
        middle = (low + high) // 2
        try:
            _Replay(trace, scratch, middle * CAPACITY_STEP, retried=retried).run()
        except AllocatorFull:
            low = middle + 1
        else:
            high = middle
    return high * CAPACITY_STEP


class _Replay:
    """One run of a trace on an allocator of its own.

    Args:
        retried: an update that does not fit is rolled back and tried once more with an empty cache, as
            `adaptive_trainer.step.update` does: what the update before has left no longer divides the memory.
    """

    def __init__(self, trace: Trace, scratch: Scratch, capacity: int | None = None, *, retried: bool = False) -> None:
        self.trace = trace
        self.scratch = scratch
        self.allocator = CachingAllocator(capacity)
        self.retried = retried
        self._copies = self._left_out = frozenset(range(*trace.copies))
        self._handles: dict[int, int] = {}
        self._workspaces: dict[int, int] = {}

    def run(self) -> None:
        """The network, and the updates of a proof.

        Raises:
            AllocatorFull: the capacity is too small.
        """
        trace = self.trace
        self._play(0, trace.update_start)
        for _ in range(UPDATES):
            self._update()
        self._left_out = frozenset()
        for _ in range(COPYING_UPDATES if self._copies else 0):
            self._update()

    def _update(self) -> None:
        kept = set(self._handles)
        try:
            self._play(self.trace.update_start, self.trace.evaluation_start)
        except AllocatorFull:
            if not self.retried:
                raise
        else:
            return
        if self._copies <= self._handles.keys():  # a roll-back keeps them
            kept |= self._copies
        for number in self._handles.keys() - kept:
            self.allocator.free(self._handles.pop(number))
        while self._workspaces:
            self.allocator.free(self._workspaces.popitem()[1])
        self.allocator.empty_cache()
        self._play(self.trace.update_start, self.trace.evaluation_start)

    def evaluate(self) -> None:
        """One evaluation batch."""
        self._play(self.trace.evaluation_start, len(self.trace.kinds))

    def _play(self, start: int, stop: int) -> None:
        handles, sizes, left_out = self._handles, self.trace.sizes, self._left_out
        allocate, free = self.allocator.allocate, self.allocator.free
        split: int | None = None
        rows = 0
        events = zip(self.trace.kinds[start:stop], self.trace.numbers[start:stop], strict=True)
        for kind, number in events:
            if kind == Kind.BORN:
                if number not in handles and number not in left_out:  # what outlived an earlier update is still there
                    handles[number] = allocate(sizes[number])
            elif kind == Kind.DIED:
                if number in handles:
                    free(handles.pop(number))
            elif kind == Kind.CONV:
                self._convolve(sizes[number] if split is None else split)
                split = None
            elif kind == Kind.SUM:
                rows = sizes[number]
            elif kind == Kind.SUMMED:
                free(allocate(self.scratch.reduction(rows, sizes[number])))
            elif kind in SPLIT_LIMIT:
                split = sizes[number] if sizes[number] <= SPLIT_LIMIT[kind] * sizes[number + 1] else None
            else:
                self._multiply(kind)

    def _convolve(self, nbytes: int) -> None:
        try:
            self.allocator.free(self.allocator.allocate(nbytes))
        except AllocatorFull:
            return  # cuDNN takes a kernel without a workspace

    def _multiply(self, kind: int) -> None:
        scratch, allocator = self.scratch, self.allocator
        if not scratch.kept:
            allocator.free(allocator.allocate(scratch.bias if kind == Kind.GEMM_BIAS else scratch.gemm))
            return
        thread = Kind.GEMM_BACKWARD if kind == Kind.GEMM_BACKWARD else Kind.GEMM
        for user, nbytes in ((thread, scratch.gemm), (Kind.GEMM_BIAS, scratch.bias)):
            if user not in self._workspaces and user in (thread, kind):
                self._workspaces[user] = allocator.allocate(nbytes)
