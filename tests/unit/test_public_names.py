"""What `from adaptive_trainer import ...` gives, and that `import adaptive_trainer` alone stays light."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import adaptive_trainer
from adaptive_trainer import errors
from tests.support.forking import ROOT

PUBLIC = {
    "Attempt", "Result", "Rung", "Trainer", "Transaction", "clear_gpu_memory", "compose_config", "descend",
    "is_out_of_memory", "limit_memory", "load_model", "make_ladder", "monitor_gpu_memory", "predict",
    "print_gpu_memory", "recompute", "run_plan",
}  # fmt: skip
ERRORS = {
    "AdaptiveTrainerError", "CheckpointError", "ConfigError", "DataError", "DeviceUnusable", "DivergedError",
    "Interrupted", "LadderExhausted", "ModelError", "OutOfMemory", "PeerLost", "Stopped", "UserError",
}  # fmt: skip


def test_the_public_names() -> None:
    assert list(adaptive_trainer.__all__) == sorted(PUBLIC | ERRORS | {"__version__"})
    assert set(dir(adaptive_trainer)) >= PUBLIC | ERRORS


@pytest.mark.parametrize("name", sorted(PUBLIC | ERRORS))
def test_each_can_be_imported_and_says_what_it_is(name: str) -> None:
    found = getattr(adaptive_trainer, name)
    assert found.__name__ == name
    assert found.__module__.startswith("adaptive_trainer.")
    assert len(found.__doc__.strip()) > 20


def test_every_error_is_public() -> None:
    own = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert own == ERRORS


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trainer_of_dogs'"):
        _ = adaptive_trainer.trainer_of_dogs


def test_the_import_is_light_and_has_the_version_of_a_checkout(tmp_path: Path) -> None:
    """In a Python of its own, which has the checkout on its path and nothing installed of it."""
    code = (
        "import sys, adaptive_trainer as a; print(a.__version__, a.__file__); "
        "print(*sorted({'torch', 'numpy', 'timm', 'torchvision', 'hydra', 'omegaconf'} & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    version, file, *heavy = ended.stdout.split()
    assert (version, Path(file).parent.parent) == (adaptive_trainer.__version__, ROOT)
    assert heavy == []


def test_the_version_has_one_source() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["hatch"]["version"]["path"] == "adaptive_trainer/__init__.py"
