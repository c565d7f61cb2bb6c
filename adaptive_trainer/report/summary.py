"""The end of a run on the screen: the rungs tried, what came of it, where everything is, what to type next."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from adaptive_trainer.errors import override
from adaptive_trainer.ladder.descent import Attempt, Outcome
from adaptive_trainer.ladder.rung import Change
from adaptive_trainer.recipe import in_words
from adaptive_trainer.report.lines import brief
from adaptive_trainer.report.listeners import Finished
from adaptive_trainer.report.result import Result
from adaptive_trainer.utils.launch import COMMAND, command
from adaptive_trainer.utils.screen import log_file, nearby
from adaptive_trainer.utils.tables import table

BEST = Path("checkpoints", "best.pt")  # in the folder of a run


def rung_table(attempts: Sequence[Attempt]) -> str:
    """A table of the rungs tried, with sizes in MiB; the reason is told where it is no prediction."""
    rows: list[Sequence[str]] = [("rung", "outcome", "predicted", "peak", "reserved", "seconds", "reason")]
    for entry in attempts:
        is_foretold = entry.outcome == Outcome.SKIPPED and entry.predicted_bytes is not None
        reason = "" if is_foretold else brief(": ".join(filter(None, [entry.phase, entry.reason])))
        sizes = (entry.predicted_bytes, entry.peak_allocated_bytes, entry.peak_reserved_bytes)
        took = "-" if entry.outcome == Outcome.SKIPPED else f"{entry.seconds:.2f}"
        rows.append((entry.rung, entry.outcome, *map(_mib, sizes), took, reason))
    return table(rows, left=(0, 1))


def _mib(size: int | None) -> str:
    return f"{size / 2**20:.0f}" if size else "-"  # a rung that was skipped, or a CPU without a limit


def changed_lines(changes: Sequence[Change]) -> list[str]:
    """The settings that differ from what was asked for, those of one reason together."""
    by_reason: dict[str, list[str]] = {}
    for change in changes:
        rule = re.sub(r"^learning rate \S+ -> \S+: ", "", change.why)  # which is being said
        text = f"{change.key} {short(change.key, change.asked)} -> {short(change.key, change.used)}"
        by_reason.setdefault(rule, []).append(text)
    return [f"changed: {', '.join(texts)} ({reason})" for reason, texts in by_reason.items()]


def short(key: str, value: object) -> str:
    """The value of a setting for people."""
    return f"{value:.3g}" if isinstance(value, float) else str(in_words(key, value))


def uses(model: str, *, is_own_model: bool) -> list[tuple[str, str]]:
    """What to type to use the trained model at this path: a few words, and the line."""
    if is_own_model:  # a checkpoint holds weights, never code
        return [("use it", f"load_model({model!r}, your_factory)")]
    predict = f"{COMMAND} task=predict data.root=FOLDER {override('model.weights', model)}"
    return [("use it", f"load_model({model!r})"), ("predict", predict)]


def summary(result: Result, finished: Finished, *, way_on: str, kept: str = "") -> str:
    """The end of a run that has trained.

    Args:
        way_on: overrides with which the command line trains on; empty where it cannot.
        kept: what `ladder=exact` would have kept, in words; empty where it is not known.
    """
    folder = Path(result.output_dir)
    log = log_file()
    model = nearby(folder / BEST)
    lines = [rung_table(result.attempts)] if len(result.attempts) > 1 else []
    lines += [f"trained on rung {result.rung}: {result.used}", *_metrics(result, finished)]
    lines += [*changed_lines(result.changes), *filter(None, [kept])]
    lines += [f"best model: {model}", f"record: {nearby(folder / 'result.json')}"]
    if log is not None:  # the library writes none, the command line does
        lines.append(f"log: {nearby(log)}")
    lines += [f"{what}: {typed}" for what, typed in uses(model, is_own_model=finished.is_own_model)]
    if way_on:
        lines.append(f"train on: {command()} {way_on}")
    if (folder / "report.html").exists():
        lines.append(f"report: {nearby(folder / 'report.html')}")
    lines += [f"advice: {hint}" for hint in finished.hints]
    return "\n".join(lines)


def _metrics(result: Result, finished: Finished) -> list[str]:
    accuracy, loss = (result.metrics.get(name, math.nan) for name in ("val_accuracy", "val_loss"))
    if not (best := _best(result, finished)):
        return []
    if math.isnan(accuracy):
        return [f"result: val loss {loss:.3f}, best {best}"]
    return [f"result: val accuracy {100 * accuracy:.2f} %, best {best}, val loss {loss:.3f}"]


def _best(result: Result, finished: Finished) -> str:
    """What best.pt has reached, and in which epoch where that is not the last; empty where nothing was trained."""
    best, epoch = finished.best, finished.best_epoch
    if best is None or "val_loss" not in result.metrics:
        return ""
    is_scored = not math.isnan(result.metrics.get("val_accuracy", math.nan))
    reached = f"{100 * best:.2f} %" if is_scored else f"{-best:.3f}"  # the greatest score is the least loss
    return reached if epoch == result.metrics["epoch"] else f"{reached} in {_epoch(epoch)}"


def _epoch(number: int | None) -> str:
    return "an epoch before this run" if number is None else f"epoch {number}"


def other_epoch(result: Result, finished: Finished) -> str:
    """That best.pt is of another epoch than the figures of a run; empty where it is of the same."""
    epoch, last = finished.best_epoch, result.metrics.get("epoch")
    if last in (None, epoch) or not (best := _best(result, finished)):
        return ""
    return f"best.pt: {best}; the figures and plots here are of the last epoch, {last}"
