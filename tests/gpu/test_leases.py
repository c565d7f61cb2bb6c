"""`memory.shared` on a real card: trainings that begin at the same time divide one limit between them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
MiB = 2**20
LIMIT = 3000
BOUND = 200  # seconds, far above what it takes


def test_two_trainings_on_one_card_under_one_limit(tmp_path: Path) -> None:
    """The second steps down where the first is in its way; neither crashes, and together they keep to the limit."""
    asked = ["data=fakedata", "data.train.size=240", "data.val.size=48", "data.num_workers=2", "trainer.epochs=4"]
    shared = ["device=cuda", "memory.shared=true", f"memory.limit={LIMIT}MiB", "report=false", "model.name=resnet18"]
    command = [sys.executable, "-m", "adaptive_trainer", *asked, *shared, "data.image_size=224"]
    jobs = [
        subprocess.Popen(
            [*command, "trainer.batch_size=64", f"seed={seed}", f"output_dir={tmp_path / str(seed)}"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "ADAPTIVE_TRAINER_CACHE": str(tmp_path / "cache")},
        )
        for seed in (1, 2)
    ]  # fmt: skip
    said = [job.communicate(timeout=BOUND)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    results = [json.loads((tmp_path / str(seed) / "result.json").read_text()) for seed in (1, 2)]
    assert all(any("this training takes" in event for event in result["events"]) for result in results), said
    peaks = [result["metrics"]["peak_reserved_bytes"] for result in results]
    assert sum(peaks) <= LIMIT * MiB, (peaks, said)
