"""A tracker hears a run: one class, named in the settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adaptive_trainer import AdaptiveTrainerError, ConfigError, Trainer, compose_config
from adaptive_trainer.report.listeners import Listener

HEARD: list[tuple[str, Any]] = []
SMALL = (
    "data=fakedata", "data.train.size=16", "data.val.size=8", "data.image_size=32", "data.num_workers=0",
    "model.name=test_resnet", "trainer.batch_size=8", "trainer.epochs=2", "memory.limit=none",
)  # fmt: skip
MINE = f"trackers.mine._target_={__name__}.Tracker"


class Tracker(Listener):
    """Keeps what it hears."""

    def start(self, folder: Path, settings: str) -> None:
        HEARD.append(("start", folder))

    def attempt(self, entry: Any) -> None:
        HEARD.append(("attempt", entry.rung))

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        HEARD.append(("epoch", (row["stage"], row["epoch"], epochs)))

    def checkpoint(self, path: Path) -> None:
        HEARD.append(("checkpoint", path.name))

    def end(self, outcome: str) -> None:
        HEARD.append(("end", outcome))


def heard(kind: str) -> list[Any]:
    return [what for each, what in HEARD if each == kind]


def test_a_tracker_hears_the_run(tmp_path: Path) -> None:
    HEARD.clear()
    Trainer(compose_config([*SMALL, f"+{MINE}"]), output_dir=tmp_path / "run").fit()
    assert heard("start") == [tmp_path / "run"]
    assert heard("attempt") == ["requested"]
    assert heard("epoch") == [(0, 1, 2), (0, 2, 2)]
    assert heard("checkpoint").count("last.pt") >= 2
    assert HEARD[0][0] == "start"
    assert HEARD[-1] == ("end", "trained")


def test_a_tracker_hears_of_a_failure(tmp_path: Path) -> None:
    HEARD.clear()
    settings = compose_config([*SMALL, f"+{MINE}", "memory.limit=4MiB", "ladder=none"])
    with pytest.raises(AdaptiveTrainerError):
        Trainer(settings, output_dir=tmp_path / "run").fit()
    assert heard("end") == ["exhausted"]


@pytest.mark.parametrize(("target", "message"), [
    ("no.such.Tracker", "trackers.mine cannot be made"),
    ("builtins.dict", "trackers.mine is a dict"),
])  # fmt: skip
def test_what_is_no_tracker_is_refused(target: str, message: str, tmp_path: Path) -> None:
    settings = compose_config([*SMALL, f"+trackers.mine._target_={target}"])
    with pytest.raises(ConfigError, match=message):
        Trainer(settings, output_dir=tmp_path / "run").fit()
    assert not (tmp_path / "run").exists()
