"""Who hears how a run goes: the record, the lines on the screen, trackers of experiments."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from textwrap import shorten
from typing import Any

from adaptive_trainer.errors import ConfigError, explained
from adaptive_trainer.ladder.descent import Attempt, Outcome
from adaptive_trainer.utils.screen import duration

log = logging.getLogger(__name__)


class Listener:
    """Hears how a run goes, as plain data; a tracker overrides what it wants to know. What it raises ends the run.

    A tracker is named in the settings: `+trackers.mine._target_=package.module.Class`, or `+tracker=NAME` where a
    file `tracker/NAME.yaml` begins with `# @package trackers.NAME` and has the `_target_`.
    """

    def start(self, folder: Path, settings: str) -> None:
        """Hear where the record is, and the settings as YAML."""

    def attempt(self, entry: Attempt) -> None:
        """Hear of a rung that was tried or skipped, or that ran out of memory in training."""

    def event(self, text: str) -> None:
        """Hear of a decision and its reason."""

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """Hear the figures of an epoch that is evaluated and saved.

        Args:
            row: as in metrics.csv. A resumed run may tell an epoch again, under the same `stage` and `epoch`.
            epochs: how many there will be.
        """

    def checkpoint(self, path: Path) -> None:
        """Hear of a file that was written."""

    def end(self, outcome: str) -> None:
        """Hear how the run ended, as in result.json."""


def trackers(nodes: dict[str, Any]) -> list[Listener]:
    """Make the listeners that the settings name.

    Raises:
        ConfigError: one cannot be made, or is no `Listener`.
    """
    return [_made(f"trackers.{name}", node) for name, node in nodes.items()]


def _made(name: str, node: dict[str, Any]) -> Listener:
    from hydra.utils import instantiate  # here: most runs have no tracker

    # a tracker's own code may raise anything; the first line is enough where Hydra adds its chain of calls
    with explained(lambda error: ConfigError(f"{name} cannot be made: {error}".partition("\n")[0])):
        tracker = instantiate(node, _convert_="all")  # plain lists and dicts: a tracker need not know OmegaConf
    if not isinstance(tracker, Listener):
        raise ConfigError(f"{name} is a {type(tracker).__name__} and no Listener; name one by {name}._target_")
    return tracker


class Lines(Listener):
    """The lines for people."""

    def attempt(self, entry: Attempt) -> None:
        """Log a rung's outcome, and why."""
        if entry.outcome == Outcome.FAILED:
            return  # the error itself is on its way to the user
        peak = f", peak {entry.peak_allocated_bytes / 2**20:.0f} MiB" if entry.peak_allocated_bytes else ""
        where = f" in {entry.phase}" if entry.phase else ""
        reason = brief(entry.reason) if entry.outcome == Outcome.OOM else entry.reason  # else it is ours, and short
        why = f": {reason}" if reason else ""
        took = f", {entry.seconds:.2f} s" if entry.outcome != Outcome.SKIPPED else ""
        log.info("rung %s: %s%s%s%s%s", entry.rung, entry.outcome, where, peak, took, why)

    def event(self, text: str) -> None:
        """Log a decision."""
        log.info("%s", text)

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """Log an epoch's losses, accuracy and time."""
        epoch, accuracy = row["epoch"], row["val_accuracy"]  # NaN where the network gives no scores by class
        left = f", {duration(row['seconds'] * (epochs - epoch))} left" if epoch < epochs else ""
        log.info(
            "epoch %d/%d: loss %.3f, val loss %.3f, val accuracy %s, %s%s",
            epoch, epochs, row["train_loss"], row["val_loss"],
            "unknown" if math.isnan(accuracy) else f"{100 * accuracy:.2f} %", duration(row["seconds"]), left,
        )  # fmt: skip


def brief(reason: str) -> str:
    """The beginning of a reason: an allocator's runs to several lines, and the record has all of it."""
    return shorten(reason, 90, placeholder=" ...")
