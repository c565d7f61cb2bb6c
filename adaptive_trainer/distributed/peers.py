"""The ranks of one run: votes, decisions of the first rank, and what becomes of a rank that is lost."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from enum import IntEnum
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store, _abort_process_group, _get_default_store
from torch.distributed.rendezvous import rendezvous

from adaptive_trainer import oom
from adaptive_trainer.errors import OutOfMemory, PeerLost, explained
from adaptive_trainer.utils.device import synchronizing
from adaptive_trainer.utils.launch import world_size
from adaptive_trainer.utils.modes import unseen

log = logging.getLogger(__name__)

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)  # for one vote: a rank that loads slowly is no rank that hangs
GRACE = 8.0  # seconds, for a card to end what it was given before a rank was lost
NUMBERS = 4  # that may go with a vote
ELSEWHERE = "another rank"  # the phase of an out-of-memory that is not of this rank


class Site(IntEnum):
    """Where a rank votes. Whoever fails between two votes goes on to `RUNG`, and meets all others there."""

    RUNG = 0
    UPDATE = 1
    EVALUATION = 2
    EXCHANGE = 3
    ENGINE = 4


class Status(IntEnum):
    """How a rank has fared."""

    WELL = 0
    FAILED = 1  # may be tried once more
    FAILED_FOR_GOOD = 2


class PeerFailed(torch.OutOfMemoryError):
    """A peer is out of memory, which all ranks answer alike.

    Attributes:
        site: where this rank has heard of it.
        status: the worst of all ranks.
        is_elsewhere: the peer has failed outside `site`, and waits at `Site.RUNG`.
    """

    def __init__(self, text: str, site: Site, status: Status, *, is_elsewhere: bool = False) -> None:
        super().__init__(text)
        self.site, self.status, self.is_elsewhere = site, status, is_elsewhere


def voted(error: BaseException, *sites: Site) -> Status | None:
    """What a vote at one of these sites has come to, where it is this that has ended the work."""
    return error.status if isinstance(error, PeerFailed) and error.site in sites else None


class Peers:
    """One rank alone, which agrees with itself.

    Attributes:
        rank: this one, from 0.
        size: how many there are.
        cards: names of what the ranks compute on, which no two cards share; empty of one rank alone.
        numbers: what each rank has given with the last vote.
        wish: what this rank asks of all, from its next vote on; 0: nothing.
        wished: the largest wish of the last vote, which is the same on all ranks.
    """

    rank = 0
    size = 1

    def __init__(self) -> None:
        self.cards: list[str] = []
        self.numbers: list[list[float]] = []
        self.wish = self.wished = 0

    @property
    def is_first(self) -> bool:
        """Whether this rank writes, shows and decides."""
        return self.rank == 0

    def vote(self, site: Site, status: Status = Status.WELL, *numbers: float) -> Status:
        """Give a status; return the worst one of all ranks.

        Raises:
            PeerFailed: this rank is well, and a peer is not, or has failed outside `site`.
            PeerLost: a peer is gone, or silent for too long.
        """
        self.numbers = [list(numbers)]
        return status

    def decided(self, work: Callable[[], T]) -> T:
        """What the work returns on the first rank, where alone it is done; raises as `vote`."""
        return work()

    def gathered(self, value: T) -> list[T]:
        """The values of all ranks, in order; raises as `vote`."""
        return [value]

    def add(self, tensor: Tensor) -> None:
        """Sum a tensor over the ranks, in place, after a vote. It takes no memory."""

    def take_first(self, tensors: list[Tensor]) -> None:
        """Give tensors the values that they have on the first rank; raises as `vote`."""

    def catch_up(self, event: Any = None) -> None:
        """Wait for the card, where another wait could have no end: a rank may be gone that its kernels wait for.

        Args:
            event: of the card; None: all that it was given.

        Raises:
            PeerLost: it does not come to the end of what it was given.
        """


class Group(Peers):
    """The ranks that torchrun has started.

    Args:
        device: what this rank trains on.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # of its own: votes are on the host, so that they wait for no kernel
        self._control: Any = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._mine = torch.zeros(3 + NUMBERS, dtype=torch.float64)
        self._all = [torch.zeros_like(self._mine) for _ in range(self.size)]
        self._cards: Any = self._control
        self._is_deciding = False
        self._store = PrefixStore("last words", _get_default_store())
        is_cuda = device.type == "cuda"
        self.cards = self.gathered(str(torch.cuda.get_device_properties(device).uuid) if is_cuda else device.type)
        if is_cuda and len(set(self.cards)) == self.size:  # NCCL refuses two ranks of one card
            # votes find a lost rank earlier than its watchdog, which would end this process
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
            with explained(_unconnected, (RuntimeError,)):
                self._cards = dist.new_group(backend="nccl", timeout=TIMEOUT)
                dist.all_reduce(torch.zeros(1, device=device), group=self._cards)  # takes its memory now

    @unseen
    def vote(self, site: Site, status: Status = Status.WELL, *numbers: float) -> Status:
        """As of `Peers`."""
        self._mine.zero_()
        content = [float(site), float(status), float(self.wish), *numbers]
        self._mine[: len(content)] = torch.tensor(content, dtype=torch.float64)
        while True:
            with self._lost():
                dist.all_gather(self._all, self._mine, group=self._control)
            rows = [row.tolist() for row in self._all]
            if len({row[0] for row in rows}) == 1:
                break
            if site is not Site.RUNG and status:
                return status
            if site is not Site.RUNG:
                away = [str(rank) for rank, row in enumerate(rows) if row[0] != site]
                raise PeerFailed(
                    f"rank {', '.join(away)} is out of memory elsewhere", site, Status.FAILED, is_elsewhere=True
                )
            # the others come here too, once they have seen this vote
        self.numbers, self.wished = [row[3:] for row in rows], int(max(row[2] for row in rows))
        worst = Status(int(max(row[1] for row in rows)))
        if worst and not status:
            failed = [str(rank) for rank, row in enumerate(rows) if row[1]]
            raise PeerFailed(f"rank {', '.join(failed)} is out of memory", site, worst)
        return worst

    def decided(self, work: Callable[[], T]) -> T:
        """As of `Peers`."""
        if self._is_deciding:  # the others are not
            raise RuntimeError("the first rank decides something within a decision")
        self._is_deciding = True
        try:
            box = [work() if self.is_first else None]
        finally:
            self._is_deciding = False
        self.vote(Site.EXCHANGE)  # a peer that has failed is elsewhere
        self._send(box)
        return box[0]  # type: ignore[return-value]

    @unseen
    def _send(self, box: list[Any]) -> None:
        with self._lost():
            dist.broadcast_object_list(box, src=0, group=self._control)

    @unseen
    def gathered(self, value: T) -> list[T]:
        """As of `Peers`."""
        found: list[Any] = [None] * self.size
        self.vote(Site.EXCHANGE)
        with self._lost():
            dist.all_gather_object(found, value, group=self._control)
        return found

    @unseen
    def add(self, tensor: Tensor) -> None:
        """As of `Peers`."""
        # gloo waits for the card, which is looked for in what is to be recorded
        with self._lost(), synchronizing(is_allowed=True):
            dist.all_reduce(tensor, group=self._group(tensor))

    @unseen
    def take_first(self, tensors: list[Tensor]) -> None:
        """As of `Peers`."""
        self.vote(Site.EXCHANGE)
        with self._lost():
            for tensor in tensors:
                dist.broadcast(tensor, src=0, group=self._group(tensor))

    def catch_up(self, event: Any = None) -> None:
        """As of `Peers`."""
        if self._cards is not self._control and not _finishes(TIMEOUT.total_seconds(), event):
            self._give_up_cards()
            lost = PeerLost("what the cards were given does not end: another one, or what is between them, has failed")
            lost.is_whole = False
            raise lost

    def close(self, *, is_well: bool) -> None:
        """Give back what the groups hold; where this rank ends by itself, at once and with nobody's help."""
        dist.destroy_process_group(self._control)  # first: the others wait in a vote
        if self._cards is not self._control:
            (dist.destroy_process_group if is_well else _abort_process_group)(self._cards)

    def _group(self, tensor: Tensor) -> Any:
        return self._cards if tensor.is_cuda else self._control

    def _lost(self) -> Any:
        return explained(self._explain, (RuntimeError,))

    def _explain(self, error: Exception) -> PeerLost | None:
        lost = _lost(error, self._last_words())
        if lost is not None and self._cards is not self._control:
            lost.is_whole = _finishes(GRACE)
            self._give_up_cards()
        return lost

    def say(self, text: str) -> None:
        """Leave word of why this rank ends, for those that lose it."""
        with suppress(RuntimeError):  # whoever keeps the store is gone too
            self._store.set(str(self.rank), text)

    def _last_words(self) -> str:
        """What the first of the ranks that have ended has left; empty where none has."""
        with suppress(RuntimeError):
            for rank in map(str, range(self.size)):
                if self._store.check([rank]):
                    return f"rank {rank} has ended: {self._store.get(rank).decode(errors='replace')}"
        return ""

    def _give_up_cards(self) -> None:
        """End kernels that wait for a rank which is lost: all else on this card waits for them."""
        cards, self._cards = self._cards, self._control
        _abort_process_group(cards)


