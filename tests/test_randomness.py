"""What was drawn is drawn again."""

from __future__ import annotations

import random

import numpy as np
import torch

from adaptive_trainer.randomness import RandomStates


def test_everything_drawn_is_drawn_again() -> None:
    """NumPy makes normal numbers in pairs: the second one of a pair waits beside the generator's state."""
    python, generator, before = random.Random(0), torch.Generator(), np.random.get_state()
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
    np.random.set_state(before)
