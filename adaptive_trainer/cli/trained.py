"""`task=predict`, `task=evaluate` and `task=export`: what a trained network is used for, on the command line."""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from adaptive_trainer.config.overrides import apply_overrides, asked, typed
from adaptive_trainer.config.schema import Config
from adaptive_trainer.config.validate import check
from adaptive_trainer.inference.model import Trained, load
from adaptive_trainer.inference.passes import opened
from adaptive_trainer.inference.predict import CSV, JSON, TOP, Files, Prediction, photos_of, predictions
from adaptive_trainer.utils.screen import nearby
from adaptive_trainer.utils.tables import table

log = logging.getLogger(__name__)

ROWS = 10  # of what is listed on the screen


def run_predict(cfg: DictConfig, folder: Path) -> float:
    """Write predictions.csv and predictions.json for the photos of `data.root`, and log what was found in short.

    Raises:
        UserError: a setting, a file or the folder cannot be used.
        LadderExhausted: a single image does not fit.
    """
    trained, config = _loaded(cfg)
    photos = photos_of(str(cfg.data.root))
    seen = Seen()
    count = min(TOP, len(trained.classes))
    with opened(trained, config, log.info) as passes, Files(folder, trained.path, count) as files:
        log.info("%d photos, %d classes, %s", len(photos), len(trained.classes), passes.where)
        for found in predictions(passes, photos, trained.classes):
            files.add(found)
            seen.add(found)
    log.info("%s", seen.text())
    log.info("predictions: %s, and %s beside it", nearby(folder / CSV), JSON)
    return math.nan


def _loaded(cfg: DictConfig) -> tuple[Trained, Config]:
    """The trained network, and the settings of its training with what is typed on top."""
    trained = load(cfg.model.weights)
    wanted = [text for text in asked(cfg).overrides if text.lstrip("+").partition("=")[0] not in ("task", "data")]
    # a group (`data=imagefolder`) is left out: it would bring its defaults, those of the images too
    saved = OmegaConf.structured(trained.config)
    config = typed(
        apply_overrides(saved, ["trainer.eval_batch_size=null", "memory.limit=null", "device=auto", *wanted])
    )
    check(config)
    return trained, config


@dataclass
class Seen:
    """What is shown of predictions: each of a few photos, of many how many show which class."""

    first: list[Prediction] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)

    def add(self, found: Prediction) -> None:
        """Note a photo."""
        if not found.classes:
            self.unreadable.append(found.path)
            return
        self.counts[found.classes[0]] += 1
        if len(self.first) <= ROWS:
            self.first.append(found)

    def text(self) -> str:
        """The lines for people."""
        total = self.counts.total()
        if total > ROWS:
            most = self.counts.most_common(ROWS)
            rows = [(str(number), f"{100 * number / total:.1f} %", name) for name, number in most]
            lines = [table([("photos", "share", "class"), *rows])]
            if (more := len(self.counts) - ROWS) > 0:
                lines.append(f"and {more} more classes")
        else:
            lines = [table([("class", "sure", "photo"), *map(_row, self.first)])] if self.first else []
        broken = [f"cannot be read, and left out: {name}" for name in self.unreadable[:ROWS]]
        if (more := len(self.unreadable) - ROWS) > 0:
            broken.append(f"and {more} more that cannot be read")
        return "\n".join([*lines, *broken])


def _row(found: Prediction) -> tuple[str, str, str]:
    return found.classes[0], f"{100 * found.probabilities[0]:.1f} %", nearby(Path(found.path))


RUN = {"predict": run_predict}
