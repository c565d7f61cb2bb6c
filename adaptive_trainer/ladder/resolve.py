"""Make complete settings of each configured rung, cumulative from the request down. No torch, no device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from typing import Any

from omegaconf import DictConfig, OmegaConf

from adaptive_trainer.config.overrides import apply_overrides, flat, stage_names, typed
from adaptive_trainer.config.schema import EVAL_CROP, LARGEST, Config, TrainerConfig
from adaptive_trainer.config.validate import problems_of
from adaptive_trainer.errors import ConfigError, refuse_all
from adaptive_trainer.ladder.rung import REQUESTED, Change, Rung
from adaptive_trainer.recipe import Recipe, Technique

Refuse = Callable[[str, Config, Config], str]  # of the rung's name and the settings before and after a change
WHOLE = "train"  # the stage of a run without phases
DEFAULT_BATCH = TrainerConfig.batch_size  # what optimizer.lr is for where the batch size is not known beforehand
MICRO_BATCHES = "micro-batches give the gradients of the whole batch, up to rounding"
NOT_ADAPTIVE = ("sgd", "momentum", "nesterov", "lars", "larc")
# What no stage may set.
OF_THE_RUN = (
    "task", "device", "resume", "output_dir", "trackers", "optimized_metric", "card", "phases", "model.weights",
)  # fmt: skip
# The same for all rungs of a stage.
OF_A_STAGE = ("seed", "ladder.rungs", "ladder.exact", "ladder.start", "trainer.channels_last")
# Decided once for all rungs: what is trained on, where, and what becomes of it.
FIXED = (
    *OF_THE_RUN, *OF_A_STAGE, "memory", "model.num_classes", "trainer.tf32", "trainer.deterministic", "data.train",
    "data.val", "data.test", "data.root", "data.cache",
)  # fmt: skip

TECHNIQUES = tuple(f"trainer.{each.name}" for each in fields(TrainerConfig) if "technique" in each.metadata)
# What changes how an update is computed, and not what: bit for bit, micro-batches up to rounding.
KEEPS_MATHEMATICS = (*TECHNIQUES, "trainer.micro_batch_size", "trainer.eval_batch_size", "data.num_workers")


def recipe(config: Config) -> Recipe:
    """The recipe of complete settings, with the derived sizes filled in.

    Raises:
        ConfigError: the batch size is still to be found.
    """
    trainer = config.trainer
    if trainer.batch_size == LARGEST:
        raise ConfigError(
            f"trainer.batch_size={LARGEST} is found by training or planning a ladder; here, give a number"
        )
    micro = min(trainer.micro_batch_size or trainer.batch_size, trainer.batch_size)
    return Recipe(
        model=config.model.name,
        image_size=config.data.image_size,
        batch_size=trainer.batch_size,
        micro_batch_size=micro,
        eval_batch_size=trainer.eval_batch_size or micro,
        precision=trainer.precision,
        techniques=tuple(_techniques(trainer)),
        optimizer=config.optimizer.name,
        lr=config.optimizer.lr,
        num_workers=config.data.num_workers,
        tf32=trainer.tf32,
        clip_grad=trainer.clip_grad,
        channels_last=bool(trainer.channels_last),
        num_classes=config.model.num_classes or 0,
        shares=tuple(trainer.shares) if isinstance(trainer.shares, list) else (),  # `memory` is for training to decide
    )


def _techniques(trainer: TrainerConfig) -> Iterator[Technique]:
    for setting in fields(trainer):
        if texts := setting.metadata.get("technique"):
            yield Technique(setting.name, getattr(trainer, setting.name), *texts)


def stored_size(requests: Iterable[Config]) -> int:
    """Height and width at which `data.cache` stores images for these requests, one a stage; 0 where none does.

    An evaluation at the largest image size that is asked for then takes a centre crop of stored pixels.
    """
    sizes = [round(asked.data.image_size / EVAL_CROP) for asked in requests if asked.data.cache != "none"]
    return max(sizes, default=0)


def resolve(
    cfg: DictConfig, batch_size: int = DEFAULT_BATCH, why: str = "", refuse: Refuse | None = None
) -> tuple[Rung[Config], ...]:
    """Complete settings for the request and for each configured rung, in order.

    An override that would raise what was asked for, or that the network refuses, is left out of its rung and of all
    below. A rung of which nothing is left is passed over. Both have their reason. The learning rate follows the batch
    size by `trainer.lr_policy`.

    Args:
        cfg: the settings.
        batch_size: what stands for `trainer.batch_size=max`; `optimizer.lr` is then for the default batch size.
        why: the reason for that number.
        refuse: says why a network does not take a change ("" where it does). A rung whose overrides are refused as a
            whole is asked about one by one.

    Raises:
        ConfigError: one message with every problem of the request and of all rungs; there is no rung `ladder.start`.
    """
    asked = typed(cfg)
    of_request = problems_of(asked)
    # Problems are gathered, so that one run shows them all.
    if not isinstance(asked.trainer.batch_size, int):
        refuse_all(of_request)  # no rung can be compared with it
    problems = list(of_request)
    is_found = asked.trainer.batch_size == LARGEST
    said = [f"batch size {LARGEST} -> {batch_size}: {why}"] if is_found else []
    if is_found:  # the learning rate was chosen without knowing the number: it is scaled from the default's
        asked = with_batch_size(asked, DEFAULT_BATCH)
        cfg = apply_overrides(cfg, [f"trainer.batch_size={batch_size}"])
    config = typed(cfg)
    ladder = [_following(Rung(REQUESTED, config, notes=tuple(said)), asked)]
    follows = True  # until a rung sets the learning rate itself
    for number, rung in enumerate(asked.ladder.rungs, start=1):
        name = rung.name or f"rung-{number}"
        try:
            cfg, config, kept, notes = _step(cfg, config, rung.overrides, refuse and partial(refuse, name))
            # A rung inherits what is wrong with the request, which is reported once.
            refuse_all([problem for problem in problems_of(config) if problem not in of_request])
        except ConfigError as error:
            problems.append(f"rung {name!r}: {error}")
            continue
        follows = follows and not any(_sets_lr(text) for text in kept)
        passed_over = "" if kept else "; ".join(notes) or "it sets nothing"
        found = said if is_found and config.trainer.batch_size == batch_size else []
        notes = [*found, *notes, *_rounding(asked, config)]
        made = Rung(name, config, tuple(kept), passed_over, tuple(notes))
        ladder.append(_following(made, asked) if follows and not of_request else made)
    refuse_all([*problems, *_twice("rung", [rung.name for rung in ladder])])
    return _from(asked.ladder.start, ladder)


def _from(start: str | None, ladder: Sequence[Rung[Config]]) -> tuple[Rung[Config], ...]:
    """The ladder with the rungs above `start` passed over."""
    names = [rung.name for rung in ladder]
    if start is not None and start not in names:
        raise ConfigError(f"ladder.start={start} is no rung of this ladder, which has {', '.join(names)}")
    above = 0 if start is None else names.index(start)
    passed = [replace(rung, passed_over=rung.passed_over or f"ladder.start={start}") for rung in ladder[:above]]
    return (*passed, *ladder[above:])


def _twice(what: str, names: Sequence[str]) -> list[str]:
    return [f"{what} name {name!r} is used twice" for name in sorted(set(names)) if names.count(name) > 1]


def stages(cfg: DictConfig) -> list[tuple[str, DictConfig]]:
    """The names and settings of the configured stages; one with the name `WHOLE` where there are none.

    Raises:
        ConfigError: a stage sets what cannot be set, or has the name of another.
    """
    phases = list(cfg.phases.stages)
    if not phases:
        return [(WHOLE, cfg)]
    names = stage_names(phases)
    found = [apply_overrides(cfg, phase.overrides) for phase in phases]
    asked, first = typed(cfg), typed(found[0])
    problems = _twice("stage", names)
    for name, settings in zip(names, map(typed, found), strict=True):
        fixed = [key for key in changed(asked, settings) if key.startswith(OF_THE_RUN)]
        # The first stage may set what is then the same for all.
        fixed += [key for key in changed(first, settings) if key.startswith(FIXED) and key not in OF_A_STAGE]
        if fixed := list(dict.fromkeys(fixed)):
            problems.append(
                f"stage {name!r}: {', '.join(fixed)} cannot change between stages; set it for the whole run"
            )
    refuse_all(problems)
    return list(zip(names, found, strict=True))


def with_batch_size(config: Config, batch_size: int) -> Config:
    """The same settings with another batch size."""
    return replace(config, trainer=replace(config.trainer, batch_size=batch_size))


def with_plan(config: Config, plan: str) -> Config:
    """The same settings with another plan of recomputation."""
    return replace(config, trainer=replace(config.trainer, recompute=plan))


def with_shares(config: Config, shares: str | list[int]) -> Config:
    """The same settings with other shares of the ranks."""
    return replace(config, trainer=replace(config.trainer, shares=shares))


def without_savers(config: Config) -> Config:
    """The same settings with all activations kept on the device."""
    return replace(config, trainer=replace(config.trainer, recompute="none", offload=False))


def _following(rung: Rung[Config], asked: Config) -> Rung[Config]:
    """The rung with the learning rate of its batch size."""
    lr, why = scaled_lr(asked, rung.settings.trainer.batch_size)
    settings = replace(rung.settings, optimizer=replace(rung.settings.optimizer, lr=lr))
    return replace(rung, settings=settings, notes=(*rung.notes, why) if why else rung.notes)


def _step(
    cfg: DictConfig, config: Config, overrides: list[str], refuse: Callable[[Config, Config], str] | None
) -> tuple[DictConfig, Config, list[str], list[str]]:
    """`cfg`, and `config` that says the same, one rung down; the overrides that were kept, and why others were not."""
    if len(overrides) > 1:
        apply_overrides(cfg, overrides)  # all problems of the rung at once
    if refuse is not None:
        # First together: of a smaller network and its image size, each alone may be refused.
        whole = _step(cfg, config, overrides, None)
        if not (reason := refuse(config, whole[1])):
            return whole
        if config.ladder.exact:  # a part of the rung alone may be no step down
            return cfg, config, [], [f"{', '.join(overrides)} is left out: {reason}"]
    kept, notes = [], []
    for text in overrides:
        candidate = _clamped(apply_overrides(cfg, [text]))
        settings = typed(candidate)
        if not isinstance(settings.trainer.batch_size, int):
            raise ConfigError(f"{text!r}: the batch size of a rung is a whole number above 0")
        differing = changed(config, settings)
        if fixed := [key for key in differing if key.startswith(FIXED)]:
            raise ConfigError(f"{text!r}: {', '.join(fixed)} cannot change on the way down; set it for the whole run")
        reason = _inexact(differing) if config.ladder.exact else ""
        reason = reason or ("" if differing else "it is so already, or comes to the same")
        reason = reason or recipe(config).no_step_down_to(recipe(settings))
        if not reason and refuse is not None:
            reason = refuse(config, settings)
        if reason:
            notes.append(f"{text} is left out: {reason}")
        else:
            cfg, config = candidate, settings
            kept.append(text)
    return cfg, config, kept, notes


def _rounding(asked: Config, config: Config) -> list[str]:
    is_split = config.trainer.micro_batch_size != asked.trainer.micro_batch_size
    return [MICRO_BATCHES] if config.ladder.exact and is_split else []


def _inexact(differing: Iterable[str]) -> str:
    """Why a change of these settings is none for `ladder.exact`; empty where it is one."""
    others = [key for key in differing if key not in KEEPS_MATHEMATICS]
    return f"it would change what is computed ({', '.join(others)}), and ladder.exact keeps that" if others else ""


def changed(before: Config, after: Config) -> dict[str, Any]:
    """The settings of `after` that differ, by their full names; None for one that is gone."""
    old, new = ({k: v for k, v in flat(asdict(each)).items() if v != {}} for each in (before, after))
    return {key: new.get(key) for key in {**old, **new} if _differ(old.get(key), new.get(key))}


def _differ(before: Any, after: Any) -> bool:
    return bool(before != after) and not (before != before and after != after)  # NaN is what it is


def _clamped(cfg: DictConfig) -> DictConfig:
    # A smaller batch takes a larger micro-batch down with it, which would be refused.
    batch, micro = cfg.trainer.batch_size, cfg.trainer.micro_batch_size
    if micro is not None and isinstance(batch, int) and micro >= batch:
        OmegaConf.update(cfg, "trainer.micro_batch_size", None)
    return cfg


def _sets_lr(override: str) -> bool:
    return override.lstrip("+").startswith(("optimizer.lr=", "optimizer=", "preset="))


def scaled_lr(asked: Config, batch_size: int) -> tuple[float, str]:
    """The learning rate at another batch size by `trainer.lr_policy`, and why."""
    lr, asked_batch, policy = asked.optimizer.lr, asked.trainer.batch_size, asked.trainer.lr_policy
    if batch_size == asked_batch or policy == "none":
        why = f"learning rate stays {lr:g}: trainer.lr_policy=none" if batch_size != asked_batch else ""
        return lr, why
    rule = policy
    if policy == "auto":
        rule = "linear" if asked.optimizer.name.lower().startswith(NOT_ADAPTIVE) else "sqrt"
    ratio = batch_size / asked_batch
    # SGD: Goyal et al., 2017, arXiv 1706.02677. Adaptive optimizers: Malladi et al., 2022, arXiv 2205.10287.
    used = lr * (ratio if rule == "linear" else math.sqrt(ratio))
    return used, f"learning rate {lr:g} -> {used:.3g}: {rule} rule for batch size {asked_batch} -> {batch_size}"


def changes(asked: Config, rung: Rung[Config], above: str = "") -> list[Change]:
    """Every setting of `rung` that differs from the request, with the reason; `above`: what became of those above."""
    old = flat(asdict(asked))
    used = changed(asked, rung.settings)
    return [Change(key, old.get(key), value, _reason(key, rung, above)) for key, value in used.items()]


def _reason(key: str, rung: Rung[Config], above: str) -> str:
    # What was decided of these is in the notes, by its first words.
    about = {
        "optimizer.lr": "learning rate ",
        "trainer.batch_size": f"batch size {LARGEST} ",
        "trainer.micro_batch_size": MICRO_BATCHES,
        "trainer.recompute": "recomputation ",
        "trainer.shares": "shares ",
    }.get(key)
    noted = (note for note in rung.notes if about is not None and note.startswith(about))
    return next(noted, f"rung {rung.name} is used" + (f"; {above}" if above else ""))
