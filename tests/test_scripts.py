"""The examples and the code of the documentation do what they say."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from adaptive_trainer import compose_config
from adaptive_trainer.cli import as_list
from tests.forking import ROOT, Launcher

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = (
    "model.name=mobilenetv3_small_050",
    "data=fakedata",
    "data.train.size=24",
    "data.val.size=8",
    "data.image_size=32",
    "data.num_workers=0",
    "trainer.batch_size=24",
    "memory.limit=28MiB",
)


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    launcher.close()


def test_train_in_python(launcher: Launcher, tmp_path: Path) -> None:
    ended = launcher.run(*SMALL, script=ROOT / "scripts" / "train_in_python.py", folder=tmp_path)
    assert ended.code == 0, ended.text
    assert "rung batch-16, validation accuracy 0." in ended.out
    assert "trainer.batch_size: 24 -> 16 (out of memory: rung batch-16)" in ended.out
    assert "scores of one image: torch.Size([1, 10])" in ended.out


def test_descend_in_your_loop(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "descend_in_your_loop.py"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "requested: oom Simulated card out of memory" in ended.stdout
    assert re.search(r"rung (batch|narrow)\S* holds, loss \d", ended.stdout)


def test_benchmark_of_loading(launcher: Launcher, tmp_path: Path) -> None:
    options = ["--images", "24", "--size", "32", "--batch", "8", "--workers", "1", "--blocks", "1"]
    options += ["--model", "mobilenetv3_small_050", "--out", str(tmp_path)]
    ended = launcher.run(*options, script=ROOT / "scripts" / "benchmark_data.py", folder=tmp_path)
    assert ended.code == 0, ended.text
    rows = [line.split(" | ") for line in (tmp_path / "benchmark_data.md").read_text().splitlines()]
    ways = ["ours, data.cache=disk", "ours, data.cache=ram", "ours, data.cache=none"]
    others = ["torchvision ImageFolder, DataLoader", "timm create_loader"]
    assert [row[0].removeprefix("| ") for row in rows if len(row) == 2][1:] == [*ways, *others]
    assert [row[0].removeprefix("| ") for row in rows if len(row) == 4][1:] == ["one batch", *ways]
    assert all(float(row[1].rstrip(" |")) > 0 for row in rows if row[0].startswith("| ours"))


# -- code blocks


def blocks(*languages: str) -> list[tuple[str, str]]:
    """(page:line, text) of every fenced block in one of the languages."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fences = re.finditer(r"^```(\w+)[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
        lines = [(match[1], text.count("\n", 0, match.start()) + 1, match[2]) for match in fences]
        found += [(f"{page.name}:{line}", code) for language, line, code in lines if language in languages]
    return found


def commands() -> list[tuple[str, list[str]]]:
    """(page:line, arguments) of every `python -m adaptive_trainer` in a shell block."""
    found = []
    for place, text in blocks("bash", "sh", "shell", "console"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            for start, word in enumerate(words):
                if word == "adaptive_trainer" and words[start - 1] == "-m":
                    found.append((place, words[start + 1 :]))
    return found


@pytest.mark.parametrize(("place", "code"), blocks("python"), ids=lambda value: value.split("\n")[0][:60])
def test_python_of_the_documentation(place: str, code: str, launcher: Launcher, tmp_path: Path) -> None:
    script = tmp_path / "block.py"
    script.write_text(code, encoding="utf-8")
    ended = launcher.run(script=script, folder=tmp_path / "work")
    assert ended.code == 0, f"{place}: {ended.text}"


@pytest.mark.parametrize(("place", "args"), commands(), ids=str)
def test_commands_of_the_documentation(place: str, args: list[str]) -> None:
    """They compose. A folder of the reader's own is not there, and what is asked of Hydra itself is Hydra's."""
    if "--config-dir" in args:
        pytest.skip("needs a folder of the reader's own")
    mine = [arg for arg in args if "=" in arg and not arg.startswith(("-", "hydra."))]
    sweeps = "-m" in args or "--multirun" in args
    overrides = [re.sub(r"(=[^\[{,]*),[^\]}]*$", r"\1", arg) if sweeps else as_list(arg) for arg in mine]
    assert compose_config(overrides).trainer.batch_size, place
