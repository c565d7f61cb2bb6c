"""The states of all random numbers that an update may draw, read before each and put back after a failure."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

__all__ = ["RandomStates"]


class RandomStates:
    """Python's, NumPy's and torch's own random numbers, and those of generators that objects hold.

    Args:
        device: where training runs; a CUDA card has random numbers of its own.
        generators: of the type of `random.Random` or `torch.Generator`.
    """

    def __init__(self, device: torch.device, generators: Iterable[random.Random | torch.Generator]) -> None:
        self.device = device
        self.generators = list(generators)

    def read(self) -> tuple[Any, ...]:
        """All states as they are now, for `write`."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        own = [g.getstate() if isinstance(g, random.Random) else g.get_state() for g in self.generators]
        return torch.get_rng_state(), cuda, random.getstate(), np.random.get_state(), own

    def write(self, states: tuple[Any, ...]) -> None:
        """Put back what `read` gave."""
        cpu, cuda, python, numpy, own = states
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, self.device)
        random.setstate(python)
        np.random.set_state(numpy)
        for generator, kept in zip(self.generators, own, strict=True):
            if isinstance(generator, random.Random):
                generator.setstate(kept)
            else:
                generator.set_state(kept)
