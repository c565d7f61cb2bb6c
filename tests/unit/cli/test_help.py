"""The page for `-h`: its commands are taken, its choices are there, its lines fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from adaptive_trainer.cli import help as page
from adaptive_trainer.cli.main import _check
from adaptive_trainer.config.overrides import compose_config
from adaptive_trainer.utils.launch import COMMAND


@pytest.mark.parametrize("settings", [settings for _, settings in page.COMMANDS])
def test_each_command_is_taken(settings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("photos/cat", "photos/dog", "FOLDER", "test"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    (tmp_path / "best.pt").touch()
    monkeypatch.chdir(tmp_path)
    _check(compose_config(settings.split()))


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_each_choice_has_a_line_that_fits(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "width", lambda: columns)
    lines = page.help_text().splitlines()
    starts = {line.split()[0].rstrip(",:") for line in lines if line}
    assert {"digits", "imagefolder", "adamw", "exact", "staged", "minimum", "cosine"} <= starts
    assert "rtx2060" in " ".join(lines)
    assert sum("(default)" in line for line in lines) == 5
    assert max(len(line) for line in lines if COMMAND not in line) <= columns
    assert max(map(len, lines)) <= max(columns, 80)


def test_choices_are_described() -> None:
    assert [
        name for group, choices in page._groups().items() if group != "card" for name in choices if not choices[name]
    ] == []
