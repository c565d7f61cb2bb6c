"""What a forward pass keeps goes to host memory on a second stream, and comes back ahead of its use (torchtune's way).

Whole storages move, each once, whatever views of it are kept. Their order is that of the pass, and all waiting is by
events of the device: nothing depends on time, a CUDA graph can hold it, and on a CPU the same steps are plain copies.
"""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from adaptive_trainer import oom
from adaptive_trainer.memory.usage import format_bytes
from adaptive_trainer.models.recomputing.values import Changed, Kept
from adaptive_trainer.utils.modes import unseen

log = logging.getLogger(__name__)

STASH = 2  # storages on their way to the host: the next one has the device wait for the oldest, and frees that one
AHEAD = 1  # storages on their way back that nothing has asked for yet
CHUNK = 64 * 2**20  # bytes asked of the host at once, which torch rounds up to a power of two where they are pinned
ALIGNED = 512
_listeners: list[Callable[[int], None]] = []


@contextmanager
def moves_noted(listener: Callable[[int], None]) -> Iterator[None]:
    """Call a function with the bytes of each storage that goes to the host meanwhile."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


class HostMemory:
    """The host memory of one network, which each pass uses anew, and the stream that copies.

    A CUDA graph goes on copying to and from it, so whoever keeps the graph keeps this too.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._arenas: list[_Arena] = []
        self._free: list[_Arena] = []
        self._said = 0

    @property
    def nbytes(self) -> int:
        """How much it is."""
        return sum(chunk.nbytes for arena in self._arenas for chunk in arena.chunks)

    def lend(self, borrower: object) -> _Arena:
        """Memory that is the borrower's as long as that lives; passes that overlap have memory of their own."""
        if not self._free:
            self._free.append(_Arena())
            self._arenas += self._free
        arena = self._free.pop()
        arena.clear()
        weakref.finalize(borrower, self._free.append, arena).atexit = False
        return arena

    @unseen
    def copy(self, to: Tensor, of: Tensor) -> torch.cuda.Event | None:
        """Copy on the second stream, once the current one has come here; what is returned is to be waited for."""
        if self._side is None:
            to.copy_(of)
            return None
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            to.copy_(of, non_blocking=True)
        copied: torch.cuda.Event = self._side.record_event()
        return copied

    def wait(self, copied: torch.cuda.Event | None) -> None:
        """Have the current stream wait for a copy."""
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)

    def join(self) -> None:
        """Have the current stream wait for all copies."""
        if self._side is None:
            return
        torch.cuda.current_stream(self.device).wait_stream(self._side)
        if self.nbytes > self._said:
            self._said = self.nbytes
            log.info("trainer.offload uses %s of host memory", format_bytes(self._said))


class _Arena:
    """Chunks of host memory that are filled from the beginning in each pass."""

    def __init__(self) -> None:
        self.chunks: list[Tensor] = []
        self.clear()

    def clear(self) -> None:
        self._filled = [0] * len(self.chunks)

    @unseen
    def take(self, like: Tensor) -> Tensor:
        """Memory for a contiguous tensor."""
        nbytes = like.nbytes
        fits = (i for i, chunk in enumerate(self.chunks) if self._filled[i] + nbytes <= chunk.nbytes)
        number = next(fits, len(self.chunks))
        if number == len(self.chunks):
            self.chunks.append(_chunk(like, max(CHUNK, 1 << (nbytes - 1).bit_length())))
            self._filled.append(0)
        start = self._filled[number]
        self._filled[number] += -(-nbytes // ALIGNED) * ALIGNED
        return self.chunks[number][start : start + nbytes].view(like.dtype)


def _chunk(like: Tensor, nbytes: int) -> Tensor:
    try:
        return like.new_empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=like.is_cuda)
    except RuntimeError as error:
        failure = oom.describe(error)
        if failure.kind not in (oom.Kind.DEVICE, oom.Kind.HOST) or not like.is_cuda:
            raise
    # Of the device, as far as a ladder is concerned: a smaller rung needs less of both.
    short = f"host memory is short: {format_bytes(nbytes)} more cannot be pinned for trainer.offload ({failure.text})"
    raise torch.OutOfMemoryError(short)


