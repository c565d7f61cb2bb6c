"""Leases of a card: who waits, who sees what of whom, and what a process that dies leaves."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adaptive_trainer.errors import ConfigError
from adaptive_trainer.memory.leases import MARGIN, Lease, shared
from adaptive_trainer.memory.limit import limited
from tests.support.forking import ROOT

CPU = torch.device("cpu")
MiB = 2**20
ANOTHER = """
import logging, os, signal, sys
from pathlib import Path
from adaptive_trainer.memory.leases import Lease

logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
with Lease(Path(sys.argv[1])) as lease:
    print(lease.choose(), flush=True)
    lease.take(5)
    if len(sys.argv) > 2:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTIVE_TRAINER_CACHE", str(tmp_path))


def another(folder: Path, *more: str) -> subprocess.Popen[str]:
    """A process that takes 5 bytes; with one more argument it is killed while it holds them."""
    return subprocess.Popen(
        [sys.executable, "-c", ANOTHER, str(folder), *more], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def test_a_lease_is_seen_until_it_is_given_back(tmp_path: Path) -> None:
    with Lease(tmp_path) as first, Lease(tmp_path) as second:
        assert first.choose() == 0
        first.take(30)
        assert second.choose() == 30
        second.take(12)
        first.take(20)  # a smaller rung
        with Lease(tmp_path) as third:
            assert third.choose() == 32
    with Lease(tmp_path) as last:
        assert last.choose() == 0


@pytest.mark.long
def test_one_process_chooses_at_a_time(tmp_path: Path) -> None:
    with Lease(tmp_path) as first:
        assert first.choose() == 0
        process = another(tmp_path)
        assert process.stdout is not None
        assert process.stdout.readline() == "another training on this card is choosing its rung: waiting for it\n"
        first.take(30)
        assert process.communicate()[0] == "30\n"


@pytest.mark.long
def test_the_lease_of_a_process_that_was_killed_is_free(tmp_path: Path) -> None:
    process = another(tmp_path, "dies")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob("*.lock"))) == 1
    with Lease(tmp_path) as lease:
        assert lease.choose() == 0
    assert [path.name for path in tmp_path.iterdir() if path.name != "choosing"] == []


def test_a_training_leaves_what_its_rung_does_not_take() -> None:
    events: list[str] = []
    with limited(CPU, "64MiB") as capacity, shared(capacity, events.append):
        assert capacity.room() == 64 * MiB
        with capacity.device_work():
            kept = torch.empty(20 * MiB, dtype=torch.uint8)
            kept.fill_(0)
        capacity.settle()
        took = int(MARGIN * 20 * MiB)
        assert capacity.room() == took
        with limited(CPU, "64MiB") as other, shared(other, events.append):
            assert other.room() == 64 * MiB - took
            assert other.description.endswith(", of which other trainings hold 22 MiB")
        with pytest.raises(torch.OutOfMemoryError), capacity.device_work():
            torch.empty(20 * MiB, dtype=torch.uint8).fill_(0)
    assert events == [
        "memory.shared=true: this training takes 22 MiB of the 64 MiB of its card, of which others held 0 bytes"
    ]


def test_a_card_that_is_full_is_refused() -> None:
    with limited(CPU, "64MiB") as first, shared(first, print):
        first.settle()  # without a peak: all of it
        refused = pytest.raises(ConfigError, match="other trainings hold 64 MiB of the 64 MiB of this card")
        with limited(CPU, "64MiB") as second, refused, shared(second, print):
            pass


def test_what_a_lease_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_limit = pytest.raises(ConfigError, match=r"needs a limit \(memory\.limit=6GiB\)")
    with limited(CPU, "none") as capacity, needs_limit, shared(capacity, print):
        pass
    monkeypatch.setenv("ADAPTIVE_TRAINER_CACHE", "")
    needs_folder = pytest.raises(ConfigError, match="needs a cache folder")
    with limited(CPU, "64MiB") as capacity, needs_folder, shared(capacity, print):
        pass
