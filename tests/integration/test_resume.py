"""Checkpoints that are whole or not there, and runs that go on, bit for bit, after any end."""

from __future__ import annotations

import errno
import fcntl
import os
import pickle
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from adaptive_trainer import Trainer, compose_config, errors, oom
from adaptive_trainer.checkpoints import checkpoint, packing
from adaptive_trainer.config.overrides import names_data
from adaptive_trainer.config.schema import Config
from adaptive_trainer.errors import CheckpointError, ConfigError, DivergedError, Stopped, UserError
from adaptive_trainer.memory.limit import Capacity
from adaptive_trainer.report import earlier
from adaptive_trainer.report import record as report
from adaptive_trainer.report.record import Record
from adaptive_trainer.report.result import Result
from tests.support import runs
from tests.support.faults import Fault
from tests.support.forking import ROOT, Launcher, Started

TINY = """
import sys
import torch
from torch import nn
from torch.utils.data import Dataset

from adaptive_trainer import Trainer, compose_config
from adaptive_trainer.cli.main import AdaptiveTrainerError

torch.set_num_threads(1)


class Noise(Dataset):
    classes = ["a", "b", "c"]

    def __len__(self):
        return 50

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.rand(3, 16, 16, generator=generator), index % 3


def model(config, num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(392, num_classes)
    )


settings = [
    "ladder=none", "trainer.epochs=6", "trainer.batch_size=4", "trainer.checkpoint_every=1", "trainer.ema_decay=0.9",
    "data.image_size=16", "data.num_workers=0", "resume=auto", *sys.argv[1:],
]
if __name__ == "__main__":
    try:
        Trainer(compose_config(settings), model=model, train_data=Noise(), output_dir="out").fit()
    except AdaptiveTrainerError as error:
        print(error)
        sys.exit(error.exit_code)
"""
HOLDS_AND_FORKS = """
import os, sys, time
from pathlib import Path
from adaptive_trainer.report.record import Record

with Record(Path(sys.argv[1])).held():
    if os.fork() == 0:
        time.sleep(3)
        os._exit(0)
    if sys.argv[2] == "stays":
        print("stays", flush=True)
        time.sleep(60)
print("left", flush=True)
time.sleep(60)
"""
TIMES = {"seconds", "peak_allocated_bytes", "peak_reserved_bytes"}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A training script that takes about a second and goes on where it was stopped."""
    path = tmp_path / "tiny.py"
    path.write_text(TINY)
    return path


def last(folder: Path) -> dict[str, Any]:
    return checkpoint.load(folder / "out" / "checkpoints" / "last.pt")


def differing(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two checkpoints differ in a single bit; what a clock or an allocator says is no part of the state."""
    if path.rpartition("/")[2] in TIMES:
        return []
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        return [] if same and torch.equal(*(t.flatten().view(torch.uint8) for t in (a, b))) else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        return [p for key in a.keys() | b.keys() for p in differing(a.get(key), b.get(key), f"{path}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [p for n, (x, y) in enumerate(zip(a, b, strict=True)) for p in differing(x, y, f"{path}/{n}")]
    return [] if type(a) is type(b) and a == b else [path]


# -- the file


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "good.pt"
    content = {
        "model": {"w": torch.rand(300, 40), "b": torch.rand(7).bfloat16()},
        "position": {"epoch": 3},
        "best": None,
    }
    checkpoint.save(path, content)
    return path


def test_round_trip_of_plain_data(good: Path) -> None:
    content = checkpoint.load(good)
    assert content["model"]["b"].dtype == torch.bfloat16
    assert (content["position"], content["best"]) == ({"epoch": 3}, None)
    assert torch.load(good, weights_only=True)["format"] == "adaptive_trainer checkpoint"
    assert list(good.parent.iterdir()) == [good]  # no temporary name left over


def refused(path: Path) -> str:
    """What is said when `path` is loaded: one line that names it."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    assert caught.value.__cause__ is None
    return text


def test_every_damaged_byte_is_noticed(good: Path, tmp_path: Path) -> None:
    """Flipped bytes all over the file: loading says so, or gives what was saved (a byte that nothing depends on)."""
    content, whole = checkpoint.load(good), good.read_bytes()
    path = tmp_path / "damaged.pt"
    noticed = 0
    places = range(0, len(whole), len(whole) // 150)
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            assert differing(checkpoint.load(path), content) == []
        except CheckpointError:
            noticed += 1
    assert noticed > 0.8 * len(places)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut_off(share: float, good: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    path.write_bytes(good.read_bytes()[: int(share * good.stat().st_size)])
    assert "cannot read checkpoint" in refused(path)


def code_at_load(path: Path) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {path}.ran",)

    content = {"format": checkpoint.FORMAT, "version": checkpoint.VERSION, "model": Runs()}
    torch.save(content, path)


FOREIGN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "tensors": (lambda path: torch.save({"w": torch.rand(3)}, path), "is not a checkpoint of adaptive_trainer"),
    "list": (lambda path: torch.save([1, 2], path), "is not a checkpoint of adaptive_trainer"),
    "module": (lambda path: torch.save(nn.Linear(2, 2), path), "not plain data"),
    "code": (code_at_load, "not plain data"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"format": checkpoint.FORMAT})), "cannot read checkpoint"),
    "empty": (lambda path: path.write_bytes(b""), "cannot read checkpoint"),
    "text": (lambda path: path.write_text("no checkpoint"), "cannot read checkpoint"),
    "folder": (lambda path: path.mkdir(), "there is no checkpoint"),
    "nothing": (lambda path: None, "there is no checkpoint"),
    "newer": (lambda path: torch.save({"format": checkpoint.FORMAT, "version": 99}, path), "version 99"),
    "unversioned": (lambda path: torch.save({"format": checkpoint.FORMAT}, path), "version"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files(kind: str, tmp_path: Path) -> None:
    make, said = FOREIGN[kind]
    path = tmp_path / "foreign.pt"
    make(path)
    assert said in refused(path)
    assert not Path(f"{path}.ran").exists()


def test_kill_in_the_middle_of_a_save(tmp_path: Path) -> None:
    """Killed while the new file is half written: the old one is there, whole."""
    script = tmp_path / "save.py"
    script.write_text(
        "import os, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from adaptive_trainer.checkpoints import checkpoint\n"
        "path = Path('state.pt')\n"
        "checkpoint.save(path, {'number': 1, 'w': torch.ones(100_000)})\n"
        "class Deadly(dict):\n"
        "    pass\n"
        "flush = os.fsync\n"
        "def die(handle):\n"
        "    os.ftruncate(handle, 50_000)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.fsync = die\n"
        "checkpoint.save(path, {'number': 2, 'w': torch.ones(100_000)})\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=env, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert checkpoint.load(tmp_path / "state.pt")["number"] == 1
    assert len(list(tmp_path.glob("state.pt.*.part"))) == 1
    checkpoint.save(tmp_path / "state.pt", {"number": 3})
    assert checkpoint.load(tmp_path / "state.pt")["number"] == 3


# -- runs that end early


def finish(launcher: Launcher, script: Path, *args: str) -> dict[str, Any]:
    """Run to the end; the last checkpoint."""
    ended = launcher.run(*args, script=script, folder=script.parent)
    assert ended.code == 0, ended.text
    return last(script.parent)


@pytest.fixture(scope="module")
def undisturbed(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    script = tmp_path_factory.mktemp("undisturbed") / "tiny.py"
    script.write_text(TINY)
    return finish(launcher, script)


def updates(folder: Path) -> int:
    path = folder / "out" / "checkpoints" / "last.pt"
    return int(checkpoint.load(path)["updates"]) if path.exists() else 0


def wait_for_update(number: int, folder: Path) -> None:
    end = time.monotonic() + 60
    while updates(folder) < number:
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("times", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_leave_no_trace(times: int, launcher: Launcher, tiny: Path) -> None:
    """SIGKILL after random delays, resume each time, finish: the same as a run that was never disturbed."""
    script = tiny
    epochs, delays = f"trainer.epochs={4 * times}", random.Random(times)
    reached = [0]
    while len(reached) <= times:
        process = launcher.start(epochs, script=script, folder=script.parent)
        wait_for_update(reached[-1] + 1, script.parent)  # else it may be killed before it has begun, for ever
        time.sleep(delays.random() * 0.2)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait().code == -signal.SIGKILL, "it finished before it was killed"
        reached.append(updates(script.parent))
    killed = finish(launcher, script, epochs)
    assert reached[-1] < killed["updates"] == 40 * times
    (script.parent / "out").rename(script.parent / "killed")
    assert differing(killed, finish(launcher, script, epochs)) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_state(
    number: signal.Signals, launcher: Launcher, tiny: Path, undisturbed: dict[str, Any]
) -> None:
    process: Started = launcher.start(script=tiny, folder=tiny.parent)
    wait_for_update(3, tiny.parent)
    os.kill(process.pid, number)
    ended = process.wait()
    assert ended.code == 75, ended.text
    assert f"stopped by {number.name} after update" in ended.out
    assert 3 <= last(tiny.parent)["updates"] < undisturbed["updates"]
    assert f"after update {last(tiny.parent)['updates']}," in ended.out
    assert differing(finish(launcher, tiny), undisturbed) == []
    rows = (tiny.parent / "out" / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[1] for row in rows] == ["epoch", "1", "2", "3", "4", "5", "6"]


# -- where a resumed run goes on, and with what

SMALL = ("model.name=mobilenetv3_small_050", "data=fakedata", "data.train.size=24", "data.val.size=8")
SETTINGS = (*SMALL, "data.image_size=32", "data.num_workers=0", "trainer.batch_size=24", "memory.limit=28MiB")


def fit(folder: Path, *overrides: str) -> Result:
    """A run in this process; batch 24 needs a card of 30 MiB, batch 16 one of 28, batch 8 one of 26."""
    return Trainer(compose_config([*SETTINGS, *overrides]), output_dir=folder).fit()


def fit_in_any_memory(folder: Path, *overrides: str) -> Result:
    """A run that need not step down, in a third of the time."""
    return fit(folder, "ladder=none", "memory.limit=none", *overrides)


@pytest.fixture(scope="module")
def batch_16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run of one epoch that had to step down to rung batch-16."""
    folder = tmp_path_factory.mktemp("batch-16")
    assert fit(folder).rung == "batch-16"
    return folder / "checkpoints" / "last.pt"


def attempts(result: Result) -> list[tuple[str, str]]:
    """Rungs and how they ended; it may be seen beforehand that a rung does not fit."""
    said = {"oom": "too large", "skipped": "too large"}
    return [(attempt.rung, said.get(attempt.outcome, attempt.outcome)) for attempt in result.attempts]


def test_the_same_memory_goes_on_at_the_saved_rung(batch_16: Path, tmp_path: Path) -> None:
    result = fit(tmp_path, f"resume={batch_16}", "trainer.epochs=2")
    assert attempts(result) == [("batch-16", "fits")]
    assert result.events[0] == "resumed at epoch 2, update 2, rung batch-16"
    assert "resumed with another trainer.epochs: 1 -> 2" in result.events
    assert result.metrics["epoch"] == 2


def test_more_memory_goes_up(batch_16: Path, tmp_path: Path) -> None:
    result = fit(tmp_path, f"resume={batch_16}", "trainer.epochs=2", "memory.limit=100MiB")
    assert attempts(result) == [("requested", "fits")]
    assert "resumed with another trainer.batch_size: 16 -> 24" in result.events
    assert result.metrics["updates"] == 3


def test_less_memory_goes_down(batch_16: Path, tmp_path: Path) -> None:
    result = fit(tmp_path, f"resume={batch_16}", "trainer.epochs=2", "memory.limit=26MiB")
    assert attempts(result) == [("batch-16", "too large"), ("batch-8", "fits")]
    assert "resumed with another trainer.batch_size: 16 -> 8" in result.events
    assert result.metrics["updates"] == 2 + 3


def test_what_is_asked_for_wins(batch_16: Path, tmp_path: Path) -> None:
    result = fit(tmp_path, f"resume={batch_16}", "trainer.epochs=2", "trainer.batch_size=12", "optimizer.lr=1e-5")
    assert (result.rung, result.used.batch_size, result.used.lr) == ("requested", 12, 1e-5)
    assert "resumed with another trainer.batch_size: 16 -> 12" in result.events
    assert any(event.startswith("resumed with another optimizer.lr: ") for event in result.events)


@pytest.mark.parametrize("wanted", [False, True])
def test_with_another_memory_format_state_lies_as_its_weights(wanted: bool, tmp_path: Path) -> None:
    """Fused steps would mix them up."""
    path = Path("checkpoints", "last.pt")
    fit_in_any_memory(tmp_path / "first", f"trainer.channels_last={not wanted}")
    more = [f"trainer.channels_last={wanted}", "trainer.epochs=2"]
    fit_in_any_memory(tmp_path / "second", f"resume={tmp_path / 'first' / path}", *more)
    content = checkpoint.load(tmp_path / "second" / path)
    averages = [values["exp_avg"] for values in content["optimizer"]["state"].values()]
    kernels = [average for average in averages if average.ndim == 4 and min(average.shape) > 1]
    assert kernels
    assert {average.is_contiguous(memory_format=torch.channels_last) for average in kernels} == {wanted}
    assert {average.is_contiguous() for average in kernels} == {not wanted}


def test_another_model_or_data_set_is_refused(batch_16: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"mobilenetv3_small_050.*resume=null"):
        fit(tmp_path, f"resume={batch_16}", "model.name=resnet10t", "ladder=none")
    with pytest.raises(CheckpointError, match="24 training samples and there are 30 now"):
        fit(tmp_path, f"resume={batch_16}", "data.train.size=30")
    content = checkpoint.load(batch_16)
    content["classes"][:2] = ["cat", "dog"]
    checkpoint.save(tmp_path / "other.pt", content)
    with pytest.raises(CheckpointError, match=r"others than those of the checkpoint: gone \['cat', 'dog'\], new \["):
        fit(tmp_path / "run", f"resume={tmp_path / 'other.pt'}")
    with pytest.raises(CheckpointError, match=r"holds a model only.*last\.pt"):
        fit(tmp_path, f"resume={batch_16.with_name('best.pt')}")


def test_out_of_memory_while_a_checkpoint_is_read_is_no_damage(good: Path) -> None:
    whole = Fault()
    with whole:
        checkpoint.load(good)
    for at in range(whole.count):
        with Fault(at), pytest.raises(torch.OutOfMemoryError, match="Injected"):
            checkpoint.load(good)
    assert whole.count > 0


def test_out_of_memory_while_a_state_is_taken_over_is_another_rungs_to_answer(capacity: Capacity) -> None:
    """As an error of torch's own: `load_state_dict` tells an out-of-memory as it tells a shape that does not fit."""

    def take_over() -> None:
        packing.unpack(content, state, runs.CPU, keep_groups=True, with_optimizer=True)

    case = runs.Case("adamw-single", "fp32", warm=True)
    content = packing.pack(runs.start(case, capacity).state, runs.CPU)
    state, whole = runs.start(case, capacity).state, Fault()
    with whole:
        take_over()
    assert whole.count > 20
    for at in range(0, whole.count, 5):
        with Fault(at), pytest.raises(RuntimeError, match="out of memory") as caught:
            take_over()
        assert oom.describe(caught.value).kind is oom.Kind.DEVICE
    content["buffers"]["gone"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="does not fit this run's model or optimizer: there is no 'gone'"):
        take_over()
    content["model"]["stem.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="does not fit"):
        take_over()


def test_a_folder_of_checkpoints_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*last\.pt: .*File exists"):
        checkpoint.save(tmp_path / "checkpoints" / "last.pt", {})


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("resume", ["null", "other"])
def test_an_earlier_run_is_not_written_over(resume: str, tmp_path: Path) -> None:
    fit_in_any_memory(tmp_path / "other")
    fit_in_any_memory(tmp_path / "mine")
    before = contents(tmp_path / "mine")
    from_where = "null" if resume == "null" else f"{tmp_path}/other/checkpoints/last.pt"
    for number in (1, 2):
        result = fit_in_any_memory(tmp_path / "mine", f"resume={from_where}", "trainer.epochs=2")
        assert any(f"is kept in earlier-{number}" in event for event in result.events)
        epochs = (tmp_path / "mine" / "metrics.csv").read_text().splitlines()[1:]
        assert len(epochs) == (2 if resume == "null" else 1)
        attempts = (tmp_path / "mine" / "attempts.jsonl").read_text().splitlines()
        assert len(attempts) == len(result.attempts)
    assert contents(tmp_path / "mine" / "earlier-1") == before
    more = fit_in_any_memory(tmp_path / "mine", "resume=auto", "trainer.epochs=3")
    assert more.metrics["epoch"] == 3
    assert not (tmp_path / "mine" / "earlier-3").exists()


@pytest.mark.parametrize("moved", range(5))
def test_a_move_that_is_cut_short_is_gone_on_with(moved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit_in_any_memory(tmp_path)
    before, replace_file, calls = contents(tmp_path), Path.replace, iter(range(10))

    def refused(self: Path, target: Path) -> Path:
        if "earlier-1" in str(target) and next(calls) == moved:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return replace_file(self, target)

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(CheckpointError, match=r"cannot move an earlier run to .*earlier-1"):
        fit_in_any_memory(tmp_path)
    if moved % 2:
        assert fit_in_any_memory(tmp_path, "resume=auto", "trainer.epochs=3").metrics["epoch"] == 3
    else:
        fit_in_any_memory(tmp_path)
        assert contents(tmp_path / "earlier-1") == before
    assert not (tmp_path / "earlier-2").exists()


@pytest.mark.parametrize(
    "refused",
    ["model.name=nosuch", "data.image_size=1", "resume=nowhere/last.pt", "data=cifar10", "data.cache=disk"],
)
def test_a_start_that_is_refused_moves_nothing(refused: str, tmp_path: Path) -> None:
    first = fit_in_any_memory(tmp_path, "trainer.epochs=2")
    before = contents(tmp_path)
    with pytest.raises(UserError):
        fit_in_any_memory(
            tmp_path, refused, f"data.root={tmp_path}/nowhere", *(["data.train.download=false"] * ("cifar" in refused))
        )
    assert contents(tmp_path) == before
    assert fit_in_any_memory(tmp_path, "resume=auto", "trainer.epochs=3").metrics["epoch"] == first.metrics["epoch"] + 1


def test_a_run_that_was_moved_is_gone_on_with_when_the_new_one_has_learned_nothing(tmp_path: Path) -> None:
    fit_in_any_memory(tmp_path, "trainer.epochs=2")
    with pytest.raises(ZeroDivisionError):
        Trainer(compose_config(SETTINGS), model=lambda *_: 1 / 0, output_dir=tmp_path).fit()  # type: ignore[arg-type]
    assert not (tmp_path / "checkpoints" / "last.pt").exists()
    assert fit_in_any_memory(tmp_path, "resume=auto", "trainer.epochs=3").metrics["epoch"] == 3


def test_half_a_checkpoint_of_a_killed_run_goes(tmp_path: Path) -> None:
    theirs = tmp_path / "film.mkv.part"
    for name in ("checkpoints/last.pt.123.part", "report.html.123.part", "plots/loss.png.123.part", theirs.name):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half a")
    fit(tmp_path)
    assert list(tmp_path.rglob("*.part")) == [theirs]


def test_two_runs_at_a_time_in_one_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "WAIT_SECONDS", 0.0)
    with Record(tmp_path).held(), pytest.raises(CheckpointError, match="another run is at work in"):
        fit(tmp_path)
    assert fit(tmp_path).outcome == "trained"


def test_workers_that_outlive_a_killed_run_are_waited_for(tmp_path: Path) -> None:
    """They have its lock from the fork on."""
    holds_and_forks(tmp_path, "stays")
    with pytest.raises(BlockingIOError):
        lock(tmp_path)
    assert fit(tmp_path).outcome == "trained"


def test_a_lock_is_given_back_before_forked_processes_end(tmp_path: Path) -> None:
    holds_and_forks(tmp_path, "left")
    lock(tmp_path)


def holds_and_forks(folder: Path, how: str) -> None:
    """A process holds the folder and forks; it is killed when it stays within, or has left, and the other lives on."""
    command = [sys.executable, "-c", HOLDS_AND_FORKS, str(folder), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"{how}\n"
        process.kill()


def lock(folder: Path) -> None:
    with (folder / ".run.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_two_trainers_of_one_second_have_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [Trainer(compose_config()).output_dir for _ in range(2)]
    assert folders[0] != folders[1]
    assert folders[0].parent.parent == tmp_path / "outputs"


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "Free some disk space, or choose another output_dir"),
        (errno.EACCES, "Get the permission to write there, or choose another output_dir"),
        (errno.EROFS, "Choose another output_dir, where files can be written"),
    ],
)
def test_the_advice_fits_what_the_system_says(
    number: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any, **how: Any) -> Any:
        raise OSError(number, os.strerror(number))

    record = Record(tmp_path)
    checkpoint.save(tmp_path / "last.pt", {})
    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(CheckpointError, match=rf"there is no earlier one\. {said}"):
        checkpoint.save(tmp_path / "new" / "best.pt", {})
    with pytest.raises(CheckpointError, match=rf"is kept in .*last\.pt\. {said}; resume=.*last\.pt goes on from it"):
        checkpoint.save(tmp_path / "last.pt", {})
    with pytest.raises(CheckpointError, match=rf"cannot write the record of this run in .*\. {said}"):
        record.metrics({"epoch": 1})


def test_auto_starts_anew_where_nothing_is(tmp_path: Path) -> None:
    assert fit(tmp_path, "resume=auto").metrics["epoch"] == 1


def test_auto_with_nothing_to_go_on_with_needs_data(tmp_path: Path) -> None:
    """The built-in digits are no answer to a run that is not found, unless they are asked for."""
    folder = tmp_path / "2024-05-01" / "10-00-00"
    with pytest.raises(
        CheckpointError, match=rf"no earlier run to go on with in {tmp_path}; type output_dir=FOLDER or"
    ):
        Trainer(compose_config(["resume=auto", "trainer.epochs=2"]), output_dir=folder).fit()
    assert names_data(compose_config(["data=digits"]))
    assert names_data(compose_config(["data.root=photos"]))
    assert not names_data(compose_config(["data.num_workers=0", "resume=auto"]))


def test_a_finished_run_is_not_proven_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is entered on its own rung, whatever fits now, and its best model is where the new record is."""
    first = fit(tmp_path / "2024-05-01" / "10-00-00", "trainer.recompute=most")

    def proven(*args: Any, **how: Any) -> Any:
        raise AssertionError("a dry run")

    monkeypatch.setattr("adaptive_trainer.training.trial.dry_run", proven)
    folder = tmp_path / "2024-05-01" / "11-00-00"
    again = Trainer(compose_config(["resume=auto", "memory.limit=24MiB"]), output_dir=folder).fit()
    assert "1 epochs are trained, and trainer.epochs=1 asks for no more" in again.events
    assert (again.attempts, again.used, again.metrics) == ([], first.used, first.metrics)
    best = [tmp_path / "2024-05-01" / time / "checkpoints" / "best.pt" for time in ("10-00-00", "11-00-00")]
    assert best[0].read_bytes() == best[1].read_bytes()


def test_auto_finds_the_newest_run(launcher: Launcher, tmp_path: Path) -> None:
    """Hydra's folders are ROOT/DATE/TIME; the settings are the saved ones, with the command line's on top."""
    args = [*SMALL, "data.image_size=32", "data.num_workers=0", "ladder=none"]
    runs = [f"hydra.run.dir=outputs/2024-05-0{day}/10-00-00" for day in (1, 2, 3)]
    for day, run in enumerate(runs[:2], start=1):
        assert launcher.run(*args, run, f"trainer.batch_size={8 * day}", folder=tmp_path).code == 0
    endless = ["trainer.batch_size=max", "memory.limit=none"]
    failed = launcher.run(*args, *endless, "hydra.run.dir=outputs/2024-05-02/12-00-00", folder=tmp_path)
    assert failed.code == 2
    ended = launcher.run(runs[2], "resume=auto", "trainer.epochs=2", folder=tmp_path)
    assert ended.code == 0, ended.text
    assert "outputs/2024-05-02/12-00-00 is passed over: it has left no checkpoint (failed: trainer.batch" in ended.text
    assert "resumed at epoch 2, update 2, rung requested" in ended.out  # 24 samples in batches of 16
    assert "mobilenetv3_small_050, batch 16, image 32" in ended.out
    assert "resumed with another trainer.epochs: 1 -> 2" in ended.out


def test_auto_names_the_run_that_it_passes_over(tmp_path: Path) -> None:
    """A newer run that has left no checkpoint; not one that is older than what is taken, nor a plan."""

    def run(time: str, *overrides: str) -> Result:
        return fit(tmp_path / "2024-05-01" / time, "resume=auto", *overrides)

    def failed(time: str) -> None:
        with pytest.raises(ConfigError):
            run(time, "trainer.batch_size=max", "memory.limit=none")

    def said(result: Result) -> list[str]:
        return [event for event in result.events if event.startswith("resume=auto")]

    failed("10-00-00")
    first = run("11-00-00")
    assert said(first)[0].startswith(
        f"resume=auto: {tmp_path}/2024-05-01/10-00-00 is passed over: it has left no checkpoint "
        "(failed: trainer.batch_size=max needs a limit on memory"
    )
    assert said(first)[1].endswith("a new run begins")
    assert said(run("12-00-00", "trainer.epochs=2")) == []
    failed("13-00-00")
    (tmp_path / "2024-05-01/14-00-00").mkdir()
    (tmp_path / "2024-05-01/14-00-00/plan.json").touch()
    (tmp_path / "2024-05-01/15-00-00").mkdir()
    (tmp_path / "2024-05-01/15-00-00/config.yaml").touch()
    [text] = said(run("16-00-00", "trainer.epochs=3"))
    assert text == (
        f"resume=auto: {tmp_path}/2024-05-01/15-00-00 is passed over, and 1 more before it: it has left no checkpoint "
        "(it was killed before the first one, or is still at it)"
    )
    assert said(run("16-00-00", "trainer.epochs=4")) == [], "it goes on from its own"


def stopped_early(folder: Path, monkeypatch: pytest.MonkeyPatch, where: str, *overrides: str) -> None:
    """A run that Ctrl-C ends before it has saved anything."""

    def stopped(*args: Any, **how: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(where, stopped)
        with pytest.raises(Stopped, match=r"stopped by Ctrl-C; nothing is saved; resume=auto .*begins again"):
            fit(folder, *overrides)


def test_a_stop_at_once_names_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: Any) -> None:
        raise KeyboardInterrupt

    fit(tmp_path)
    monkeypatch.setattr("adaptive_trainer.training.epochs.loop.Loop._train_on", stopped)
    with pytest.raises(Stopped, match="stopped by Ctrl-C; go on from the last checkpoint with resume=auto output_dir="):
        fit(tmp_path, "resume=auto", "trainer.epochs=2")


@pytest.mark.parametrize("end", ["stopped", "killed"])
@pytest.mark.parametrize(
    "where",
    [
        "training.trainer.build_datasets",
        "training.trainer.Judge",
        "training.trial.dry_run",
        "training.session.build_optimizer",
        "checkpoints.checkpoint.save",
    ],
)
def test_auto_begins_anew_what_was_stopped_before_its_first_checkpoint(
    where: str, end: str, batch_16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its own folder and from that of the next run, though an older run has a checkpoint."""
    shutil.copytree(batch_16.parent.parent, tmp_path / "2024-05-01" / "10-00-00")
    first = tmp_path / "2024-05-01" / "11-00-00"
    asked = ("trainer.epochs=2", "optimizer.lr=3e-4", "trainer.batch_size=12")
    stopped_early(first, monkeypatch, f"adaptive_trainer.{where}", *asked)
    if end == "killed":
        (first / "result.json").unlink()
    for folder in (tmp_path / "2024-05-01" / "12-00-00", first):
        result = Trainer(compose_config(["resume=auto"]), output_dir=folder).fit()
        assert (result.requested.lr, result.requested.batch_size, result.metrics["epoch"]) == (3e-4, 12, 2)
        assert any(f"{first} has left no checkpoint" in event for event in result.events), result.events
        if folder != first:
            shutil.rmtree(folder)


def test_auto_passes_over_a_run_that_is_still_at_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tmp_path / "2024-05-01" / "10-00-00")
    running = tmp_path / "2024-05-01" / "11-00-00"
    stopped_early(running, monkeypatch, "adaptive_trainer.training.trial.dry_run")
    (running / "result.json").unlink()
    with Record(running).held():
        result = fit(tmp_path / "2024-05-01" / "12-00-00", "resume=auto", "trainer.epochs=2")
    assert f"{running} is passed over" in result.events[0]
    assert result.metrics["epoch"] == 2


def test_in_python_the_saved_settings_are_taken_too(tmp_path: Path) -> None:
    """What is typed, or set since, wins; a setting that is typed wins although it is the default."""
    fit(tmp_path, "trainer.epochs=3", "optimizer=sgd", "trainer.batch_size=12")
    cfg = compose_config(["resume=auto", "trainer.epochs=4"])
    cfg.optimizer.lr = 0.01
    result = Trainer(cfg, output_dir=tmp_path).fit()
    assert (result.metrics["epoch"], result.requested.batch_size) == (4, 12)
    assert (result.requested.optimizer, result.requested.lr) == ("sgd", 0.01)
    bare = OmegaConf.merge(OmegaConf.structured(Config), compose_config(["trainer.epochs=5"]))
    assert isinstance(bare, DictConfig)
    bare.resume = "auto"
    assert Trainer(bare, output_dir=tmp_path).fit().metrics["epoch"] == 5
    back = Trainer(
        compose_config(["resume=auto", "trainer.batch_size=24", "trainer.epochs=6"]), output_dir=tmp_path
    ).fit()
    assert back.requested.batch_size == 24


def test_a_folder_of_ones_own_is_looked_in_when_resumed(tmp_path: Path) -> None:
    (tmp_path / "ladder").mkdir()
    (tmp_path / "ladder" / "mine.yaml").write_text("rungs: [{name: tiny, overrides: [trainer.batch_size=2]}]\n")
    fit(tmp_path / "run", "memory.limit=none")
    cfg = compose_config(["resume=auto", "ladder=mine", "trainer.epochs=2"], config_folder=tmp_path)
    trainer = Trainer(cfg, output_dir=tmp_path / "run")
    assert trainer.fit().metrics["epoch"] == 2
    assert "name: tiny" in (tmp_path / "run" / "config.yaml").read_text()


def test_stages_keep_what_was_typed_when_resumed(tmp_path: Path) -> None:
    (tmp_path / "phases").mkdir()
    stages = "[{name: a, overrides: [trainer.epochs=3]}, {name: b, overrides: [trainer.epochs=4]}]"
    (tmp_path / "phases" / "mine.yaml").write_text(f"stages: {stages}\n")
    cfg = compose_config([*SETTINGS, "memory.limit=none", "phases=mine", "trainer.epochs=1"], config_folder=tmp_path)
    first = Trainer(cfg, output_dir=tmp_path / "run").fit()
    assert [stage["metrics"]["epoch"] for stage in first.stages] == [1, 1]
    assert "stage a: trainer.epochs=1, as typed, and not what its file says" in first.events
    again = Trainer(compose_config(["resume=auto"]), output_dir=tmp_path / "run").fit()
    assert again.metrics["epoch"] == 1
    more = Trainer(compose_config(["resume=auto", "trainer.epochs=2"]), output_dir=tmp_path / "run").fit()
    assert more.metrics["epoch"] == 2


class Pixels(torch.utils.data.Dataset[Any]):
    classes = ("a", "b", "c")

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        return torch.rand(3, 16, 16, generator=generator), index % 3


def flat(*_: Any) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))


