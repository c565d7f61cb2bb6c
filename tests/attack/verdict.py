"""One trial: a training with a fault, and the judgement of how it ended, against trainings without any."""

from __future__ import annotations

import os
import re
import shutil
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import count
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any
from unittest import mock

from tests.attack.cases import UPDATES, Case
from tests.attack.evidence import Evidence, differences, evidence
from tests.attack.injector import Fault, Injector, Site

LIMIT = 120  # seconds after which a training of less than one hangs
DOCUMENTED = (2, 3, 4, 75)  # exit codes of errors that are raised on purpose


class Kind(StrEnum):
    """How a trial can end."""

    EQUAL = "equal"
    STEPPED = "stepped down as announced, equal to those settings"
    UNCOMPARED = "stepped down, not compared"
    HONEST = "honest failure, resumed to an equal end"
    MISSED = "not reached"
    DIFFERENT = "SILENT DIFFERENCE"
    RAW = "RAW ERROR"
    UNUSABLE = "DEVICE UNUSABLE after one out-of-memory"
    HANG = "HANG"


IN_UPDATE = ("begin", "forward", "backward", "clipping", "optimizer step")  # phases of an attempt

BAD = (Kind.DIFFERENT, Kind.RAW, Kind.UNUSABLE, Kind.HANG)


class Hang(BaseException):
    """The training did not end."""


@dataclass
class Outcome:
    """How one training ended: with evidence, or with an error in words."""

    facts: Evidence = field(default_factory=dict)
    error: str = ""
    exit_code: int | None = None
    hangs: bool = False
    rung: str = "requested"
    attempts: list[tuple[str, str, str]] = field(default_factory=list)  # rung, outcome, phase
    events: list[str] = field(default_factory=list)
    hits: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """The judgement of one trial, with what repeats it."""

    case: str
    fault: str
    kind: Kind
    where: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: python -m tests.attack {self.case} {self.fault}\n    at {self.where}\n    {self.detail}"


