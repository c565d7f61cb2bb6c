"""The states of all random numbers that an update may draw, read before each and put back after a failure."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from adaptive_trainer import oom

MT19937_BYTES = 625 * 4  # 624 words and how many of them are used up
KINDS = {
    "torch.Generator": torch.Generator, "random.Random": random.Random, "numpy.Generator": np.random.Generator,
    "numpy.RandomState": np.random.RandomState, "numpy.BitGenerator": np.random.BitGenerator,
}  # fmt: skip
EVERY = tuple(KINDS.values())
PLAIN = {Tensor, int, float, bool, str, bytes, type(None)}
BITS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")


def is_generator(value: Any) -> bool:
    """Whether it is an object that random numbers are drawn from and whose state can be read."""
    return isinstance(value, EVERY) and not isinstance(value, random.SystemRandom)


def process_wide() -> list[Any]:
    """The generators of the process: whoever draws from them, they are nobody's own."""
    found = [torch.default_generator, *torch.cuda.default_generators]
    return [*found, random.random.__self__, np.random.rand.__self__]  # type: ignore[attr-defined]


def state_of(generator: Any) -> Any:
    """What it will draw, as arrays, numbers, texts and containers of them."""
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)  # legacy: a tuple that only MT19937 has
    return getattr(generator, "bit_generator", generator).state  # of numpy.Generator, which has none itself


def put(generator: Any, state: Any) -> None:
    """Make it draw what it would have drawn when `state_of` was asked."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state if isinstance(state, Tensor) else torch.from_numpy(state))
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        getattr(generator, "bit_generator", generator).state = state


def states_of(generators: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Each generator with its state, for `put_all`."""
    # torch's as tensors: making these later would be operators, which can fail half-way through `put_all`.
    return [(each, each.get_state() if isinstance(each, torch.Generator) else state_of(each)) for each in generators]


def put_all(states: Iterable[tuple[Any, Any]]) -> None:
    """Put back what `states_of` gave."""
    for generator, state in states:
        put(generator, state)


def seed(generator: Any, number: int) -> None:
    """Make it draw what a new one of its kind draws with this seed, from 0 to 2^64 - 1."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(number)
    elif isinstance(generator, random.Random):
        generator.seed(number)
    elif isinstance(generator, np.random.RandomState):
        generator.seed(number % 2**32)
    else:
        bits = getattr(generator, "bit_generator", generator)
        bits.state = type(bits)(number).state


def packed(generator: Any) -> dict[str, Any] | None:
    """Its kind and state as plain data for a checkpoint; None where its state is something else."""
    kind = next(name for name, kind in KINDS.items() if isinstance(generator, kind))
    state = tree_map(lambda leaf: torch.tensor(leaf) if isinstance(leaf, np.ndarray) else leaf, state_of(generator))
    if not all(type(leaf) in PLAIN for leaf in tree_leaves(state)):
        return None
    return {"kind": kind, "device": str(getattr(generator, "device", "")).partition(":")[0], "state": state}


def unpack(generator: Any, saved: Mapping[str, Any]) -> bool:
    """Put what `packed` gave into a generator; False where it was of another kind."""
    state = tree_map(lambda leaf: leaf.numpy() if isinstance(leaf, Tensor) else leaf, saved["state"])
    try:
        is_alike = isinstance(generator, KINDS[saved["kind"]])
        if is_alike:
            put(generator, state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # of another device, or with other bits
        if oom.describe(error).kind is not oom.Kind.OTHER:
            raise
        return False
    return is_alike


def made(saved: Mapping[str, Any], device: torch.device) -> Any:
    """A generator with the kind and state that `packed` gave; None where no such one can be made.

    Args:
        device: for one of torch's that drew on a card.
    """
    kind, state = saved["kind"], saved["state"]
    if kind == "torch.Generator":
        new: Any = torch.Generator("cpu" if saved["device"] == "cpu" else device)
    elif kind == "random.Random":
        new = random.Random()
    elif state["bit_generator"] not in BITS:  # a name in a checkpoint, which may be anybody's
        return None
    else:
        bits = getattr(np.random, state["bit_generator"])()
        new = bits if kind == "numpy.BitGenerator" else getattr(np.random, kind.removeprefix("numpy."))(bits)
    return new if unpack(new, saved) else None


class RandomStates:
    """Python's, NumPy's and torch's own random numbers.

    Args:
        devices: where training runs; a CUDA card has random numbers of its own.
    """

    def __init__(self, *devices: torch.device) -> None:
        self._of_torch = [torch.default_generator]
        self._numpy = _NumPyState()
        for device in devices:
            if device.type == "cuda":
                torch.cuda.init()  # type: ignore[no-untyped-call]  # makes the card's generators
                index = torch.cuda.current_device() if device.index is None else device.index
                generator = torch.cuda.default_generators[index]
                self._of_torch += [generator] if generator not in self._of_torch else []

    def read(self, own: Iterable[Any] = ()) -> tuple[Any, ...]:
        """All states as they are now, and those of generators that objects own, for `write`."""
        return states_of([*self._of_torch, *own]), random.getstate(), self._numpy.read()

    def write(self, states: tuple[Any, ...]) -> None:
        """Put back what `read` gave."""
        of_generators, python, numpy = states
        put_all(of_generators)
        random.setstate(python)
        np.random.set_state(numpy)


class _NumPyState:
    """The state of NumPy's global random numbers, read anew only where something may have drawn."""

    def __init__(self) -> None:
        self._memory = b""
        self._state: dict[str, Any] = {"has_gauss": 1}

    def read(self) -> dict[str, Any]:
        # NumPy gives it word by word, slower than all other generators give theirs. That it is the one read last shows
        # in its memory, unless half a pair of normal numbers waits to be drawn, which is no part of that memory. (It
        # would not show that a state was put back in which such a half waits, when it alone was drawn in between.)
        generator = np.random.get_bit_generator()  # type: ignore[attr-defined]  # of 1.24, not in its stubs
        is_usual = type(generator) is np.random.MT19937
        memory = ctypes.string_at(generator.ctypes.state_address, MT19937_BYTES) if is_usual else b""
        if not memory or memory != self._memory or self._state["has_gauss"]:
            self._memory, self._state = memory, np.random.get_state(legacy=False)
        return self._state


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Puts back what the block draws, and what a network may switch: predictions must not change a training."""
    # torch's random numbers are the process's: another thread that draws meanwhile draws the same ones again.
    states, dtype = RandomStates(torch.device("cpu")), torch.get_default_dtype()
    before = states.read()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(dtype)
        states.write(before)
