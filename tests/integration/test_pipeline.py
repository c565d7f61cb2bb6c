"""Data workers of a whole training: the same ones over epochs, the samples of none, and no process left behind."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, get_worker_info

from adaptive_trainer import Trainer, compose_config
from adaptive_trainer.config.schema import RungConfig
from adaptive_trainer.data.cached import prefetch
from adaptive_trainer.data.position import Position
from adaptive_trainer.errors import Interrupted, LadderExhausted, Stopped
from adaptive_trainer.report.result import Result

# Python 3.12 warns of every fork in a process with threads, and torch always has some
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

MiB = 2**20
SIZE, BATCH, EPOCHS = 40, 8, 3
UPDATES = SIZE // BATCH  # an epoch
DRY_PASSES = 2  # forward passes of a dry run come before its updates
SMALLER = {"smaller": ["trainer.batch_size=4", "data.image_size=6"]}


class Drawn(Dataset[Any]):
    """Images drawn anew each time they are read; the processes that read them are on record."""

    classes = ("a", "b", "c")

    def __init__(self, record: Path, size: int, fault: Callable[[int], None]) -> None:
        self.record, self.size, self.fault = record, size, fault

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with self.record.open("a") as file:
            file.write(f"{os.getpid()}\n")
        self.fault(index)
        drawn = torch.rand(3, 8, 8) + float(np.random.random()) + random.random()
        return drawn, index % 3


class Net(nn.Module):
    """Notes what it trains on, and whose children are alive then; `event` is called with the number of the update."""

    def __init__(self, classes: int, event: Callable[[int], None]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, classes))
        self.event = event
        self.inputs: list[list[float]] = []
        self.workers: list[set[int]] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            numbers = x.flatten().tolist()  # not known of shapes alone, which are run before, to predict
            self.workers.append(alive())
            self.inputs.append(numbers)
            self.event(len(self.inputs) - DRY_PASSES)
        out: Tensor = self.body(x)
        return out


def alive() -> set[int]:
    return {child.pid or 0 for child in multiprocessing.active_children()}


def nothing(number: int) -> None:
    pass


def fit(
    folder: Path,
    *overrides: str,
    num_workers: int = 2,
    event: Callable[[int], None] = nothing,
    fault: Callable[[int], None] = nothing,
    steps: dict[str, list[str]] = SMALLER,
) -> tuple[Result, Net]:
    """The result and the network that was trained."""
    nets: list[Net] = []

    def make(config: Any, classes: int) -> nn.Module:
        nets.append(Net(classes, event))
        return nets[-1]

    cfg = compose_config([
        f"trainer.batch_size={BATCH}", f"trainer.epochs={EPOCHS}", "data.image_size=8", "data.transforms=torchvision",
        f"data.num_workers={num_workers}", "memory.limit=32MiB", "device=cpu", "ladder=none", *overrides,
    ])  # fmt: skip
    cfg.ladder.rungs = [RungConfig(name, overrides) for name, overrides in steps.items()]
    folder.mkdir(exist_ok=True)
    data = Drawn(folder / "pids", SIZE, fault), Drawn(folder / "pids", 6, nothing)
    result = Trainer(cfg, model=make, train_data=data[0], val_data=data[1], output_dir=folder).fit()
    return result, next((net for net in nets if net.inputs), nets[-1])


def test_the_same_workers_in_every_epoch_and_evaluation(tmp_path: Path) -> None:
    _, net = fit(tmp_path)
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == EPOCHS * (SIZE + 6)
    assert len(set(pids)) == 2
    assert os.getpid() not in map(int, pids)
    assert net.workers == [set(map(int, pids))] * (DRY_PASSES + EPOCHS * UPDATES)
    assert alive() == set()


def test_workers_read_while_the_dry_run_runs(tmp_path: Path) -> None:
    read = []

    def event(update: int) -> None:
        if update <= 0:  # in the dry run
            until = time.monotonic() + 30
            while not (tmp_path / "pids").exists() and time.monotonic() < until:
                time.sleep(0.01)
            read.append((tmp_path / "pids").exists())

    fit(tmp_path, event=event)
    assert read == [True] * DRY_PASSES


@pytest.mark.parametrize(
    ("fault", "error"),
    [(MemoryError, LadderExhausted), (ValueError, ValueError), (KeyboardInterrupt, Stopped)],
)
def test_no_worker_is_left_of_a_dry_run_that_fails(
    fault: type[BaseException], error: type[BaseException], tmp_path: Path
) -> None:
    def event(update: int) -> None:
        assert len(alive()) == 2
        raise fault

    with pytest.raises(error):
        fit(tmp_path, event=event, steps={})
    assert alive() == set()


def test_no_worker_starts_where_only_an_evaluation_is_left(tmp_path: Path) -> None:
    fit(tmp_path)
    (tmp_path / "pids").unlink()
    _, net = fit(tmp_path, "resume=auto")
    assert net.workers == []
    assert not (tmp_path / "pids").exists()


def grows(at: int) -> Callable[[int], None]:
    """Memory runs out in that update."""

    def event(update: int) -> None:
        if update == at:
            torch.empty(64 * MiB, dtype=torch.uint8)

    return event


def signalled(at: int, times: int = 1) -> Callable[[int], None]:
    """Ctrl-C is pressed in that update."""

    def event(update: int) -> None:
        for _ in range(times if update == at else 0):
            os.kill(os.getpid(), signal.SIGINT)

    return event


def test_the_workers_of_a_rung_end_before_the_dry_run_of_the_next(tmp_path: Path) -> None:
    result, net = fit(tmp_path, event=grows(UPDATES + 3))
    assert result.rung == "smaller"
    first, rest = net.workers[DRY_PASSES : DRY_PASSES + UPDATES + 3], net.workers[DRY_PASSES + UPDATES + 3 :]
    second = rest[DRY_PASSES:]
    assert rest[:DRY_PASSES] == second[:1] * DRY_PASSES
    assert (len(first[0]), len(second[0])) == (2, 2)
    assert first == first[:1] * len(first)
    assert second == second[:1] * len(second)
    assert not first[0] & second[0]
    assert alive() == set()


def undisturbed(folder: Path, num_workers: int) -> Net:
    return fit(folder, num_workers=num_workers)[1]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[list[float]]:
    """What an undisturbed run without workers trains on."""
    return undisturbed(tmp_path_factory.mktemp("alone"), 0).inputs


def stepped_down(folder: Path, num_workers: int) -> Net:
    return fit(folder, num_workers=num_workers, event=grows(UPDATES + 3))[1]


def resumed(folder: Path, num_workers: int) -> Net:
    with pytest.raises(Interrupted, match=f"after update {UPDATES + 2}, state saved"):
        fit(folder, num_workers=num_workers, event=signalled(UPDATES + 2))
    assert alive() == set()
    return fit(folder, "resume=auto", num_workers=num_workers)[1]


@pytest.mark.parametrize("how", [undisturbed, stepped_down, resumed])
def test_the_samples_and_weights_are_those_without_workers(how: Callable[[Path, int], Net], tmp_path: Path) -> None:
    alone, by_workers = (how(tmp_path / str(number), number) for number in (0, 3))
    assert alone.inputs == by_workers.inputs
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), by_workers.parameters(), strict=True))


def test_a_resumed_run_sees_what_an_undisturbed_one_would(tmp_path: Path) -> None:
    whole, rest = undisturbed(tmp_path / "whole", 2), resumed(tmp_path / "resumed", 2)
    assert rest.inputs[DRY_PASSES:] == whole.inputs[DRY_PASSES + UPDATES + 2 :]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), rest.parameters(), strict=True))


def fails(update: int) -> None:
    if update == UPDATES + 2:
        raise KeyError("what I forgot")


def bug(index: int) -> None:
    if index == SIZE - 1:
        raise ZeroDivisionError("a bug")


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ({"event": fails}, KeyError),
        ({"fault": bug}, ZeroDivisionError),
        ({"event": signalled(UPDATES + 2)}, Interrupted),
        ({"event": signalled(UPDATES + 2, times=2)}, Stopped),
        ({"event": grows(1), "steps": {}}, LadderExhausted),
    ],
)
def test_no_worker_is_left_after_an_error(how: dict[str, Any], error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error) as caught:
        fit(tmp_path, **how)
    assert (tmp_path / "pids").read_text()
    assert alive() == set()  # while the error, which knows every frame, is still there
    del caught


def test_a_worker_without_memory_costs_workers_and_no_sample(expected: list[list[float]], tmp_path: Path) -> None:
    in_the_middle = Position(0, 0, 0, SIZE).permutation()[SIZE // 2]

    def fault(index: int) -> None:
        if index == in_the_middle and get_worker_info() is not None:
            raise MemoryError

    result, net = fit(tmp_path / "short", num_workers=4, fault=fault)
    assert [event for event in result.events if "->" in event] == ["data.num_workers 4 -> 2", "data.num_workers 2 -> 0"]
    assert [len(workers) for workers in net.workers[DRY_PASSES:]][:3] == [4, 4, 0]
    assert net.inputs == expected


def test_a_worker_that_dies_between_epochs_costs_workers_and_no_sample(
    expected: list[list[float]], tmp_path: Path
) -> None:
    """It is killed when all samples of its epoch are read, and missed when others are wanted."""

    def kills(update: int) -> None:
        if update == UPDATES:
            os.kill(min(alive()), signal.SIGKILL)

    result, net = fit(tmp_path / "killed", event=kills)
    assert [event for event in result.events if "->" in event] == ["data.num_workers 2 -> 0"]
    assert net.inputs == expected


class Short:
    """Raises for want of memory at one sample, so many times, in data workers or where there are none."""

    def __init__(self, make: Callable[[], Exception], times: int, *, in_workers: bool = False) -> None:
        self.make, self.left, self.in_workers = make, times, in_workers
        self.at = Position(0, 0, 0, SIZE).permutation()[SIZE // 2]

    def __call__(self, index: int) -> None:
        if index == self.at and self.left and (get_worker_info() is not None) == self.in_workers:
            self.left -= 1
            raise self.make()


WANTS: dict[str, Callable[[], Exception]] = {
    "MemoryError": MemoryError,
    "numpy": lambda: np._core._exceptions._ArrayMemoryError((2**40,), np.dtype("u1")),  # type: ignore[attr-defined]
    "bad_alloc": lambda: RuntimeError("std::bad_alloc"),
    "torch": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    "ENOMEM": lambda: OSError(errno.ENOMEM, "Cannot allocate memory"),
    "ENOMEM of a file": lambda: OSError(errno.ENOMEM, "Cannot allocate memory", "a.jpg"),
    "Pillow": lambda: OSError("out of memory error when reading image file"),
}


@pytest.mark.parametrize("make", WANTS.values(), ids=WANTS)
def test_no_memory_in_a_worker_costs_workers_and_no_sample(
    make: Callable[[], Exception], expected: list[list[float]], tmp_path: Path
) -> None:
    result, net = fit(tmp_path / "short", fault=Short(make, 9, in_workers=True))
    assert [event for event in result.events if "->" in event] == ["data.num_workers 2 -> 0"]
    assert (result.rung, net.inputs) == ("requested", expected)


@pytest.mark.parametrize("make", WANTS.values(), ids=WANTS)
def test_no_memory_without_workers_is_tried_once_more(
    make: Callable[[], Exception], expected: list[list[float]], tmp_path: Path
) -> None:
    result, net = fit(tmp_path / "short", num_workers=0, fault=Short(make, 1))
    assert (result.rung, net.inputs) == ("requested", expected)


def test_no_memory_without_workers_again_is_a_rung(tmp_path: Path) -> None:
    result, _ = fit(tmp_path, num_workers=0, fault=Short(MemoryError, 2))
    assert result.rung == "smaller"
    assert [(entry.rung, entry.phase) for entry in result.attempts if entry.outcome == "oom"] == [
        ("requested", f"loading data, after update {SIZE // 2 // BATCH}")
    ]


@pytest.mark.parametrize("text", ["CUDA out of memory. Tried to allocate 2 GiB", "std::bad_alloc", "[Errno 12] no"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_mistake_that_quotes_an_out_of_memory_ends_the_run(num_workers: int, text: str, tmp_path: Path) -> None:
    fault = Short(lambda: ValueError(text), 9, in_workers=num_workers > 0)
    with pytest.raises(ValueError, match=re.escape(text)):
        fit(tmp_path, num_workers=num_workers, fault=fault)


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("times", [1, 2])
def test_a_fork_that_fails_for_want_of_memory(
    at: int, times: int, expected: list[list[float]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of the first workers, or when one of them is there already; before the dry run, and where a batch is wanted."""
    forks, fork = [0], os.fork

    def fails() -> int:
        forks[0] += 1
        if forks[0] in range(at, times * at + 1, at):
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return fork()

    monkeypatch.setattr(os, "fork", fails)
    result, net = fit(tmp_path / "short", num_workers=3)
    assert [event for event in result.events if "->" in event] == ["data.num_workers 3 -> 0"] * (times - 1)
    assert net.inputs == expected
    assert alive() == set()


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("part", ["indices", "buffers"])
def test_no_memory_for_stored_images(part: str, times: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the thread that gathers them, and in what it gathers them into."""
    left = [times]

    def short(original: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            if left[0] and threading.current_thread().name in ("prefetcher_0", "MainThread"):
                left[0] -= 1
                raise MemoryError("no room")
            return original(*args, **kwargs)

        return called

    owner, name = (prefetch._Source, "gather") if part == "indices" else (prefetch, "_Host")
    monkeypatch.setattr(owner, name, short(getattr(owner, name)))
    settings = [
        "data=fakedata", "data.train.size=16", "data.val.size=8", "data.image_size=32", "data.cache=ram",
        "model.name=mobilenetv3_small_050", "trainer.batch_size=4", "data.num_workers=0", "device=cpu",
        "memory.limit=64MiB", "ladder.rungs=[{name: less, overrides: ['trainer.batch_size=2']}]",
    ]  # fmt: skip
    result = Trainer(compose_config(settings), output_dir=tmp_path).fit()
    assert result.rung == ("requested" if times == 1 else "less")
