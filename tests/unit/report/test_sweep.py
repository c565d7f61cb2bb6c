"""The table of a sweep: every job is in it, and those of another recipe are marked."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from adaptive_trainer.report.sweep import summary

TRAINED = {"outcome": "trained", "rung": "requested", "changes": [], "requested": {}, "used": {}}


def job(folder: Path, number: int, settings: list[str], result: dict[str, Any] | None, seconds: float = 1.5) -> None:
    home = folder / str(number)
    (home / ".hydra").mkdir(parents=True)
    (home / ".hydra" / "overrides.yaml").write_text("".join(f"- {json.dumps(each)}\n" for each in settings))
    if result is not None:
        (home / "result.json").write_text(json.dumps(result))
        (home / "metrics.csv").write_text(f"epoch,seconds\n1,{seconds}\n2,{seconds}\n")


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_job_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order of their numbers, by what they differ in; a star where one has trained by another recipe."""
    monkeypatch.setenv("COLUMNS", "100")
    attempts = [{"seconds": 4.0, "peak_reserved_bytes": 5 * 2**20}]
    down = [
        {"key": "trainer.batch_size", "asked": 24, "used": 8, "why": "it did not fit"},
        {"key": "optimizer.lr", "asked": 0.001, "used": 0.001 / 3, "why": "sqrt"},
    ]
    exact = [{"key": "trainer.recompute", "asked": "none", "used": "auto", "why": "it did not fit"}]
    common = ["data=fakedata"]
    job(tmp_path, 0, [*common, "seed=1"], {**TRAINED, "metrics": {"val_accuracy": 0.9}, "attempts": attempts})
    job(tmp_path, 1, [*common, "seed=2"], {**TRAINED, "rung": "b8", "changes": down, "metrics": {"val_accuracy": 0.8}})
    job(tmp_path, 2, [*common, "seed=3"], {**TRAINED, "rung": "recompute", "changes": exact})
    job(tmp_path, 3, [*common, "seed=x"], {"outcome": "failed", "message": "seed=x is no number\nmore"})
    job(tmp_path, 10, [*common, "seed=4"], None)
    said = summary(tmp_path, "val_accuracy")
    lines = said.splitlines()
    assert [line.split()[0] for line in lines if line[:1].isdigit()] == ["0", "1", "2", "3", "10"]
    assert lines[0].split() == [
        "job",
        "settings",
        "outcome",
        "rung",
        "val_accuracy",
        "seconds",
        "reserved",
        "MiB",
        "why",
    ]
    assert lines[1].split() == ["0", "seed=1", "trained", "requested", "0.9", "7", "5"]
    assert "trainer.batch_size 24 -> 8, optimizer.lr 0.001 -> 0.000333" in said
    assert "(job 1): such figures say less" in said
    assert "seed=x is no number" in said
    assert "more" not in [each.strip() for each in lines]
    assert "it was killed" in said
    found = rows(tmp_path)
    assert [row["outcome"] for row in found] == ["trained", "trained", "trained", "failed", "lost"]
    assert [bool(row["other_recipe"]) for row in found] == [False, True, False, False, False]
    assert found[0]["total_seconds"] == "7.0"
    page = (tmp_path / "sweep.html").read_text()
    assert page.count("<tr>") == 6


def test_jobs_that_keep_no_record_have_no_table(tmp_path: Path) -> None:
    job(tmp_path, 0, ["task=plan"], None)
    assert summary(tmp_path, "val_loss") == ""
    assert list(tmp_path.glob("sweep.*")) == []


def test_a_folder_that_was_typed_is_looked_into(tmp_path: Path) -> None:
    typed = f"output_dir={tmp_path}/${{name}}"
    job(tmp_path / "sweep", 0, [typed], None)
    (tmp_path / "sweep" / "0" / ".hydra" / "config.yaml").write_text(f"name: mine\n{typed.replace('=', ': ')}\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "result.json").write_text(json.dumps({**TRAINED, "metrics": {"seconds": 3.25}}))
    assert "3.25" in summary(tmp_path / "sweep", "seconds")
