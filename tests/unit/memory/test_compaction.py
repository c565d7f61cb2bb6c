"""Tensors that are moved close together: what they hold, and what they are, stays."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptive_trainer.errors import OutOfMemory
from adaptive_trainer.memory.allocator import SMALL_SEGMENT, CachingAllocator
from adaptive_trainer.memory.compaction import _fills, _pieces, compact
from adaptive_trainer.memory.limit import Capacity
from tests.support import runs
from tests.support.faults import differences, dump

CPU = torch.device("cpu")


def test_views_of_one_memory_stay_views_of_one_memory() -> None:
    whole = torch.arange(12.0)
    part, other = whole[2:6].view(2, 2), torch.full((3,), 7, dtype=torch.int64)
    expected, versions = [each.clone() for each in (whole, part, other)], [whole._version, other._version]
    compact([part, whole, other, torch.empty(0)], CPU)
    assert all(map(torch.equal, (whole, part, other), expected))
    assert [whole._version, other._version] == versions
    part.fill_(-1)
    assert whole[2:6].tolist() == [-1.0] * 4


def test_gaps_are_filled_from_the_smallest_that_is_large_enough() -> None:
    mib = 1 << 20
    gaps = {True: [20 * mib, 6 * mib], False: [2048]}
    sizes = [6 * mib, 5 * mib, 5 * mib + 1, 4 * mib, 10 * mib, 700, 700, 600]
    assert [_fills(gaps, size) for size in sizes] == [True, True, True, True, False, True, True, False]
    assert sorted(gaps[True]) == [0, 6 * mib - 512]
    assert gaps[False] == [0]


@given(st.lists(st.integers(0, 30 << 20), max_size=30))
def test_what_is_held_meanwhile_leaves_no_gap_and_has_room_for_all(sizes: list[int]) -> None:
    allocator = CachingAllocator()
    kept = [allocator.allocate(piece) for piece in _pieces(sizes)]
    assert allocator.free_blocks() == ((), ())
    for handle in kept:
        allocator.free(handle)
    before = allocator.reserved
    for size in sorted(sizes, reverse=True):
        allocator.allocate(size)
    assert allocator.reserved <= before + SMALL_SEGMENT  # halves of segments for small blocks


def test_no_memory_for_a_second_place_leaves_all_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.arange(1000.0)
    place = tensor.data_ptr()

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "UntypedStorage", full)
    with pytest.raises(torch.OutOfMemoryError):
        compact([tensor], CPU)
    assert (tensor.data_ptr(), float(tensor.sum())) == (place, 499500.0)


@pytest.mark.parametrize("case", [runs.Case("adamw-fused", "fp32", warm=True), runs.Case("lion", "fp16", warm=True)])
def test_training_goes_on_with_the_same_bits(case: runs.Case, capacity: Capacity) -> None:
    states = []
    for moves in (False, True):
        run = runs.start(case, capacity)
        update = run.update()
        for _ in range(5):
            run.advance(update)
            if moves:
                compact(update.tensors(), CPU)
        states.append(dump(run.state))
    assert differences(*states) == []


def test_what_is_to_be_undone_moves_too(capacity: Capacity) -> None:
    run = runs.start(runs.Case("lion", "fp32", warm=True), capacity)
    update = run.update()
    run.advance(update)
    before = dump(run.state)

    def failing(*_: object) -> None:
        compact(update.tensors(), CPU)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfMemory):
        update.run(run.images[:7], run.labels[:7], samples=7, accumulate=failing)
    assert differences(dump(run.state), before) == []
