"""Free memory in one piece: how large it is, and what it is good for in the model of the allocator."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_trainer.memory.allocator import LARGE_ROUNDING, SMALL_LIMIT, AllocatorFull, CachingAllocator, MiB
from adaptive_trainer.memory.one_piece import KEPT, REST, piece, small_blocks

BYTES = st.integers(0, 10_000 * MiB)


@given(BYTES, BYTES, BYTES, BYTES)
def test_a_piece_leaves_room_for_the_small_blocks(unreserved: int, small: int, small_reserved: int, back: int) -> None:
    small_peak = small_reserved + back  # of what was given back since
    size = piece(unreserved, small, small_peak, small_reserved)
    assert size % LARGE_ROUNDING == 0
    assert 0 <= size <= unreserved
    left = unreserved - size
    assert left >= min(unreserved, small - small_reserved)
    assert left >= min(unreserved, back)
    assert left < max(0, small - small_reserved, back) + LARGE_ROUNDING or size == 0


@given(st.lists(st.integers(1, 3 * MiB), max_size=20))
def test_large_weights_are_no_small_blocks(weights: list[int]) -> None:
    assert small_blocks(weights) == KEPT * sum(w for w in weights if w <= SMALL_LIMIT) + REST


@pytest.mark.parametrize("is_joined", [False, True])
def test_blocks_of_other_sizes_fit_a_piece_that_was_cut_before(is_joined: bool) -> None:
    allocator = CachingAllocator(122 * MiB)
    if is_joined:
        allocator.free(allocator.allocate(122 * MiB))
    for block in [allocator.allocate(38 * MiB) for _ in range(3)]:
        allocator.free(block)
    allocator.allocate(2 * MiB)
    allocator.allocate(58 * MiB)
    with nullcontext() if is_joined else pytest.raises(AllocatorFull):
        allocator.allocate(58 * MiB)
