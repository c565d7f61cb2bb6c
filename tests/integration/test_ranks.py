"""Several ranks, as torchrun starts them, on a CPU: they train as one, stay together, and none waits for a lost one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from adaptive_trainer.checkpoints import checkpoint
from adaptive_trainer.errors import Interrupted
from tests.support.forking import ROOT

BOUND = 300  # seconds, far above what any of it takes
# a free port of its own, for several of them may run at a time
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
COMMAND = [
    "-m", "adaptive_trainer", "data.num_workers=0", "data.image_size=32", "trainer.batch_size=8",
    "model.name=resnet10t", "device=cpu", "memory.limit=none", "ladder=none", "report=false",
    "trainer.deterministic=true",
]  # fmt: skip
MADE_UP = ["data=fakedata", "data.train.size=50", "data.val.size=21"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(
    command: list[str], folder: Path, *overrides: str, data: list[str] = MADE_UP
) -> subprocess.CompletedProcess[str]:
    typed = [*command, *COMMAND, f"output_dir={folder}", *data, *overrides]
    return subprocess.run(typed, capture_output=True, text=True, timeout=BOUND, env=environment(), check=False)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    content = checkpoint.load(folder / "checkpoints" / "last.pt")
    return {name: value for name, value in content["model"].items() if "running" not in name and "num_b" not in name}


def test_two_ranks_train_as_one_with_two_micro_batches(tmp_path: Path) -> None:
    """To the bit, where each keeps the statistics of its own samples; the last batch of 2 stays on one rank."""
    both = run(TORCHRUN, tmp_path / "both", "trainer.epochs=2")
    assert both.returncode == 0, both.stderr
    alone = run([sys.executable], tmp_path / "alone", "trainer.epochs=2", "trainer.micro_batch_size=4")
    assert alone.returncode == 0, alone.stderr
    expected = weights(tmp_path / "alone")
    assert [name for name, value in weights(tmp_path / "both").items() if not torch.equal(value, expected[name])] == []
    result: dict[str, Any] = json.loads((tmp_path / "both" / "result.json").read_text())
    assert (result["world_size"], len(result["ranks"]), result["metrics"]["epoch"]) == (2, 2, 2)
    assert both.stdout.count("trained on rung requested") == 1  # one rank talks
    assert json.loads((tmp_path / "both" / "ranks" / "1" / "result.json").read_text())["outcome"] == "trained"


def test_ranks_train_the_same_network_twice_in_one_process(tmp_path: Path) -> None:
    command = [*TORCHRUN, "-m", "tests.attack.two_fits", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BOUND, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "0.json").read_text() == (tmp_path / "1.json").read_text()


def test_ranks_with_other_data_end_at_once(tmp_path: Path, photos: Path) -> None:
    """As on machines of which one has not got all files."""
    shutil.copytree(photos, tmp_path / "1" / "photos")
    next((tmp_path / "1" / "photos" / "train").rglob("*.jpg")).unlink()
    (tmp_path / "0").mkdir()
    photos.rename(tmp_path / "0" / "photos")
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys\nos.chdir(os.environ['RANK'])\nfrom adaptive_trainer.cli.main import main\nmain()\n"
    )
    typed = [
        *TORCHRUN,
        str(script),
        *COMMAND[2:],
        "data=imagefolder",
        "data.root=photos",
        f"output_dir={tmp_path / 'run'}",
    ]
    env = {**environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(typed, capture_output=True, text=True, timeout=BOUND, env=env, cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert "rank 0 has 12 and 6, rank 1 has 11 and 6" in " ".join(done.stderr.split())


def test_a_vote_is_measured() -> None:
    command = [*TORCHRUN, "-m", "scripts.scaling_model", "--measure-vote"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BOUND, env=environment(), check=False)
    assert re.fullmatch(r"2 ranks: \d+\.\d\d ms a vote\n", done.stdout), done.stderr


def test_the_test_set_is_evaluated_whole(tmp_path: Path, photos: Path) -> None:
    """By the first rank alone; a test that a rank was left out of would say so."""
    done = run(TORCHRUN, tmp_path / "run", "trainer.epochs=1", data=["data=imagefolder", f"data.root={photos}"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["images"] == 10


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for part, count in (("train", 12), ("val", 6), ("test", 10)):
        for number in range(count):
            path = tmp_path / "photos" / part / f"class{number % 2}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (20 * number, 255 * (number % 2), 90)).save(path)
    return tmp_path / "photos"


def unequal(folder: Path, numbers: str, *overrides: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    start = [*TORCHRUN[:-1], f"--nproc-per-node={ranks}"] if ranks > 1 else [sys.executable]
    command = [*start, "-m", "tests.attack.unequal", str(folder), numbers, *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=BOUND, env=environment(), check=False)


def parts(folder: Path) -> list[int]:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return [rank["part"] for rank in result["ranks"]]


def test_shares_by_memory_hold_a_batch_that_equal_shares_do_not(tmp_path: Path) -> None:
    """Cards of 24 and 48 MiB, of which equal parts of 12 samples need 42 each."""
    done = unequal(tmp_path / "both", "24MiB,48MiB", "trainer.shares=memory")
    assert done.returncode == 0, done.stderr
    assert "trained on rung requested" in done.stdout
    assert re.search(r"^1 +8 +42 MiB +48 MiB", done.stdout, re.MULTILINE)
    assert parts(tmp_path / "both") == [4, 8]
    # to the bit the same parts as micro-batches of one rank
    done = unequal(tmp_path / "alone", "4,8", ranks=1)
    assert done.returncode == 0, done.stderr
    expected = weights(tmp_path / "alone")
    assert [name for name, value in weights(tmp_path / "both").items() if not torch.equal(value, expected[name])] == []


@pytest.mark.slow
def test_shares_equal_by_hand_and_after_a_resumption(tmp_path: Path) -> None:
    done = unequal(tmp_path / "equal", "24MiB,48MiB")
    assert done.returncode == 0, done.stderr
    assert "trained on rung batch-8" in done.stdout
    assert parts(tmp_path / "equal") == [4, 4]
    folders = [tmp_path / "memory", tmp_path / "by hand"]
    for folder, asked in zip(folders, ("memory", "[4,8]"), strict=True):
        done = unequal(folder, "24MiB,48MiB", f"trainer.shares={asked}")
        assert done.returncode == 0, done.stderr
    of_memory, by_hand = map(weights, folders)
    assert [name for name, value in of_memory.items() if not torch.equal(value, by_hand[name])] == []
    # with more room the parts stay what they were
    done = unequal(folders[0], "40MiB,48MiB", "trainer.shares=memory", "resume=auto", "trainer.epochs=3")
    assert done.returncode == 0, done.stderr
    assert parts(folders[0]) == [4, 8]


def test_shares_by_speed_are_refused_without_cards(tmp_path: Path) -> None:
    done = unequal(tmp_path, "none,none", "trainer.shares=speed")
    assert done.returncode != 0
    assert "trainer.shares=speed goes by the predicted time of an update" in done.stderr


def wait_for(path: Path) -> None:
    end = time.monotonic() + BOUND
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.1)


def started(folder: Path, *overrides: str, command: list[str] = TORCHRUN) -> subprocess.Popen[str]:
    typed = [*command, *COMMAND, *MADE_UP, f"output_dir={folder}", "trainer.epochs=500", *overrides]
    return subprocess.Popen(typed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())


def ranks_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """Process ids of the ranks that a torchrun has started."""
    found: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        try:
            status, variables = (entry / "stat").read_text(), (entry / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        rank = next((int(each[5:]) for each in variables if each.startswith(b"RANK=")), None)
        if rank is not None and int(status.rpartition(")")[2].split()[1]) == process.pid:
            found[rank] = int(entry.name)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the ranks in /proc")
def test_where_one_rank_is_killed_the_other_saves_and_ends(tmp_path: Path) -> None:
    process = started(tmp_path)
    wait_for(tmp_path / "metrics.csv")
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    began = time.monotonic()
    out, _ = process.communicate(timeout=BOUND)
    assert time.monotonic() - began < 60
    assert process.returncode != 0
    said = " ".join(out.split())
    assert "another rank has ended" in said
    assert "the state is saved: go on with" in said
    before = checkpoint.load(tmp_path / "checkpoints" / "last.pt")["updates"]
    again = run([*TORCHRUN, "--nproc-per-node=3"], tmp_path, "resume=auto", f"trainer.epochs={before // 7 + 2}")
    assert again.returncode == 0, again.stdout + again.stderr
    assert checkpoint.load(tmp_path / "checkpoints" / "last.pt")["updates"] == 7 * (before // 7 + 2)
    assert json.loads((tmp_path / "result.json").read_text())["world_size"] == 3


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the ranks in /proc")
def test_torchrun_starts_all_anew_and_they_go_on(tmp_path: Path) -> None:
    process = started(tmp_path, "trainer.epochs=6", command=[*TORCHRUN, "--max-restarts=1"])
    wait_for(tmp_path / "metrics.csv")
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    out, _ = process.communicate(timeout=BOUND)
    assert process.returncode == 0, out
    assert "resumed at epoch" in out
    rows = (tmp_path / "metrics.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[1]) for row in rows] == [*range(1, 7)]  # each epoch once
    assert checkpoint.load(tmp_path / "checkpoints" / "last.pt")["updates"] == 6 * 7


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the ranks in /proc")
def test_ranks_of_two_machines_start_anew_where_one_is_killed(tmp_path: Path) -> None:
    """Each has a torchrun of its own, which counts for itself how often it has started its rank."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    machine = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3",
        "--rdzv-backend=c10d", "--rdzv-id=1", f"--rdzv-endpoint=localhost:{port}",
    ]  # fmt: skip
    both = [started(tmp_path / "run", "resume=auto", "trainer.epochs=4", command=machine) for _ in range(2)]
    wait_for(tmp_path / "run" / "metrics.csv")
    os.kill((ranks_of(both[0]) | ranks_of(both[1]))[1], signal.SIGKILL)
    said = [process.communicate(timeout=BOUND)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "resumed at epoch" in "".join(said)
    result: dict[str, Any] = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["world_size"], result["metrics"]["epoch"], result["metrics"]["updates"]) == (2, 4, 28)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the ranks in /proc")
def test_a_signal_to_one_rank_stops_all_after_the_same_update(tmp_path: Path) -> None:
    process = started(tmp_path)
    wait_for(tmp_path / "metrics.csv")
    os.kill(ranks_of(process)[1], signal.SIGINT)
    out, _ = process.communicate(timeout=BOUND)
    assert process.returncode != 0
    assert "stopped by SIGINT after update" in " ".join(out.split())
    assert str(Interrupted.exit_code) in out


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_run_out_of_memory_and_are_killed_stay_together(ranks: int, tmp_path: Path) -> None:
    """Each at random, by itself; all have the bits of a run without faults down the same rungs."""
    command = [sys.executable, "-m", "tests.attack.ranks", str(tmp_path), str(ranks), "23"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BOUND, env=environment(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "seed 23: well" in done.stdout
    assert "exit code -9 of one" in done.stdout
