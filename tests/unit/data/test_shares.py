"""How the samples of a batch are shared out among ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_trainer.data.position import part_of, shares

WEIGHTS = st.lists(st.integers(0, 40), min_size=1, max_size=9).filter(any).map(tuple)


@given(st.integers(0, 300), WEIGHTS, st.booleans())
def test_every_sample_is_on_one_rank_and_none_is_alone(samples: int, weights: tuple[int, ...], avoid: bool) -> None:
    sizes = shares(samples, weights, avoid_single=avoid)
    assert sum(sizes) == samples
    assert all(size >= 0 for size in sizes)
    assert all(not size for size, weight in zip(sizes, weights, strict=True) if not weight)
    assert not avoid or samples == 1 or 1 not in sizes
    whole = list(range(samples))
    parts = [part_of(whole, rank, weights, avoid_single=avoid) for rank in range(len(weights))]
    assert [each for part in parts for each in part] == whole


@given(st.integers(0, 300), st.integers(1, 9))
def test_equal_weights_give_even_shares(samples: int, ranks: int) -> None:
    sizes = shares(samples, (1,) * ranks)
    assert list(sizes) == sorted(sizes, reverse=True)
    used = [size for size in sizes if size]
    assert max(used, default=0) - min(used, default=0) <= 1
    assert max(shares(samples, (1,) * ranks, avoid_single=False)) == -(-samples // ranks)


@given(WEIGHTS, st.data())
def test_no_rank_has_more_than_fits(weights: tuple[int, ...], data: st.DataObject) -> None:
    samples = data.draw(st.integers(0, sum(weights)))
    sizes = shares(samples, weights, avoid_single=False)
    assert all(size <= weight for size, weight in zip(sizes, weights, strict=True))
    more = shares(samples + 1, weights, avoid_single=False)
    assert sum(sizes) == sum(more) - 1
    assert all(size <= then for size, then in zip(sizes, more, strict=True))  # a smaller batch is smaller everywhere
    assert shares(sum(weights), weights, avoid_single=False) == weights


@given(WEIGHTS, st.integers(1, 300))
def test_no_sample_could_be_moved_to_a_rank_that_is_less_full(weights: tuple[int, ...], samples: int) -> None:
    sizes = shares(samples, weights, avoid_single=False)
    fullest = max(size / weight for size, weight in zip(sizes, weights, strict=True) if weight)
    assert all((size + 1) / weight >= fullest for size, weight in zip(sizes, weights, strict=True) if weight)


@pytest.mark.parametrize(
    ("samples", "weights", "expected"),
    [
        (24, (8, 16), (8, 16)), (24, (1, 2), (8, 16)), (24, (3, 0), (24, 0)), (5, (8, 16), (2, 3)),
        (3, (8, 16), (0, 3)), (2, (1, 1), (2, 0)), (1, (1, 4), (0, 1)), (9, (1, 1, 1, 1), (3, 2, 2, 2)),
        (10, (0.1, 0.2), (3, 7)), (24, (1, 23), (0, 24)),
    ],
)  # fmt: skip
def test_shares(samples: int, weights: tuple[float, ...], expected: tuple[int, ...]) -> None:
    assert shares(samples, weights) == expected
