"""What was drawn is drawn again."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptive_trainer.utils.random import RandomStates


def test_everything_drawn_is_drawn_again() -> None:
    """NumPy makes normal numbers in pairs: the second one of a pair waits beside the generator's state."""
    python, generator, before = random.Random(0), torch.Generator(), np.random.get_state()
    states, own = RandomStates(torch.device("cpu")), [python, generator]

    def draw() -> list[float]:
        return [
            random.random(), float(np.random.randn()), float(torch.rand(())), python.random(),
            float(torch.rand((), generator=generator)),
        ]  # fmt: skip

    for _ in range(3):
        kept = states.read(own)
        drawn = draw()
        states.write(kept)
        assert draw() == drawn
    np.random.set_state(before)


@given(st.lists(st.sampled_from(["randn", "rand", "seed", "shuffle", "set_state"])))
def test_the_state_of_numpy_is_the_one_that_numpy_gives(draws: list[str]) -> None:
    """It is read anew where it may have changed, and only there."""
    before, at_rest = np.random.get_state(), np.random.RandomState(3).get_state()
    actions: dict[str, Callable[[], object]] = {
        "randn": np.random.randn, "rand": np.random.rand, "seed": partial(np.random.seed, 3),
        "shuffle": partial(np.random.shuffle, [1, 2, 3]), "set_state": partial(np.random.set_state, at_rest),
    }  # fmt: skip
    states = RandomStates(torch.device("cpu"))
    try:
        for draw in draws:
            for _ in range(2):
                np.testing.assert_equal(states.read()[-1], np.random.get_state(legacy=False))
            actions[draw]()
        np.testing.assert_equal(states.read()[-1], np.random.get_state(legacy=False))
    finally:
        np.random.set_state(before)


def test_another_generator_of_numpy_is_read_as_well() -> None:
    before = np.random.get_bit_generator()  # type: ignore[attr-defined]
    states = RandomStates(torch.device("cpu"))
    try:
        for kind in (np.random.PCG64, np.random.MT19937):
            np.random.set_bit_generator(kind(5))  # type: ignore[attr-defined]
            kept = states.read()
            drawn = np.random.rand(4).tolist()
            states.write(kept)
            assert np.random.rand(4).tolist() == drawn
    finally:
        np.random.set_bit_generator(before)  # type: ignore[attr-defined]
