"""The phases of a run, one after another: each goes on with the weights of the one before."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from typing import Any, NamedTuple

from omegaconf import DictConfig

from adaptive_trainer.config.overrides import typed
from adaptive_trainer.config.schema import Config
from adaptive_trainer.data.pipeline import worker_deaths_deferred
from adaptive_trainer.errors import LadderExhausted, explained
from adaptive_trainer.ladder.descent import Attempt
from adaptive_trainer.ladder.resolve import changed
from adaptive_trainer.ladder.rung import Rung
from adaptive_trainer.memory.usage import describe_users, in_mib
from adaptive_trainer.training.run import Phase, Run
from adaptive_trainer.training.stage import Stage
from adaptive_trainer.training.trial import Weights

log = logging.getLogger(__name__)


class Done(NamedTuple):
    """The last phase, the rung that it ended on, and name, rung and metrics of every phase."""

    stage: Stage
    rung: Rung[Config]
    phases: list[dict[str, Any]]


def train(phases: Sequence[Phase], run: Run, cfg: DictConfig, saved: dict[str, Any] | None) -> Done:
    """Train every phase; from a checkpoint on, its own and those behind it.

    Args:
        cfg: the settings of the run.
        saved: the checkpoint, or None.

    Raises:
        LadderExhausted: no rung of a phase fits; the message says what to try.
    """
    done: list[dict[str, Any]] = []
    weights, after = None, ""
    first = 0 if saved is None else saved["stage"]
    for number, phase in enumerate(phases[first:], start=first):
        if len(phases) > 1:
            run.record.event(f"stage {phase.name}: {_differences(cfg, typed(phase.settings))}")
        stage = Stage(phase, run, number, saved, weights, after)
        saved = None  # it is large, and the stage lets it go
        rung = _train(stage)
        # on the host, so that the next phase has the whole card; the last one's stay where they are
        weights = Weights.of(stage.trial.opened) if number + 1 < len(phases) else None
        after = phase.name
        done.append({"name": phase.name, "rung": rung.name, "metrics": stage.keeper.metrics})
        if len(phases) > 1:
            log.info("stage %s: trained on rung %s", phase.name, rung.name)
    return Done(stage, rung, done)


def _train(stage: Stage) -> Rung[Config]:
    attempts = stage.run.record.attempts
    earlier = len(attempts)

    def advised(error: LadderExhausted) -> LadderExhausted:
        stage.run.accept()  # it is the memory that is short, and to be recorded
        # other settings do not help against a leak, so the advice is left out where one was seen
        return LadderExhausted(f"{error}\n{stage.leak or _advice(stage, attempts[earlier:])}")

    with explained(advised, (LadderExhausted,)), worker_deaths_deferred(), closing(stage.trial):
        return stage.train()


def _differences(cfg: DictConfig, phase: Config) -> str:
    asked = typed(cfg)
    asked.phases = phase.phases  # a phase has none of its own, which is no difference
    if asked.trainer.channels_last is None and phase.trainer.channels_last:  # as decided for the run
        asked.trainer.channels_last = True
    return ", ".join(f"{key}={value}" for key, value in changed(asked, phase).items()) or "the settings as they are"


def _advice(stage: Stage, attempts: Sequence[Attempt]) -> str:
    capacity = stage.run.parts.capacity
    is_exact, request = stage.phase.settings.ladder.exact, stage.rungs.ladder[0].settings
    exact = "ladder=exact, " if not is_exact and stage.run.judge.may_keep_model(request) else ""
    return (
        f"capacity: {capacity.description}\n{_shortage(stage, attempts)}{describe_users(capacity.device)}\n"
        f"what to try: a larger memory.limit{_enough(stage, attempts)}, closing other programs on the card, "
        f"{exact}ladder=faithful, a smaller model.name, data.image_size or trainer.micro_batch_size"
    )


def _shortage(stage: Stage, attempts: Sequence[Attempt]) -> str:
    """What the last rung that was predicted lacks, as a line; empty where that is not known."""
    room = stage.run.parts.capacity.room()
    known = [entry for entry in attempts if entry.predicted_bytes is not None]
    if not known or room is None or (need := known[-1].predicted_bytes or 0) <= room:
        return ""
    lacking, predicted, there = map(in_mib, (need - room, need, room))
    return f"short of {lacking}: rung {known[-1].rung} is predicted to need {predicted}, and there are {there}\n"


def _enough(stage: Stage, attempts: Sequence[Attempt]) -> str:
    """The least memory that one of these rungs is predicted to fit in, in words; empty where that is not known."""
    room, judge, parted = stage.run.parts.capacity.room(), stage.run.judge, stage.rungs.parting.parted
    names = {entry.rung for entry in attempts if entry.predicted_bytes is not None}  # the others are out for good
    needs = [(judge.needed(parted(rung).settings), rung.name) for rung in stage.rungs.ladder if rung.name in names]
    # A prediction below the room was wrong: the rung has failed in more.
    known = [(need, name) for need, name in needs if need is not None and room is not None and need > room]
    if not known:
        return ""
    need, name = min(known)
    return f" ({-(-need // 2**20)} MiB are predicted to do for rung {name})"
