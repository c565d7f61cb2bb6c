"""The plots of a report, by matplotlib and without pyplot, which would look for a screen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from adaptive_trainer.ladder.descent import Attempt
from adaptive_trainer.report.history import History
from adaptive_trainer.report.listeners import Sample, Timeline

MiB = 2**20
SIZE = (5.2, 3.3)  # inches: on a narrow screen, which shows it at two thirds, letters can still be read
BLUE, ORANGE, RED, GREY = "#2b6cb0", "#dd6b20", "#c53030", "#a0aec0"
MOST_CLASSES = 40  # of a confusion matrix that can be looked at
BINS = 100  # of throughput

Row = Mapping[str, Any]


def ladder(attempts: Sequence[Attempt], room: int | None) -> Figure | None:
    """Predicted need and measured peak of each rung, and the limit as a line; None where nothing is known."""
    known = [entry for entry in attempts if entry.predicted_bytes or entry.peak_reserved_bytes]
    if not known:
        return None
    figure, axes = _axes(height=max(2.2, 0.9 + 0.42 * len(known)))
    places = np.arange(len(known))[::-1]
    bars = ((0.2, "predicted", BLUE, "predicted_bytes"), (-0.2, "measured peak", ORANGE, "peak_reserved_bytes"))
    for offset, label, colour, name in bars:
        sizes = [(getattr(entry, name) or 0) / MiB for entry in known]
        axes.barh(places + offset, sizes, 0.38, label=label, color=colour)
    if room is not None:
        axes.axvline(room / MiB, color=RED, linestyle="--", label="limit")
    axes.set_yticks(places, [f"{entry.rung} ({entry.outcome})" for entry in known])
    axes.set(xlabel="MiB, reserved by the allocator", title="The ladder")
    return _with_legend(figure)


def memory(history: History) -> Figure | None:
    """Memory over time, with the moments when it ran out; None where nothing counts it."""
    seen = [(at, each) for at, each in history.samples if each.reserved]
    if not seen:
        return None
    figure, axes = _axes()
    times = [at for at, _ in seen]
    dots = "." if len(seen) < 30 else ""
    axes.plot(times, [each.reserved / MiB for _, each in seen], label="reserved", color=BLUE, marker=dots)
    axes.plot(times, [each.allocated / MiB for _, each in seen], label="in tensors", color=ORANGE, marker=dots)
    if history.out_of_memory:
        at, peak = zip(*history.out_of_memory, strict=True)
        axes.plot(at, np.array(peak) / MiB, "x", color=RED, markersize=9, label="out of memory")
    if history.room is not None:
        axes.axhline(history.room / MiB, color=RED, linestyle="--", label="limit")
    axes.set(xlabel="seconds", ylabel="MiB", title="Memory between updates", ylim=(0, None))
    return _with_legend(figure)


def update(line: Timeline) -> Figure:
    """The memory of one update over its operators."""
    figure, axes = _axes()
    at = np.linspace(0, line.operators, len(line.live))
    values = np.array(line.live) / MiB
    axes.fill_between(at, values, color=BLUE, alpha=0.25)
    axes.plot(at, values, color=BLUE)
    for name, place in (("backward", line.backward), ("step", line.step)):
        if place:
            axes.axvline(place, color=GREY, linestyle=":")
            axes.text(place, 0.02 * values.max(), f" {name}", color="#4a5568", fontsize="small")
    axes.plot(at[values.argmax()], values.max(), "o", color=RED, label=f"peak, {values.max():.0f} MiB")
    axes.set(xlabel="operators", ylabel="MiB in tensors, predicted", title="One update", ylim=(0, None))
    return _with_legend(figure)


def peak(line: Timeline) -> Figure:
    """What makes the peak, by layers."""
    figure, axes = _axes(height=max(2.2, 0.9 + 0.28 * len(line.peak)))
    names = [name if len(name) <= 38 else f"...{name[-35:]}" for name, _ in line.peak][::-1]
    axes.barh(names, [size / MiB for _, size in line.peak][::-1], color=BLUE)
    axes.set(xlabel="MiB at the peak, predicted", title="What makes the peak")
    return figure


def loss(rows: Sequence[Row], samples: Sequence[tuple[float, Sample]]) -> Figure | None:
    """Training and validation loss by update."""
    if not rows:
        return None
    figure, axes = _axes()
    within = [each for _, each in samples if each.loss is not None]
    if within:
        losses = [each.loss for each in within]
        axes.plot(_on([each.updates for each in within]), losses, color=BLUE, alpha=0.35, label="within an epoch")
    updates = _on([int(row["updates"]) for row in rows])
    for name, label, colour in (("train_loss", "training", BLUE), ("val_loss", "validation", ORANGE)):
        axes.plot(updates, [float(row[name]) for row in rows], "o-", color=colour, label=label)
    axes.set(xlabel="updates", title="Loss")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _with_legend(figure)


def accuracy(rows: Sequence[Row]) -> Figure | None:
    """Training and validation accuracy by update; None where there is none."""
    shares = ("train_accuracy", "val_accuracy")
    scored = [row for row in rows if not any(math.isnan(float(row[name])) for name in shares)]
    if not scored:
        return None
    figure, axes = _axes()
    updates = _on([int(row["updates"]) for row in scored])
    for name, label, colour in zip(shares, ("training", "validation"), (BLUE, ORANGE), strict=True):
        axes.plot(updates, [100 * float(row[name]) for row in scored], "o-", color=colour, label=label)
    axes.set(xlabel="updates", ylabel="%", title="Accuracy")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _with_legend(figure)


def throughput(samples: Sequence[tuple[float, Sample]]) -> Figure | None:
    """Images a second over time; None where fewer than two moments are known."""
    step = max(1, len(samples) // BINS)
    points = samples[::step]
    pairs = itertools.pairwise(points)
    rates = [(b, (there.images - here.images) / (b - a)) for (a, here), (b, there) in pairs if b > a]
    rates = [(at, rate) for at, rate in rates if rate > 0]  # not where a phase or a network began anew
    if not rates:
        return None
    figure, axes = _axes()
    axes.plot(*zip(*rates, strict=True), color=BLUE, marker="." if len(rates) < 30 else "")
    axes.set(xlabel="seconds", ylabel="images a second", title="Throughput, evaluation included", ylim=(0, None))
    return figure


def confusion(matrix: Any, classes: Sequence[str]) -> Figure:
    """Counts (classes, classes) of labels, down, and answers, across: of the classes that are confused the most."""
    wrong = matrix.sum(0) + matrix.sum(1) - 2 * matrix.diagonal()
    chosen = np.sort(np.argsort(-wrong, kind="stable")[:MOST_CLASSES])
    shown = matrix[np.ix_(chosen, chosen)]
    figure, axes = _axes(height=4.6)
    shares = shown / np.maximum(shown.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [classes[number][:14] for number in chosen]
    as_it_is: dict[str, Any] = {"fontsize": "small", "parse_math": False}  # a name may have dollars
    axes.set_xticks(range(len(chosen)), names, rotation=90, **as_it_is)
    axes.set_yticks(range(len(chosen)), names, **as_it_is)
    for row, column in np.argwhere(shown > 0) if len(chosen) <= 15 else ():
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(shown[row, column]), ha="center", va="center", fontsize="small", color=colour)
    some = "" if len(chosen) == len(classes) else f", the {len(chosen)} most confused classes"
    axes.set(xlabel="answer", ylabel="class", title=f"Confusion matrix{some}")
    return figure


def _on(updates: Sequence[int]) -> list[int]:
    """Counts that go on where a phase, or another network, begins at 0 again."""
    before, found = 0, list[int]()
    for last, now in itertools.pairwise([0, *updates]):
        before += last if now < last else 0
        found.append(before + now)
    return found


def drawn(figures: Mapping[str, Callable[[], Figure | None]]) -> dict[str, Figure]:
    """Draw those that have something to show."""
    made = {name: draw() for name, draw in figures.items()}
    return {name: figure for name, figure in made.items() if figure is not None}


def _axes(height: float = SIZE[1]) -> tuple[Figure, Any]:
    figure = Figure(figsize=(SIZE[0], height), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _with_legend(figure: Figure) -> Figure:
    figure.legend(loc="outside lower center", ncols=4, fontsize="small", frameon=False)  # over no curve
    return figure
