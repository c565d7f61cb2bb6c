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
        own = list(generators)
        self.of_python = [g for g in own if isinstance(g, random.Random)]
        self.of_torch = [torch.default_generator, *(g for g in own if isinstance(g, torch.Generator))]
        if device.type == "cuda":
            torch.cuda.init()  # type: ignore[no-untyped-call]  # makes the card's generators
            index = torch.cuda.current_device() if device.index is None else device.index
            self.of_torch.append(torch.cuda.default_generators[index])

    def read(self) -> tuple[Any, ...]:
        """All states as they are now, for `write`."""
        of_torch, of_python = [g.get_state() for g in self.of_torch], [g.getstate() for g in self.of_python]
        return of_torch, of_python, random.getstate(), np.random.get_state(legacy=False)

    def write(self, states: tuple[Any, ...]) -> None:
        """Put back what `read` gave."""
        of_torch, of_python, python, numpy = states
        for generator, state in zip(self.of_torch, of_torch, strict=True):
            generator.set_state(state)
        for own, kept in zip(self.of_python, of_python, strict=True):
            own.setstate(kept)
        random.setstate(python)
        np.random.set_state(numpy)
