"""Which checkpoint a resumed run goes on from, and its settings: the saved ones, with explicit overrides on top."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import count, takewhile
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from adaptive_trainer import checkpoint
from adaptive_trainer.config import CardConfig, Config, OptimizerConfig, apply_overrides
from adaptive_trainer.errors import CheckpointError, override
from adaptive_trainer.ladder import WHOLE, stage_names
from adaptive_trainer.optimizers import kind_of_state
from adaptive_trainer.report import refused_by_disk
from adaptive_trainer.transaction import TrainState

__all__ = [
    "check_data",
    "check_stages",
    "find",
    "is_within",
    "left_by_earlier",
    "load",
    "passed_over",
    "saved_settings",
    "set_aside",
    "take_up",
    "way_on",
]

DAY = re.compile(r"\d{4}-\d\d-\d\d")
LAST = Path("checkpoints", "last.pt")
SETTINGS = "config.yaml"
OF_A_RUN = (LAST.parent, "attempts.jsonl", "metrics.csv", "result.json", SETTINGS)


def find(resume: str | None, output_dir: Path) -> Path | None:
    """The checkpoint that `resume` means; None for a fresh start.

    `auto` is the one in `output_dir`, or of the last run that was set aside there; else, where `output_dir` is
    `ROOT/DATE/TIME`, the newest of all runs in ROOT.
    """
    if resume is None:
        return None
    if resume != "auto":
        return Path(resume).expanduser()
    for folder in (output_dir, *reversed(_set_aside(output_dir))):
        if (own := folder / LAST).exists():
            return own
    saved = [path for path in (run / LAST for run in _runs(output_dir)) if path.exists()]
    return max(saved, key=_modified, default=None)


def passed_over(taken: Path | None, output_dir: Path) -> str:
    """Which run `resume=auto` would have taken, had it left a checkpoint, and why it has none; empty where all is well.

    Args:
        taken: the checkpoint that was found instead.
    """
    since = 0.0 if taken is None else _modified(taken)
    begun = {run: _modified(run / "config.yaml") for run in _runs(output_dir) if not (run / LAST).exists()}
    later = sorted((run for run in begun if begun[run] > since), key=begun.__getitem__)
    if not later or output_dir / LAST == taken:
        return ""
    more = f", and {len(later) - 1} more before it" if len(later) > 1 else ""
    return f"resume=auto: {later[-1]} is passed over{more}: it has left no checkpoint ({_end(later[-1])})"


def is_within(path: Path | None, output_dir: Path) -> bool:
    """Whether a checkpoint is one of the run in `output_dir`, which then goes on."""
    return path is not None and path.resolve().is_relative_to((output_dir / LAST).resolve().parent)


def left_by_earlier(output_dir: Path) -> list[Path]:
    """The files and folders of an earlier run in this folder."""
    return [path for name in OF_A_RUN if (path := output_dir / name).exists()]


def set_aside(output_dir: Path) -> str:
    """Move what an earlier run has left in the folder into one within, so that a fresh start mixes nothing with it.

    A move that was cut short is gone on with: the settings are moved last.

    Returns:
        What was done, in words; empty where there was nothing.

    Raises:
        CheckpointError: it cannot be moved.
    """
    left, earlier = left_by_earlier(output_dir), _set_aside(output_dir)
    if not left:
        return ""
    aside = output_dir / f"earlier-{len(earlier) + 1}"
    if earlier and not any((earlier[-1] / path.name).exists() for path in (output_dir / SETTINGS, *left)):
        aside = earlier[-1]
    with refused_by_disk(lambda problem: CheckpointError(f"cannot move an earlier run to {aside}: {problem}")):
        aside.mkdir(exist_ok=True)
        for path in left:
            path.replace(aside / path.name)
    return f"the earlier run in {output_dir} is kept in {aside.name}"


def _set_aside(output_dir: Path) -> list[Path]:
    """The folders of earlier runs within, the oldest first."""
    return list(takewhile(Path.exists, (output_dir / f"earlier-{number}" for number in count(1))))


def _runs(output_dir: Path) -> list[Path]:
    """The folders of all other trainings in ROOT, where `output_dir` is ROOT/DATE/TIME; a plan is none."""
    here = output_dir.absolute()
    if not DAY.fullmatch(here.parent.name):
        return []
    others = [path.parent for path in here.parent.parent.glob("*/*/config.yaml")]
    return [run for run in others if DAY.fullmatch(run.parent.name) and run != here]


def _modified(path: Path) -> float:
    return path.stat().st_mtime


def _end(run: Path) -> str:
    with suppress(OSError, ValueError, KeyError):
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
        return shorten(f"{result['outcome']}: {result['message']}", 200, placeholder=" ...")
    return "it was killed before the first one, or is still at it"


def load(path: Path) -> dict[str, Any]:
    """The content of a checkpoint that can be trained on.

    Raises:
        CheckpointError: there is none, it is damaged, foreign, or holds only a model.
    """
    content = checkpoint.load(path)
    if "optimizer" not in content:
        raise CheckpointError(f"{path} holds a model only and cannot be trained on; resume from last.pt beside it")
    return content


def check_stages(saved: dict[str, Any], names: Sequence[str]) -> None:
    """Refuse a checkpoint whose stage, or one before it, is none of those with these names.

    Raises:
        CheckpointError: it is.
    """
    phases = OmegaConf.create(saved["request"]).phases.stages
    before = stage_names(phases) or [WHOLE]
    done = saved["stage"] + 1
    if before[:done] != list(names[:done]):
        raise CheckpointError(
            f"the checkpoint is of stage {before[done - 1]}, number {done} of {', '.join(before)}, and the stages are "
            f"{', '.join(names)} now; keep the phases up to there, or start anew with resume=null"
        )


def check_data(saved: dict[str, Any], samples: int, classes: Sequence[str]) -> None:
    """Refuse a checkpoint that was made with another number of training samples, or with other classes.

    Raises:
        CheckpointError: it was.
    """
    advice = "use the same data, or start anew with resume=null"
    if saved["position"]["size"] != samples:
        raise CheckpointError(
            f"the checkpoint was made with {saved['position']['size']} training samples and there are {samples} now; "
            f"{advice}"
        )
    if saved["classes"] != list(classes):
        gone, new = sorted(set(saved["classes"]) - set(classes)), sorted(set(classes) - set(saved["classes"]))
        what = f"gone {gone}, new {new}" if gone or new else "their order"
        raise CheckpointError(f"the classes are others than those of the checkpoint: {what}; {advice}")


def take_up(saved: dict[str, Any], config: Config, state: TrainState, device: torch.device) -> list[str]:
    """Put a checkpoint into the state of a session under `config`.

    Returns:
        What is to be told: where it goes on, and what is otherwise than before.

    Raises:
        CheckpointError: it belongs to another model or optimizer.
    """
    asked, before = asdict(config), saved["config"]
    was, wanted = before["optimizer"], asked["optimizer"]
    with_optimizer = kind_of_state(OptimizerConfig(**was)) == kind_of_state(OptimizerConfig(**wanted))
    checkpoint.unpack(saved, state, device, keep_groups=was != wanted, with_optimizer=with_optimizer)
    told = []
    if not with_optimizer:
        told.append("the optimizer starts anew: what the checkpoint has of it is of another kind")
    told.append(f"resumed at epoch {state.finished_epochs + 1}, update {state.updates}, rung {saved['rung']}")
    if before["seed"] != asked["seed"]:
        told.append(f"seed={asked['seed']} is left out: a resumed run goes on with seed {before['seed']}")
    for group in ("model", "data", "optimizer", "schedule", "trainer"):
        for key, value in asked[group].items():
            if before[group].get(key) != value:
                told.append(f"resumed with another {group}.{key}: {before[group].get(key)} -> {value}")
    return told


def way_on(output_dir: Path) -> str:
    """The overrides with which the run in this folder goes on."""
    is_usual = DAY.fullmatch(output_dir.absolute().parent.name)
    return "resume=auto" if is_usual else f"resume=auto {override('output_dir', output_dir)}"


def saved_settings(cfg: DictConfig, overrides: Sequence[str], output_dir: Path) -> DictConfig:
    """What was asked of the run that is resumed, with `overrides` applied; `cfg` itself where nothing is resumed.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        ConfigError: an override does not suit the saved settings.
    """
    path = find(cfg.resume, output_dir)
    if path is None:
        return cfg
    saved = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(load(path)["request"]))
    saved.card = CardConfig()  # a training has none
    result = apply_overrides(DictConfig(saved), overrides)
    result.resume = cfg.resume
    return result
