"""A rung, and ladders of plain settings for a training loop of one's own. No torch."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from omegaconf import OmegaConf

from adaptive_trainer.errors import ConfigError

T = TypeVar("T")
REQUESTED = "requested"


@dataclass(frozen=True, slots=True)
class Rung(Generic[T]):
    """One step of a ladder.

    Attributes:
        settings: everything in force at this rung, cumulative; `overrides` is what it sets itself.
        passed_over: why the rung is not to be tried; empty when it is.
        notes: decisions taken on the way to these settings, each with its reason.
    """

    name: str
    settings: T
    overrides: tuple[str, ...] = ()
    passed_over: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Change:
    """A setting that differs from what was asked for."""

    key: str
    asked: Any
    used: Any
    why: str


def make_ladder(
    requested: Mapping[str, Any], steps: Mapping[str, Mapping[str, Any]]
) -> tuple[Rung[dict[str, Any]], ...]:
    """A ladder of plain settings: `make_ladder({"batch": 64}, {"half": {"batch": 32}, "amp": {"amp": True}})`.

    Raises:
        ConfigError: a step sets a key that the request does not have, or is named `requested`.
    """
    if REQUESTED in steps:
        raise ConfigError(f"a step cannot be named {REQUESTED!r}, which is the name of the first rung")
    settings = own(dict(requested))
    ladder = [Rung(REQUESTED, own(settings))]
    for name, step in steps.items():
        unknown = sorted(set(step) - set(settings))
        if unknown:
            raise ConfigError(f"step {name!r} sets {', '.join(unknown)}; the request has {', '.join(sorted(settings))}")
        settings |= step
        ladder.append(Rung(name, own(settings), tuple(f"{key}={value}" for key, value in step.items())))
    return tuple(ladder)


def own(settings: T) -> T:
    """The settings in containers of their own, nested ones too; what is in these (networks, tensors) is the same."""
    # Networks and tensors of a user's settings are not to be copied, for they may fill the device.
    leaves: dict[int, Any] = {}
    queue, seen = [settings], set[int]()
    while queue:
        value: Any = queue.pop()
        if id(value) in seen:  # a list may hold itself
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            queue += [*value, *value.values()]
        elif isinstance(value, list | tuple | set | frozenset | deque):
            queue += value
        elif not OmegaConf.is_config(value):
            leaves[id(value)] = value  # what `deepcopy` takes for copied already
    return copy.deepcopy(settings, leaves)
