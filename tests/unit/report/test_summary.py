"""What the end of a run says of its best epoch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from adaptive_trainer import Result, compose_config
from adaptive_trainer.config.overrides import typed
from adaptive_trainer.ladder.resolve import recipe
from adaptive_trainer.report.history import History
from adaptive_trainer.report.listeners import Finished
from adaptive_trainer.report.page import Report
from adaptive_trainer.report.summary import summary


def said(folder: Path, scores: list[float], best: float, accuracy: float | None = None) -> tuple[str, str]:
    """The screen's line of the result, and the report, of a run with these val accuracies (by default) by epoch."""
    rows: list[dict[str, Any]] = [
        {"stage": 0, "model": "a", "epoch": number, "val_accuracy": score if accuracy is None else accuracy,
         "val_loss": 1.0 if accuracy is None else -score}
        for number, score in enumerate(scores, start=1)
    ]  # fmt: skip
    history, report = History(), Report(folder)
    for row in rows:
        history.epoch(row, len(rows))
    used = recipe(typed(compose_config()))
    result = Result("trained", "requested", used, used, [], [], rows[-1], [], str(folder))
    picture = Image.new("RGB", (8, 8))
    finished = Finished([], lambda _: picture, str, lambda: None, list, best=best, best_epoch=history.epoch_of(best))
    report.trained(result, finished)
    lines = summary(result, finished, way_on="").splitlines()
    return next(line for line in lines if line.startswith("result")), (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("scores", "best", "accuracy", "line", "epoch"),
    [
        ([0.3, 0.45, 0.45, 0.4], 0.45, None, "val accuracy 40.00 %, best 45.00 % in epoch 2, val loss 1.000",
         "epoch 2"),
        ([0.3, 0.4], 0.45, None, "val accuracy 40.00 %, best 45.00 % in an epoch before this run, val loss 1.000",
         "an epoch before this run"),
        ([-2.0, -1.5, -1.7], -1.5, math.nan, "val loss 1.700, best 1.500 in epoch 2", "epoch 2"),
        ([0.3, 0.4], 0.4, None, "val accuracy 40.00 %, best 40.00 %, val loss 1.000", ""),
    ],
)  # fmt: skip
def test_the_best_epoch_is_named_where_it_is_not_the_last(
    scores: list[float], best: float, accuracy: float | None, line: str, epoch: str, tmp_path: Path
) -> None:
    shown, page = said(tmp_path, scores, best, accuracy)
    assert shown == f"result: {line}"
    assert page.count(" the figures and plots here are of the last epoch, ") == bool(epoch)
    assert f" in {epoch}; the figures" in page or not epoch
