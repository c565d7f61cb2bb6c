from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes with two threads each wait for each other
os.environ["ADAPTIVE_TRAINER_CACHE"] = ""  # what earlier runs have learned is no part of a test
os.environ.pop("COLUMNS", None)  # lines are as wide as a test says

import gc
from collections.abc import Iterator

import pytest
import torch

from adaptive_trainer.memory.limit import Capacity, limited
from tests.support import composing, exact_advice

torch.set_num_threads(1)  # threads of small operators wait for each other more than they work
composing.remember()
exact_advice.where_asked()


def pytest_collection_finish() -> None:
    freeze()


def freeze() -> None:
    """Leave what lives now out of collections: those after each out-of-memory then look at new objects alone."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests have recorded under the name `summary`, whichever process they ran in."""
    reports = [report for group in terminalreporter.stats.values() for report in group]
    calls = [report for report in reports if getattr(report, "when", "") == "call"]
    lines = [value for report in calls for name, value in report.user_properties if name == "summary"]
    for line in lines:
        terminalreporter.write_line(line)


@pytest.fixture(scope="module")
def capacity() -> Iterator[Capacity]:
    """The CPU with no limit on memory, for many small updates."""
    freeze()  # what was imported since
    with limited(torch.device("cpu"), "none") as found:
        yield found


@pytest.fixture(params=[pytest.param(9, marks=pytest.mark.long), pytest.param(1, marks=pytest.mark.slow)])
def every(request: pytest.FixtureRequest) -> int:
    """One operator in so many fails, in each phase of an update: all of them under `-m slow`."""
    stride: int = request.param
    return stride


@pytest.fixture
def soon_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated cards leave out what repeats itself as soon as it does."""
    monkeypatch.setattr("adaptive_trainer.memory.simulated.COUNTED_FIRST", 0)
