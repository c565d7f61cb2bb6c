"""Who hears how a run goes: the record, the lines on the screen, trackers of experiments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive_trainer.errors import ConfigError, explained
from adaptive_trainer.ladder.descent import Attempt
from adaptive_trainer.recipe import Recipe

if TYPE_CHECKING:
    from PIL.Image import Image

    from adaptive_trainer.report.result import Result


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
        is_last_resort: it is predicted not to fit, and is tried because there is none below it.
    """

    name: str
    recipe: Recipe
    before: Recipe
    need: int | None = None
    room: int | None = None
    added_time: float | None = None
    updates: int = 0
    is_last_resort: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    """What is seen between two updates.

    Attributes:
        updates, images: made, and trained on, since the first epoch of the phase.
        allocated, reserved: bytes of the device now; 0 where nothing counts them.
        loss: mean training loss of the epoch so far, as last read; None where it was not read yet.
    """

    updates: int
    images: int
    allocated: int
    reserved: int
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class Wrong:
    """An image of the validation set that was given another class than its own, and with which probability."""

    index: int
    label: int
    predicted: int
    probability: float


@dataclass(frozen=True, slots=True)
class Answers:
    """What a network has answered in an evaluation.

    Attributes:
        counts: images by (label, predicted class).
        mistakes: the most confident ones, the worst first.
    """

    counts: Mapping[tuple[int, int], int]
    mistakes: Sequence[Wrong]


@dataclass(frozen=True, slots=True)
class Advice:
    """A further option of a recipe.

    Attributes:
        typed: overrides to type.
        need: bytes that the recipe would then be predicted to need.
        saves: bytes that it would need less than now; below 0, more.
        fits: whether that is within what there is.
        effect: what it gives up or restores, in words.
    """

    typed: str
    need: int
    saves: int
    fits: bool
    effect: str


@dataclass(frozen=True, slots=True)
class Timeline:
    """The memory of one update by a trace: bytes that tensors ask for, after each operator.

    Attributes:
        live: bytes, one for each operator or for several.
        operators: how many there are.
        backward, step: the operators with which the backward pass and the optimizer's step begin.
        peak: bytes at the peak, by what holds them, the most first: of those that hold the most.
        holders: how many hold bytes then, in all.
        at: the operator at the peak, in words.
    """

    live: Sequence[int]
    operators: int
    backward: int
    step: int
    peak: Sequence[tuple[str, int]]
    holders: int
    at: str


@dataclass(frozen=True, slots=True)
class Finished:
    """A run that has trained, and what can be asked about it; nothing is worked out before it is asked for.

    Attributes:
        classes: their names.
        image: opens an image of the validation set by its index.
        name: what that image is called.
        timeline: traces an update; None where that is not possible.
        advice: predicts further options.
        source: where the images are from: a folder, or what the data set is called.
        counts: how many images there are of what, in words.
        trained_on: training images of each class; empty where no list of labels is known.
        hints: what to try where the network has not learned, each in a line.
        best: validation accuracy of best.pt, or the loss with a minus where accuracy is not known; None where there is
            no best.pt.
        best_epoch: which epoch that was; None where this process has not trained it.
        is_own_model: whether the network was made by the caller, who has to make it again.
    """

    classes: Sequence[str]
    image: Callable[[int], Image]
    name: Callable[[int], str]
    timeline: Callable[[], Timeline | None]
    advice: Callable[[], Sequence[Advice]]
    source: str = ""
    counts: str = ""
    trained_on: Sequence[int] = ()
    hints: Sequence[str] = ()
    best: float | None = None
    best_epoch: int | None = None
    is_own_model: bool = False


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

    def sample(self, sample: Sample) -> None:
        """Hear, up to twenty times a second, how training goes."""

    def answers(self, answers: Answers) -> None:
        """Hear of an evaluation of a network that gives scores by class."""

    def checkpoint(self, path: Path) -> None:
        """Hear of a file that was written."""

    def trained(self, result: Result, finished: Finished) -> None:
        """Hear what a run that has trained came to, once result.json is written."""

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
