"""Several ranks on CUDA cards, as torchrun starts them: one card each over NCCL, else all on one over gloo."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from adaptive_trainer.checkpoints import checkpoint
from tests.gpu.test_exact_ladder import differing
from tests.integration.test_ranks import TORCHRUN, ranks_of, wait_for

pytestmark = pytest.mark.gpu
BOUND = 180  # seconds, far above what any of it takes
B8 = 'ladder.rungs=[{name:b8,overrides:["trainer.batch_size=8"]}]'
GRAPH = "one CUDA graph from here on"


def trained(folder: Path, limits: str, *overrides: str, ranks: int = 2) -> list[dict[str, Any]]:
    command = [*TORCHRUN[:-1], f"--nproc-per-node={ranks}", "-m", "tests.attack.cards", str(folder), limits]
    done = subprocess.run(
        [*command, "device=cuda", *overrides], capture_output=True, text=True, timeout=BOUND, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize(
    "recipe",
    [
        (),
        ("trainer.precision=fp16", "trainer.clip_grad=1.0", "trainer.ema_decay=0.9"),
        ("trainer.recompute=blocks", "model.name=resnet18"),
        ("trainer.micro_batch_size=4", "model.name=vit_tiny_patch16_224"),
        (
            "trainer.label_smoothing=0.1",
            "optimizer.name=sgd",
            "trainer.batch_size=33",
            "model.name=mobilenetv3_small_100",
        ),
        ("trainer.class_weights=balanced", "data.train.size=226", "model.name=resnet10t"),
        ("trainer.class_weights=balanced", "data.train.size=226", "model.name=resnet10t", "optimizer.name=lion"),
    ],
    ids=["plain", "fp16", "recompute", "micro-batches", "uneven", "weights", "weights, passes alone"],
)
def test_graphs_around_the_sum_have_the_bits_of_kernels(recipe: tuple[str, ...], tmp_path: Path) -> None:
    """Weights, buffers, optimizer and position, with last batches and evaluations between replays.

    A last batch of two samples is all on one rank; lion's step is not recorded.
    """
    kernels = trained(tmp_path / "eager", "none,none", "ladder=none", "trainer.engine=eager", *recipe)
    graphs = trained(tmp_path / "graph", "none,none", "ladder=none", "trainer.engine=graph", *recipe)
    assert all(any(GRAPH in event for event in each["events"]) for each in graphs), graphs
    assert not any("CUDA graph goes" in event for each in graphs for event in each["events"])
    assert [each["digest"] for each in graphs] == [each["digest"] for each in kernels]
    assert differing(tmp_path / "eager", tmp_path / "graph") == []


def test_two_ranks_train_as_one_with_two_micro_batches(tmp_path: Path) -> None:
    """To the bit, but for the statistics, which each counts on its own samples."""
    recipe = ("ladder=none", "model.name=efficientnet_b0", "trainer.batch_size=24")
    trained(tmp_path / "both", "none,none", *recipe)
    trained(tmp_path / "alone", "none", *recipe, "trainer.micro_batch_size=12", ranks=1)
    both, alone = (checkpoint.load(tmp_path / name / "checkpoints" / "last.pt")["model"] for name in ("both", "alone"))
    counted = ("running_mean", "running_var", "num_batches_tracked")
    assert [k for k, v in both.items() if not k.endswith(counted) and not bool((v == alone[k]).all())] == []


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_memory_runs_out_on_one_card_from_the_beginning(engine: str, tmp_path: Path) -> None:
    """Both step down before the first update, and train as without a limit on that rung."""
    recipe = (f"trainer.engine={engine}", "model.name=efficientnet_b0")
    found = trained(tmp_path / "capped", "none,900MiB", B8, *recipe)
    assert [each["rung"] for each in found] == ["b8", "b8"]
    trained(tmp_path / "free", "none,none", B8, "ladder.start=b8", *recipe)
    assert differing(tmp_path / "free", tmp_path / "capped") == []


def test_memory_runs_out_on_one_card_in_training(tmp_path: Path) -> None:
    """Both step down after the same update, no sample is lost, and the bits are those of the replay."""
    recipe = ("model.name=efficientnet_b0", "trainer.engine=eager")  # a replay takes no memory that could run out
    found = trained(tmp_path / "capped", "none,10:900MiB", B8, *recipe)
    assert [each["rung"] for each in found] == ["b8", "b8"]
    assert found[0]["schedule"] == found[1]["schedule"]
    (phase,) = found[0]["failed"]
    at = int(re.findall(r"after update (\d+)", phase)[0])
    assert 10 <= at < 24
    trained(tmp_path / "free", "none,none", B8, f"fail={at}", *recipe)
    assert differing(tmp_path / "free", tmp_path / "capped") == []


def test_a_small_card_takes_a_small_part_of_the_batch(tmp_path: Path) -> None:
    """And the batch stays, which equal parts give up; as without limits with these parts, to the bit."""
    recipe = ("model.name=efficientnet_b0", "trainer.batch_size=24")
    assert [each["rung"] for each in trained(tmp_path / "equal", "3000MiB,700MiB", B8, *recipe)] == ["b8", "b8"]
    found = trained(tmp_path / "unequal", "3000MiB,700MiB", B8, "trainer.shares=memory", *recipe)
    assert [each["rung"] for each in found] == ["requested", "requested"]
    parts = found[0]["parts"]
    assert sum(parts) == 24
    assert parts[0] > 2 * parts[1] > 0
    trained(tmp_path / "free", "none,none", "ladder=none", f"trainer.shares={json.dumps(parts)}", *recipe)
    assert differing(tmp_path / "free", tmp_path / "unequal") == []


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_where_one_rank_is_killed_the_other_ends_and_torchrun_starts_anew(engine: str, tmp_path: Path) -> None:
    asked = ["device=cuda", "trainer.epochs=40", f"trainer.engine={engine}", "data.train.size=400", "data.val.size=16"]
    data = ["data=fakedata", "data.num_workers=0", "trainer.checkpoint_every=5", "report=false", "verbosity=normal"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # not --standalone: by default torchrun's store outlives a restart, and with it where the ranks were
    torchrun = [*TORCHRUN[:3], f"--master-port={port}", TORCHRUN[-1], "--max-restarts=1"]
    command = [*torchrun, "-m", "adaptive_trainer", *asked, *data, f"output_dir={tmp_path}"]
    log = tmp_path / "said"
    with log.open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, text=True)
        wait_for(tmp_path / "metrics.csv")
        before = ranks_of(process)
        os.kill(before[1], signal.SIGKILL)
        began = time.monotonic()
        while Path(f"/proc/{before[0]}").exists():
            assert time.monotonic() - began < 20, log.read_text()
            time.sleep(0.1)
        assert process.wait(timeout=BOUND) == 0, log.read_text()
    assert "another rank has ended" in " ".join(log.read_text().split())
    assert checkpoint.load(tmp_path / "checkpoints" / "last.pt")["finished_epochs"] == 40
