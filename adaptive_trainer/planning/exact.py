"""What `ladder=exact` would have kept of a request that another ladder has given up."""

from __future__ import annotations

from omegaconf import DictConfig

from adaptive_trainer.config.overrides import apply_overrides, typed
from adaptive_trainer.config.schema import LARGEST, Config
from adaptive_trainer.errors import ConfigError
from adaptive_trainer.ladder.resolve import Refuse, recipe, resolve
from adaptive_trainer.memory.usage import format_bytes
from adaptive_trainer.planning.concrete import is_enough, predicted
from adaptive_trainer.planning.recomputation import Planner
from adaptive_trainer.prediction.estimator import Prediction

NAMED = {"model": "{}", "batch_size": "batch {}", "image_size": "image {}", "precision": "{}"}


def kept(cfg: DictConfig, used: Config | None, planner: Planner, room: int | None, refuse: Refuse) -> str:
    """Say what `ladder=exact` would have kept, in how much memory and at what time; empty where nothing is known.

    Args:
        cfg: what was asked for.
        used: the settings of the rung that fits; None where none does.
        room: bytes that there are.
        refuse: as of `resolve`.
    """
    given_up = _given_up(cfg, used)
    if room is None or not given_up or (found := _first_fit(cfg, planner, room, refuse)) is None:
        return ""
    config, need = found
    time = "" if need.added_time is None or recipe(config).accumulation > 1 else f", {need.added_time:.2g} x the time"
    return f"ladder=exact would keep {given_up} (predicted: {format_bytes(need.min_capacity_bytes or 0)}{time})"


def _given_up(cfg: DictConfig, used: Config | None) -> str:
    if cfg.ladder.exact or cfg.trainer.batch_size == LARGEST:
        return ""
    asked = recipe(typed(cfg))
    differs = [name for name in NAMED if used is None or getattr(recipe(used), name) != getattr(asked, name)]
    return ", ".join(NAMED[name].format(getattr(asked, name)) for name in differs)


def _first_fit(cfg: DictConfig, planner: Planner, room: int, refuse: Refuse) -> tuple[Config, Prediction] | None:
    try:
        ladder = resolve(apply_overrides(cfg, ["ladder=exact"]), refuse=refuse)
    except ConfigError:  # a folder of configs of one's own may have another ladder of this name
        return None
    for rung in ladder:
        if not rung.passed_over:
            config, need = predicted(planner, rung.settings, room)
            if is_enough(rung.settings, need, room):
                return config, need
    return None
