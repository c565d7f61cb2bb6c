"""What further options would save, or restore, on the recipe that was trained: predicted, the most useful first."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from adaptive_trainer.config.schema import Config
from adaptive_trainer.errors import override
from adaptive_trainer.ladder.resolve import recipe
from adaptive_trainer.planning.judge import Judge
from adaptive_trainer.recipe import Recipe
from adaptive_trainer.report.listeners import Advice

SECONDS = 1.0  # after which no further option is predicted
RECOMPUTED = {"trainer.recompute": "blocks"}  # which needs no search for a plan
# Each a step that saves, and what it costs.
SAVING: tuple[tuple[Mapping[str, Any], str], ...] = (
    (RECOMPUTED, "the same result, for more time"),
    ({"trainer.recompute": "cheap"}, "the same result, for a little more time"),
    ({"trainer.precision": "bf16"}, "products are rounded to 8 bits; needs an Ampere card or later"),
    ({"trainer.precision": "fp16"}, "products are rounded to 11 bits"),
)


def advice(asked: Recipe, used: Config, judge: Judge) -> list[Advice]:
    """Predict options of a run that has trained with the settings `used`.

    What restores something and fits comes first, then what saves, the most first.
    """
    room, (_, need) = judge.capacity.room(), judge.assess(used)
    if room is None or need is None:
        return []
    until, stepped = time.perf_counter() + SECONDS, _stepped_down(asked, recipe(used))
    found: list[tuple[bool, Advice]] = []
    for restores, changes, effect in (*_restoring(asked, recipe(used)), *_saving(used)):
        settings = _with(used, changes)
        if time.perf_counter() > until or settings == used or judge.refusal(used, settings):
            continue
        then = judge.assess(settings)[1]
        if then is not None and (restores or then < need):
            typed = " ".join(override(key, value) for key, value in {**stepped, **changes}.items())
            found.append((restores and then <= room, Advice(typed, then, need - then, then <= room, effect)))
    return [each for _, each in sorted(found, key=lambda pair: (not pair[0], -pair[1].saves))]


def _stepped_down(asked: Recipe, now: Recipe) -> dict[str, Any]:
    """What has to be typed beside what was asked for, so that the same recipe is trained again."""
    found: dict[str, Any] = {}
    if asked.batch_size != now.batch_size:
        found["trainer.batch_size"] = now.batch_size
    if asked.image_size != now.image_size:
        found["data.image_size"] = now.image_size
    if asked.precision != now.precision:
        found["trainer.precision"] = now.precision
    return found


def _restoring(asked: Recipe, now: Recipe) -> Iterator[tuple[bool, Mapping[str, Any], str]]:
    """Settings that bring back what was asked for, in less memory than it took."""
    if asked.batch_size != now.batch_size:
        whole = {"trainer.batch_size": asked.batch_size, "trainer.micro_batch_size": now.micro_batch_size}
        yield True, whole, f"restores batch {asked.batch_size}, in micro-batches"
    if asked.image_size != now.image_size:
        size = {"data.image_size": asked.image_size, **RECOMPUTED}
        yield True, size, f"restores image {asked.image_size}, for more time"
    if asked.precision != now.precision:
        precision = {"trainer.precision": asked.precision, **RECOMPUTED}
        yield True, precision, f"restores {asked.precision}, for more time"


def _saving(used: Config) -> Iterator[tuple[bool, Mapping[str, Any], str]]:
    """Settings that take less memory, and what each gives up."""
    now = recipe(used)
    for changes, effect in SAVING:
        yield False, changes, effect
    if now.micro_batch_size > 1:
        half = {"trainer.micro_batch_size": now.micro_batch_size // 2}
        yield False, half, "smaller micro-batches, which BatchNorm sees"
    smaller = round(0.8 * now.image_size / 32) * 32
    if 32 <= smaller < now.image_size:
        yield False, {"data.image_size": smaller}, "smaller images, which cost accuracy"


def _with(config: Config, changes: Mapping[str, Any]) -> Config:
    for key, value in changes.items():
        part, _, name = key.partition(".")
        config = replace(config, **{part: replace(getattr(config, part), **{name: value})})
    return config
