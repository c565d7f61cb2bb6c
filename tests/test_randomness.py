"""What is kept of random numbers is what they are."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptive_trainer.randomness import RandomStates, _NumpyState

DRAWS: list[Callable[[], object]] = [
    lambda: np.random.rand(),
    lambda: np.random.randn(),  # makes two and keeps one
    lambda: np.random.rand(700),  # more than the generator's memory
    lambda: np.random.randint(9, size=3),
    lambda: np.random.seed(3),
    lambda: np.random.set_state(np.random.get_state()),
]


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    before = np.random.get_state()
    yield
    np.random.set_state(before)


def as_text(state: object) -> str:
    with np.printoptions(threshold=10**6):
        return repr(state)


@given(st.lists(st.one_of(st.none(), st.sampled_from(DRAWS)), max_size=12))
def test_the_state_of_numpy_is_known_without_asking(steps: list[Callable[[], object] | None]) -> None:
    mine = _NumpyState()
    for draw in steps:
        if draw is not None:
            draw()
        assert as_text(mine.read()) == as_text(np.random.get_state())


def test_nothing_is_asked_while_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    np.random.seed(0)
    mine, ask = _NumpyState(), np.random.get_state
    asked: list[int] = []

    def counted() -> object:
        asked.append(1)
        return ask()

    monkeypatch.setattr(np.random, "get_state", counted)
    for draw, count in ((None, 1), (None, 1), (DRAWS[0], 2), (None, 2), (DRAWS[1], 3), (None, 4)):
        if draw is not None:
            draw()
        mine.read()
        assert len(asked) == count, "a waiting normal number is not in the memory that is compared"


def test_another_generator_is_asked_each_time() -> None:
    before = np.random.get_bit_generator()  # type: ignore[attr-defined]
    np.random.set_bit_generator(np.random.PCG64(0))  # type: ignore[attr-defined]
    try:
        mine = _NumpyState()
        for _ in range(3):
            np.random.rand()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert as_text(mine.read()) == as_text(np.random.get_state())
    finally:
        np.random.set_bit_generator(before)  # type: ignore[attr-defined]


def test_everything_drawn_is_drawn_again() -> None:
    python, generator = random.Random(0), torch.Generator()
    states = RandomStates(torch.device("cpu"), [python, generator])

    def draw() -> list[float]:
        return [
            random.random(), float(np.random.randn()), float(torch.rand(())), python.random(),
            float(torch.rand((), generator=generator)),
        ]  # fmt: skip

    for _ in range(3):
        kept = states.read()
        drawn = draw()
        states.write(kept)
        assert draw() == drawn
