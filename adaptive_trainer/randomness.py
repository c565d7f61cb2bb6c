"""The states of all random numbers that an update may draw, read before each and put back after a failure."""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

__all__ = ["RandomStates"]

MEMORY = 624 * 4 + 4  # bytes of a Mersenne Twister: its words and its position in them


class RandomStates:
    """Python's, NumPy's and torch's own random numbers, and those of generators that objects hold.

    Args:
        device: where training runs; a CUDA card has random numbers of its own.
        generators: of the type of `random.Random` or `torch.Generator`.
    """

    def __init__(self, device: torch.device, generators: Iterable[random.Random | torch.Generator]) -> None:
        self.device = device
        self.generators = list(generators)
        self._numpy = _NumpyState()

    def read(self) -> tuple[Any, ...]:
        """All states as they are now, for `write`."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        own = [g.getstate() if isinstance(g, random.Random) else g.get_state() for g in self.generators]
        return torch.get_rng_state(), cuda, random.getstate(), self._numpy.read(), own

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


class _NumpyState:
    """What `np.random.get_state()` gives. Putting it together takes up to 0.1 ms, so it is kept while nothing is drawn.

    Whether anything was is seen at the generator's memory, where that is all of the state.
    """

    def __init__(self) -> None:
        self._memory = b""
        self._state: Any = None

    def read(self) -> Any:
        memory = _memory()
        if not memory or memory != self._memory:
            self._state = np.random.get_state()
            self._memory = memory if _is_all_of(self._state, memory) else b""
        return self._state


def _memory() -> bytes:
    """Of NumPy's global generator; empty where it is no Mersenne Twister, which it is unless someone has changed it."""
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]  # the stubs forget it
    if not isinstance(generator, np.random.MT19937):
        return b""
    return ctypes.string_at(generator.ctypes.state_address, MEMORY)


def _is_all_of(state: Any, memory: bytes) -> bool:
    """Whether the state is this memory, and no second normal number waits, which is kept elsewhere."""
    if not memory:
        return False
    _, words, position, waits, _ = state
    return not waits and memory == words.tobytes() + int(position).to_bytes(4, sys.byteorder)
