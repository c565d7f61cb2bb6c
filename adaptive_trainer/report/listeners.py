"""Who hears how a run goes: the record, the lines on the screen, trackers of experiments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptive_trainer.errors import ConfigError, explained
from adaptive_trainer.ladder.descent import Attempt
from adaptive_trainer.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Candidate:
    """A rung that is about to be tried.

    Attributes:
        name: of the rung.
        recipe: what it trains with.
        before: what trained before, else what was asked for.
        need: bytes that it is predicted to need; None where that is not known.
        room: bytes that there are; None where no limit is known.
        added_time: predicted time of an update over that without recomputation; None where that is not known.
        updates: updates that are made, and are kept where the network stays.
    """

    name: str
    recipe: Recipe
    before: Recipe
    need: int | None = None
    room: int | None = None
    added_time: float | None = None
    updates: int = 0


class Listener:
    """Hears how a run goes, as plain data; a tracker overrides what it wants to know. What it raises ends the run.

    A tracker is named in the settings: `+trackers.mine._target_=package.module.Class`, or `+tracker=NAME` where a
    file `tracker/NAME.yaml` begins with `# @package trackers.NAME` and has the `_target_`.
    """

    def start(self, folder: Path, settings: str) -> None:
        """Hear where the record is, and the settings as YAML."""

    def candidate(self, rung: Candidate) -> None:
        """Hear of a rung that is about to be tried in a descent."""

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