def test_weights_whose_loss_is_no_number_are_not_saved(tmp_path: Path) -> None:
    settings = ["optimizer=sgd", "optimizer.lr=1e30", "trainer.log_every=4", "trainer.checkpoint_every=4"]
    settings += ["trainer.batch_size=4", "data.image_size=16", "data.num_workers=0", "ladder=none"]
    with pytest.raises(DivergedError, match="after update 4"):
        Trainer(compose_config(settings), model=flat, train_data=Pixels(), output_dir=tmp_path).fit()
    assert checkpoint.load(tmp_path / "checkpoints" / "last.pt")["updates"] == 0


class Table(nn.Module):
    """Makes a buffer in its first forward pass, beside the `state_dict`, and a larger one for more samples."""

    def __init__(self) -> None:
        super().__init__()
        self.body = flat()

    def forward(self, x: Tensor) -> Tensor:
        if "table" not in self._buffers or len(x) > len(self.get_buffer("table")):
            self.register_buffer("table", torch.rand(len(x), 3), persistent=False)
        output: Tensor = self.body(x) + self.get_buffer("table")[: len(x)]
        return output


def test_buffers_that_a_forward_pass_makes_are_resumed(tmp_path: Path) -> None:
    for folder, epochs in (("whole", (2,)), ("parts", (1, 2))):
        for until in epochs:
            settings = [f"trainer.epochs={until}", "trainer.batch_size=4", "data.image_size=16", "data.num_workers=0"]
            cfg = compose_config([*settings, "ladder=none", "resume=auto"])
            Trainer(cfg, model=lambda *_: Table(), train_data=Pixels(), output_dir=tmp_path / folder).fit()
    one, other = (checkpoint.load(tmp_path / name / "checkpoints" / "last.pt") for name in ("whole", "parts"))
    assert list(one["buffers"]) == ["table"]
    assert [where for key in ("buffers", "random") for where in differing(one[key], other[key])] == []


