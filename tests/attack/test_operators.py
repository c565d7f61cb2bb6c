"""Out-of-memories of single operators, anywhere in a whole `Trainer.fit`."""

from __future__ import annotations

import pytest

from tests.attack.cases import CASES, DESCENDING, WORKERS, Case
from tests.attack.conftest import Tally
from tests.attack.injector import UNTIL_STEP_DOWN, Fault
from tests.attack.verdict import Arena, choose

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize("case", [*CASES, *WORKERS], ids=str)
def test_one_out_of_memory_changes_nothing(case: Case, arena: Arena, tally: Tally) -> None:
    """Before the operator runs, or (where it takes memory) when it has run: the same samples once more."""
    dice = tally.dice
    for site in choose(arena.sites(case, "operator"), tally.share(70), dice):
        fault = Fault("operator", site.number, "oom", after=site.allocates and dice.random() < 0.5)
        tally.add(arena.judge(case, fault, allocates=site.allocates))
    tally.close()


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_a_run_without_a_ladder_fails_honestly(case: Case, arena: Arena, tally: Tally) -> None:
    """Two or three operators in a row fail: an exit code of 2, 3 or 4, and what is saved goes on to the same end."""
    dice = tally.dice
    for site in choose(arena.sites(case, "operator"), tally.share(40), dice):
        fault = Fault("operator", site.number, "oom", times=dice.choice((2, 3)))
        tally.add(arena.judge(case, fault, allocates=site.allocates))
    tally.close()


@pytest.mark.parametrize("case", DESCENDING, ids=str)
def test_a_run_that_steps_down_is_the_rung_from_there_on(case: Case, arena: Arena, tally: Tally) -> None:
    """Operators fail twice in a row, or until the rung is left: compared with that rung, asked for by hand."""
    dice = tally.dice
    for site in choose(arena.sites(case, "operator"), tally.share(60), dice):
        fault = Fault("operator", site.number, "oom", times=dice.choice((1, 2, 3, UNTIL_STEP_DOWN, UNTIL_STEP_DOWN)))
        tally.add(arena.judge(case, fault, allocates=site.allocates))
    tally.close()
