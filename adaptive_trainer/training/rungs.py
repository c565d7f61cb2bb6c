"""The ladder of a phase, and what is learned of its rungs on the way: what is refused, and how much room there was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from omegaconf import DictConfig

from adaptive_trainer.config.schema import EQUAL, LARGEST, Config
from adaptive_trainer.distributed.peers import peers
from adaptive_trainer.errors import CheckpointError
from adaptive_trainer.ladder.descent import Attempt, Outcome, outcomes
from adaptive_trainer.ladder.resolve import DEFAULT_BATCH, changes, recipe, resolve
from adaptive_trainer.ladder.rung import Change, Rung
from adaptive_trainer.training.parting import Parting
from adaptive_trainer.training.run import Phase, Run


class Rungs:
    """The rungs that a phase's settings stand for.

    What a network refuses is left out when a descent comes to it: asking earlier would build every network.

    Attributes:
        ladder: the rungs, as far as they are known.
        parting: what is left open in it.
        largest, why: the batch size that `max` has come to, or None, and the reason for it.
    """

    def __init__(self, phase: Phase, run: Run, parting: Parting) -> None:
        self.ladder: Sequence[Rung[Config]] = phase.ladder
        self.largest: int | None = None
        self.why = ""
        self._settings: DictConfig = phase.settings
        self._run, self.parting = run, parting
        self._since = len(run.record.attempts)  # attempts of earlier phases
        self._looked_at = 0  # the lowest rung whose overrides were offered to the network
        self._refused: dict[str, dict[str, str]] = {}  # by rung and settings, with the reason

    def settle(self, largest: int, why: str) -> None:
        """Take the ladder of a batch size that was found."""
        self.largest, self.why = largest, why
        self.ladder = self._resolved()
        for note in self.ladder[0].notes:  # how the batch size was found
            self._run.record.event(note)

    def _resolved(self) -> tuple[Rung[Config], ...]:
        made = resolve(self._settings, self.largest or DEFAULT_BATCH, self.why, self._refuse)
        return self._run.parts.prepare(made)

    def first(self, saved: dict[str, Any] | None, *, is_finished: bool = False) -> int:
        """The rung to begin with: the saved one; one further up when more is asked for, or there is more memory.

        Args:
            is_finished: no epoch is left to train, so that it is the saved one in any case.

        Raises:
            CheckpointError: the ladder has no rung with the saved model.
        """
        if saved is None:
            return 0
        model = saved["config"]["model"]  # another one could use nothing of the saved state
        possible = [i for i, rung in enumerate(self.ladder) if asdict(rung.settings.model) == model]
        if not possible:
            raise CheckpointError(
                f"the checkpoint holds the model {model} and no rung of the ladder trains it; "
                "ask for that model, or start anew with resume=null"
            )
        has_grown = peers().decided(lambda: (self._run.parts.capacity.size or 0) > (saved["capacity"] or 0))
        if is_finished or ({"shares": EQUAL, **saved["requested"]} == self.requested() and not has_grown):
            return next((i for i in possible if self.ladder[i].name == saved["rung"]), possible[0])
        return possible[0]

    def requested(self) -> dict[str, Any]:
        """What decides the memory that the request needs."""
        asked = recipe(self.ladder[0].settings).reported()
        asked["shares"] = self.ladder[0].settings.trainer.shares
        # without what takes no memory of the device: a resume with another lr stays on its rung
        return {key: asked[key] for key in asked if key not in ("lr", "num_workers", "tf32")}

    def index(self, rung: Rung[Config]) -> int:
        """Its place on the ladder."""
        return [each.name for each in self.ladder].index(rung.name)  # it may have a plan since

    def down_from(self, start: int) -> Iterator[Rung[Config]]:
        """The rungs from there on."""
        return map(self._rung, range(start, len(self.ladder)))  # lazily: each is looked at when it is its turn

    def above(self, number: int) -> int:
        """The nearest rung above that is not passed over; -1 where there is none."""
        return next((i for i in range(number - 1, -1, -1) if not self.ladder[i].passed_over), -1)

    def is_last(self, rung: Rung[Config]) -> bool:
        """Whether no rung below it can be tried."""
        return all(below.passed_over for below in self.down_from(self.index(rung) + 1))

    def assess(self, rung: Rung[Config]) -> tuple[str, int | None]:
        """Why a rung need not be tried, and the bytes it is expected to need. The last one is tried in any case."""
        hopeless, need = self._assessed(rung)
        return "" if hopeless and (self._is_proven(rung) or self.is_last(rung)) else hopeless, need

    def _assessed(self, rung: Rung[Config]) -> tuple[str, int | None]:
        return self.parting.assess(rung.settings)

    def is_last_resort(self, rung: Rung[Config]) -> bool:
        """Whether it is tried though it is predicted not to fit, for want of a rung below it."""
        hopeless, _ = self._assessed(rung)
        return bool(hopeless) and self.is_last(rung) and not self._is_proven(rung)

    def _is_proven(self, rung: Rung[Config]) -> bool:
        """Whether the batch-size finder has seen it pass a dry run, which counts for more than a prediction."""
        found = f"{LARGEST}-{self.largest}"
        return self.index(rung) == 0 and any(
            entry.rung == found and entry.outcome == Outcome.FITS for entry in self._run.record.attempts
        )

    def changes(self, rung: Rung[Config], asked: Config | None = None) -> list[Change]:
        """What `rung` sets otherwise than was asked for, by default than the first rung, and why."""
        above = outcomes(self.ladder[: self.index(rung)], self._run.record.attempts[self._since :])
        return changes(asked or self.ladder[0].settings, rung, above)

    def _rung(self, number: int) -> Rung[Config]:
        """A rung of the ladder, without the overrides that its network refuses, there and above."""
        while self._looked_at < number:
            self._looked_at += 1
            above, rung = self.ladder[self._looked_at - 1 : self._looked_at + 1]
            if not rung.passed_over and self._refused_now(above, rung):
                self._leave_out_refused(rung.name)
        return self.ladder[number]

    def _leave_out_refused(self, name: str) -> None:
        self._refused[name] = {}
        self.ladder = (*self.ladder[: self._looked_at], *self._resolved()[self._looked_at :])
        rung, reasons = self.ladder[self._looked_at], tuple(filter(None, self._refused[name].values()))
        for note in () if rung.passed_over else rung.notes:
            if note.endswith(reasons):
                self._run.record.event(f"rung {name}: {note}")

    def _refused_now(self, above: Rung[Config], rung: Rung[Config]) -> str:
        return peers().decided(lambda: self._run.judge.refusal(above.settings, rung.settings))

    def _refuse(self, name: str, above: Config, config: Config) -> str:
        """As `Judge.refusal`, of rungs that were found to be refused; the answer stays what it was."""
        known = self._refused.get(name)
        if known is None:
            return ""
        key = repr(config)  # the same override may come to other settings once one above it is left out
        if key not in known:
            known[key] = peers().decided(lambda: self._run.judge.refusal(above, config))
        return known[key]


class Climbing:
    """When to try more again: the rung above, or a faster plan of recomputation for the same one.

    It takes more room than there was before, and after each try a wait that doubles.

    Attributes:
        target: the rung to try, once it is due.
    """

    def __init__(self, rungs: Rungs, run: Run) -> None:
        self._rungs, self._capacity = rungs, run.parts.capacity
        self._room: dict[str, int | None] = {}
        self._wait, self._at = 1, 0
        self.target = 0

    def note(self, entry: Attempt) -> None:
        """Remember the room in which a rung did not fit, or fits by its plan."""
        # one that was skipped for another reason than memory would be skipped again
        if entry.outcome != Outcome.SKIPPED or entry.predicted_bytes is not None:
            self._room[entry.rung] = self._capacity.room()

    def is_due(self, rung: Rung[Config], epochs: int) -> bool:
        """Whether to leave this rung now, after so many epochs."""
        if not rung.settings.ladder.climb or epochs < self._at:
            return False
        targets = peers().gathered(self._higher(rung))  # the room of one rank may have grown, and not of the others
        self.target = min((target for target in targets if target >= 0), default=-1)
        asked = self._rungs.ladder[self._rungs.index(rung)]
        if self.target == self._rungs.index(rung) and self._rungs.parting.planned(asked).settings == rung.settings:
            self.target = -1  # there is no faster plan
        return self.target >= 0

    def _higher(self, rung: Rung[Config]) -> int:
        here = self._rungs.index(rung)
        above, ladder = self._rungs.above(here), self._rungs.ladder
        # another model would start from epoch 1
        if above >= 0 and ladder[above].settings.model == rung.settings.model and self._has_grown(ladder[above]):
            return above
        return here if self._has_grown(rung) else -1

    def _has_grown(self, rung: Rung[Config]) -> bool:
        then, now = self._room.get(rung.name), self._capacity.room()
        return then is not None and now is not None and now > then

    def wait(self, epochs: int) -> None:
        """Not again before twice as many epochs have passed as the last time."""
        self._at = epochs + 2 * self._wait
        self._wait *= 2
