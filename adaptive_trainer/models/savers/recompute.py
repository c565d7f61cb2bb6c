"""Recompute activations in the backward pass rather than keep them (Chen et al., arXiv 1604.06174).

What is recomputed is said by a plan (`recomputing.plan`). The network's forward pass is followed operator by operator
(`recomputing.following`).
"""

from __future__ import annotations

import logging

from torch import nn

from adaptive_trainer.errors import ConfigError
from adaptive_trainer.models.recomputing.following import follow
from adaptive_trainer.models.recomputing.plan import NONE, Level, Plan, blocks_of

log = logging.getLogger(__name__)

KEY = "recompute"
BLOCKS = "blocks"
AUTO, MOST = "auto", "most"  # as little as makes it fit; the least memory
PLANNED = (AUTO, MOST)  # found by a search, before the network is built: `planning.recomputation`


def recompute(model: nn.Module, plan: str) -> None:
    """Recompute activations of your own network in its backward pass rather than keep them: less memory, the same bits.

        found = predict(model, torch.optim.AdamW, (24, 3, 224, 224), recompute="auto", limit="4GiB")
        recompute(model, found.plan)

    The network is changed in place: its weights, keys and hooks stay as they are, and so does its evaluation.
    What torch cannot see must not write what an operator has computed: NumPy on the same memory, or a kernel that is no
    operator of torch. Into `empty` and `zeros` it may.

    Args:
        plan: what `predict` has found; "cheap" (normalisations, activations, gates), "blocks", a plan as
            "most:blocks.0|blocks.1+cheap:rest", or "none" to keep all activations again.

    Raises:
        ConfigError: it is no plan, is one of another network, or is still to be found ("auto", "most").
    """
    if plan not in (NONE, Level.CHEAP, BLOCKS) and ":" not in plan:
        raise ConfigError(
            f"recompute was given {plan!r}; allowed are {NONE}, {Level.CHEAP}, {BLOCKS} and plans, such as the one "
            "that predict(model, ..., recompute='auto', limit='4GiB').plan is"
        )
    apply(model, plan)


def apply(model: nn.Module, value: str) -> None:
    """Recompute what a value of the setting says, from the next forward pass on.

    Raises:
        ConfigError: it names parts that the network does not have, or a plan that is still to be found.
    """
    follow(model, plan=plan_of(model, value))


def compile_refusal(_: nn.Module) -> str:
    """Say why the network cannot be compiled: it can, as compiled code recomputes by means of its own."""
    return ""


def plan_of(model: nn.Module, value: str) -> Plan:
    """The plan that a value of the setting stands for in this network.

    Raises:
        ConfigError: as `apply`.
    """
    if value == Level.CHEAP:
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
