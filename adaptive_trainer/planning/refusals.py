"""What settings are not trained with, whatever the memory, and why."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from adaptive_trainer.config.schema import Config
from adaptive_trainer.errors import UserError, refuse_all
from adaptive_trainer.ladder.resolve import recipe
from adaptive_trainer.ladder.rung import Rung
from adaptive_trainer.memory.usage import format_bytes
from adaptive_trainer.models.optimizers import build_optimizer, check_optimizer
from adaptive_trainer.models.recomputing.plan import NONE, Plan
from adaptive_trainer.models.savers.recompute import plan_of
from adaptive_trainer.models.zoo import check_name
from adaptive_trainer.planning.image_size import check_image_size, failure_at
from adaptive_trainer.planning.networks import Networks
from adaptive_trainer.planning.recomputation import Planner


def refusal(networks: Networks, above: Config, config: Config) -> str:
    """Why these settings, one step below those, cannot be trained with; empty where they may."""
    reason = ""
    if config.data.image_size != above.data.image_size or config.model != above.model:
        reason = _size_refusal(networks, above, config)
    if not reason and replace(config.optimizer, lr=0.0) != replace(above.optimizer, lr=0.0):
        reason = _optimizer_refusal(networks.outline(config), config)
    is_split = recipe(config).micro_batch_size < recipe(above).micro_batch_size
    if not reason and config.ladder.exact and is_split and networks.has_batch_norm(config):
        reason = "it would change BatchNorm's statistics, and ladder.exact keeps them"
    if not reason and config.trainer.recompute != above.trainer.recompute:
        reason = _why_not(lambda: check_recomputation(networks, config))
    alone = "" if reason else single_sample(config)  # asked last: BatchNorm may be looked for in a built network
    return alone if alone and networks.has_batch_norm(config) else reason


def no_step(planner: Planner, above: Config, config: Config, room: int | None = None) -> str:
    """Why another network than the one above is no step down; empty where it may be one.

    Plans of recomputation that are still to be found are those for a room without limits: both networks then keep what
    they can, and compare.

    Args:
        room: bytes that there are; a network whose weights take more is not predicted.
    """
    # Sizes and precision are compared by the ladder itself; a network's need shows in its prediction only.
    if config.model == above.model:
        return ""
    above, config = (planner.planned(each, None) for each in (above, config))
    predictor = planner.predictor
    weights = predictor.networks.weights_bytes
    was: int | None
    need: int | None
    if room is not None and weights(config) > room:
        was, need, what, those = weights(above), weights(config), "its weights alone take", "those above"
    else:
        was, need = (predictor.predict(each).min_capacity_bytes for each in (above, config))
        what, those = "it is predicted to need", "the rung above"
    if need is None or was is None or need < was:
        return ""
    more = f"{what} {format_bytes(need)}, no less than {those} ({format_bytes(was)})"
    return f"it is no step down from {above.model.name}: {more}"


def _size_refusal(networks: Networks, above: Config, config: Config) -> str:
    if not networks.is_own:
        return image_refusal(config, networks.classes(config))
    model, size = networks.outline(config), config.data.image_size  # one for this run: nothing to remember on disk
    failure = "" if model is None else failure_at(model.eval(), size)
    # A network that fails on shapes alone at the size above too, where it trained, is not understood this way.
    if model is None or not failure or failure_at(model, above.data.image_size):
        return ""
    return f"{type(model).__name__} refuses data.image_size={size}: {failure}"


def image_refusal(config: Config, num_classes: int) -> str:
    """Why a network of timm or torchvision refuses the image size; empty where it does not."""
    return _why_not(lambda: check_image_size(config.model, config.data.image_size, num_classes))


def _optimizer_refusal(model: nn.Module | None, config: Config) -> str:
    if model is None:
        return ""
    on_meta = {key: value for key, value in config.optimizer.kwargs.items() if key != "fused"}  # which meta has not
    optimizer = replace(config.optimizer, kwargs=on_meta)
    return _why_not(lambda: build_optimizer(model, optimizer, torch.device("meta")))


def _why_not(check: Callable[[], object]) -> str:
    try:
        check()
    except UserError as error:
        return str(error)
    return ""


def check_recomputation(networks: Networks, config: Config) -> None:
    """Refuse a plan of recomputation that is none, or is one of another network.

    Raises:
        ConfigError: it is.
    """
    if ":" in (value := config.trainer.recompute):
        model = networks.outline(replace(config, trainer=replace(config.trainer, recompute=NONE)))
        plan = Plan.parse(value)
        if model is not None:  # else the dry run finds out
            plan_of(model, str(plan))


def single_sample(config: Config) -> str:
    """Why a network with BatchNorm is not trained with a batch or micro-batch of one; empty for larger ones."""
    used = recipe(config)
    if used.micro_batch_size > 1:
        return ""
    key = "batch_size" if used.batch_size == 1 else "micro_batch_size"
    return (
        f"trainer.{key}=1 leaves BatchNorm a single sample, which has no variance; "
        "use 2 or more, or a model without BatchNorm"
    )


def check_names(ladder: Sequence[Rung[Config]], *, own_model: bool = False) -> None:
    """Refuse networks, unless they are the caller's own, and optimizers that nobody knows, on any rung.

    Raises:
        ConfigError: there are some; all problems of the rungs at once.
        ModelError: it is the network that was asked for.
    """
    checks: list[Callable[[Config], None]] = [lambda config: check_optimizer(config.optimizer)]
    if not own_model:
        checks.insert(0, lambda config: check_name(config.model.name))
        checks.append(partial(check_recomputation, Networks(None, None)))
    problems: dict[str, str] = {}  # what is wrong, and the first rung of which it is: those below inherit it
    for rung, check in itertools.product(ladder, checks):
        if rung is ladder[0]:  # what was asked for: nothing below would be what the user wants
            check(rung.settings)
        elif problem := _why_not(partial(check, rung.settings)):
            problems.setdefault(problem, rung.name)
    refuse_all(f"rung {name!r}: {text}" for text, name in problems.items())
