"""Which checkpoint a resumed run goes on from, and its settings: the saved ones, with explicit overrides on top."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from adaptive_trainer import checkpoint
from adaptive_trainer.config import Config, apply_overrides
from adaptive_trainer.errors import CheckpointError

__all__ = ["find", "load", "saved_settings"]

DAY = re.compile(r"\d{4}-\d\d-\d\d")


def find(resume: str | None, output_dir: Path) -> Path | None:
    """The checkpoint that `resume` means; None for a fresh start.

    `auto` is the one in `output_dir`; else, where `output_dir` is `ROOT/DATE/TIME`, the newest of all runs in ROOT.
    """
    if resume is None:
        return None
    if resume != "auto":
        return Path(resume)
    own = output_dir / "checkpoints" / "last.pt"
    if own.exists() or not DAY.fullmatch(output_dir.absolute().parent.name):
        return own if own.exists() else None
    others = output_dir.absolute().parent.parent.glob("*/*/checkpoints/last.pt")
    return max((path for path in others if DAY.fullmatch(path.parts[-4])), key=_modified, default=None)


def _modified(path: Path) -> float:
    return path.stat().st_mtime


def load(path: Path) -> dict[str, Any]:
    """The content of a checkpoint that can be trained on.

    Raises:
        CheckpointError: there is none, it is damaged, foreign, or holds only a model.
    """
    content = checkpoint.load(path)
    if "optimizer" not in content:
        raise CheckpointError(f"{path} holds a model only and cannot be trained on; resume from last.pt beside it")
    return content


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
    result = apply_overrides(DictConfig(saved), overrides)
    result.resume = str(path)
    return result
