"""The fastest depths in given memory are as good as the best of all combinations, and keep to what they say."""

from __future__ import annotations

import itertools
import random

import pytest

from adaptive_trainer.models.recomputing.plan import Level
from adaptive_trainer.planning.depths import PRECISE, Chosen, Depths
from adaptive_trainer.prediction.splicing import Sections
from adaptive_trainer.prediction.stretches import Profile, Stretch
from adaptive_trainer.prediction.tracer import Trace

DEPTHS = 3
LINK = 1e9
NO_SECTIONS = Sections(Trace(b"", (), (), b"", (), 1, 0, 0), [], 0, 0)


def depths(names: list[str], draw: random.Random) -> Depths:
    """Made-up profiles of stretches of these names."""

    def made(depth: int) -> Profile:
        drawn = ((draw.randint(1, 100), draw.randint(1, 200), draw.randint(1, 50)) for _ in names)
        stretches = (Stretch(name, *figures) for name, figures in zip(names, drawn, strict=True))
        return Profile(tuple(stretches), 1.0, 1000 + depth, 1, NO_SECTIONS)

    blocks = sorted({*names} - {""})
    lacking = set(blocks[:1])  # of the depth in the middle
    return Depths([made(depth) for depth in range(DEPTHS)], [blocks, set(blocks) - lacking, blocks], LINK)


def all_choices(model: Depths) -> list[Chosen]:
    found = itertools.product(range(DEPTHS), repeat=len(model.paths))
    lacking = model.paths.index(min(model.paths))
    return [(list(each), level) for each in found if each[lacking] != 1 for level in (Level.KEEP, Level.CHEAP)]


@pytest.mark.parametrize("names", [["", "a", "", "b", "", "c", ""], ["a", "b", "c", "d"], ["", "a", "b", "a", "", "b"]])
@pytest.mark.parametrize("seed", range(4))
def test_no_combination_is_faster_in_the_same_memory(names: list[str], seed: int) -> None:
    model = depths(names, random.Random(seed))
    every = all_choices(model)
    if names.count("a") > 1:  # what runs more than once has one depth
        every = [each for each in every if len(set(each[0])) == 1]
    least = min(map(model.peak, every))
    assert model.peak(model.least()) <= least * (1 + PRECISE)
    assert model.solve(least - 1) is None
    for room in (least, 1.05 * least, 1.2 * least, 1.5 * least):
        chosen = model.solve(room)
        assert chosen is not None
        assert model.peak(chosen) <= room
        best = min(model.seconds(each) for each in every if model.peak(each) <= room)
        assert model.seconds(chosen) == best


def test_neighbours_differ_in_one_block() -> None:
    model = depths(["", "a", "", "b", ""], random.Random(0))
    every = all_choices(model)
    chosen = every[0]
    found = model.neighbours(chosen)
    times = [model.seconds(each) for each in found]
    assert times == sorted(times)
    one = [each for each in every if each[1] == chosen[1] and differs(each, chosen) == 1]
    assert sorted(list(each) for each, _ in found) == sorted(list(each) for each, _ in one)


def differs(one: Chosen, other: Chosen) -> int:
    return sum(a != b for a, b in zip(one[0], other[0], strict=True))


def test_blocks_in_another_order_are_refused() -> None:
    one, other = (Profile((Stretch(a, 1, 1, 1), Stretch(b, 1, 1, 1)), 1.0, 2, 1, NO_SECTIONS) for a, b in ("ab", "ba"))
    with pytest.raises(ValueError, match="another order"):
        Depths([one, other], ["ab", "ab"], LINK)
