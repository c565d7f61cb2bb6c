"""What to try where a network has not learned, by the figures of the run; nothing is said where they look well."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from adaptive_trainer.config.schema import Config, OptimizerConfig
from adaptive_trainer.models.zoo import has_pretrained_weights
from adaptive_trainer.report.history import History
from adaptive_trainer.report.listeners import Answers

FAR = 10  # times the loss of guessing: no network that has learned comes to it
LARGE_GAP = 0.2  # of training above validation accuracy
SETTLED = 50  # updates after which a loss is no chance, and BatchNorm evaluates by means that have followed
FEW_IMAGES = 50  # of a class
PRETRAINED = "model.pretrained=true"


def hints(
    history: History, trained_on: Sequence[int], config: Config, *, is_own_model: bool, is_own_loss: bool = False
) -> list[str]:
    """What to try, each in a line; nothing where no epoch was trained.

    Args:
        history: what was heard of the run.
        trained_on: training images of each class; empty where they are not known.
        config: the settings that trained.
        is_own_model, is_own_loss: made by the caller: weights are not known, or what the loss counts.
    """
    rows = _of_last_network(history.epochs)
    if not rows or history.last is None:
        return []
    begins_anew = not (is_own_model or config.model.pretrained or config.model.weights)
    pretrained = [PRETRAINED] if begins_anew and has_pretrained_weights(config.model.name) else []
    if not is_own_loss and (too_large := [*_too_large(rows[-1], history.last, config)]):
        return too_large  # the other figures say nothing then
    by_heart = [*_by_heart(rows, history.last, config, pretrained)]
    learned = by_heart or _learned_nothing(rows, history.last, config, pretrained)
    found = [*learned, *_loss_stays(rows, config)]
    return [*found, *(_few_images(trained_on, pretrained) if found else ())]


def _of_last_network(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if (row["stage"], row["model"]) == (rows[-1]["stage"], rows[-1]["model"])]


def _too_large(last: dict[str, Any], answers: Answers, config: Config) -> Iterator[str]:
    guessing = math.log(max(2, len({label for label, _ in answers.counts})))  # the cross entropy of equal scores
    if last["train_loss"] > guessing and last["val_loss"] > FAR * guessing:
        rate = config.optimizer.lr
        yield (
            f"val loss {last['val_loss']:.3g} is far above that of guessing, {guessing:.2f}: the learning rate is too "
            f"large. Try optimizer.lr={min(rate / 10, OptimizerConfig().lr):.3g} (now {rate:.3g})"
        )


def _learned_nothing(
    rows: Sequence[dict[str, Any]], answers: Answers, config: Config, pretrained: list[str]
) -> Iterator[str]:
    images = Counter[int]()
    for (label, _), count in answers.counts.items():
        images[label] += count
    most, best = max(images.values()) / images.total(), max(row["val_accuracy"] for row in rows)
    chance = math.sqrt(most * (1 - most) / images.total())  # the binomial standard error of that share
    if best <= most + chance:
        longer = f"trainer.epochs={max(10, 2 * config.trainer.epochs)}"
        yield (
            f"val accuracy {_percent(best)} is not clearly above the share of the most frequent class, "
            f"{_percent(most)}: nothing useful is learned yet. Try {' '.join([*pretrained, longer])}"
        )


def _loss_stays(rows: Sequence[dict[str, Any]], config: Config) -> Iterator[str]:
    first, last, rate = rows[0], rows[-1], config.optimizer.lr
    if last["updates"] - first["updates"] >= SETTLED and last["train_loss"] >= first["train_loss"]:
        yield (
            f"the training loss has not fallen: {first['train_loss']:.3f} in epoch {first['epoch']}, "
            f"{last['train_loss']:.3f} in epoch {last['epoch']}. Try a lower learning rate, "
            f"optimizer.lr={rate / 10:.3g} (now {rate:.3g})"
        )


def _by_heart(rows: Sequence[dict[str, Any]], answers: Answers, config: Config, pretrained: list[str]) -> Iterator[str]:
    last, images = rows[-1], sum(answers.counts.values())
    # a moving average lags behind in its first epochs; of few images a share is known to 1 / sqrt(images) only
    can_compare = last["updates"] >= SETTLED and config.trainer.ema_decay is None
    if can_compare and last["train_accuracy"] - last["val_accuracy"] > LARGE_GAP + 1 / math.sqrt(images):
        can_augment = config.data.transforms == "torchvision" and config.data.cache == "none"
        augment = ["data.auto_augment=ta_wide"] if can_augment and not config.data.auto_augment else []
        tries = " ".join([*pretrained, *augment])
        yield (
            f"training accuracy {_percent(last['train_accuracy'])} is far above val accuracy "
            f"{_percent(last['val_accuracy'])}: the network learns the images by heart. Try more images"
            f"{f', or {tries}' if tries else ''}"
        )


def _few_images(trained_on: Sequence[int], pretrained: list[str]) -> Iterator[str]:
    present = [count for count in trained_on if count]
    if present and np.median(present) < FEW_IMAGES:
        yield (
            f"half of the classes have {int(np.median(present))} training images or fewer, the smallest has "
            f"{min(present)}: more images help the most{f', then {PRETRAINED}' if pretrained else ''}"
        )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
