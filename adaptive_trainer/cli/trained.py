"""`task=predict`, `task=evaluate` and `task=export`: what a trained network is used for, on the command line."""

from __future__ import annotations

import heapq
import logging
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from adaptive_trainer.config.overrides import apply_overrides, asked, typed
from adaptive_trainer.config.schema import Config
from adaptive_trainer.config.validate import RUNNING, check
from adaptive_trainer.data.images.folders import evaluates_folder
from adaptive_trainer.inference.evaluate import FILE, Evaluated, evaluate, of_folder, of_settings, write
from adaptive_trainer.inference.export import ABOUT, ONNX, export
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
        log.info("photos: %d, classes: %d\ndevice: %s", len(photos), len(trained.classes), passes.where)
        for found in predictions(passes, photos, trained.classes):
            files.add(found)
            seen.add(found)
    log.info("%s", seen.text())
    log.info("predictions: %s, and %s beside it", nearby(folder / CSV), JSON)
    return math.nan


def run_evaluate(cfg: DictConfig, folder: Path) -> float:
    """Write evaluation.json for a folder of images, or for the data set of the settings; log it in short.

    Raises:
        UserError: a setting, a file or the folder cannot be used, or the network does not know a class.
        LadderExhausted: a single image does not fit.
    """
    trained, config = _loaded(cfg)
    wanted = typed(cfg)
    is_folder = evaluates_folder(wanted.data)
    data, what = of_folder(trained, cfg.data.root) if is_folder else of_settings(trained, wanted)
    with opened(trained, config, log.info) as passes:
        log.info("images: %d of %s\ndevice: %s", len(data), what, passes.where)
        found = evaluate(passes, data, trained.classes, what)
    write(found, folder, trained.path)
    log.info("%s", _evaluated(found))
    log.info("evaluation: %s", nearby(folder / FILE))
    return math.nan


def run_export(cfg: DictConfig, folder: Path) -> float:
    """Write the network as a torch.export program, and as ONNX where that can be, with all that its use needs.

    Raises:
        UserError: the checkpoint or the folder cannot be used, or the network cannot be exported.
    """
    trained = load(cfg.model.weights)
    found = export(trained, folder)
    for name, difference in found.differences.items():
        log.info("%s: its scores are the network's; largest difference %.2g", nearby(folder / name), difference)
    if found.no_onnx:
        log.warning("no %s: %s", ONNX, found.no_onnx)
    log.info("%s: classes and preprocessing", nearby(folder / ABOUT))
    return math.nan


def _evaluated(found: Evaluated) -> str:
    """The lines for people: the classes that fare worst, and what is taken for what."""
    present = sorted((each for each in found.classes if each.images), key=lambda each: each.f1)
    rows = [
        (str(each.images), f"{each.precision:.3f}", f"{each.recall:.3f}", f"{each.f1:.3f}", each.name)
        for each in present[:ROWS]
    ]
    lines = [table([("images", "precision", "recall", "F1", "class"), *rows], left=())]
    if len(present) > ROWS:
        lines.append(f"and {len(present) - ROWS} classes that fare better")
    pairs = [(count, label, answer) for label, answer, count in found.confusion if label != answer]
    lines += [f"{label} taken for {answer}: {count}" for count, label, answer in heapq.nlargest(3, pairs)]
    return "\n".join([*lines, *_broken(found.unreadable), str(found)])


def _broken(unreadable: list[str]) -> list[str]:
    lines = [f"cannot be read, and left out: {name}" for name in unreadable[:ROWS]]
    return [*lines, f"and {len(unreadable) - ROWS} more that cannot be read"] if len(unreadable) > ROWS else lines


def _loaded(cfg: DictConfig) -> tuple[Trained, Config]:
    """The trained network, and the settings of its training with what is typed on top."""
    trained = load(cfg.model.weights)
    # not `data=imagefolder`, which brings the defaults of its group, those of the images too
    wanted = [text for text in asked(cfg).overrides if text.lstrip("+").partition("=")[0] in RUNNING]
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
        if len(self.first) < ROWS:
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
        return "\n".join([*lines, *_broken(self.unreadable)])


def _row(found: Prediction) -> tuple[str, str, str]:
    return found.classes[0], f"{100 * found.probabilities[0]:.1f} %", nearby(Path(found.path))


RUN = {"predict": run_predict, "evaluate": run_evaluate, "export": run_export}