def _finishes(seconds: float, event: Any = None) -> bool:
    """Whether the card comes to an event, or to the end of what it was given, in that time."""
    with suppress(RuntimeError):  # it may answer nothing any more
        end, last = time.monotonic() + seconds, event or torch.cuda.current_stream().record_event()
        while time.monotonic() < end:
            if last.query():
                return True
            time.sleep(0.001)
    return False


def _unconnected(error: Exception) -> PeerLost:
    return PeerLost(
        f"NCCL cannot connect the cards of the ranks: {oom.describe(error).text}. It takes some memory of each card, "
        "beside memory.limit; NCCL_DEBUG=INFO says more"
    )


def _lost(error: Exception, last_words: str = "") -> PeerLost | None:
    if isinstance(error, torch.OutOfMemoryError) or oom.describe(error).kind is oom.Kind.POISONED:
        return None
    log.debug("a rank is lost: %s", error)
    return PeerLost(last_words or f"another rank has ended, or was silent for {TIMEOUT.seconds // 60} minutes")


_current: Peers = Peers()


def peers() -> Peers:
    """The ranks of this process's run."""
    return _current


@contextmanager
def joined(device: torch.device) -> Iterator[Peers]:
    """Inside, `peers()` are the ranks that torchrun has started; without torchrun this one alone.

    Raises:
        PeerLost: they do not find each other.
    """
    if world_size() == 1:
        yield _current
        return
    is_new = not dist.is_initialized()
    try:
        with explained(_lost, (RuntimeError,)):
            if is_new:
                _find_each_other()
            group = Group(device)
        is_well = False
        try:
            with as_current(group):
                yield group
            is_well = True
        except PeerLost:
            raise
        except Exception as error:
            group.say(str(error))
            raise
        finally:
            group.close(is_well=is_well)
    finally:
        if is_new and dist.is_initialized():
            dist.destroy_process_group()


