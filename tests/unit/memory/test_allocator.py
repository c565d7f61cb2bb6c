from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_trainer.memory.allocator import AllocatorFull, CachingAllocator

KiB = 1 << 10
MiB = 1 << 20

SIZES = st.one_of(
    st.integers(1, 4 * KiB), st.integers(MiB - 600, MiB + 600), st.integers(1, 12 * MiB), st.integers(1, 60 * MiB)
)
# An event allocates (a size) or frees (which of the live blocks, as a fraction of their number).
EVENTS = st.lists(st.one_of(SIZES, st.floats(0, 1, exclude_max=True)), max_size=80)
CAPACITIES = st.one_of(st.none(), st.integers(2 * MiB, 200 * MiB))


class Naive:
    """The same rules with nothing but a list of [address, size, used, requested, segment], searched from the start."""

    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity
        self.blocks: list[list[int]] = []
        self.segments: dict[int, int] = {}
        self.top = 2 * MiB
        self.num_retries = 0

    def allocated(self) -> int:
        return sum(size for _, size, used, _, _ in self.blocks if used)

    def reserved(self) -> int:
        return sum(self.segments.values())

    def small(self, block: list[int]) -> bool:
        return self.segments[block[4]] == 2 * MiB

    def release(self) -> None:
        for block in [b for b in self.blocks if not b[2] and b[1] == self.segments[b[4]]]:
            self.blocks.remove(block)
            del self.segments[block[4]]

    def allocate(self, nbytes: int) -> int | None:
        size = -(-nbytes // 512) * 512
        small = size <= MiB
        free = [b for b in self.blocks if not b[2] and b[1] >= size and self.small(b) == small]
        if free:
            block = min(free, key=lambda b: (b[1], b[0]))
        else:
            segment = 2 * MiB if small else 20 * MiB if size < 10 * MiB else -(-size // (2 * MiB)) * 2 * MiB
            if self.capacity is not None and self.reserved() + segment > self.capacity:
                self.num_retries += 1
                self.release()
                if self.reserved() + segment > self.capacity:
                    return None
            block = [self.top, segment, 0, 0, self.top]
            self.segments[self.top] = segment
            self.blocks.append(block)
            self.top += segment
        rest = block[1] - size
        if rest >= 512 if small else rest > MiB:
            self.blocks.append([block[0] + size, rest, 0, 0, block[4]])
            block[1] = size
        block[2], block[3] = 1, nbytes
        return block[0]

    def free(self, address: int) -> None:
        next(b for b in self.blocks if b[0] == address)[2] = 0
        self.blocks.sort()
        i = 0
        while i + 1 < len(self.blocks):
            one, two = self.blocks[i], self.blocks[i + 1]
            if not one[2] and not two[2] and one[4] == two[4]:
                one[1] += two[1]
                del self.blocks[i + 1]
            else:
                i += 1


def run(events: list[Any], allocator: CachingAllocator) -> list[tuple[int, int]]:
    """Play the events; what did not fit is left out. Returns the live (handle, bytes)."""
    live: list[tuple[int, int]] = []
    for event in events:
        if isinstance(event, int):
            try:
                live.append((allocator.allocate(event), event))
            except AllocatorFull:
                continue
        elif live:
            allocator.free(live.pop(int(event * len(live)))[0])
    return live


@given(EVENTS, CAPACITIES)
@settings(max_examples=300, deadline=None)
def test_same_as_the_naive_model(events: list[Any], capacity: int | None) -> None:
    naive, allocator = Naive(capacity), CachingAllocator(capacity)
    live: list[int] = []
    peak_allocated = peak_reserved = 0
    for event in events:
        if isinstance(event, int):
            expected = naive.allocate(event)
            if expected is None:
                with pytest.raises(AllocatorFull) as caught:
                    allocator.allocate(event)
                assert caught.value.requested == event
                assert caught.value.reserved + caught.value.segment > caught.value.capacity == capacity
            else:
                assert allocator.allocate(event) == expected
                live.append(expected)
        elif live:
            handle = live.pop(int(event * len(live)))
            naive.free(handle)
            allocator.free(handle)
        assert (allocator.allocated, allocator.reserved) == (naive.allocated(), naive.reserved())
        assert allocator.requested == sum(b[3] for b in naive.blocks if b[2])
        assert allocator.num_retries == naive.num_retries
        peak_allocated, peak_reserved = max(peak_allocated, naive.allocated()), max(peak_reserved, naive.reserved())
    assert (allocator.peak_allocated, allocator.peak_reserved) == (peak_allocated, peak_reserved)


@given(EVENTS, CAPACITIES)
@settings(max_examples=200, deadline=None)
def test_invariants(events: list[Any], capacity: int | None) -> None:
    allocator = CachingAllocator(capacity)
    live = sorted(run(events, allocator))
    assert allocator.requested == sum(nbytes for _, nbytes in live)
    assert allocator.requested <= allocator.allocated <= allocator.reserved <= allocator.peak_reserved
    assert capacity is None or allocator.peak_reserved <= capacity
    assert all(one + size <= two for (one, size), (two, _) in pairwise(live)), "blocks overlap"
    for handle, _ in live:
        allocator.free(handle)
    assert (allocator.requested, allocator.allocated) == (0, 0)
    allocator.empty_cache()
    assert allocator.reserved == 0
    allocator.reset_peaks()
    assert (allocator.peak_requested, allocator.peak_allocated, allocator.peak_reserved) == (0, 0, 0)


@given(EVENTS, CAPACITIES, st.lists(st.integers(0, 60 * MiB), max_size=8))
@settings(max_examples=200, deadline=None)
def test_what_passes_through_leaves_what_allocate_and_free_would(
    events: list[Any], capacity: int | None, passing: list[int]
) -> None:
    def left(*, at_once: bool) -> tuple[Any, ...]:
        allocator = CachingAllocator(capacity)
        run(events, allocator)
        found: list[str] = []
        for nbytes in passing:
            try:
                if at_once:
                    allocator.pass_through(nbytes)
                else:
                    allocator.free(allocator.allocate(nbytes))
            except AllocatorFull as error:
                found.append(str(error))
        peaks = allocator.peak_requested, allocator.peak_allocated, allocator.peak_reserved
        return allocator.free_blocks(), allocator.requested, allocator.allocated, allocator.num_retries, peaks, found

    assert left(at_once=True) == left(at_once=False)


@given(EVENTS)
@settings(max_examples=100, deadline=None)
def test_what_it_reserved_is_enough_and_the_same(events: list[Any]) -> None:
    free, tight = CachingAllocator(), CachingAllocator()
    run(events, free)
    tight.capacity = free.peak_reserved
    assert len(run(events, tight)) == len(run(events, CachingAllocator()))
    assert (tight.peak_reserved, tight.num_retries) == (free.peak_reserved, 0)


@pytest.mark.parametrize(
    ("nbytes", "block", "segment"),
    [
        (1, 512, 2 * MiB),
        (512, 512, 2 * MiB),
        (513, 1024, 2 * MiB),
        (MiB, MiB, 2 * MiB),
        (MiB + 1, MiB + 512, 20 * MiB),
        (10 * MiB - 512, 10 * MiB - 512, 20 * MiB),
        (10 * MiB, 10 * MiB, 10 * MiB),
        (10 * MiB + 1, 10 * MiB + 512, 12 * MiB),
        (11 * MiB, 12 * MiB, 12 * MiB),  # a rest of 1 MiB is not split off
        (11 * MiB - 512, 11 * MiB - 512, 12 * MiB),
    ],
)
def test_block_and_segment_of_one_request(nbytes: int, block: int, segment: int) -> None:
    allocator = CachingAllocator()
    allocator.allocate(nbytes)
    assert (allocator.requested, allocator.allocated, allocator.reserved) == (nbytes, block, segment)


def test_under_pressure_cached_segments_are_given_back_once() -> None:
    allocator = CachingAllocator(capacity=40 * MiB)
    allocator.free(allocator.allocate(20 * MiB))
    allocator.free(allocator.allocate(16 * MiB))  # reuses the 20 MiB
    allocator.allocate(24 * MiB)
    assert (allocator.reserved, allocator.num_retries) == (24 * MiB, 1)


def test_a_segment_in_use_is_not_given_back() -> None:
    allocator = CachingAllocator(capacity=24 * MiB)
    keep = allocator.allocate(2 * MiB)
    with pytest.raises(AllocatorFull, match="tried to allocate"):
        allocator.allocate(20 * MiB)
    assert (allocator.allocated, allocator.reserved, allocator.num_retries) == (2 * MiB, 20 * MiB, 1)
    allocator.free(keep)
    allocator.allocate(24 * MiB)
    assert allocator.num_retries == 2


def test_nothing_takes_nothing() -> None:
    allocator = CachingAllocator(capacity=0)
    handle = allocator.allocate(0)
    allocator.free(handle)
    allocator.free(handle)
    assert (handle, allocator.reserved) == (0, 0)


def test_misuse_is_an_error() -> None:
    allocator = CachingAllocator()
    with pytest.raises(ValueError, match="-1 bytes"):
        allocator.allocate(-1)
    handle = allocator.allocate(8)
    allocator.free(handle)
    with pytest.raises(KeyError):
        allocator.free(handle)
