"""Recompute activations in the backward pass rather than keep them (Chen et al., arXiv 1604.06174).

What is recomputed is said by a plan (`recomputing.plan`). The network's forward pass is followed operator by operator
(`recomputing.following`).
"""

from __future__ import annotations

import logging

from torch import nn

from adaptive_trainer.errors import ConfigError
from adaptive_trainer.models.recomputing.following import follow, plan_in
from adaptive_trainer.models.recomputing.plan import Level, Plan, blocks_of

log = logging.getLogger(__name__)

KEY = "recompute"
CHEAP, BLOCKS = "cheap", "blocks"
AUTO = "auto"
PLANNED = (AUTO, "most")  # found by a search, before the network is built: `planning.recomputation`


def apply(model: nn.Module, value: str) -> None:
    """Recompute what a value of the setting says, from the next forward pass on.

    Raises:
        ConfigError: it names parts that the network does not have, or a plan that is still to be found.
    """
    follow(model, plan=plan_of(model, value))


def compile_refusal(model: nn.Module) -> str:
    """Say why the network cannot be compiled; empty where it can."""
    return "" if plan_in(model).is_empty else f"recomputed activations (trainer.{KEY}) are not compiled"


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
