"""The lines that people read while a run goes on."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from textwrap import shorten
from typing import Any

from adaptive_trainer.ladder.descent import IN_WORDS, Attempt, Outcome
from adaptive_trainer.memory.usage import format_bytes, in_mib
from adaptive_trainer.recipe import Recipe, plan_in_words
from adaptive_trainer.report.listeners import Candidate, Listener
from adaptive_trainer.utils.screen import duration

log = logging.getLogger(__name__)

MANY = 50  # updates of an epoch, beside which the slow first ones do not count


class Lines(Listener):
    """Logs a run for people: what is planned, each step down in one line, each epoch."""

    def __init__(self) -> None:
        self._candidate: Candidate | None = None
        self._is_warm = False  # an epoch has been trained
        self._failed: list[Attempt] = []  # since the last rung that fitted

    def candidate(self, rung: Candidate) -> None:
        """Log what is planned, or the step down where rungs above did not fit."""
        if self._failed:
            log.warning("step down: %s", step_down(self._failed, rung))
        elif self._candidate is None:
            log.info("plan: %s", _tried(rung))
        self._candidate, self._failed = rung, []

    def attempt(self, entry: Attempt) -> None:
        """Log how a rung was tried; one that does not fit is part of the step down."""
        is_candidate = self._candidate is not None and entry.rung == self._candidate.name
        if entry.outcome == Outcome.FAILED or (entry.outcome == Outcome.FITS and is_candidate):
            return  # the error itself is on its way to the user; what trains is said by who trains it
        is_foretold = entry.outcome == Outcome.SKIPPED and entry.predicted_bytes is not None
        if is_foretold or (entry.outcome == Outcome.OOM and is_candidate):
            self._failed.append(entry)
            log.debug("rung %s: %s: %s", entry.rung, entry.outcome, entry.reason)
        elif entry.outcome == Outcome.SKIPPED:  # passed over: the table at the end says why, or the error
            log.debug("rung %s: %s: %s", entry.rung, entry.outcome, entry.reason)
        else:  # a size that the batch-size finder has tried
            said = _oom(entry) if entry.outcome == Outcome.OOM else figures(entry)
            log.info("rung %s: %s: %s", entry.rung, entry.outcome, said)

    def event(self, text: str) -> None:
        """Log a decision."""
        log.info("%s", text)

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """Log an epoch's losses, accuracy and time."""
        epoch, accuracy = row["epoch"], row["val_accuracy"]  # NaN where the network gives no scores by class
        is_known = epoch < epochs and (self._is_warm or row["updates"] >= MANY * epoch)
        left = f", {duration(row['seconds'] * (epochs - epoch))} left" if is_known else ""
        self._is_warm = True
        log.info(
            "epoch %d/%d: loss %.3f, val loss %.3f, val accuracy %s, %s%s",
            epoch, epochs, row["train_loss"], row["val_loss"],
            "unknown" if math.isnan(accuracy) else f"{100 * accuracy:.2f} %", duration(row["seconds"]), left,
        )  # fmt: skip


def step_down(failed: Sequence[Attempt], rung: Candidate) -> str:
    """What did not fit and why, what is given up, and what is kept, in one line."""
    skipped = [entry for entry in failed if entry.outcome == Outcome.SKIPPED]
    said = [f"{entry.rung} ({_oom(entry)})" for entry in failed if entry.outcome == Outcome.OOM]
    if skipped:
        names = ", ".join(entry.rung for entry in skipped)
        needs = ", ".join(f"{(entry.predicted_bytes or 0) / 2**20:.0f}" for entry in skipped)
        said.append(f"{names} (predicted {needs} MiB)")
    given_up, same, kept = differences(rung.before, rung.recipe)
    if rung.updates and rung.before.model == rung.recipe.model:
        kept.append(f"all {rung.updates} updates")
    lost = f"; given up: {', '.join(given_up)}" if given_up else ""
    exact = f"; changed, exact: {', '.join(same)}" if same else ""
    return f"{', '.join(said)} -> {_tried(rung)}{lost}{exact}; kept: {', '.join(kept)}"


def differences(before: Recipe, after: Recipe) -> tuple[list[str], list[str], list[str]]:
    """What one recipe has given up of another, what it computes otherwise to the same bits, and what it has kept."""
    facts = [
        ("{}", before.model, after.model),
        ("batch {}", str(before.batch_size), str(after.batch_size)),
        ("image {}", str(before.image_size), str(after.image_size)),
        ("{}", before.precision, after.precision),
    ]
    if after.accumulation > 1:  # else the batch says it
        facts.append(("micro-batches of {}", str(before.micro_batch_size), str(after.micro_batch_size)))
    techniques = [
        (f"{old.key} {{}}", plan_in_words(str(old.value)), plan_in_words(str(new.value)))
        for old, new in zip(before.techniques, after.techniques, strict=True)
        if old.is_used or new.is_used
    ]
    lost, exact = (
        [text.format(f"{old} -> {new}") for text, old, new in each if old != new] for each in (facts, techniques)
    )
    return lost, exact, [text.format(new) for text, old, new in (*facts, *techniques) if old == new]


def brief(reason: str) -> str:
    """The beginning of a reason: an allocator's runs to several lines, and the record has all of it."""
    return shorten(reason, 90, placeholder=" ...")


def _tried(rung: Candidate) -> str:
    """A rung that is about to be tried, and what is predicted of it."""
    said = f"rung {rung.name}{_predicted(rung)}"
    if rung.need is None or rung.room is None or rung.need <= rung.room:
        return said
    lacks = f"{said}; that is {in_mib(rung.need - rung.room)} too much, "
    return lacks + ("and no rung is predicted to fit" if rung.is_last_resort else "but it may fit")


def _predicted(rung: Candidate) -> str:
    of = "" if rung.room is None else f" of {rung.room / 2**20:.0f}"
    said = [] if rung.need is None else [f"predicted {rung.need / 2**20:.0f}{of} MiB"]
    if rung.added_time is not None:
        said.append(f"{rung.added_time:.2f} x the time")
    return "".join(f", {each}" for each in said)


def figures(entry: Attempt) -> str:
    """Peak and time of a try, and why it was not made, in words."""
    return ", ".join(filter(None, [_peak(entry), f"{entry.seconds:.2f} s", entry.reason]))


def _peak(entry: Attempt) -> str:
    return f"peak {format_bytes(entry.peak_allocated_bytes)}" if entry.peak_allocated_bytes else ""


def _oom(entry: Attempt) -> str:
    where = f" in {entry.phase}" if entry.phase else ""
    return ", ".join(filter(None, [f"{IN_WORDS[Outcome.OOM]}{where}", _peak(entry)]))
