"""Sweeps with Hydra's launchers and sweepers: in this process and in others, with one exit code and one rung."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.forking import ROOT, Ended, Launcher

TINY = (
    "-m", "model.name=mobilenetv3_small_050", "data=fakedata", "data.train.size=24", "data.val.size=8",
    "data.image_size=32", "data.num_workers=0", "hydra.sweep.dir=sweep",
)  # fmt: skip


@pytest.fixture
def sweep(launcher: Launcher, tmp_path: Path) -> Any:
    """Run a sweep in a folder of its own, whose jobs in other processes import this checkout."""

    def run(*args: str, env: dict[str, str] | None = None) -> Ended:
        return launcher.run(*TINY, *args, folder=tmp_path, env={"PYTHONPATH": str(ROOT), **(env or {})})

    return run


def results(folder: Path, count: int = 2) -> list[dict[str, Any]]:
    return [json.loads((folder / "sweep" / str(number) / "result.json").read_text()) for number in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["parallel", "local"])
def test_a_launcher_runs_two_jobs_and_the_code_is_that_of_the_worse(name: str, sweep: Any, tmp_path: Path) -> None:
    ended = sweep(f"hydra/launcher={name}", "ladder=none", "trainer.batch_size=25,8")
    assert ended.code == 2, ended.text
    assert [each["outcome"] for each in results(tmp_path)] == ["failed", "trained"]
    again = sweep("ladder=none", "trainer.batch_size=8,12")
    assert again.code == 0, again.text  # what the sweep before has left is forgotten


def test_optuna_searches_where_the_metric_says(sweep: Any, tmp_path: Path) -> None:
    search = ("hydra/sweeper=search", "hydra.sweeper.n_trials=2", "optimizer.lr=interval(1e-4,1e-2)", "ladder=none")
    ended = sweep(*search, "trainer.batch_size=8", "optimized_metric=val_loss")
    assert ended.code == 0, ended.text
    assert "Directions: ['minimize']" in ended.out
    records = results(tmp_path)
    best = min(each["metrics"]["val_loss"] for each in records)
    assert f"Best value: {best}" in ended.out
    assert all(1e-4 <= each["requested"]["lr"] <= 1e-2 for each in records)
    assert records[0]["requested"]["lr"] != records[1]["requested"]["lr"]


def test_optuna_goes_on_after_a_trial_that_failed(sweep: Any, tmp_path: Path) -> None:
    search = ("hydra/sweeper=search", "hydra.sweeper.n_trials=3", "hydra.sweeper.sampler.seed=1", "ladder=none")
    ended = sweep(*search, "trainer.batch_size=choice(25,8)")
    assert ended.code == 2, ended.text
    assert "Directions: ['maximize']" in ended.out
    assert {each["outcome"] for each in results(tmp_path, 3)} == {"failed", "trained"}
    assert "Best parameters: {'trainer.batch_size': 8}" in ended.out


@pytest.mark.parametrize(
    ("how", "missing"), [("hydra/launcher=parallel", "joblib"), ("hydra/sweeper=search", "optuna")]
)
def test_what_brings_a_launcher_is_said(how: str, missing: str, launcher: Launcher, tmp_path: Path) -> None:
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins" / "__init__.py").touch()  # in front of all plugins that are installed
    ended = launcher.run(*TINY, how, "seed=1,2", folder=tmp_path)
    assert ended.code == 2, ended.text
    assert f"{missing} comes with pip install 'adaptive-trainer[sweep]'" in ended.text
    assert "Traceback" not in ended.text


SAME = ("ladder.same_rung=true", "data.image_size=96", "memory.limit=120MiB,60MiB")
EVENT = "training begins at rung batch-8 (ladder.start), the highest that is predicted to fit for all jobs of the sweep"


@pytest.mark.parametrize("name", ["basic", pytest.param("parallel", marks=pytest.mark.slow)])
def test_all_jobs_begin_at_the_highest_rung_that_fits_each(name: str, sweep: Any, tmp_path: Path) -> None:
    """The larger card would train the request."""
    ended = sweep(*SAME, f"hydra/launcher={name}")
    assert ended.code == 0, ended.text
    records = results(tmp_path)
    assert [each["rung"] for each in records] == ["batch-8", "batch-8"]
    assert all(EVENT in each["events"] for each in records)
    [why] = [each["why"] for each in records[0]["changes"] if each["key"] == "trainer.batch_size"]
    assert why == "rung batch-8 is used; passed over: requested (ladder.start=batch-8), batch-16 (ladder.start=batch-8)"


def test_a_mistyped_job_does_not_decide_the_rung(sweep: Any, tmp_path: Path) -> None:
    ended = sweep("ladder.same_rung=true", "trainer.batch_size=8,0")
    assert ended.code == 2, ended.text
    assert [each["outcome"] for each in results(tmp_path)] == ["trained", "failed"]
    assert "training begins at rung requested" in " ".join(results(tmp_path)[0]["events"])


def test_no_job_begins_where_no_rung_fits_all(sweep: Any, tmp_path: Path) -> None:
    ended = sweep("ladder.same_rung=true", "ladder=none", "data.image_size=96", "memory.limit=200MiB,20MiB")
    assert ended.code == 3, ended.text
    assert "no rung is predicted to fit for all jobs" in ended.text
    assert not (tmp_path / "sweep" / "0").exists()


def test_one_rung_for_trials_that_are_not_known_is_refused(sweep: Any, tmp_path: Path) -> None:
    ended = sweep("ladder.same_rung=true", "hydra/sweeper=search", "optimizer.lr=interval(1e-4,1e-2)")
    assert ended.code == 2, ended.text
    assert "ladder.start=RUNG begins all jobs at one" in ended.text
    assert "Traceback" not in ended.text


SHARED = ("data.image_size=96", "memory.limit=120MiB", "memory.shared=true")  # of which batch 24 takes 81 MiB


@pytest.mark.slow
def test_two_jobs_at_a_time_share_a_card(sweep: Any, tmp_path: Path) -> None:
    """Whichever comes second steps down, and leaves the other alone."""
    cache = {"ADAPTIVE_TRAINER_CACHE": str(tmp_path / "cache")}
    ended = sweep(*SHARED, "trainer.epochs=30", "hydra/launcher=parallel", "seed=1,2", env=cache)
    assert ended.code == 0, ended.text
    records = results(tmp_path)
    assert sorted(each["rung"] for each in records) == ["batch-8", "requested"]
    events = [event for each in records for event in each["events"] if event.startswith("memory.shared")]
    taken = [int(event.partition("takes ")[2].partition(" ")[0]) for event in events]
    assert len(taken) == 2
    assert sum(taken) <= 120


SIZES = (96, 32, 97, 0, 98, 64, 99, 640, 160, 48, 101, 102)  # of images; 0 is a mistake, and 640 fits nowhere
LADDER = 'ladder.rungs=[{name:b8,overrides:["trainer.batch_size=8"]}]'


@pytest.mark.slow
def test_twelve_jobs_two_at_a_time(launcher: Launcher, tmp_path: Path) -> None:
    """On one card, for which some are too large; what becomes of one is its own affair, and the first is killed."""
    env = {"PYTHONPATH": str(ROOT), "ADAPTIVE_TRAINER_CACHE": str(tmp_path / "cache")}
    card = ("memory.limit=140MiB", "memory.shared=true", "trainer.epochs=8", LADDER)
    jobs = ("hydra/launcher=local", "hydra.sweeper.max_batch_size=2", f"data.image_size={','.join(map(str, SIZES))}")
    running = launcher.start(*TINY, *card, *jobs, folder=tmp_path, env=env)
    folder = tmp_path / "sweep"
    while not (folder / "0" / "metrics.csv").exists():
        time.sleep(0.02)
    os.kill(process_in(folder / "0"), signal.SIGKILL)
    ended = running.wait()
    assert ended.code == 3, ended.text
    assert sorted(path.read_text() for path in (folder / ".exit_codes").iterdir()) == [*"000000000123"]
    with (folder / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    outcomes = {SIZES[0]: "lost", 0: "failed", 640: "exhausted"}
    assert [row["outcome"] for row in rows] == [outcomes.get(size, "trained") for size in SIZES], ended.text
    trained = [row for row in rows if row["outcome"] == "trained"]
    assert {row["rung"] for row in trained} == {"requested", "b8"}
    assert all(bool(row["other_recipe"]) == (row["rung"] == "b8") for row in trained)


def process_in(folder: Path) -> int:
    """The process that writes the log of this folder."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(link.resolve().is_relative_to(folder.resolve()) for link in (entry / "fd").iterdir()):
                return int(entry.name)
    raise AssertionError(f"no process writes in {folder}")


def test_the_share_of_a_training_that_was_killed_is_free(launcher: Launcher, tmp_path: Path) -> None:
    env = {"ADAPTIVE_TRAINER_CACHE": str(tmp_path / "cache")}
    alone = (*TINY[1:-1], *SHARED)
    process = launcher.start(*alone, "output_dir=a", "trainer.epochs=9999", folder=tmp_path, env=env)
    while not (tmp_path / "a" / "metrics.csv").exists():
        time.sleep(0.05)
    beside = launcher.run(*alone, "output_dir=b", folder=tmp_path, env=env)
    assert beside.code == 0, beside.text
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait().code == -signal.SIGKILL
    after = launcher.run(*alone, "output_dir=c", folder=tmp_path, env=env)
    assert after.code == 0, after.text
    found = [json.loads((tmp_path / name / "result.json").read_text()) for name in "bc"]
    assert [each["rung"] for each in found] == ["batch-8", "requested"]
