"""What is said of a network that has not learned, and that nothing is said of one that has."""

from __future__ import annotations

from typing import Any

import pytest

from adaptive_trainer import compose_config
from adaptive_trainer.config.overrides import typed
from adaptive_trainer.report.history import History
from adaptive_trainer.report.listeners import Answers
from adaptive_trainer.training.hints import hints

EVEN = {(label, 0): 50 for label in range(4)}  # 200 images of four classes


def row(epoch: int, train: float = 0.8, val: float = 0.75, loss: float = 1.0, updates: int = 1000) -> dict[str, Any]:
    figures = {"train_accuracy": train, "val_accuracy": val, "train_loss": loss, "val_loss": 1.0}
    return {"stage": 0, "model": "resnet18", "epoch": epoch, "updates": updates * epoch, **figures}


def said(
    *rows: dict[str, Any], overrides: tuple[str, ...] = (), images: int = 500, own: bool = False, own_loss: bool = False
) -> list[str]:
    history = History()
    for each in rows:
        history.epoch(each, len(rows))
    history.answers(Answers(EVEN, []))
    config = typed(compose_config(["model.name=resnet18", f"trainer.epochs={len(rows)}", *overrides]))
    return hints(history, [images] * 4, config, is_own_model=own, is_own_loss=own_loss)


def test_a_network_that_learns_gets_no_advice() -> None:
    assert said(row(1, loss=1.0), row(2, loss=0.8), images=10) == []


def test_no_more_than_the_most_frequent_class() -> None:
    (text,) = said(row(1, train=0.25, val=0.25))
    assert text == (
        "val accuracy 25.0 % is not clearly above the share of the most frequent class, 25.0 %: nothing useful "
        "is learned yet. Try model.pretrained=true trainer.epochs=10"
    )
    assert said(row(1, train=0.3, val=0.255)) != []  # one of 200 images may be chance
    assert said(row(1, train=0.3, val=0.25), row(2, train=0.3, val=0.30, loss=0.9)) == []


def test_a_learning_rate_that_is_far_too_large() -> None:
    broken = {**row(1, train=0.3, val=0.255, loss=2e4), "val_loss": 190216086.0}
    (text,) = said(broken, overrides=("optimizer.lr=1",))
    assert text == (
        "val loss 1.9e+08 is far above that of guessing, 1.39: the learning rate is too large. Try optimizer.lr=0.001 "
        "(now 1)"
    )
    assert "learning rate" not in said(broken, own_loss=True)[0]  # which may count otherwise
    assert said({**row(1, loss=0.1), "val_loss": 20.0}) == []  # a network that has learned


@pytest.mark.parametrize(
    ("overrides", "own"),
    [
        (("model.pretrained=true",), False),
        (("model.weights=best.pt",), False),
        (("model.name=no_such_network",), False),
        ((), True),
    ],
)
def test_pretrained_weights_are_named_where_there_are_some(overrides: tuple[str, ...], own: bool) -> None:
    (text,) = said(row(1, train=0.3, val=0.25), overrides=overrides, own=own)
    assert "pretrained" not in text


def test_a_loss_that_does_not_fall() -> None:
    (text,) = said(row(1, loss=1.2), row(2, loss=1.3))
    assert text == (
        "the training loss has not fallen: 1.200 in epoch 1, 1.300 in epoch 2. Try a lower learning rate, "
        "optimizer.lr=0.0001 (now 0.001)"
    )
    assert said(row(1, loss=1.2, updates=20), row(2, loss=1.3, updates=20)) == []


def test_the_losses_of_two_networks_are_not_compared() -> None:
    assert said(row(1, loss=0.5), {**row(1, loss=1.3), "model": "resnet10t"}) == []


def test_images_that_are_learned_by_heart() -> None:
    (text,) = said(row(1, train=0.99, val=0.6))
    assert text == (
        "training accuracy 99.0 % is far above val accuracy 60.0 %: the network learns the images by heart. Try more "
        "images, or model.pretrained=true data.auto_augment=ta_wide"
    )
    assert said(row(1, train=0.99, val=0.6), overrides=("trainer.ema_decay=0.99",)) == []
    assert said(row(1, train=0.99, val=0.6, updates=20)) == []
    assert said(row(1, train=0.8, val=0.55)) == []  # 200 images say it to 7 % only


def test_few_images_are_named_where_the_network_fares_badly() -> None:
    *_, text = said(row(1, train=0.3, val=0.25), images=12)
    assert text == (
        "half of the classes have 12 training images or fewer, the smallest has 12: more images help the most, then "
        "model.pretrained=true"
    )


def test_nothing_is_said_of_a_run_that_trained_nothing() -> None:
    assert hints(History(), [], typed(compose_config([])), is_own_model=False) == []