class NoNumber(nn.Module):
    """Cross entropy; of the ninth batch no number, though the gradients are: two are of the dry run."""

    batches = 0

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.batches += 1
        loss = nn.functional.cross_entropy(output, target)
        return loss + (float("inf") if self.batches == 9 else 0)


def test_a_loss_between_those_that_are_told_is_looked_at_before_a_checkpoint(tmp_path: Path) -> None:
    settings = ["trainer.log_every=100", "trainer.checkpoint_every=4", "trainer.batch_size=4", "data.image_size=16"]
    cfg = compose_config([*settings, "data.num_workers=0", "ladder=none"])
    with pytest.raises(DivergedError, match="inf after update") as caught:
        Trainer(cfg, model=flat, train_data=Pixels(), loss=NoNumber(), output_dir=tmp_path).fit()
    content = checkpoint.load(tmp_path / "checkpoints" / "last.pt")
    assert f"after update {content['updates'] + 4}. " in str(caught.value)
    assert content["updates"] > 0
    assert content["meters"]["loss"].isfinite()


def test_an_average_that_a_run_did_not_have_begins_with_its_weights(capacity: Capacity) -> None:
    with_average = runs.Case("sgd", "fp32", warm=False)
    content = packing.pack(runs.start(replace(with_average, warm=True, ema=False), capacity).state, runs.CPU)
    state = runs.start(with_average, capacity).state
    packing.unpack(content, state, runs.CPU, keep_groups=False, with_optimizer=True)
    assert state.ema is not None
    averaged = state.ema.module.state_dict()
    assert [name for name, value in state.model.state_dict().items() if not torch.equal(value, averaged[name])] == []


