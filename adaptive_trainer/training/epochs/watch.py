"""What is looked at between updates: the mean loss, the allocator's cache, images that cannot be read."""

from __future__ import annotations

import math
import time
from itertools import chain

import torch

from adaptive_trainer.data.loader import Batch
from adaptive_trainer.distributed.peers import peers
from adaptive_trainer.errors import DivergedError, OutOfMemory
from adaptive_trainer.report.listeners import Listener, Sample
from adaptive_trainer.training.session import Session

SAMPLED_EVERY = 0.05  # seconds
UPDATES_PER_FLUSH = 5  # a cache that is flushed this often or more is thrashing


def finite(kind: str, loss: float, session: Session, update: int | None = None) -> float:
    """The loss, which is a number.

    Raises:
        DivergedError: it is none.
    """
    if math.isfinite(loss):
        return loss
    blame = ""
    if session.config.trainer.precision == "fp16":
        blame = f" fp16 overflows at 65504, and rung {session.rung!r} trains in it: try trainer.precision=bf16 or fp32."
    raise DivergedError(
        f"the {kind} loss is {loss} after update {update or session.state.updates}.{blame} "
        f"A lower optimizer.lr (now {session.config.optimizer.lr:g}) or trainer.clip_grad=1 often helps"
    )


class RunningLoss:
    """The mean training loss: asked for after one update and read after the next, so that a device need not wait.

    Attributes:
        last: the mean as it was last read; None where it was not.
        text: loss and share of right answers as they were last read, for people; the share is left out where none is
            right, as of a network that gives no scores by class.
    """

    def __init__(self, session: Session) -> None:
        on_cuda = session.capacity.device.type == "cuda"
        self.is_asked = False
        self._session = session
        self._asked_after = 0
        self.last: float | None = None
        self.text: tuple[str, ...] = ()
        self._sums = torch.zeros(4, dtype=torch.float64, pin_memory=on_cuda)  # only pinned memory is copied to beside
        self._copied = torch.cuda.Event() if on_cuda else None  # type: ignore[no-untyped-call]

    def ask(self) -> None:
        """Begin to copy the sums as they are now."""
        state = self._session.state
        self._asked_after = state.updates  # for the message, which is of this update and not of the next
        seen = state.meters["seen"]
        meters = (state.meters["loss"], state.meters.get("weight", seen), state.meters["correct"], seen)
        for there, here in zip(self._sums, meters, strict=True):
            there.copy_(here, non_blocking=True)  # the card goes on computing
        if self._copied is not None:
            self._copied.record()
        self.is_asked = True

    def answer(self) -> float:
        """The mean at the time when it was asked for.

        Raises:
            DivergedError: it is no number.
        """
        if self._copied is not None:
            peers().catch_up(self._copied)
            self._copied.synchronize()  # for this copy alone, not for the update that is running
        self.is_asked = False
        total, weight, correct, seen = map(sum, zip(*peers().gathered(self._sums.tolist()), strict=True))
        self.last = loss = finite("training", float(total / (weight or 1)), self._session, self._asked_after)
        self.text = (f"loss {loss:.3f}", f"acc {100 * correct / seen:.0f} %" if correct else "")
        return loss


class Sampling:
    """Tells the listeners, at most so often, how training goes."""

    def __init__(self, session: Session, record: Listener) -> None:
        self._session, self._record, self._at = session, record, 0.0

    def look(self, loss: float | None) -> None:
        """After an update: tell memory, counts and the loss as it was last read."""
        if (now := time.perf_counter()) < self._at:
            return
        self._at = now + SAMPLED_EVERY
        state, used = self._session.state, self._session.capacity.usage()
        images = state.position.epoch * state.position.size + state.position.cursor
        self._record.sample(Sample(state.updates, images, used.allocated, used.reserved, loss))


class Thrashing:
    """Whether the allocator flushes its cache again and again: training works then, but slowly."""

    def __init__(self, session: Session, record: Listener, *, is_left: bool) -> None:
        self._session, self._record, self._is_left = session, record, is_left
        self._has_warned = False
        self._before = self._now()

    def _now(self) -> tuple[int, int]:
        return self._session.state.updates, self._session.capacity.usage().num_alloc_retries

    def look(self) -> None:
        """Compare with the last look.

        Raises:
            OutOfMemory: the rung is to be left.
        """
        (since, before), self._before = self._before, self._now()
        updates, flushes = self._before[0] - since, self._before[1] - before
        if flushes * UPDATES_PER_FLUSH < updates or updates == 0 or flushes < 2:
            return  # a single flush is usual where shapes change
        text = f"the allocator flushed its cache {flushes} times in {updates} updates"
        if self._is_left:
            raise OutOfMemory(f"{text} and ladder.avoid_thrashing is on", phase="training")
        if not self._has_warned:
            self._has_warned = True
            self._record.event(
                f"rung {self._session.rung} fits, but {text}, which is slow; ladder.avoid_thrashing=true steps down"
            )


class BrokenImages:
    """The images that were left out because they cannot be read."""

    def __init__(self, record: Listener) -> None:
        self._record = record
        self._named: set[str] = set()
        self._waiting: list[str] = []  # to be told to all ranks
        self._has_left_one = False

    def name(self, batch: Batch) -> None:
        """Record those of a batch, each once, three at a time; of several ranks at the end of an epoch."""
        self._waiting += [name for name in batch.skipped if name not in self._named]
        if peers().size == 1:
            self.tell()

    def tell(self) -> None:
        """Record those that the ranks have met."""
        broken, self._waiting = [*chain(*peers().gathered(self._waiting))], []
        if broken := [*dict.fromkeys(broken)]:
            self._named.update(broken[:3])  # those that were only counted may be named in another epoch
            what = "1 broken image is" if len(broken) == 1 else f"{len(broken)} broken images are"
            self._record.event(f"{what} left out: {', '.join(broken[:3])}")

    def without_the_last(self, batch: Batch) -> Batch:
        """The batch with no sample, where broken ones have left BatchNorm a single one."""
        if not self._has_left_one:
            self._has_left_one = True
            self._record.event(
                f"of a batch of {batch.samples}, broken images have left one, and BatchNorm cannot train on one"
            )
        return batch._replace(images=batch.images[:0], labels=batch.labels[:0])
