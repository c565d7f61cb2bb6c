"""The plots of a report, by matplotlib and without pyplot, which would look for a screen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from adaptive_trainer.ladder.descent import Attempt
from adaptive_trainer.report.fonts import writable
from adaptive_trainer.report.history import History
from adaptive_trainer.report.listeners import Sample, Timeline

MiB = 2**20
SIZE = (5.2, 3.3)  # inches: on a narrow screen, which shows it at two thirds, letters can still be read
BLUE, ORANGE, RED, GREY = "#2b6cb0", "#dd6b20", "#c53030", "#a0aec0"
MOST_NUMBERS = 15  # classes of a confusion matrix with room for its counts
BINS = 100  # of throughput
RUN_TIME = "seconds since the run began"

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
    names, fonts = writable([entry.rung for entry in known])
    said = [f"{name} ({entry.outcome})" for name, entry in zip(names, known, strict=True)]
    axes.set_yticks(places, said, fontfamily=fonts, parse_math=False)  # a name may have dollars
    axes.set(xlabel="MiB, reserved by the allocator", title="The ladder")
    return _with_legend(figure)


def memory(history: History) -> Figure | None:
    """Memory over time, with the moments when it ran out; None where nothing counts it."""
    seen = [(at, each) for at, each in history.samples if each.reserved]
    if not seen:
        return None
    figure, axes = _axes()
    times = [at for at, _ in seen]
    axes.plot(times, [each.reserved / MiB for _, each in seen], label="reserved", color=BLUE, marker=_dots(seen))
    axes.plot(times, [each.allocated / MiB for _, each in seen], label="in tensors", color=ORANGE, marker=_dots(seen))
    if history.out_of_memory:
        at, peak = zip(*history.out_of_memory, strict=True)
        axes.plot(at, np.array(peak) / MiB, "x", color=RED, markersize=9, label="out of memory")
    if history.room is not None:
        axes.axhline(history.room / MiB, color=RED, linestyle="--", label="limit")
    axes.set(xlabel=RUN_TIME, ylabel="MiB", title="Memory between updates", xlim=(0, None), ylim=(0, None))
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
    """What makes the peak, by layers; what small layers hold together is said in words."""
    figure, axes = _axes(height=max(2.2, 0.9 + 0.28 * len(line.peak)))
    names = [name if len(name) <= 38 else f"...{name[-35:]}" for name, _ in line.peak][::-1]
    axes.barh(names, [size / MiB for _, size in line.peak][::-1], color=BLUE)
    rest = (max(line.live) - sum(size for _, size in line.peak)) / MiB
    others = f"\n{line.holders - len(line.peak)} others hold {rest:.0f} MiB" if line.holders > len(line.peak) else ""
    axes.set(xlabel=f"MiB at the peak, predicted{others}", title="What makes the peak")
    return figure


def loss(rows: Sequence[Row], samples: Sequence[tuple[float, Sample]]) -> Figure | None:
    """Training and validation loss by update."""
    if not rows:
        return None
    figure, axes = _axes()
    within = [each for _, each in samples if each.loss is not None]
    if within:
        losses = [each.loss for each in within]
        at = _on([each.updates for each in within])
        axes.plot(at, losses, color=BLUE, alpha=0.35, marker=_dots(within), label="within an epoch")
    updates = _on([int(row["updates"]) for row in rows])
    for name, label, colour in (("train_loss", "training", BLUE), ("val_loss", "validation", ORANGE)):
        axes.plot(updates, [float(row[name]) for row in rows], "o-", color=colour, label=label)
    axes.set(xlabel="updates", title="Loss")
    _count_from_zero(axes)
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
    axes.set(xlabel="updates", ylabel="%", title="Accuracy", ylim=(0, None))
    _count_from_zero(axes)
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
    axes.plot(*zip(*rates, strict=True), color=BLUE, marker=_dots(rates))
    axes.set(xlabel=RUN_TIME, ylabel="images a second", title="Throughput, evaluation included")
    axes.set(xlim=(0, None), ylim=(0, None))
    return figure


def confusion(counts: Any, classes: Sequence[str]) -> Figure:
    """Counts of images (classes, classes): labels down, answers across; the darker, the larger the share of a label."""
    figure, axes = _axes(height=4.6)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names, fonts = writable([name[:14] for name in classes])
    as_it_is: dict[str, Any] = {
        "fontsize": "small",
        "fontfamily": fonts,
        "parse_math": False,
    }  # a name may have dollars
    axes.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 2 else 0, **as_it_is)
    axes.set_yticks(range(len(names)), names, **as_it_is)
    if len(names) <= MOST_NUMBERS:
        for label, answer in np.argwhere(counts):
            colour = "white" if shares[label, answer] > 0.5 else "black"
            place = {"ha": "center", "va": "center", "fontsize": "small"}
            axes.text(answer, label, str(counts[label, answer]), color=colour, **place)
    axes.set(xlabel="answer", ylabel="class", title="Confusion matrix")
    return figure


def in_matrix(classes: Sequence[str]) -> tuple[list[str], list[str]]:
    """What the confusion matrix calls the classes, and the fonts for it."""
    return writable([name[:14] for name in classes])


def _on(updates: Sequence[int]) -> list[int]:
    """Counts that go on where a phase, or another network, begins at 0 again."""
    before, found = 0, list[int]()
    for last, now in itertools.pairwise([0, *updates]):
        before += last if now < last else 0
        found.append(before + now)
    return found


def _dots(points: Sequence[Any]) -> str:
    """A marker at each of a few points: a single one would make no line."""
    return "." if len(points) < 30 else ""


def _count_from_zero(axes: Any) -> None:
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))


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