class Offloading:
    """One forward pass of which the storages that are kept go to the host, and the backward pass that wants them.

    Args:
        memory: where they go.
        stays: identities of storages that stay alive anyway.
        least: bytes under which a storage is left where it is.
    """

    def __init__(self, memory: HostMemory, stays: set[int], least: int) -> None:
        self.memory = memory
        self.arena = memory.lend(self)
        self._stays = stays
        self._least = max(1, least)
        self._known: weakref.WeakValueDictionary[tuple[int, torch.dtype], Stored] = weakref.WeakValueDictionary()
        self._leaving: deque[weakref.ref[Stored]] = deque()
        # By the last time that each was kept: autograd goes back in the reverse order, and asks for the last one first.
        self._order: dict[weakref.ref[Stored], None] = {}
        self._ahead: weakref.WeakSet[Stored] = weakref.WeakSet()

    def keep(self, tensor: Tensor) -> Kept:
        """Keep a tensor, on the host if it is large."""
        storage = tensor.untyped_storage()
        if id(storage) in self._stays or not self._is_worth(tensor, storage.nbytes()):
            return Kept(tensor)
        key = id(storage), tensor.dtype
        stored = self._known.get(key)
        if stored is None or not stored.is_of(storage):
            stored = self._known[key] = self._send(tensor, storage)
        ref = weakref.ref(stored)
        self._order.pop(ref, None)
        self._order[ref] = None
        return Offloaded(tensor, stored)

    def _is_worth(self, tensor: Tensor, nbytes: int) -> bool:
        is_plain = tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_nested)
        is_plain = is_plain and not (tensor.is_conj() or tensor.is_neg())  # which is not in its bytes
        is_there = tensor.device == self.memory.device
        return is_plain and is_there and nbytes >= self._least and nbytes % tensor.element_size() == 0

    def _send(self, tensor: Tensor, storage: torch.UntypedStorage) -> Stored:
        stored = Stored(self, _flat(tensor, storage.nbytes()), storage)
        # Weak: what nobody refers to is not told that its memory is written.
        self._leaving.append(weakref.ref(stored))
        if len(self._leaving) > STASH and (oldest := self._leaving.popleft()()) is not None:
            oldest.leave()
        for listener in _listeners:
            listener(storage.nbytes())
        return stored

    def __enter__(self) -> Offloading:
        """The forward pass begins."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """The forward pass has ended: what is still on its way to the host stays here too, as it is wanted first."""
        self._leaving.clear()
        if kind is None:
            self.memory.join()

    def bring(self, stored: Stored) -> None:
        """Fetch a storage, and in a backward pass those that it is likely to want next."""
        if stored.here is None:
            stored.fetch()
        if torch._C._current_graph_task_id() == -1:  # somebody looks at what autograd has saved
            return
        self._ahead.discard(stored)
        while self._order and len(self._ahead) < AHEAD:
            other = self._order.popitem()[0]()
            if other is not None and other.here is None:
                other.fetch()
                self._ahead.add(other)


@unseen
def _flat(tensor: Tensor, nbytes: int) -> Tensor:
    """All of a tensor's storage."""
    return tensor.detach().as_strided((nbytes // tensor.element_size(),), (1,), 0)


class Stored:
    """A storage on the host, or on its way there or back; its memory is free when nothing refers to it.

    Attributes:
        here: all of it on the device, where it is there.
    """

    __slots__ = ("__weakref__", "_copied", "_host", "_of", "_pass", "_version", "here")

    def __init__(self, offloading: Offloading, flat: Tensor, storage: torch.UntypedStorage) -> None:
        self._pass = offloading
        self._copied: torch.cuda.Event | None = None
        self._of: weakref.ref[torch.UntypedStorage] | None = weakref.ref(storage)
        self._host = offloading.arena.take(flat)
        self.here: Tensor | None = flat
        self._version = flat._version
        self._copied = offloading.memory.copy(self._host, flat)

    def is_of(self, storage: torch.UntypedStorage) -> bool:
        """Whether it holds what this storage holds now."""
        return self._of is not None and self._of() is storage

    def leave(self, *, is_written: bool = False) -> None:
        """Be on the host alone, once the copy is made; `is_written`: the storage is about to be."""
        self._wait()
        self.here = None
        if is_written:
            self._of = None

    def fetch(self) -> None:
        """Have it on its way back."""
        self.here = torch.empty(self._host.shape, dtype=self._host.dtype, device=self._pass.memory.device)
        self._copied = self._pass.memory.copy(self.here, self._host)
        self._version = self.here._version

    def get(self) -> Tensor:
        """All of it, on the device.

        Raises:
            Changed: it was still here and is not what it was.
        """
        self._pass.bring(self)
        self._wait()
        here = self.here
        if here is None or here._version != self._version:
            raise Changed(self._host)
        return here

    def _wait(self) -> None:
        copied, self._copied = self._copied, None
        self._pass.memory.wait(copied)

    def __del__(self) -> None:
        """Have the current stream wait, before it uses memory anew that a copy is still on its way to."""
        with suppress(RuntimeError):  # of an event that was recorded in a graph
            self._wait()


class Offloaded(Kept):
    """A tensor of a storage that is on the host."""

    is_copy = True

    __slots__ = ("_layout", "_stored")

    def __init__(self, tensor: Tensor, stored: Stored) -> None:
        self._stored = stored  # and not the tensor: its memory is to be free
        self._layout = tensor.shape, tensor.stride(), tensor.storage_offset()

    def get(self) -> Tensor:
        """The tensor, back on the device.

        Raises:
            Changed: it was still here and is not what it was.
        """
        return self._stored.get().as_strided(*self._layout)

    def alias(self) -> None:
        """Keep to the memory that the tensor has now: the copy on the host does."""

    def copy_before_write(self) -> None:
        """Wait for the copy on the host, as the memory here is about to be written."""
        self._stored.leave(is_written=True)
