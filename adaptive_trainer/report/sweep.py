"""What the jobs of a sweep have come to, read from their folders: a table on the screen, sweep.csv, sweep.html."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from adaptive_trainer.errors import CheckpointError
from adaptive_trainer.report.summary import short
from adaptive_trainer.utils.files import as_csv, refused_by_disk, write_whole
from adaptive_trainer.utils.screen import nearby
from adaptive_trainer.utils.tables import html, table

# Settings that may differ from what was asked for, and change no figure that is compared.
HARMLESS = ("trainer.recompute", "trainer.offload", "trainer.eval_batch_size", "data.num_workers")
LOST = "lost"
KILLED = "its process has ended without a result: it was killed, perhaps for its memory"
NAMES = ("job", "settings", "outcome", "rung")


def summary(folder: Path, metric: str) -> str:
    """Write sweep.csv and sweep.html into the folder of a sweep; return the table for the screen.

    Empty where no job has left a record.

    Args:
        metric: what the sweep compares.

    Raises:
        CheckpointError: the files cannot be written.
    """
    typed = {path.parent.parent: _typed(path) for path in sorted(folder.glob("*/.hydra/overrides.yaml"), key=_number)}
    common = set.intersection(*map(set, typed.values())) if len(typed) > 1 else set[str]()
    rows = [_row(job, asked, common, metric) for job, asked in typed.items()]
    if all(row["outcome"] == LOST for row in rows):  # as of a task that keeps no record
        return ""
    shown = _shown(rows, metric)
    remark = _remark(rows, is_same_rung=any("ladder.same_rung=true" in asked for asked in typed.values()))
    with refused_by_disk(CheckpointError, f"cannot write the table of the sweep in {folder}"):
        write_whole(folder / "sweep.csv", as_csv(rows))
        page = f"<!doctype html><meta charset=utf-8><title>sweep</title><h1>{escape(folder.name)}</h1>{html(shown)}"
        write_whole(folder / "sweep.html", f"{page}<p>{escape(remark)}</p>\n")
    files = f"sweep: {nearby(folder / 'sweep.csv')}, {nearby(folder / 'sweep.html')}"
    return "\n".join([table(shown, left=(0, 1, 2, 3)), *filter(None, [remark]), files])


def _number(overrides: Path) -> tuple[int, str]:
    name = overrides.parent.parent.name
    return (int(name), "") if name.isdecimal() else (0, name)


def _typed(overrides: Path) -> list[str]:
    with suppress(OSError, YAMLError):  # its process was killed as it wrote
        return [str(each) for each in yaml.safe_load(overrides.read_text(encoding="utf-8"))]
    return []


def _home(job: Path) -> Path:
    """The folder of a job's record: `output_dir`, which may depend on other settings, or its own."""
    with suppress(OSError, YAMLError, OmegaConfBaseException, AttributeError):
        return Path(OmegaConf.load(job / ".hydra" / "config.yaml").output_dir or job)
    return job


def _row(job: Path, typed: Sequence[str], common: set[str], metric: str) -> dict[str, Any]:
    """What one job has come to; what could not be known is empty."""
    folder = _home(job)
    result: dict[str, Any] = {"outcome": LOST, "message": KILLED}
    with suppress(OSError, ValueError):
        result |= {"message": ""} | json.loads((folder / "result.json").read_text(encoding="utf-8"))
    metrics, attempts = result.get("metrics", {}), result.get("attempts", [])
    peaks = [entry["peak_reserved_bytes"] or 0 for entry in attempts if "peak_reserved_bytes" in entry]
    changes = [change for change in result.get("changes", []) if change["key"] not in HARMLESS]
    words = (f"{c['key']} {short(c['key'], c['asked'])} -> {short(c['key'], c['used'])}" for c in changes)
    return {
        "job": job.name,
        "settings": " ".join(each for each in typed if each not in common),
        "outcome": result["outcome"],
        "rung": result.get("rung", ""),
        metric: metrics.get(metric, ""),
        "total_seconds": round(_seconds(folder, attempts), 1),
        "peak_reserved_bytes": metrics.get("peak_reserved_bytes") or max(peaks, default=0) or "",
        "other_recipe": ", ".join(words),
        "reason": result.get("message", ""),
        "requested": json.dumps(result.get("requested", {})),
        "used": json.dumps(result.get("used", {})),
        "folder": str(folder),
    }


def _seconds(folder: Path, attempts: Sequence[dict[str, Any]]) -> float:
    """Of all epochs, and of the rungs that were tried."""
    took = sum(float(entry.get("seconds") or 0) for entry in attempts)
    with suppress(OSError, ValueError, KeyError), (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        took += sum(float(row["seconds"]) for row in csv.DictReader(file))
    return took


def _shown(rows: Sequence[dict[str, Any]], metric: str) -> list[Sequence[str]]:
    """The table for people: a star marks another recipe than was asked for, which the last column names."""
    lines: list[Sequence[str]] = [(*NAMES, metric, "seconds", "reserved MiB", "why")]
    for row in rows:
        value, seconds, peak = row[metric], row["total_seconds"], row["peak_reserved_bytes"]
        figures = (f"{value:.4g}" if isinstance(value, float) else str(value), f"{seconds:.0f}")
        star = "*" if row["other_recipe"] else ""
        why = row["other_recipe"] or str(row["reason"]).partition("\n")[0]
        names = (row["job"], row["settings"], row["outcome"], row["rung"] + star)
        lines.append((*names, *figures, f"{peak / 2**20:.0f}" if peak else "-", why))
    return lines


def _remark(rows: Sequence[dict[str, Any]], *, is_same_rung: bool) -> str:
    others = [row["job"] for row in rows if row["other_recipe"]]
    if not others:
        return ""
    advice = "" if is_same_rung else "; ladder.same_rung=true begins all jobs at one rung"
    return (
        f"* trained by another recipe than was asked for (job {', '.join(others)}): such figures say less about the "
        f"settings that are compared{advice}"
    )
