"""A model of PyTorch's native CUDA caching allocator: one device, one stream, default settings. Pure Python.

It places blocks as `c10/cuda/CUDACachingAllocator.cpp` does, so that replaying a program's allocations gives the same
allocated and reserved bytes, and shows whether the program fits a capacity. The rules stand where they are applied.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

MiB = 1 << 20
MIN_BLOCK = 512
SMALL_LIMIT = MiB
SMALL_SEGMENT = 2 * MiB
LARGE_SEGMENT = 20 * MiB
LARGE_SEGMENT_LIMIT = 10 * MiB
LARGE_ROUNDING = 2 * MiB

ADDRESS_BITS = 60  # a free block's sort key is its size and then its address, packed into one integer


def segment_for(size: int) -> int:
    """Bytes of the segment that is taken for a block of `size` bytes, where no free block is large enough."""
    if size <= SMALL_LIMIT:
        return SMALL_SEGMENT
    if size < LARGE_SEGMENT_LIMIT:
        return LARGE_SEGMENT
    return (size + LARGE_ROUNDING - 1) & -LARGE_ROUNDING


class AllocatorFull(Exception):
    """The capacity does not allow a request, even after every cached segment was given back.

    Attributes (bytes): `requested`, `segment` (what had to be reserved for it), `allocated`, `reserved`, `capacity`.
    """

    def __init__(self, requested: int, segment: int, allocated: int, reserved: int, capacity: int) -> None:
        super().__init__(
            f"tried to allocate {requested} bytes (a segment of {segment}) with {allocated} allocated "
            f"and {reserved} reserved of {capacity} bytes"
        )
        self.requested, self.segment = requested, segment
        self.allocated, self.reserved, self.capacity = allocated, reserved, capacity


@dataclass(slots=True, eq=False)
class _Block:
    """A piece of a segment; `previous` and `next` are its neighbours in the same segment."""

    address: int
    size: int
    pool: list[int]
    requested: int = 0
    free: bool = False
    previous: _Block | None = None
    next: _Block | None = None


class CachingAllocator:
    """The allocator. `capacity` limits `reserved`, as a per-process memory fraction does; None is no limit.

    Attributes (bytes now, and the most since the start or `reset_peaks`): `requested` as asked for, `allocated` in
    blocks handed out, `reserved` in segments; `peak_requested`, `peak_allocated`, `peak_reserved`.
    `small_reserved` and `peak_small_reserved` are those of segments for blocks of up to 1 MiB.
    `num_retries` counts requests for which the cached segments had to be given back.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.allocated = self.reserved = self.requested = 0
        self.peak_allocated = self.peak_reserved = self.peak_requested = 0
        self.small_reserved = self.peak_small_reserved = 0
        self.num_retries = 0
        self._small: list[int] = []
        self._large: list[int] = []
        self._free: dict[int, _Block] = {}
        self._used: dict[int, _Block] = {}
        self._next_address = SMALL_SEGMENT

    def allocate(self, nbytes: int) -> int:
        """Take a block of `nbytes`; the handle is its address. 0 bytes take no block and give handle 0.

        Raises:
            AllocatorFull: the capacity does not allow it.
        """
        if nbytes < 0:
            raise ValueError(f"{nbytes} bytes cannot be allocated; give 0 or more")
        if not nbytes:
            return 0
        size = (nbytes + MIN_BLOCK - 1) & -MIN_BLOCK  # rounded up
        small = size <= SMALL_LIMIT
        pool = self._small if small else self._large
        at = bisect_left(pool, size << ADDRESS_BITS)  # the smallest that is large enough, the lowest address first
        if at < len(pool):
            block = self._free.pop(pool.pop(at))
            block.free = False
        else:
            block = self._new_segment(size, pool, nbytes)
        rest = block.size - size  # is split off, unless it is too small for its pool
        if rest > SMALL_LIMIT or (small and rest >= MIN_BLOCK):
            self._split(block, size)
        block.requested = nbytes
        self._used[block.address] = block
        self.requested += nbytes
        self.allocated += block.size
        # Not `max`: a call costs more here than all else of a line, and a plan replays millions of events.
        if self.requested > self.peak_requested:
            self.peak_requested = self.requested
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated
        return block.address

    def free(self, handle: int) -> None:
        """Give a block back to its pool, joined with its free neighbours. Handle 0 is nothing.

        Raises:
            KeyError: no block is in use under this handle.
        """
        if handle == 0:
            return
        block = self._used.pop(handle)
        self.requested -= block.requested
        self.allocated -= block.size
        previous, following = block.previous, block.next
        if previous is not None and previous.free:
            self._take(previous)
            _join(previous, block)
            block = previous
        if following is not None and following.free:
            self._take(following)
            _join(block, following)
        self._put(block)

    def pass_through(self, nbytes: int) -> None:
        """As `free(allocate(nbytes))`, in less time: where a free block is large enough, only peaks change.

        Raises:
            AllocatorFull: as `allocate`.
        """
        size = (nbytes + MIN_BLOCK - 1) & -MIN_BLOCK
        small = size <= SMALL_LIMIT
        pool = self._small if small else self._large
        at = bisect_left(pool, size << ADDRESS_BITS)
        if not nbytes or at == len(pool):
            self.free(self.allocate(nbytes))
            return
        whole = pool[at] >> ADDRESS_BITS
        taken = size if whole - size > SMALL_LIMIT or (small and whole - size >= MIN_BLOCK) else whole
        self.peak_requested = max(self.peak_requested, self.requested + nbytes)
        self.peak_allocated = max(self.peak_allocated, self.allocated + taken)

    def empty_cache(self) -> None:
        """Give back every wholly free segment."""
        for pool in (self._large, self._small):
            kept = []
            for key in pool:
                block = self._free[key]
                if block.previous is None and block.next is None:  # it is the whole segment
                    del self._free[key]
                    self.reserved -= block.size
                    self.small_reserved -= block.size if pool is self._small else 0
                else:
                    kept.append(key)
            pool[:] = kept

    def free_blocks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The free blocks of both pools, by size and place."""
        return tuple(self._small), tuple(self._large)

    def reset_peaks(self) -> None:
        """Start the peaks anew from what is in use now."""
        self.peak_allocated = self.allocated
        self.peak_reserved = self.reserved
        self.peak_requested = self.requested

    def _new_segment(self, size: int, pool: list[int], nbytes: int) -> _Block:
        segment = segment_for(size)
        capacity = self.capacity
        if capacity is not None and self.reserved + segment > capacity:
            # An earlier step of the allocator, giving back only blocks that are large enough, acts only where
            # `max_split_size_mb` is set.
            self.num_retries += 1
            self.empty_cache()
            if self.reserved + segment > capacity:
                raise AllocatorFull(nbytes, segment, self.allocated, self.reserved, capacity)
        self.reserved += segment
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        if pool is self._small:
            self.small_reserved += segment
            self.peak_small_reserved = max(self.peak_small_reserved, self.small_reserved)
        block = _Block(self._next_address, segment, pool)
        self._next_address += segment
        return block

    def _split(self, block: _Block, size: int) -> None:
        rest = _Block(block.address + size, block.size - size, block.pool)
        rest.previous, rest.next = block, block.next
        if block.next is not None:
            block.next.previous = rest
        block.next = rest
        block.size = size
        self._put(rest)

    def _put(self, block: _Block) -> None:
        key = (block.size << ADDRESS_BITS) | block.address
        block.free = True
        self._free[key] = block
        insort(block.pool, key)

    def _take(self, block: _Block) -> None:
        key = (block.size << ADDRESS_BITS) | block.address
        del self._free[key]
        del block.pool[bisect_left(block.pool, key)]


def _join(block: _Block, following: _Block) -> None:
    block.size += following.size
    block.next = following.next
    if block.next is not None:
        block.next.previous = block
