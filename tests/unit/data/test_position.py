"""Which samples come next: nothing lost, nothing repeated, whatever the batch sizes."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_trainer.data.position import Key, Position, key_seed, micro_batches, updates_per_epoch

SIZES = st.integers(1, 200)
BATCHES = st.integers(1, 40)


def epoch_of(position: Position, batch_sizes: list[int]) -> tuple[list[list[Key]], Position]:
    """One epoch in which each update draws its batch size from the list, the last one repeated."""
    epoch, updates, step = position.epoch, [], 0
    while position.epoch == epoch:
        batch = next(position.batches(batch_sizes[min(step, len(batch_sizes) - 1)]))
        updates.append(batch)
        position = position.advance(len(batch))
        step += 1
    return updates, position


@given(size=SIZES, batch_sizes=st.lists(BATCHES, min_size=1, max_size=20), seed=st.integers(0, 2**40))
@settings(max_examples=200, deadline=None)
def test_any_sequence_of_batch_sizes_sees_every_sample_once(size: int, batch_sizes: list[int], seed: int) -> None:
    start = Position(seed, 0, 0, size)
    for epoch in range(2):
        order = start.permutation()
        updates, start = epoch_of(start, batch_sizes)
        assert [key for batch in updates for key in batch] == [(seed, epoch, index) for index in order]
        assert sorted(order) == list(range(size))
    assert start == Position(seed, 2, 0, size)


@given(size=st.integers(2, 200), batch_sizes=st.lists(st.integers(2, 40), min_size=1, max_size=20))
@settings(max_examples=200, deadline=None)
def test_no_update_has_a_single_sample(size: int, batch_sizes: list[int]) -> None:
    updates, _ = epoch_of(Position(0, 0, 0, size), batch_sizes)
    assert all(2 <= len(batch) <= max(*batch_sizes, 3) for batch in updates)


@given(size=SIZES, cursor=st.integers(0, 199), batch_size=BATCHES)
@settings(max_examples=300, deadline=None)
def test_sizes_are_those_of_the_updates_that_are_left(size: int, cursor: int, batch_size: int) -> None:
    position = Position(0, 0, cursor % size, size)
    assert position.sizes(batch_size) == {len(part) for part in position.indices(batch_size)}


@given(size=SIZES, batch_size=BATCHES)
@settings(max_examples=200, deadline=None)
def test_schedule_step_counts_the_updates_of_an_undisturbed_run(size: int, batch_size: int) -> None:
    position, updates = Position(0, 0, 0, size), 0
    while position.epoch < 2:
        assert position.schedule_step(batch_size) == updates
        position = position.advance(position.next_size(batch_size))
        updates += 1
    assert updates == 2 * updates_per_epoch(size, batch_size)


@given(size=SIZES, cursor=st.integers(0, 199), batch_size=BATCHES)
def test_schedule_step_stays_inside_its_epoch(size: int, cursor: int, batch_size: int) -> None:
    per_epoch = updates_per_epoch(size, batch_size)
    step = Position(0, 3, cursor % size, size).schedule_step(batch_size)
    assert 3 * per_epoch <= step < 4 * per_epoch


@given(samples=st.integers(0, 300), micro=st.integers(1, 40), avoid=st.booleans())
def test_micro_batches_are_even_and_complete(samples: int, micro: int, avoid: bool) -> None:
    sizes = micro_batches(samples, micro, avoid)
    assert sum(sizes) == samples
    assert not sizes or max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    if not avoid:
        assert len(sizes) == math.ceil(samples / micro)
        assert all(size <= micro for size in sizes)
    else:
        assert 1 not in sizes or samples == 1
        assert all(size <= max(micro, 3) for size in sizes)
        assert micro < 3 or all(size <= micro for size in sizes)


def test_micro_batches_by_hand() -> None:
    assert micro_batches(24, 10, avoid_single=False) == [8, 8, 8]
    assert micro_batches(8, 4, avoid_single=True) == [4, 4]
    assert micro_batches(5, 2, avoid_single=False) == [2, 2, 1]
    assert micro_batches(5, 2, avoid_single=True) == [3, 2]
    assert micro_batches(1, 4, avoid_single=True) == [1]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    order = Position(5, 1, 0, 50).permutation()
    assert Position(5, 1, 49, 50).permutation() == order
    assert Position(5, 2, 0, 50).permutation() != order
    assert Position(6, 1, 0, 50).permutation() != order


def test_order_draws_no_global_random_number() -> None:
    before, python = torch.get_rng_state(), random.getstate()
    list(Position(5, 1, 0, 50).batches(7))
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python


def test_key_seed_tells_its_numbers_apart() -> None:
    seeds = {key_seed(seed, epoch, index) for seed in range(4) for epoch in range(12) for index in range(112)}
    assert len(seeds) == 4 * 12 * 112
    assert key_seed(1, 11) != key_seed(11, 1)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_dict_round_trip() -> None:
    position = Position(3, 2, 17, 40)
    assert Position.from_dict(position.to_dict()) == position


@pytest.mark.parametrize(("cursor", "epoch", "size"), [(40, 0, 40), (-1, 0, 40), (0, -1, 40), (0, 0, 0)])
def test_impossible_positions_are_refused(cursor: int, epoch: int, size: int) -> None:
    with pytest.raises(ValueError, match="is no position"):
        Position(0, epoch, cursor, size)


@pytest.mark.parametrize("samples", [-1, 4])
def test_advance_refuses_what_is_not_left(samples: int) -> None:
    with pytest.raises(ValueError, match=f"cannot advance by {samples}: 3 samples are left"):
        Position(0, 0, 7, 10).advance(samples)
