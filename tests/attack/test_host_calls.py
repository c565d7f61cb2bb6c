"""Failures of host memory, files and disks at single calls, anywhere in a whole `Trainer.fit`."""

from __future__ import annotations

import pytest

from tests.attack.cases import BY_NAME, CASES, TRAIN, WORKERS, Case
from tests.attack.conftest import Tally
from tests.attack.injector import HOST_FUNCTIONS, Fault, Injector
from tests.attack.verdict import Arena, choose

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
SOME = [BY_NAME[name] for name in ("conv-adamw-fp16-ema", "evaluating-nadam", "conv-cache-disk", "conv-workers")]


@pytest.mark.parametrize("case", CASES[:-1:2], ids=str)
def test_host_memory_runs_out_at_any_call(case: Case, arena: Arena, tally: Tally) -> None:
    """Any call that the package makes or gets raises MemoryError, or an out-of-memory of the device."""
    dice = tally.dice
    for site in choose(arena.sites(case, "call"), tally.share(100), dice):
        fault = Fault("call", site.number, dice.choice(("memory", "memory", "oom")))
        tally.add(arena.judge(case, fault))
    tally.close()


@pytest.mark.parametrize("case", [*SOME, WORKERS[1]], ids=str)
@pytest.mark.parametrize("door", HOST_FUNCTIONS)
def test_a_host_function_fails(door: str, case: Case, arena: Arena, tally: Tally) -> None:
    """Opening, writing, flushing and renaming files, random states, loading, decoding: once, and twice in a row."""
    dice = tally.dice
    for site in choose(arena.sites(case, door), tally.share(6), dice):
        fault = Fault(door, site.number, dice.choice(HOST_FUNCTIONS[door]), times=dice.choice((1, 1, 2)))
        tally.add(arena.judge(case, fault))
    tally.close()


@pytest.mark.parametrize("case", [BY_NAME["conv-sgd-clip"], WORKERS[0], BY_NAME["conv-cache-ram"]], ids=str)
@pytest.mark.parametrize("error", ["memory", "ENOMEM", "bad_alloc", "oom"])
def test_a_sample_finds_no_memory(error: str, case: Case, arena: Arena, tally: Tally) -> None:
    """Reading one sample fails, once or twice, here or in a data worker: the same samples again, with fewer workers."""
    dice = tally.dice
    arena.expected(case)
    for _ in range(tally.share(4)):
        tally.add(arena.judge(case, Fault("reading", dice.randrange(TRAIN), error, times=dice.choice((1, 1, 2)))))
    tally.close()


@pytest.mark.parametrize("case", [BY_NAME["conv-sgd-clip"], WORKERS[0]], ids=str)
def test_an_error_that_quotes_a_lack_of_memory_is_none(case: Case, arena: Arena) -> None:
    """It goes through unchanged, after one reading."""
    folder = arena.folder()
    outcome = arena.train(case, folder, injector=Injector("reading", Fault("reading", 5, "quoted", times=3)))
    assert outcome.error.startswith("ValueError")
    assert [path.name for path in folder.glob("read-*")] == ["read-0"]
