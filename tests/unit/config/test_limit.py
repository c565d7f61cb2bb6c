"""What `memory.limit` may say."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from adaptive_trainer.config.limit import LEAST, Limit, parse_limit
from adaptive_trainer.errors import ConfigError
from adaptive_trainer.memory.allocator import SMALL_SEGMENT

MiB = 2**20


def test_the_least_is_a_segment_of_the_allocator() -> None:
    assert LEAST == SMALL_SEGMENT


@pytest.mark.parametrize(
    ("value", "limit"),
    [
        (None, Limit()),
        ("null", Limit()),
        ("none", Limit(lifted=True)),
        ("None", Limit(lifted=True)),
        ("5600MiB", Limit(bytes=5600 * MiB)),
        (" 6 gib ", Limit(bytes=6 * 2**30)),
        ("1.5GiB", Limit(bytes=3 * 2**29)),
        ("512 MB", Limit(bytes=512 * 10**6)),
        ("2097152", Limit(bytes=2 * MiB)),
        ("2097152B", Limit(bytes=2 * MiB)),
        (6 * 2**30, Limit(bytes=6 * 2**30)),
        (6e9, Limit(bytes=6 * 10**9)),
        (0.5, Limit(fraction=0.5)),
        ("0.5", Limit(fraction=0.5)),
        (1, Limit(fraction=1.0)),
        (1.0, Limit(fraction=1.0)),
    ],
)
def test_limits_that_can_be_read(value: object, limit: Limit) -> None:
    assert parse_limit(value) == limit


@pytest.mark.parametrize(
    "value",
    [
        *("lots", "1.5", "-6GiB", "NaNGiB", "6 potatoes", "6G", "GiB", "50%", "1e3MiB"),
        *(-1, 0, 0.0, 1.5, float("nan"), float("inf"), True, False, [6]),
    ],
)
def test_limits_that_cannot_be_read(value: object) -> None:
    with pytest.raises(ConfigError, match=r"memory\.limit=.*allowed are a size .*fraction") as caught:
        parse_limit(value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [5600, "5600", "0MiB", "12kB"])
def test_a_forgotten_unit(value: object) -> None:
    with pytest.raises(
        ConfigError, match=r"less than the 2 MiB of the allocator's smallest segment, .*; a size has a unit"
    ):
        parse_limit(value)


@given(st.integers(2, 10**6))
def test_sizes_in_mib(n: int) -> None:
    assert parse_limit(f"{n}MiB").of(0) == n * MiB


@given(st.data(), st.integers(2 * MiB, 2**40))
def test_a_fraction_is_never_more_than_the_whole(data: st.DataObject, total: int) -> None:
    fraction = data.draw(st.floats(2 * MiB / total, 1))
    assume(fraction * total >= 2 * MiB)
    of = parse_limit(fraction).of(total)
    assert of is not None
    assert 0 <= of <= total