def test_a_checkpoint_of_another_implementation_of_sgd(tmp_path: Path) -> None:
    """The run's own implementation stays, and momentum that the checkpoint lacks is made."""
    settings = ["optimizer=sgd", "trainer.batch_size=8", "data.image_size=16", "data.num_workers=0", "ladder=none"]
    made = compose_config([*settings, "trainer.epochs=1"])
    Trainer(made, model=flat, train_data=Pixels(), output_dir=tmp_path / "a").fit()
    path = tmp_path / "a" / "checkpoints" / "last.pt"
    content = checkpoint.load(path)
    del content["optimizer"]["state"][0]
    for group in content["optimizer"]["param_groups"]:
        group["fused"] = None
    checkpoint.save(path, content)
    again = compose_config([*settings, "trainer.epochs=2", "trainer.precision=bf16", f"resume={path}"])
    Trainer(again, model=flat, train_data=Pixels(), output_dir=tmp_path / "b").fit()
    found = checkpoint.load(tmp_path / "b" / "checkpoints" / "last.pt")["optimizer"]
    assert {group["fused"] for group in found["param_groups"]} == {True}
    assert len(found["state"]) == 2


def test_a_network_of_ones_own_goes_by_its_class_after_a_resume_below_the_first_rung(tmp_path: Path) -> None:
    class Small(nn.Sequential):
        """For any `model.name`."""

        def __init__(self, classes: int) -> None:
            super().__init__(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Flatten(), nn.LazyLinear(classes))
            self(torch.zeros(2, 3, 32, 32))

    ladder = ["ladder.rungs=[{name: other, overrides: ['trainer.batch_size=2', 'model.name=resnet18']}]"]
    settings = [*SETTINGS[2:], "data=fakedata", "trainer.batch_size=24", "memory.limit=24MiB", *ladder]
    for epochs in (1, 2):
        cfg = compose_config([*settings, f"trainer.epochs={epochs}", "resume=auto"])
        result = Trainer(cfg, model=lambda _, classes: Small(classes), output_dir=tmp_path).fit()
        assert (result.rung, result.metrics["epoch"]) == ("other", epochs)
        assert (result.requested.model, result.used.model) == ("Small", "Small (resnet18)")


