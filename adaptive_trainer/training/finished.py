"""What a run that has trained hands to those who tell of it: the screen, the report, trackers."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from PIL.Image import Image
from torchvision.transforms.functional import to_pil_image

from adaptive_trainer.config.schema import Config
from adaptive_trainer.data.datasets import DataSets, MapDataset, described, sample_name
from adaptive_trainer.data.splitting import known_labels, source
from adaptive_trainer.recipe import Recipe
from adaptive_trainer.report.history import History
from adaptive_trainer.report.listeners import Finished
from adaptive_trainer.training.advice import advice
from adaptive_trainer.training.hints import hints
from adaptive_trainer.training.stage import Stage


def finished_by(
    stage: Stage, used: Config, asked: Recipe, history: History, *, is_own_model: bool, is_own_loss: bool
) -> Finished:
    """What the last stage of a run leaves to be told.

    Args:
        used: the settings of the rung that has trained.
        asked: what was asked for.
        history: what was heard of the run.
        is_own_model, is_own_loss: they are the caller's.
    """
    judge, data, root, best = stage.run.judge, stage.run.data, used.data.root, stage.trial.opened.state.best
    trained_on = _by_class(data)
    return Finished(
        classes=data.classes,
        image=partial(_picture, data.val),
        name=partial(sample_name, data.val),
        timeline=partial(judge.timeline, used),
        advice=partial(advice, asked, used, judge),
        source=str(Path(root).expanduser().absolute()) if root else type(source(data.train)[0]).__name__,
        counts=described(data)[0],
        trained_on=trained_on,
        hints=hints(history, trained_on, used, is_own_model=is_own_model, is_own_loss=is_own_loss),
        best=best,
        best_epoch=history.epoch_of(best),
        is_own_model=is_own_model,
    )


def _by_class(data: DataSets) -> list[int]:
    """Training images of each class; none where there is no list of labels, or one of something else."""
    labels = known_labels(data.train)
    if labels is None or labels.min() < 0 or labels.max() >= data.num_classes:
        return []
    counts: list[int] = np.bincount(labels, minlength=data.num_classes).tolist()
    return counts


def _picture(data: MapDataset, index: int) -> Image:
    image = data[index][0]
    return image if isinstance(image, Image) else to_pil_image(image)
