"""What modules hold on the host beside parameters and buffers: whether it has changed, and putting it back.

A CUDA graph repeats kernels and no Python. An update is recorded once, so what it changes on the host shows whether
replays would do the same; and what it left there is put back, since none of its kernels ran.
"""

from __future__ import annotations

import pickle
import random
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_trainer.utils.belongings import HOOKS, PLAIN, is_own_kind
from adaptive_trainer.utils.random import is_generator, put, state_of


class HostState:
    """The attributes of modules and what is in them, one within the other, and the global random numbers, as they are.

    Args:
        modules: these, and those below them.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        waiting: list[tuple[str, Any]] = [(type(module).__name__, module) for module in modules]
        # Parameters and buffers are what an update is there to change.
        known = {id(tensor) for _, root in waiting for tensor in (*root.parameters(), *root.buffers())}
        self._random = _global_random_numbers()
        self._kept: list[tuple[str, Any, Any]] = []  # holds on to objects: else another could get the address of one
        self._copies: dict[int, Tensor] = {}
        while waiting:
            name, value = waiting.pop()
            if type(value) in PLAIN or id(value) in known:
                continue
            if isinstance(value, tuple | frozenset):  # cannot change, but what is in it can
                waiting += ((name, each) for each in value)
            elif (content := _content(value)) is not None:
                known.add(id(value))
                self._kept.append((name, value, content))
                if isinstance(value, Tensor) and value.device.type == "cpu":
                    self._copies[id(value)] = value.detach().clone()
                waiting += _parts(name, value, content)

    def changes(self) -> list[str]:
        """The names of what is otherwise now."""
        now = _global_random_numbers()
        found = [name for name, state in self._random.items() if now[name] != state]
        for name, value, content in self._kept:
            if _has_changed(value, content):
                found += _changed_attributes(value, content) if isinstance(value, nn.Module) else [name]
        return sorted(set(found))

    @torch.no_grad()
    def put_back(self) -> None:
        """Make it what it was, but for the global random numbers and the values of tensors on a card."""
        for _, value, content in self._kept:
            if _has_changed(value, content):
                if id(value) in self._copies:
                    value.copy_(self._copies[id(value)])
                else:
                    _fill(value, content)


def _global_random_numbers() -> dict[str, Any]:
    return {
        "torch's random numbers": torch.get_rng_state().numpy().tobytes(),
        "Python's random numbers": random.getstate(),
        "numpy's random numbers": pickle.dumps(np.random.get_state()),
    }


def _content(value: Any) -> Any:
    """What an object holds, one level deep; None where there is nothing to look into."""
    if isinstance(value, PLAIN):
        return None
    if isinstance(value, Tensor):
        return 0 if value.is_inference() else value._version  # counts writes, and waits for no device
    if is_generator(value):
        return state_of(value)
    if isinstance(value, np.ndarray):
        return None if isinstance(value, np.memmap) else value.copy()  # a map is data, and may be as large as a disk
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, list | set | deque):
        return list(value)
    has_attributes = is_own_kind(value) and type(value).__dictoffset__
    return dict(vars(value)) if isinstance(value, nn.Module) or has_attributes else None


def _parts(name: str, value: Any, content: Any) -> Iterator[tuple[str, Any]]:
    """What is in an object, by the name of the attribute that leads there."""
    if isinstance(value, nn.Module):
        yield from ((f"{type(value).__name__}.{key}", each) for key, each in content.items() if key not in HOOKS)
    elif isinstance(content, dict | list):
        yield from ((name, each) for each in (content.values() if isinstance(content, dict) else content))


def _has_changed(value: Any, content: Any) -> bool:
    return not _same(value if isinstance(value, np.ndarray) else _content(value), content)


def _changed_attributes(module: nn.Module, before: dict[str, Any]) -> list[str]:
    now, missing = vars(module), object()
    changed = [key for key in {**before, **now} if not _same(now.get(key, missing), before.get(key, missing))]
    return [f"{type(module).__name__}.{key}" for key in changed]


def _same(now: Any, before: Any) -> bool:
    """Whether two things are one object, or equal numbers, texts and arrays, or containers of what is the same."""
    if now is before:
        return True
    if type(now) is not type(before):
        return False
    if isinstance(now, PLAIN):
        return repr(now) == repr(before)  # as NaN is not equal to NaN
    if isinstance(now, np.ndarray):
        return (now.shape, now.dtype, now.tobytes()) == (before.shape, before.dtype, before.tobytes())
    if isinstance(now, dict):
        return list(now) == list(before) and all(map(_same, now.values(), before.values()))
    if isinstance(now, list | tuple):
        return len(now) == len(before) and all(map(_same, now, before))
    return False


def _fill(value: Any, content: Any) -> None:
    """Put what an object held into it again."""
    if is_generator(value):
        put(value, content)
    elif isinstance(value, np.ndarray):
        np.copyto(value, content)
    else:
        own = value if isinstance(value, dict | list | set | deque) else vars(value)
        own.clear()
        (own.extend if isinstance(own, list | deque) else own.update)(content)
