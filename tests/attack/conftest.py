from __future__ import annotations

import gc
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

import pytest
import torch

from adaptive_trainer.models.recomputing import keeper
from tests.attack.verdict import BAD, Arena, Verdict

SEED = int(os.environ.get("ATTACK_SEED", "17"))
SHARE = float(os.environ.get("ATTACK_SHARE", "1"))
SHOWN = 12  # failures of one test that are written out


@pytest.fixture(autouse=True)
def recompute_what_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """These networks are small, and their activations would all be kept."""
    monkeypatch.setattr(keeper, "SMALL", 0)


@dataclass
class Tally:
    """Counts verdicts, and fails at the end where one is bad."""

    request: pytest.FixtureRequest
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def dice(self) -> Random:
        """Random numbers of this test alone, the same whichever tests run."""
        return Random(f"{SEED} {self.request.node.name}")

    def share(self, number: int) -> int:
        """So many injections, or what `ATTACK_SHARE` leaves of them."""
        return max(1, round(number * SHARE))

    def add(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)

    def close(self) -> None:
        """Hand the counts to the summary; fail with what repeats each bad verdict."""
        counts = Counter(verdict.kind.value for verdict in self.verdicts)
        self.request.node.user_properties.append(("attack", dict(counts)))
        bad = [verdict for verdict in self.verdicts if verdict.kind in BAD]
        if bad:
            with open(os.environ.get("ATTACK_LOG", os.devnull), "a", encoding="utf-8") as file:
                file.writelines(f"{verdict}\n" for verdict in bad)
            text = "\n".join(map(str, bad[:SHOWN]))
            pytest.fail(f"ATTACK_SEED={SEED}: {len(bad)} of {len(self.verdicts)} are bad\n{text}", pytrace=False)


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    return Tally(request)


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    """A quiet place for many small trainings on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    gc.collect()
    gc.freeze()  # a collection after each failure then looks at new objects alone
    yield Arena(tmp_path_factory.mktemp("arena"))
    gc.unfreeze()
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many injections there were, and how they ended."""
    total: Counter[str] = Counter()
    for report in (report for group in terminalreporter.stats.values() for report in group):
        if getattr(report, "when", "") == "teardown":
            continue
        for name, value in getattr(report, "user_properties", ()):
            if name == "attack" and getattr(report, "when", "") == "call":
                total.update(value)
    if total:
        terminalreporter.write_line(f"attack: {total.total()} injections, ATTACK_SEED={SEED}")
        for kind, number in total.most_common():
            terminalreporter.write_line(f"  {number:6} {kind}")
