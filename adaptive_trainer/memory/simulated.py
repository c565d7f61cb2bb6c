"""A simulated device: counts live tensor bytes at the operators, and runs out of memory where a real one would."""

from __future__ import annotations

import weakref
from collections import Counter, deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adaptive_trainer import oom
from adaptive_trainer.errors import ConfigError, explained
from adaptive_trainer.memory.allocator import AllocatorFull, CachingAllocator
from adaptive_trainer.memory.usage import Usage, format_bytes

COMPILED = "found no compiled frames"  # what torch.compile(fullgraph=True) says under a dispatch mode
COUNTED_FIRST = 32  # of each kind of work, so that what begins soon is found where it begins
COUNTED_EVERY = 50  # of work that repeats itself


class _Storage(weakref.ref[torch.UntypedStorage]):
    """A live storage and its block. torch keeps one Python object per storage, alive as long as the storage is."""

    __slots__ = ("handle", "key", "nbytes")
    key: int
    handle: int
    nbytes: int


class SimulatedDevice(TorchDispatchMode):
    """Counts the tensors that operators see and make, and runs out of memory as a device of `capacity` bytes would.

    Tensors that were there before (weights, the batch) count from the first operator that is given them. The workspaces
    of single kernels are not seen.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity
        self._allocator = CachingAllocator(capacity)
        self._live: dict[int, _Storage] = {}
        # Storages die whenever Python collects garbage, perhaps while the allocator is at work: their blocks wait here.
        self._dead: deque[int] = deque()
        self._found: object = None  # the state in which the last work met the device: all that decides what it does
        self._repeats: dict[Hashable, int] = {}  # kinds that leave this state as it is, and how often since counted
        self._counted: Hashable = None  # the kind of the last work, if it was counted to its end
        self._times: Counter[Hashable] = Counter()  # how often each kind was
        self._is_working = self._has_failed = False

    @contextmanager
    def work(self, kind: Hashable) -> Iterator[None]:
        """Count what is done inside, unless it is known to repeat itself. Work within work is part of it.

        Args:
            kind: names work whose operators and shapes are always the same; None is counted in any case.

        Raises:
            ConfigError: it runs compiled code.
        """
        if self._is_working:
            yield
            return
        self._empty_after_failure()
        is_counted = not self._is_repetition(kind)
        self._is_working = True
        try:
            with explained(_explain, (RuntimeError,)), self if is_counted else nullcontext():
                yield
            self._has_failed = False
        except BaseException:
            self._has_failed = True
            raise
        finally:
            self._is_working = False
        if is_counted:
            self._counted = kind
            self._times[kind] += 1

    def _empty_after_failure(self) -> None:
        """Empty the cache after work that failed, as `oom.release` empties a real device's."""
        if self._has_failed:
            self.empty_cache()
            self._has_failed = False

    def _is_repetition(self, kind: Hashable) -> bool:
        # Counting takes time at every operator. Work that leaves the device in the state that it met would do so again,
        # with the same peaks, so it runs uncounted once it was counted often enough, but for every COUNTED_EVERYth
        # time: memory may depend on more than shapes. Whatever changes the state (other work, a freed tensor, new
        # peaks, another size, a failure, a leak) has everything counted again.
        state = self.capacity, self.usage(), self._allocator.free_blocks()
        counted, self._counted = self._counted, None
        if state != self._found:
            self._found, self._repeats = state, {}
        elif counted is not None:
            self._repeats[counted] = 0
        if kind not in self._repeats or self._times[kind] < COUNTED_FIRST:
            return False
        self._repeats[kind] += 1
        return self._repeats[kind] < COUNTED_EVERY

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count the arguments, run the operator, count its results; drop the results if they do not fit."""
        kwargs = kwargs or {}
        full = self._count(args) or (self._count(kwargs.values()) if kwargs else None)
        if full is None:
            out = func(*args, **kwargs)
            full = self._count((out,))
            if full is None:
                return out
            del out  # before the error is raised: its traceback would keep this frame, and the result, alive
        self._has_failed = True  # now: work may go on, as a block with a whole descent in it does
        raise oom.SimulatedOutOfMemory(full)

    def _count(self, values: Iterable[Any]) -> str | None:
        """Give every tensor in `values` its block; why not, where one does not fit."""
        for value in values:
            if isinstance(value, Tensor):
                full = self._hold(value)
            elif isinstance(value, list | tuple):
                full = self._count(value)
            else:
                continue
            if full is not None:
                return full
        return None

    def _hold(self, tensor: Tensor) -> str | None:
        if tensor.layout is not torch.strided:
            return None  # sparse and opaque tensors have no storage of their own
        storage = tensor.untyped_storage()
        key, nbytes = id(storage), storage.nbytes()
        known = self._live.get(key)
        if known is not None:
            if known.nbytes == nbytes:
                return None
        elif storage.device.type != "cpu":
            return None  # meta and fake tensors
        try:
            self._drain()
            handle = self._allocator.allocate(nbytes)
        except AllocatorFull as error:
            return self._message(error)
        if known is not None:  # resized: as on a device, the old block goes when the new one is there
            self._allocator.free(known.handle)
        else:
            known = self._live[key] = _Storage(storage, self._forget)
            known.key = key
        known.handle, known.nbytes = handle, nbytes
        return None

    def _forget(self, storage: _Storage) -> None:
        self._live.pop(storage.key, None)
        self._dead.append(storage.handle)

    def _drain(self) -> None:
        while self._dead:
            self._allocator.free(self._dead.popleft())

    def _message(self, error: AllocatorFull) -> str:
        sizes = error.requested, error.segment, self.capacity, self.capacity - error.reserved
        return (
            "Simulated card out of memory. Tried to allocate {} (in a new segment of {}). The card has a total "
            "capacity of {} of which {} is free; {} is allocated, and {} is reserved but unallocated."
        ).format(*map(format_bytes, (*sizes, error.allocated, error.reserved - error.allocated)))

    def usage(self) -> Usage:
        """What is used of the device, of what was counted."""
        self._drain()
        a = self._allocator
        return Usage(a.allocated, a.reserved, a.peak_allocated, a.peak_reserved, a.num_retries)

    def reset_peaks(self) -> None:
        """Start counting peaks anew."""
        self._empty_after_failure()
        self._drain()
        self._allocator.reset_peaks()

    def resize(self, capacity: int) -> None:
        """Have another size from now on, no smaller than what is reserved."""
        self.capacity = self._allocator.capacity = capacity

    def empty_cache(self) -> None:
        """Give back every wholly free segment, as `torch.cuda.empty_cache` does."""
        self._drain()
        self._allocator.empty_cache()


def _explain(error: Exception) -> ConfigError | None:
    if COMPILED not in str(error):
        return None
    return ConfigError(
        "a simulated card counts operators, and this network, loss or optimizer runs code of torch.compile, "
        "which is not made of them; without the simulated card it runs: memory.limit=none, or limit_memory('none')"
    )
