"""The states of all random numbers that an update may draw, read before each and put back after a failure."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

__all__ = ["RandomStates"]

MT19937_BYTES = 625 * 4  # 624 words and how many of them are used up


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
        self._numpy = _NumPyState()
        if device.type == "cuda":
            torch.cuda.init()  # type: ignore[no-untyped-call]  # makes the card's generators
            index = torch.cuda.current_device() if device.index is None else device.index
            self.of_torch.append(torch.cuda.default_generators[index])

    def read(self) -> tuple[Any, ...]:
        """All states as they are now, for `write`."""
        of_torch, of_python = [g.get_state() for g in self.of_torch], [g.getstate() for g in self.of_python]
        return of_torch, of_python, random.getstate(), self._numpy.read()

    def write(self, states: tuple[Any, ...]) -> None:
        """Put back what `read` gave."""
        of_torch, of_python, python, numpy = states
        for generator, state in zip(self.of_torch, of_torch, strict=True):
            generator.set_state(state)
        for own, kept in zip(self.of_python, of_python, strict=True):
            own.setstate(kept)
        random.setstate(python)
        np.random.set_state(numpy)


class _NumPyState:
    """The state of NumPy's global random numbers, read anew only where something may have drawn.

    NumPy gives it word by word, slower than all other generators give theirs. That it is the one read last shows in its
    memory, unless half a pair of normal numbers waits to be drawn, which is no part of that memory. (It would not show
    that somebody has put back a state in which such a half waits, when it alone was drawn in between.)
    """

    def __init__(self) -> None:
        self._memory = b""
        self._state: dict[str, Any] = {"has_gauss": 1}

    def read(self) -> dict[str, Any]:
        generator = np.random.get_bit_generator()  # type: ignore[attr-defined]  # of 1.24, not in its stubs
        is_usual = type(generator) is np.random.MT19937
        memory = ctypes.string_at(generator.ctypes.state_address, MT19937_BYTES) if is_usual else b""
        if not memory or memory != self._memory or self._state["has_gauss"]:
            self._memory, self._state = memory, np.random.get_state(legacy=False)
        return self._state
