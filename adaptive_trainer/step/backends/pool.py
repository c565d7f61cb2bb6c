"""One pool of device memory in which graphs, and operators beside them, take turns.

A graph's memory is free between its replays, yet torch gives it to nobody: allocations elsewhere do not look into a
graph's pool, and a free block of one stream is never given to another. So all that takes turns works on one stream, on
which every allocation is of the pool.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch


class Pool:
    """Memory that lives as long as a graph that was recorded in it.

    Args:
        device: the card.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._index = torch.cuda.current_device() if device.index is None else device.index
        self._stream = _stream(self._index)
        self._handle = torch.cuda.graph_pool_handle()
        self._is_open = False

    def capture(self, graphs: Sequence[Any], work: Callable[[Callable[[], None]], None], size: int) -> None:
        """Run the work's Python once; its kernels go into the graphs and do not run.

        Args:
            graphs: are replayed in this order.
            work: is given a function that ends one graph and begins the next.
            size: bytes that are taken in one piece before the work begins. Blocks that are cut from one piece leave few
                gaps, and a piece for every size leaves many: the allocator cannot give any back while it records.
        """
        has_ended, left = False, list(graphs)

        def begin() -> None:
            # thread_local: the loader's threads may ask the driver for pinned memory meanwhile
            left[0].capture_begin(pool=self._handle, capture_error_mode="thread_local")

        def cut() -> None:
            left[0].capture_end()
            del left[0]
            begin()

        try:
            with torch.cuda.stream(self._stream):
                begin()
                try:
                    if size > 0:
                        with suppress(torch.OutOfMemoryError):  # then piece by piece
                            # no tensor, which may be filled
                            torch.UntypedStorage(size, device=self.device)  # type: ignore[no-untyped-call]
                    work(cut)
                finally:
                    with warnings.catch_warnings():  # that it is empty: its work has failed at once
                        warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
                        left[0].capture_end()
                    has_ended = True
        finally:
            if not has_ended:
                self._abandon()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Inside, operators run on the pool's stream, in its memory.

        Nothing that is made inside may be needed once a graph of the pool is replayed.
        """
        if self._is_open:
            yield
            return
        here = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(here)
        try:
            with torch.cuda.stream(self._stream), self._allocating():
                yield
        finally:
            here.wait_stream(self._stream)

    def held(self) -> int:
        """Bytes of the pool that something refers to."""
        segments = torch.cuda.memory_snapshot(self._handle)  # type: ignore[no-untyped-call]
        return sum(segment["allocated_size"] for segment in segments)

    @contextmanager
    def _allocating(self) -> Iterator[None]:
        # By stream and not by thread: backward has threads of its own.
        torch._C._cuda_beginAllocateCurrentStreamToPool(self._index, self._handle)
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = False
            torch._C._cuda_endAllocateToPool(self._index, self._handle)
            torch._C._cuda_releasePool(self._index, self._handle)  # the beginning has taken hold of it

    def _abandon(self) -> None:
        """Take allocator and random numbers out of a recording whose end failed.

        The allocator would go on sending memory to the pool, and up to torch 2.12 the generator would refuse to draw.
        """
        with suppress(RuntimeError):  # the first fails where the recording did end; then the graph gives back its pool
            torch._C._cuda_endAllocateToPool(self._index, self._handle)
            torch._C._cuda_releasePool(self._index, self._handle)
        generator, fresh = torch.cuda.default_generators[self._index], torch.Generator(self.device)
        fresh.set_state(generator.get_state())
        generator.graphsafe_set_state(fresh)


@functools.cache
def _stream(index: int) -> torch.cuda.Stream:
    # One for all pools of a device: what a recording leaves on it beside the pool is used again by the next.
    return torch.cuda.Stream(index)  # type: ignore[no-untyped-call]
