"""report.html: one file that shows how a run went, and what to try next. The plots are beside it as PNG files too."""

from __future__ import annotations

import base64
import csv
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive_trainer.recipe import in_words
from adaptive_trainer.report.classes import by_class, largest_confusions, matrix
from adaptive_trainer.report.history import History
from adaptive_trainer.report.listeners import Answers, Finished, Timeline, Wrong
from adaptive_trainer.report.result import Result
from adaptive_trainer.report.summary import BEST, changed_lines, other_epoch, uses
from adaptive_trainer.utils.files import write_whole
from adaptive_trainer.utils.screen import duration

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

PAGE, PLOTS = "report.html", "plots"
MOST_IN_A_MATRIX = 40  # classes; of more, the largest confusions are listed
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
            self._forget()
            self._write(result, finished)
        except (Exception, KeyboardInterrupt) as error:  # what has trained stays so
            log.warning("there is no report: %s: %s", type(error).__name__, str(error).partition("\n")[0])

    def _forget(self) -> None:
        """Remove the report of an earlier attempt in this folder, which would pass for this one's."""
        for path in (self.folder / PAGE, *(self.folder / PLOTS).glob("*.png")):
            path.unlink(missing_ok=True)

    def _write(self, result: Result, finished: Finished) -> None:
        from jinja2 import Environment, PackageLoader

        line, names, rows = finished.timeline(), finished.classes, _rows(self.folder / "metrics.csv")
        pictures = self._pictures(line, rows, names)
        folder = self.folder / PLOTS
        folder.mkdir(exist_ok=True)
        for name, picture in pictures.items():
            write_whole(folder / f"{name}.png", picture)
        loader = PackageLoader("adaptive_trainer.report", "")
        page = Environment(loader=loader, autoescape=True).get_template("page.html")
        text = page.render(
            result=result,
            figures=[(name, f"{result.metrics[name]:.3f}") for name in SHOWN if name in result.metrics],
            other_epoch=other_epoch(result, finished),
            facts=self._facts(rows, finished),
            hints=finished.hints,
            pictures=[(name, base64.b64encode(picture).decode()) for name, picture in pictures.items()],
            timeline=line,
            missing=_missing(pictures, self.last),
            numbered=_numbered(names) if "confusion" in pictures else [],
            recipe=_compared(result),
            changed=changed_lines(result.changes),
            advice=finished.advice(),
            room=None if self.room is None else round(self.room / 2**20),
            classes=by_class(self.last, names) if self.last else [],
            trained_on=dict(zip(names, finished.trained_on, strict=False)),
            confusions=largest_confusions(self.last, names) if self.last and "confusion" not in pictures else [],
            mistakes=[_mistake(each, finished) for each in (self.last.mistakes if self.last else ())],
            uses=uses(str(self.folder / BEST), is_own_model=finished.is_own_model),
            mib=lambda size: "" if size is None else f"{size / 2**20:.0f}",
        )
        write_whole(self.folder / PAGE, text.encode(errors="replace"))  # names of files may hold bytes that are no text

    def _facts(self, rows: Sequence[Mapping[str, str]], finished: Finished) -> list[tuple[str, str]]:
        """What was trained on what, and when."""
        epochs = {row["stage"]: row["epoch"] for row in rows}  # the last one of each stage
        took = duration(self.clock() - self._began)
        said = [
            ("data", finished.source),
            ("images", finished.counts),
            ("epochs", " + ".join(epochs.values())),
            ("ended", f"{datetime.now():%Y-%m-%d %H:%M}, after {took}"),
            ("folder", str(self.folder)),
        ]
        return [(name, text) for name, text in said if text]

    def _pictures(
        self, line: Timeline | None, rows: Sequence[Mapping[str, str]], classes: Sequence[str]
    ) -> dict[str, bytes]:
        from adaptive_trainer.report import plots  # matplotlib takes most of a second to import

        draw: dict[str, Callable[[], Any]] = {
            "ladder": partial(plots.ladder, self.attempts, self.room),
            "memory": partial(plots.memory, self),
            "loss": partial(plots.loss, rows, self.samples),
            "accuracy": partial(plots.accuracy, rows),
            "throughput": partial(plots.throughput, self.samples),
        }
        if line is not None:
            draw |= {"update": partial(plots.update, line), "peak": partial(plots.peak, line)}
        if self.last is not None and len(classes) <= MOST_IN_A_MATRIX:
            draw["confusion"] = partial(plots.confusion, matrix(self.last, len(classes)), classes)
        return {name: _png(figure) for name, figure in plots.drawn(draw).items()}


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


def _missing(pictures: Mapping[str, bytes], answers: Answers | None) -> list[str]:
    said = {
        "memory": "Nothing counts memory on this device, so that there is no plot of it (memory.limit=2GiB does).",
        "update": "The update could not be traced, so that there is no plot of it.",
    }
    if answers is None:
        said["confusion"] = "Nothing was evaluated by class, so that there is no confusion matrix."
    return [text for name, text in said.items() if name not in pictures]


def _numbered(classes: Sequence[str]) -> list[tuple[str, str]]:
    """What stands for which class in the confusion matrix, where no font can write their names."""
    from adaptive_trainer.report.plots import in_matrix

    written, _ = in_matrix(classes)
    is_numbered = written == [str(number) for number, _ in enumerate(classes, start=1)]
    return [*zip(written, classes, strict=True)] if is_numbered else []


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
        "name": _within(finished.source, finished.name(wrong.index)),
        "label": finished.classes[wrong.label],
        "answer": finished.classes[wrong.predicted],
        "percent": round(100 * wrong.probability),
    }


def _within(folder: str, name: str) -> str:
    """The path of a file below the folder of the data, with the folder of its class."""
    path = Path(name).expanduser().absolute()
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else name


def _thumbnail(image: Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    small.save(content, format="jpeg")
    return base64.b64encode(content.getvalue()).decode()
