"""What settings come to in a room, where a plan of recomputation or the batch size is still to be found."""

from __future__ import annotations

import time
from dataclasses import replace

from adaptive_trainer.config.schema import Config
from adaptive_trainer.ladder.batch_size import largest
from adaptive_trainer.ladder.resolve import with_batch_size, with_plan
from adaptive_trainer.models.recomputing.plan import NONE
from adaptive_trainer.models.savers.recompute import AUTO, MOST, PLANNED
from adaptive_trainer.planning.recomputation import Planner
from adaptive_trainer.prediction.estimator import Prediction, Verdict, verdict

SAMPLED = (8, 16)  # batch sizes whose needs show where to look for the largest


def predicted(planner: Planner, config: Config, room: int | None) -> tuple[Config, Prediction]:
    """The settings with a plan for `room` bytes in place of one that is to be found, and what they will need."""
    start = time.perf_counter()
    used = planner.planned(config, room)
    found = planner.predictor.predict(used)
    plan = used.trainer.recompute
    keeps_all = plan == NONE and not used.trainer.offload
    added = None if found.reason else 1.0 if keeps_all else planner.added_time(used)
    seconds = time.perf_counter() - start
    return used, replace(found, seconds=seconds, plan=plan, added_time=added)


def is_enough(asked: Config, found: Prediction, room: int | None) -> bool:
    """Whether a descent ends with what these settings come to, as far as can be predicted."""
    if verdict(found, room) == Verdict.FITS:
        return True
    # A plan that was made for this room is near to it. Where it fails its dry run, training makes one for less.
    is_near = asked.trainer.recompute == AUTO and found.plan != NONE and verdict(found, room) == Verdict.UNSURE
    return is_near and room is not None and (found.min_capacity_bytes or 0) <= room


def largest_batch(planner: Planner, config: Config, capacity: int, most: int) -> tuple[int | None, str]:
    """Find the largest batch size up to `most` that is predicted to need no more than `capacity` bytes.

    Returns:
        The size, 0 where none fits, or None and the reason where it cannot be predicted.
    """
    if config.trainer.recompute in PLANNED:  # whatever fits at all, fits with the plan of least memory
        config = with_plan(config, MOST)

    def found(size: int) -> Prediction:
        return planner.predictor.predict(planner.planned(with_batch_size(config, size), capacity))

    def fits(size: int) -> bool:
        least = found(size).min_capacity_bytes
        return least is not None and least <= capacity

    samples = [found(size) for size in SAMPLED]
    small, large = (each.min_capacity_bytes for each in samples)
    if small is None or large is None:
        return None, next(filter(None, (each.reason for each in samples)), "")
    # Memory grows evenly with the batch, so two sizes show about where the boundary is.
    a_sample = max(1, (large - small) // (SAMPLED[1] - SAMPLED[0]))
    guess = SAMPLED[0] + (capacity - small) // a_sample
    return largest(fits, guess=guess, step=max(1, guess // 100), least=1, most=most) or 0, ""
