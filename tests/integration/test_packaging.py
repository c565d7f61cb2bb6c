"""Wheel and checkout: each finds `configs/`, from whatever folder it is started in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.forking import ROOT

COMPOSE = """
from pathlib import Path
from adaptive_trainer import compose_config
from adaptive_trainer.config.overrides import config_dir
cfg = compose_config(["preset=minimum", "ladder=faithful", "optimizer=sgd"])
print(config_dir(), cfg.trainer.batch_size, len(cfg.ladder.rungs), cfg.optimizer.name)
"""


def python(*args: str, cwd: Path, path: Path) -> str:
    """What a Python of its own prints, with nothing but `path` to import the package from."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ended = subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env={**env, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    python("-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), cwd=ROOT, path=folder)
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    args = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder), str(wheel))
    python(*args, cwd=folder, path=folder)
    return folder


def test_what_the_wheel_holds(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    in_checkout = {f"adaptive_trainer/{p.relative_to(ROOT)}" for p in (ROOT / "configs").rglob("*.yaml")}
    assert in_checkout
    assert in_checkout <= names
    assert "adaptive_trainer/py.typed" in names
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "adaptive_trainer").rglob("*.py")}
    assert modules <= names
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"adaptive_trainer"}


def test_a_wheel_finds_its_configs(installed: Path, tmp_path: Path) -> None:
    found = python("-c", COMPOSE, cwd=tmp_path, path=installed).split()
    assert found == [str(installed / "adaptive_trainer" / "configs"), "8", "13", "sgd"]
    assert "batch_size: 24" in python("-m", "adaptive_trainer", "--cfg", "job", cwd=tmp_path, path=installed)


def test_the_wheels_command(installed: Path, tmp_path: Path) -> None:
    script = installed / "bin" / "adaptive-trainer"
    assert "batch_size: 8" in python(str(script), "preset=minimum", "--cfg", "job", cwd=tmp_path, path=installed)


def test_a_checkout_finds_its_configs(tmp_path: Path) -> None:
    """An editable install puts the checkout on the path, too."""
    assert python("-c", COMPOSE, cwd=tmp_path, path=ROOT).split()[0] == str(ROOT / "configs")
    assert "batch_size: 24" in python("-m", "adaptive_trainer", "--cfg", "job", cwd=ROOT, path=tmp_path)


def test_an_incomplete_installation_says_so(installed: Path, tmp_path: Path) -> None:
    without_configs = shutil.ignore_patterns("configs")
    shutil.copytree(installed / "adaptive_trainer", tmp_path / "adaptive_trainer", ignore=without_configs)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    args = [sys.executable, "-m", "adaptive_trainer", "--cfg", "job"]
    ended = subprocess.run(args, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "install again" in ended.stderr
    assert "Traceback" not in ended.stderr
