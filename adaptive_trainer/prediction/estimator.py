"""How much memory an update will need, and whether it fits: a trace replayed through the model of the allocator."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import StrEnum
from html import escape

import torch

from adaptive_trainer.memory.allocator import LARGE_SEGMENT, SMALL_SEGMENT, AllocatorFull
from adaptive_trainer.memory.usage import format_bytes
from adaptive_trainer.prediction.derivation import Tracer
from adaptive_trainer.prediction.replay import Replay
from adaptive_trainer.prediction.tracer import Trace, TraceError, TraceSpec, no_collection
from adaptive_trainer.prediction.workspaces import MULTIPROCESSORS, Workspaces
from adaptive_trainer.utils.tables import html

CAPACITY_STEP = 2 * 2**20  # segments are multiples of it, so nothing changes in between
# Shares of the smallest capacity. Predictions were 4.3 % too low and 2.0 % too high at the worst on the card they were
# compared with (docs/gpu-results.md); a rung given up for nothing costs more than one that is tried for nothing.
FITS_ABOVE, HOPELESS_BELOW = 1.07, 0.90


class Verdict(StrEnum):
    """What is expected of a recipe on a device; `skipped` is not to be tried at all."""

    FITS = "fits"
    UNSURE = "unsure"
    HOPELESS = "hopeless"
    UNKNOWN = "unknown"
    SKIPPED = "skipped"


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
        offloaded_bytes: what an update sends to the host, and fetches back.
        plan: what is recomputed of the activations, as `trainer.recompute` and `recompute` take it; empty where nobody
            asked.
        added_time: predicted time of an update, such as 1.18, over that with all activations kept on the device; None
            where it is not known.
    """

    live_bytes: int | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    min_capacity_bytes: int | None = None
    seconds: float = 0.0
    reason: str = ""
    offloaded_bytes: int = 0
    plan: str = ""
    added_time: float | None = None

    def _repr_html_(self) -> str:
        """What a notebook shows: the sizes, or why they are not known."""
        if self.reason:
            return f"<p>not known: {escape(self.reason)}</p>"
        sizes = (self.live_bytes, self.allocated_bytes, self.reserved_bytes, self.min_capacity_bytes)
        return html([("live", "allocated", "reserved", "smallest limit"), [format_bytes(size) for size in sizes]])


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
    try:
        trace = (tracer or Tracer()).trace(spec)
    except TraceError as error:
        return Prediction(seconds=time.perf_counter() - start, reason=str(error))
    workspaces = workspaces_of(capability, multiprocessors, version)
    with no_collection():
        free = Replay(trace, workspaces)
        free.run()
        free.evaluate()  # counts in the peaks, and not below: an evaluation that does not fit is halved
        peaks = free.allocator
        least = smallest_limit(trace, workspaces, peaks.peak_reserved, spec)
    sizes = peaks.peak_requested, peaks.peak_allocated, peaks.peak_reserved, least
    moved = trace.moved(len(spec.micro_batches))
    return Prediction(*sizes, time.perf_counter() - start, offloaded_bytes=moved)


def verdict(prediction: Prediction, capacity_bytes: int | None) -> Verdict:
    """Judge a capacity, in bytes for the allocator; unknown where it is None or nothing is predicted.

    It fits from 1.07 times the smallest capacity on, and is hopeless below 0.90 times; in between, and within one
    segment of the smallest capacity, it is unsure.
    """
    least = prediction.min_capacity_bytes
    if least is None or capacity_bytes is None:
        return Verdict.UNKNOWN
    # Blocks that are placed otherwise than predicted take, or save, a whole segment, however small the network is.
    segment = SMALL_SEGMENT if least < LARGE_SEGMENT else LARGE_SEGMENT
    if capacity_bytes >= max(least * FITS_ABOVE, least + segment):
        return Verdict.FITS
    is_hopeless = capacity_bytes < min(least * HOPELESS_BELOW, least - segment)
    return Verdict.HOPELESS if is_hopeless else Verdict.UNSURE


def workspaces_of(capability: tuple[int, int], multiprocessors: int, version: str = torch.__version__) -> Workspaces:
    """What kernels take on a card, under a version of torch such as "2.14.1"."""
    major, minor = version.split(".")[:2]
    return Workspaces.of(capability, multiprocessors, (int(major), int(minor)))


def smallest_limit(trace: Trace, workspaces: Workspaces, at_most: int, spec: TraceSpec) -> int:
    """The smallest limit, in bytes, under which the updates of a trace run.

    Args:
        at_most: bytes that are enough, such as what is reserved with no limit.
        spec: how the update is made.
    """
    low, high = 0, -(-at_most // CAPACITY_STEP)
    while low < high:
        middle = (low + high) // 2
        if runs(trace, workspaces, middle * CAPACITY_STEP, spec):
            high = middle
        else:
            low = middle + 1
    return high * CAPACITY_STEP


def runs(trace: Trace, workspaces: Workspaces, limit: int, spec: TraceSpec) -> bool:
    """Whether the updates of a trace run under a limit in bytes."""
    if limit < trace.most_alive:
        return False
    try:
        Replay(trace, workspaces, limit, retried=spec.undo, same_kernels=spec.same_kernels).run()
    except AllocatorFull:
        return False
    return True
