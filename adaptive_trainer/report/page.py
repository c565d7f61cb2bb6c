"""report.html: one file that shows how a run went, and what to try next. The plots are beside it as PNG files too."""

from __future__ import annotations

import base64
import csv
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptive_trainer.recipe import in_words
from adaptive_trainer.report.history import History
from adaptive_trainer.report.listeners import Answers, Finished, Timeline, Wrong
from adaptive_trainer.report.result import OfClass, Result
from adaptive_trainer.report.summary import changed_lines
from adaptive_trainer.utils.files import write_whole

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

PAGE, PLOTS = "report.html", "plots"
MOST_CLASSES = 200  # of the table by class; of more, those with the least F1
THUMBNAIL = 128  # pixels
SHOWN = ("val_accuracy", "val_loss", "test_accuracy", "test_f1")


class Report(History):
    """Hears a run and writes its report at the end, where it has trained."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def trained(self, result: Result, finished: Finished) -> None:
        """Write the report; one that fails is said in a line and fails no training."""
        try:
            self._write(result, finished)
        except (Exception, KeyboardInterrupt) as error:  # what has trained stays so
            log.warning("there is no report: %s: %s", type(error).__name__, str(error).partition("\n")[0])

    def _write(self, result: Result, finished: Finished) -> None:
        from jinja2 import Environment, PackageLoader

        line, matrix = finished.timeline(), confusion(self.last, len(finished.classes))
        pictures = self._pictures(line, matrix, finished.classes)
        folder = self.folder / PLOTS
        folder.mkdir(exist_ok=True)
        for name, picture in pictures.items():
            write_whole(folder / f"{name}.png", picture)
        loader = PackageLoader("adaptive_trainer.report", "")
        page = Environment(loader=loader, autoescape=True).get_template("page.html")
        text = page.render(
            result=result,
            figures=[(name, f"{result.metrics[name]:.3f}") for name in SHOWN if name in result.metrics],
            pictures=[(name, base64.b64encode(picture).decode()) for name, picture in pictures.items()],
            timeline=line,
            missing=_missing(pictures),
            recipe=_compared(result),
            changed=changed_lines(result.changes),
            advice=finished.advice(),
            room=None if self.room is None else round(self.room / 2**20),
            classes=by_class(matrix, finished.classes),
            mistakes=[_mistake(each, finished) for each in (self.last.mistakes if self.last else ())],
            mib=lambda size: "" if size is None else f"{size / 2**20:.0f}",
        )
        write_whole(self.folder / PAGE, text.encode(errors="replace"))  # names of files may hold bytes that are no text

    def _pictures(self, line: Timeline | None, matrix: Any, classes: Sequence[str]) -> dict[str, bytes]:
        from adaptive_trainer.report import plots  # matplotlib takes most of a second to import

        rows = _rows(self.folder / "metrics.csv")
        draw: dict[str, Callable[[], Any]] = {
            "ladder": partial(plots.ladder, self.attempts, self.room),
            "memory": partial(plots.memory, self),
            "loss": partial(plots.loss, rows, self.samples),
            "accuracy": partial(plots.accuracy, rows),
            "throughput": partial(plots.throughput, self.samples),
        }
        if line is not None:
            draw |= {"update": partial(plots.update, line), "peak": partial(plots.peak, line)}
        if matrix is not None:
            draw["confusion"] = partial(plots.confusion, matrix, classes)
        return {name: _png(figure) for name, figure in plots.drawn(draw).items()}


def confusion(answers: Answers | None, classes: int) -> Any:
    """Counts (classes, classes) of labels and answers; None where there are none."""
    if answers is None:
        return None
    matrix = np.zeros((classes, classes), np.int64)
    for (label, answer), count in answers.counts.items():
        matrix[label, answer] = count
    return matrix


def by_class(matrix: Any, classes: Sequence[str]) -> list[OfClass]:
    """Precision, recall and F1 of each class; of many classes those with the least F1."""
    if matrix is None:
        return []
    # Three divisions, where scikit-learn would take a second to import and want each label again.
    right, labels, answers = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    precision, recall = right / np.maximum(answers, 1), right / np.maximum(labels, 1)
    columns = (labels, precision, recall, 2 * right / np.maximum(labels + answers, 1))
    rows = [OfClass(*row) for row in zip(classes, *(column.tolist() for column in columns), strict=True)]
    return rows if len(rows) <= MOST_CLASSES else sorted(rows, key=lambda row: row.f1)[:MOST_CLASSES]


def _rows(path: Path) -> list[Mapping[str, str]]:
    """The epochs, those before a resumption included; none where none was left to train."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _png(figure: Any) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _missing(pictures: Mapping[str, bytes]) -> list[str]:
    said = {
        "memory": "Nothing counts memory on this device, so that there is no plot of it (memory.limit=2GiB does).",
        "update": "The update could not be traced, so that there is no plot of it.",
        "confusion": "Nothing was evaluated by class, so that there is no confusion matrix.",
    }
    return [text for name, text in said.items() if name not in pictures]


def _compared(result: Result) -> list[tuple[str, Any, Any]]:
    asked, used = result.requested.reported(), result.used.reported()
    return [(key, *(in_words(f"trainer.{key}", _short(each[key])) for each in (asked, used))) for key in asked]


def _short(value: Any) -> Any:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else value


def _mistake(wrong: Wrong, finished: Finished) -> dict[str, Any]:
    picture = ""
    with suppress(Exception):  # of the caller's own data set: a sample that cannot be shown
        picture = _thumbnail(finished.image(wrong.index))
    return {
        "picture": picture,
        "name": Path(finished.name(wrong.index)).name,
        "label": finished.classes[wrong.label],
        "answer": finished.classes[wrong.predicted],
        "percent": round(100 * wrong.probability),
    }


def _thumbnail(image: Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    small.save(content, format="jpeg")
    return base64.b64encode(content.getvalue()).decode()
