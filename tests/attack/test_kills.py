"""Trainings that are killed again and again, and gone on with by `resume=auto`, end as if nothing had happened."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from tests.attack.cases import CASES, WORKERS, Case
from tests.attack.conftest import Tally
from tests.attack.evidence import differences, evidence
from tests.attack.injector import Fault, Site
from tests.attack.nursery import Nursery, Request
from tests.attack.verdict import Arena, Kind, Verdict

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
SIGNALS = ("SIGKILL", "SIGKILL", "SIGTERM", "SIGINT")
ALLOWED = (0, 75, 130, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)
KILLS = 3  # of one training, at most
MOMENTS = (
    "evaluation._go_on",
    "checkpoint._write",
    "packing.pack",
    "record.",
    "program.accumulate",
    "program.change",
    "",
)


@pytest.fixture(scope="module")
def nursery(arena: Arena) -> Iterator[Nursery]:
    found = Nursery(arena.root)
    yield found
    found.close()


class Killing:
    """Kills the trainings of one case, and compares how they end at last."""

    def __init__(self, case: Case, arena: Arena, nursery: Nursery, tally: Tally) -> None:
        self.case, self.arena, self.nursery, self.tally = case, arena, nursery, tally
        self.names = count()
        status, self.seconds, facts, _ = self.start(arena.folder())
        assert status == 0, facts
        self.expected = facts

    def start(self, folder: Path, *more: str, fault: str = "", sends: str = "", delay: float = 0.0):  # type: ignore[no-untyped-def]
        """One process; its status, seconds, evidence and what it said."""
        facts = self.arena.root / f"{self.case}-{next(self.names)}.pkl"
        request = Request(self.case.name, str(folder), str(facts), more, fault, sends, delay)
        status, seconds = self.nursery.run(request)
        said = Path(f"{facts}.error")
        content = pickle.loads(facts.read_bytes()) if facts.exists() else {}
        return status, seconds, content, said.read_text(encoding="utf-8") if said.exists() else ""

    def trial(self, plan: list[tuple[str, str, float]]) -> None:
        """Kill by a plan of (fault, signal from outside, seconds), each time going on, then let it end."""
        folder, done, bad = self.arena.folder(), [], ""
        kind, facts = Kind.EQUAL, {}
        for fault, sends, delay in [*plan, ("", "", 0.0)]:
            status, _, facts, said = self.start(folder, "resume=auto", fault=fault, sends=sends, delay=delay)
            done.append(f"{fault or sends or 'none'}{f' after {delay:.3f} s' if sends else ''} -> {status}")
            if status is None:
                kind, bad = Kind.HANG, "it did not end"
            elif status not in ALLOWED:
                kind, bad = Kind.RAW, f"status {status}: {said[:300]}"
            if bad or status == 0:
                break
        if not bad and (found := differences(self.expected, facts)):
            kind, bad = Kind.DIFFERENT, "; ".join([*found[:4], f"{len(found)} in all"])
        self.tally.add(Verdict(self.case.name, "kills", kind, ", ".join(done), bad))


@pytest.mark.parametrize("case", [*CASES, *WORKERS], ids=str)
def test_killed_at_chosen_and_random_moments(case: Case, arena: Arena, nursery: Nursery, tally: Tally) -> None:
    """By its own hand at an operator or call (in evaluation, while a checkpoint is written), and from outside."""
    killing, dice = Killing(case, arena, nursery, tally), tally.dice
    sites = {door: arena.sites(case, door) for door in ("operator", "call")}
    doors = {moment: [door for door in sites if _at(sites[door], moment)] for moment in MOMENTS}
    assert all(doors.values()), f"moments that no operator or call of {case} is at: {doors}"
    for number in range(tally.share(10)):
        plan, moment = [], MOMENTS[number % len(MOMENTS)]
        for _ in range(dice.randint(1, KILLS)):
            name = dice.choice(SIGNALS)
            if dice.random() < 0.4:
                plan.append(("", name, dice.uniform(0.02, 1.1 * killing.seconds)))
            else:
                door = dice.choice(doors[moment])
                site = dice.choice(_at(sites[door], moment))
                plan.append((str(Fault(door, site.number, name)), "", 0.0))
        killing.trial(plan)
    tally.close()


def _at(sites: list[Site], moment: str) -> list[Site]:
    return [site for site in sites if moment in site.where]


@pytest.mark.parametrize("name", SIGNALS[1:])
def test_the_command_line_is_killed(name: str, arena: Arena, tally: Tally, tmp_path: Path) -> None:
    """`python -m adaptive_trainer` on digits, killed from outside at random; then `resume=auto`."""
    overrides = ["data=digits", "model.name=test_resnet", "data.image_size=32", "trainer.batch_size=128"]
    overrides += ["trainer.epochs=2", "trainer.checkpoint_every=2", "memory.limit=none", "device=cpu"]
    overrides += ["trainer.ema_decay=0.9", "data.num_workers=0"]
    whole = _command(tmp_path / "whole", overrides)
    assert whole[0] == 0, whole[2]
    done, bad, kind, status = [], "", Kind.EQUAL, -1
    for attempt in range(4):
        delay = tally.dice.uniform(0.4, 0.9) * whole[1] if attempt < 3 else None
        status, seconds, said = _command(tmp_path / "killed", [*overrides, "resume=auto"], name, delay)
        done.append(f"{name} after {seconds:.1f} s -> {status}")
        if status not in ALLOWED:
            kind, bad = Kind.RAW, f"status {status}: {said[-300:]}"
        if status == 0 or bad:
            break
    if not bad:
        found = differences(evidence(tmp_path / "whole", None), evidence(tmp_path / "killed", None))
        kind, bad = (Kind.DIFFERENT, "; ".join(found[:4])) if found else (kind, "")
    tally.add(Verdict("command line", "kills", kind, ", ".join(done), bad))
    tally.close()


def _command(folder: Path, overrides: list[str], name: str = "", delay: float | None = None) -> tuple[int, float, str]:
    """Status, seconds and output of one command."""
    command = [sys.executable, "-m", "adaptive_trainer", *overrides, f"output_dir={folder}", f"hydra.run.dir={folder}"]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)
    try:
        said, _ = process.communicate(timeout=delay or 300)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.Signals[name or "SIGKILL"])
        said, _ = process.communicate(timeout=300)
    return process.returncode, time.monotonic() - start, said
