"""Recompute activations in the backward pass rather than keep them (Chen et al., arXiv 1604.06174).

What is recomputed is said by a plan (`recomputing.plan`). The network's code, its modules and their hooks stay as they
are: its forward pass is followed operator by operator (`recomputing.keeper`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from adaptive_trainer.errors import ConfigError
from adaptive_trainer.models.recomputing.keeper import Keeper
from adaptive_trainer.models.recomputing.plan import Level, Plan, blocks_of

log = logging.getLogger(__name__)

KEY = "recompute"
CHEAP, BLOCKS = "cheap", "blocks"
AUTO = "auto"
PLANNED = (AUTO, "most")  # found by a search, before the network is built: `planning.recomputation`
Forward = Callable[..., Any]


def apply(model: nn.Module, value: str) -> None:
    """Recompute what a value of the setting says, from the next forward pass on.

    Raises:
        ConfigError: it names parts that the network does not have, or a plan that is still to be found.
    """
    plan = plan_of(model, value)
    own = own_forward(model)
    model.__dict__.pop("forward", None)
    if not plan.is_empty:
        # Paths to the network's generators lead through these arguments, and checkpoints name them.
        model.__dict__["forward"] = partial(_followed, model, own, plan)
    elif own is not None:
        model.__dict__["forward"] = own


def compile_refusal(model: nn.Module) -> str:
    """Say why the network cannot be compiled; empty where it can."""
    return f"recomputed activations (trainer.{KEY}) are not compiled" if planned(model) is not None else ""


def plan_of(model: nn.Module, value: str) -> Plan:
    """The plan that a value of the setting stands for in this network.

    Raises:
        ConfigError: as `apply`.
    """
    if value == CHEAP:
        return Plan({}, Level.CHEAP)
    if value in PLANNED:
        raise ConfigError(f"trainer.{KEY}={value} is a plan that is still to be found; training and planning find it")
    if value == BLOCKS:
        blocks = blocks_of(model)
        if not blocks:
            log.warning("%s has no blocks to recompute: trainer.%s saves nothing", type(model).__name__, KEY)
        return Plan(dict.fromkeys(blocks, Level.WHOLE))
    plan = Plan.parse(value)
    known = {path for path, _ in model.named_modules(remove_duplicate=False)}
    if unknown := [path for path in plan.parts if path not in known]:
        raise ConfigError(f"trainer.{KEY}: {type(model).__name__} has no module {', '.join(unknown)}")
    return plan


def planned(model: nn.Module) -> Plan | None:
    """The plan that is applied; None where there is none."""
    found = model.__dict__.get("forward")
    return found.args[2] if isinstance(found, partial) and found.func is _followed else None


def own_forward(model: nn.Module) -> Forward | None:
    """The forward pass that this network alone was given, without recomputation; None where it is its class's."""
    found: Forward | None = model.__dict__.get("forward")
    return found.args[1] if isinstance(found, partial) and found.func is _followed else found


def _followed(model: nn.Module, own: Forward | None, plan: Plan, *args: Any, **kwargs: Any) -> Any:
    forward = own or partial(type(model).forward, model)
    if not (model.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    samples = next((leaf.shape[0] for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim), 1)
    with Keeper(_levels(model, plan.parts), plan.rest, samples):
        return forward(*args, **kwargs)


def _levels(model: nn.Module, parts: Mapping[str, Level]) -> dict[int, Level]:
    return {id(model.get_submodule(path)): level for path, level in parts.items()}