def alone() -> AbstractContextManager[None]:
    """Inside, `peers()` is this rank alone: it does something that the others do not."""
    return as_current(Peers())


@contextmanager
def as_current(ranks: Peers) -> Iterator[None]:
    """Inside, `peers()` are these."""
    global _current  # as torch's own process group is
    before, _current = _current, ranks
    try:
        yield
    finally:
        _current = before


def _find_each_other() -> None:
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    store = PrefixStore(_meeting(store, rank, size), store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)


def _meeting(store: Store, rank: int, size: int) -> str:
    """A name for what these ranks exchange, which no others have had.

    torchrun's store outlives a run and the ranks: it would tell where those before were to be found. How often it has
    started them anew is no such name, since each machine counts for itself.
    """
    own = uuid4().hex
    if rank:
        store.set(f"rank {rank}", own)
        name = store.get(f"for {own}").decode()
        store.set(f"{name} has {rank}", "")
        return name
    away, end = set(range(1, size)), time.monotonic() + TIMEOUT.total_seconds()
    while away:
        for other in away:
            if store.check([f"rank {other}"]):  # which may be one from before, until this one has come
                store.set(f"for {store.get(f'rank {other}').decode()}", own)
        away = {other for other in away if not store.check([f"{own} has {other}"])}
        if time.monotonic() > end:
            raise RuntimeError(f"rank {', '.join(map(str, sorted(away)))} has not come")
        time.sleep(0.01)
    return own


def all_are_well(number: float = 0) -> list[float]:
    """End what is done `together`, well; the numbers of all ranks.

    Raises:
        PeerFailed: a peer is out of memory.
    """
    here = peers()
    here.vote(Site.RUNG, Status.WELL, number)
    return [row[0] for row in here.numbers]


def meet(text: str, heard: Status | None, *, is_last: bool) -> None:
    """Come together with all ranks after a failure, to do the same once more.

    Args:
        text: of the failure.
        heard: what a vote at `Site.RUNG` has come to, where that was the failure.
        is_last: this rank does not try again.

    Raises:
        PeerFailed: one of them does not try again, which `together` answers.
    """
    worst = heard or peers().vote(Site.RUNG, Status.FAILED_FOR_GOOD if is_last else Status.FAILED)
    if worst is Status.FAILED_FOR_GOOD:
        raise PeerFailed(text, Site.RUNG, worst)


def together(work: Callable[[], T], device: torch.device) -> T:
    """Return what the work returns, which ends with `all_are_well`: no rank has run out of memory in it.

    Raises:
        OutOfMemory: one has.
        Exception: whatever is not about the device's memory, unchanged.
    """
    if peers().size == 1:
        return work()
    has_voted = False
    try:
        return work()
    except OutOfMemory as error:  # its words alone: the frames hold memory
        failure = error.reason, error.phase
    except Exception as error:
        found = oom.describe(error)
        if not found.fills(device):
            raise
        failure = found.text, ELSEWHERE if isinstance(error, PeerFailed) else "attempt"
        has_voted = voted(error, Site.RUNG) is not None
    if not has_voted:
        peers().vote(Site.RUNG, Status.FAILED_FOR_GOOD)
    raise OutOfMemory(failure[0], phase=failure[1])