class Arena:
    """Trains into folders below `root`, and remembers how trainings without a fault end."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = root / "files"
        self._numbers = count()
        self._expected: dict[Any, Evidence] = {}
        self._kept: dict[Case, dict[int, Path]] = {}

    def folder(self) -> Path:
        """A new folder for one training."""
        return self.root / f"run{next(self._numbers)}"

    def train(self, case: Case, folder: Path, *more: str, injector: Injector | None = None) -> Outcome:
        """One training to whatever end."""
        injector, outcome = injector or Injector(""), Outcome()
        injector.attempts = folder / "attempts.jsonl"
        trainer = case.trainer(case.settings(self.files, *more), folder, injector.reading)
        try:
            # what earlier runs have learned is no part of an attack, but stored images need a place
            cache = str(folder / "cache") if case.from_files else ""
            with mock.patch.dict(os.environ, ADAPTIVE_TRAINER_CACHE=cache), _no_longer_than(LIMIT), injector.active():
                result = trainer.fit()
            outcome.rung, outcome.events = result.rung, list(result.events)
            outcome.attempts = [(entry.rung, entry.outcome, entry.phase) for entry in result.attempts]
        except Hang:
            outcome.hangs, outcome.error = True, "it did not end"
        except (Exception, KeyboardInterrupt) as error:
            outcome.exit_code = getattr(error, "exit_code", None)
            outcome.error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if outcome.exit_code not in DOCUMENTED:
                outcome.error += f" ({_where(error)})"
        outcome.hits = injector.hits or [path.name for path in folder.glob("read-*")]
        if not outcome.error:
            outcome.facts = evidence(folder, trainer.model)
        return outcome

    def expected(self, case: Case) -> Evidence:
        """How the training ends when nothing happens."""
        if case not in self._expected:
            self._expected[case] = self._undisturbed(case)
        return self._expected[case]

    def without_cache(self, case: Case) -> Evidence:
        """How it ends where images are not stored, which is announced when there is no room for them."""
        if (case, "none") not in self._expected:
            self._expected[case, "none"] = self._undisturbed(case, "data.cache=none")
        return self._expected[case, "none"]

    def _undisturbed(self, case: Case, *more: str, folder: Path | None = None) -> Evidence:
        folder = folder or self.folder()
        outcome = self.train(case, folder, *more)
        shutil.rmtree(folder, ignore_errors=True)
        if outcome.error:
            raise AssertionError(f"{case} fails without any fault: {outcome.error}")
        return outcome.facts

    def sites(self, case: Case, door: str) -> list[Site]:
        """Every operator or call of an undisturbed training, once what is remembered is warm."""
        self.expected(case)
        injector, folder = Injector(door), self.folder()
        outcome = self.train(case, folder, injector=injector)
        shutil.rmtree(folder, ignore_errors=True)
        if outcome.error or (found := differences(self.expected(case), outcome.facts)):
            raise AssertionError(f"{case} is not the same when it is counted: {outcome.error or found}")
        return injector.sites

    def at_rung(self, case: Case, updates: int, rung: str) -> Evidence:
        """How a training ends that goes on from that update with the settings of a rung, asked for by hand."""
        key = (case, updates, rung)
        if key not in self._expected:
            folder = self.folder()
            shutil.copytree(self._after_updates(case)[updates], folder)
            self._expected[key] = self._undisturbed(case, "resume=auto", *case.below(rung), folder=folder)
        return self._expected[key]

    def _after_updates(self, case: Case) -> dict[int, Path]:
        """The folders of an undisturbed training as they were after each update."""
        if case in self._kept:
            return self._kept[case]
        kept, folder, base = self._kept.setdefault(case, {}), self.folder(), self.folder()
        replace = Path.replace

        def replaced(path: Path, target: Any) -> Path:
            out = replace(path, target)
            if Path(target).name == "last.pt":
                copy = base / str(len(kept))
                shutil.copytree(folder, copy)
                kept[len(kept)] = copy
            return out

        with mock.patch.object(Path, "replace", replaced):
            outcome = self.train(case, folder, "trainer.checkpoint_every=1")
        assert not outcome.error, outcome.error
        return kept

    def judge(self, case: Case, fault: Fault, *, allocates: bool = True) -> Verdict:
        """Train with the fault; resume after an honest failure; compare."""
        folder, injector = self.folder(), Injector(fault.door, fault)
        outcome = self.train(case, folder, injector=injector)
        kind, detail = self._judged(case, fault, outcome, folder, allocates)
        shutil.rmtree(folder, ignore_errors=True)
        return Verdict(case.name, str(fault), kind, outcome.hits[0] if outcome.hits else "nowhere", detail)

    def _judged(self, case: Case, fault: Fault, outcome: Outcome, folder: Path, allocates: bool) -> tuple[Kind, str]:
        if outcome.hangs:
            return Kind.HANG, outcome.error
        if not outcome.error:
            return self._compared(case, outcome)
        if found := self._resumed(case, folder):
            return Kind.DIFFERENT, f"{outcome.error}; resumed: {found}"
        if outcome.exit_code not in DOCUMENTED:
            return Kind.RAW, outcome.error
        if outcome.exit_code == 4 and allocates and fault.times == 1:
            return Kind.UNUSABLE, outcome.error
        return Kind.HONEST, outcome.error

    def _compared(self, case: Case, outcome: Outcome) -> tuple[Kind, str]:
        halved = any("evaluation" in text and "batch" in text for text in outcome.events)
        expected, kind = self.expected(case), Kind.EQUAL if outcome.hits else Kind.MISSED
        if outcome.rung != "requested":
            left = _left_after(outcome.attempts)
            if left is None or left not in self._after_updates(case):
                return Kind.UNCOMPARED, str(outcome.attempts)
            expected, kind = self.at_rung(case, left, outcome.rung), Kind.STEPPED
        elif any(text.startswith("data.cache=") and "is not used" in text for text in outcome.events):
            expected, kind = self.without_cache(case), Kind.STEPPED
        found = differences(expected, outcome.facts)
        if halved and kind is not Kind.MISSED:  # sums over other parts round otherwise
            if case.name.startswith(("evaluating", "down-evaluating")):  # it counts the parts
                return Kind.UNCOMPARED, str(outcome.events)
            kind, found = Kind.STEPPED, [text for text in found if "val_loss" not in text]
        return (Kind.DIFFERENT if found else kind), "; ".join(
            [*found[:4], *([f"{len(found)} in all"] if found else [])]
        )

    def _resumed(self, case: Case, folder: Path) -> str:
        """What is otherwise when a failed training is gone on with; empty when nothing is."""
        if not (folder / "checkpoints" / "last.pt").exists():
            return ""  # nothing was trained, or nothing is left
        outcome = self.train(case, folder, "resume=auto")
        if outcome.error:
            return outcome.error
        if outcome.rung != "requested":
            return f"on rung {outcome.rung}"
        return _summary(differences(self.expected(case), outcome.facts))


def _summary(found: Sequence[str]) -> str:
    return "; ".join([*found[:4], f"{len(found)} in all"]) if found else ""


def choose(sites: Sequence[Site], number: int, dice: Random) -> list[Site]:
    """So many sites: one of each place in the code, as far as they go, then any others."""
    places: dict[str, list[Site]] = {}
    for site in sites:
        places.setdefault(site.where, []).append(site)
    names = list(places)
    dice.shuffle(names)
    chosen = [dice.choice(places[name]) for name in names[:number]]
    left = [site for site in sites if site not in chosen] if len(chosen) < number else []
    return chosen + dice.sample(left, min(len(left), number - len(chosen)))


def _left_after(attempts: Sequence[tuple[str, str, str]]) -> int | None:
    """The update after which the first rung was left, where the others were at the same; else None."""
    found: list[int] = []
    for _, outcome, phase in attempts:
        if outcome == "oom":
            after = re.search(r"after update (\d+)", phase)
            ends_epoch = after is not None and int(after[1]) % (UPDATES // 2) == 0
            if ends_epoch and not phase.startswith(IN_UPDATE):  # the state before an evaluation is in no checkpoint
                return None
            found.append(int(after[1]) if after else found[-1] if found else 0)
    return found[0] if found and len(set(found)) == 1 else None


@contextmanager
def _no_longer_than(seconds: int) -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _where(error: BaseException) -> str:
    """The innermost functions of the package that an error went through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "adaptive_trainer/" in frame.filename]
    return " > ".join(f"{Path(frame.filename).stem}.{frame.name}:{frame.lineno}" for frame in frames[-5:])
