"""Each row of docs/memory-guide.md does what it says: its command is taken from the page and run."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptive_trainer
from adaptive_trainer import limit_memory
from tests.support.forking import ROOT, Launcher

COMMAND = "python -m adaptive_trainer"
ROWS = dict(
    re.findall(r"^\| ([^|]+) \| `([^`|]+)` \|", (ROOT / "docs" / "memory-guide.md").read_text("utf-8"), re.MULTILINE)
)
SMALL = {
    "model.name": "mobilenetv3_small_050",
    "data": "fakedata",
    "data.train.size": "24",
    "data.val.size": "8",
    "data.image_size": "32",
    "data.num_workers": "0",
    "trainer.epochs": "1",
    "memory.limit": "none",
    "device": "cpu",
}

# What result.json says of a training.
TRAININGS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "a smaller batch": lambda result: result["used"]["batch_size"] == 8,
    "fewer workers": lambda result: result["used"]["num_workers"] == 0,
    "smaller images": lambda result: result["used"]["image_size"] == 160,
    "AMP": lambda result: result["used"]["precision"] == "fp16",
    "gradient accumulation": lambda result: (result["used"]["batch_size"], result["accumulation"]) == (24, 6),
    "a smaller model": lambda result: result["used"]["model"] == "mobilenetv3_small_100",
    "go through a checklist": lambda result: result["rung"] == "batch-16" and len(result["changes"]) == 2,
    "presets": lambda result: (result["used"]["batch_size"], result["used"]["image_size"]) == (8, 192),
    "train in stages": lambda result: [each["name"] for each in result["stages"]] == ["smoke-test", "balanced", "full"],
}
OPEN = {"fewer workers": "data.num_workers", "presets": "data.image_size"}  # what the row itself decides
LIMIT = {"go through a checklist": "28MiB"}  # too small for the request

# A card of 64 MiB: the model has 16, a step that failed still has 32 by its traceback.
CALLS = {
    "restart the kernel": r"freed 32 MiB; 16 MiB are still in use\n",
    "clean up": r"freed 48 MiB; 0 bytes are still in use\n",
    "close other processes": r"(?s).*simulated card: total 64 MiB, allocated 48 MiB",
    "print the memory": r"(?s).*simulated card: .* reserved 48 MiB \(75 %\), free on the device 16 MiB \(25 %\)",
    "monitor the memory": r"one step: before 48 MiB, peak 60 MiB, after 48 MiB\n",
}


def test_every_row_is_tried() -> None:
    assert {*TRAININGS, *CALLS, "a table of what fits", "close desktop and browser"} == ROWS.keys()


def run(row: str, small: dict[str, str], launcher: Launcher, folder: Path) -> str:
    assert ROWS[row].startswith(COMMAND)
    typed = shlex.split(ROWS[row].removeprefix(COMMAND))
    keys = {word.partition("=")[0] for word in typed}
    added = [f"{key}={value}" for key, value in small.items() if key not in keys]
    ended = launcher.run(*added, *typed, "hydra.run.dir=out", folder=folder)
    assert ended.code == 0, ended.text
    return ended.out


@pytest.mark.parametrize("row", TRAININGS)
def test_trainings(row: str, launcher: Launcher, tmp_path: Path) -> None:
    small = {**SMALL, "memory.limit": LIMIT.get(row, "none")}
    small.pop(OPEN.get(row, ""), None)
    run(row, small, launcher, tmp_path)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert TRAININGS[row](result), result


def test_a_table_of_what_fits(launcher: Launcher, tmp_path: Path) -> None:
    shown = run("a table of what fits", {"model.name": SMALL["model.name"]}, launcher, tmp_path)
    assert re.search(r"(?m)^batch +160 px +192 px\n8 +\d+ +\d+\n16 +\d+ +\d+$", shown), shown
    assert (tmp_path / "out" / "memory.csv").exists()
    assert (tmp_path / "out" / "memory.png").exists()


def test_close_desktop_and_browser(launcher: Launcher, tmp_path: Path) -> None:
    shown = run("close desktop and browser", {"device": "cpu"}, launcher, tmp_path)
    assert shown.startswith("machine: ")
    assert "\nresult: " in shown


@pytest.mark.parametrize("row", CALLS)
def test_calls(row: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card, whose memory is shown then")

    def fails() -> None:
        held = torch.zeros(8, 2**20)
        held + 1

    names = {name: getattr(adaptive_trainer, name) for name in adaptive_trainer.__all__}
    with limit_memory("64MiB", device="cpu"):
        names |= {"model": torch.zeros(4, 2**20), "step": lambda: torch.zeros(3, 2**20)}
        try:
            fails()
        except torch.OutOfMemoryError as error:
            monkeypatch.setattr(sys, "last_value", error, raising=False)  # as a prompt and a notebook do
        exec(ROWS[row], names)
        del names
    assert re.match(CALLS[row], capsys.readouterr().out)