def two_stages(first: str = "a") -> str:
    return f"phases.stages=[{{name: {first}}}, {{name: b, overrides: ['data.image_size=48']}}]"


def test_a_checkpoint_of_a_stage_that_is_not_there_any_more(tmp_path: Path) -> None:
    """It is refused, and the record of the finished run stays."""
    assert fit(tmp_path, two_stages(), "memory.limit=none").outcome == "trained"
    record = (tmp_path / "result.json").read_bytes()
    for now in ("phases=single", two_stages("c")):
        with pytest.raises(CheckpointError, match=r"is of stage b, number 2 of a, b, and the stages are .* now; keep"):
            fit(tmp_path, "memory.limit=none", "resume=auto", now)
        assert (tmp_path / "result.json").read_bytes() == record
    assert fit(tmp_path, "memory.limit=none", "resume=auto", two_stages(), "trainer.epochs=2").metrics["epoch"] == 2


def test_the_way_on_names_the_folder_that_was_chosen() -> None:
    assert earlier.way_on(Path("outputs/2026-11-26/10-00-00")) == "resume=auto"
    assert earlier.way_on(Path("mine")) == "resume=auto output_dir=mine"


@pytest.mark.parametrize(
    "value",
    ["mine", "a b", "a(1)", "a=b", "ä,x", 'q"q', "it's", "[1]", "{a}", "a$b", "1.5", "a~b", "a\\", 'a\\"b', "a\\b"],
)
def test_what_is_told_to_type_is_taken(value: str) -> None:
    [word] = shlex.split(errors.override("output_dir", value))
    assert compose_config([word]).output_dir == value


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
@pytest.mark.parametrize("times", [1, 2])
def test_memory_that_runs_out_while_a_checkpoint_is_written(
    error: Exception, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, save = [error] * times, torch.save

    def fails(content: Any, file: Any) -> None:
        if left:
            file.write(b"half")
            raise left.pop()
        save(content, file)

    path = tmp_path / "last.pt"
    checkpoint.save(path, {"number": 1})
    monkeypatch.setattr(torch, "save", fails)
    if times == 1:
        checkpoint.save(path, {"number": 2})
    else:
        with pytest.raises(CheckpointError, match=r"out of memory \(.*the last good one is kept in .*last.pt"):
            checkpoint.save(path, {"number": 2})
    assert checkpoint.load(path)["number"] == 3 - times
    assert list(tmp_path.iterdir()) == [path]
