"""How the samples of a batch are shared out among ranks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from adaptive_trainer.data.position import part_of, shares


@given(st.integers(0, 300), st.integers(1, 9))
def test_every_sample_is_on_one_rank_and_none_is_alone(samples: int, ranks: int) -> None:
    sizes = shares(samples, ranks)
    assert len(sizes) == ranks
    assert sum(sizes) == samples
    assert sizes == sorted(sizes, reverse=True)
    assert samples == 1 or 1 not in sizes
    used = [size for size in sizes if size]
    assert max(used, default=0) - min(used, default=0) <= 1
    whole = list(range(samples))
    assert [each for rank in range(ranks) for each in part_of(whole, rank, ranks)] == whole
    assert max(shares(samples, ranks, avoid_single=False)) == -(-samples // ranks)
