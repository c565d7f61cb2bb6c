"""The Trainer in this process: parts of one's own, out-of-memory at every place, and nothing left behind."""

from __future__ import annotations

import csv
import gc
import json
import logging
import os
import random
import signal
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from adaptive_trainer import Trainer, compose_config, load_model
from adaptive_trainer.checkpoints import checkpoint
from adaptive_trainer.config.schema import ModelConfig, RungConfig
from adaptive_trainer.data.position import Position
from adaptive_trainer.errors import CheckpointError, ConfigError, DivergedError, LadderExhausted
from adaptive_trainer.memory import usage
from adaptive_trainer.memory.simulated import COUNTED_EVERY, SimulatedDevice
from adaptive_trainer.planning.cache import Measurement
from adaptive_trainer.planning.judge import Judge
from adaptive_trainer.recipe import Recipe
from adaptive_trainer.report.result import Result
from adaptive_trainer.step.dry_run import DRY_RUN_UPDATES, dry_run
from adaptive_trainer.step.update import Update
from adaptive_trainer.training import trial

MiB = 2**20
STEPS = {"half": ["trainer.batch_size=4"], "quarter": ["trainer.batch_size=2"]}
BASE = ("trainer.batch_size=8", "trainer.epochs=2", "data.image_size=8", "data.transforms=none", "data.num_workers=0")


class Seen(Dataset[Any]):
    """Notes which samples are asked for; the first pixel of each tells which it is."""

    classes = ("a", "b", "c")

    def __init__(self, size: int = 40) -> None:
        self.size = size
        self.keys: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.keys.append(index)
        generator = torch.Generator().manual_seed(index)
        image = torch.rand(3, 8, 8, generator=generator)
        image[0, 0, 0] = index
        return image, index % 3


Appetite = Callable[[bool, int], int | list[int]]


class Net(nn.Module):
    """A linear network that notes what it trains on, and takes memory as it is told.

    Attributes:
        trained: sample numbers of every training forward pass, in order.
        appetite: sizes in bytes of what a forward pass holds on top, as a function of (is training, samples).
    """

    def __init__(self, classes: int, appetite: Appetite) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU())
        self.head = nn.Linear(16, classes)
        self.appetite = appetite
        self.trained: list[list[int]] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.trained.append([int(number) for number in x[:, 0, 0, 0].tolist()])  # not known of shapes alone
        sizes = self.appetite(self.training, len(x))
        held = [torch.empty(size, dtype=torch.uint8) for size in ([sizes] if isinstance(sizes, int) else sizes)]
        out: Tensor = self.head(self.body(x / 8))
        del held
        return out


def nothing(training: bool, samples: int) -> int:
    return 1


def settings(*overrides: str, steps: dict[str, list[str]]) -> Any:
    cfg = compose_config([*BASE, "ladder=none", *overrides])
    cfg.ladder.rungs = [RungConfig(name, overrides) for name, overrides in steps.items()]
    return cfg


def fit(
    folder: Path,
    *overrides: str,
    appetite: Appetite = nothing,
    steps: dict[str, list[str]] = STEPS,
    data: Dataset[Any] | None = None,
    **parts: Any,
) -> tuple[Result, list[Net]]:
    """The result, and every network that was made on the way."""
    nets: list[Net] = []

    def make(config: ModelConfig, classes: int) -> nn.Module:
        nets.append(Net(classes, appetite))
        return nets[-1]

    trainer = Trainer(
        settings(*overrides, steps=steps),
        model=make,
        train_data=data or Seen(),
        val_data=Seen(6),
        output_dir=folder,
        **parts,
    )
    return trainer.fit(), [net for net in nets if net.trained]  # shapes alone are run before, to predict


def outcomes(result: Result) -> list[tuple[str, str]]:
    return [(attempt.rung, attempt.outcome) for attempt in result.attempts]


# -- parts of one's own


def test_a_model_data_and_loss_of_ones_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="adaptive_trainer")
    calls: list[tuple[torch.Size, torch.Size]] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        calls.append((output.shape, target.shape))
        return nn.functional.cross_entropy(output, target)

    result, nets = fit(tmp_path, loss=loss)
    assert (torch.Size([8, 3]), torch.Size([8])) in calls
    assert outcomes(result) == [("requested", "fits")]
    assert len(nets) == 1
    assert (result.requested.model, result.used.model) == ("Net", "Net")
    assert "rung requested fits: Net, batch 8, image 8, fp32" in caplog.text
    assert "efficientnet" not in (tmp_path / "metrics.csv").read_text()
    loaded = load_model(tmp_path / "checkpoints" / "best.pt", model=lambda config, classes: Net(classes, nothing))
    assert loaded(torch.rand(2, 3, 8, 8)).shape == (2, 3)


def test_fits_where_standard_error_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert outcomes(fit(tmp_path)[0]) == [("requested", "fits")]


def test_fits_outside_the_main_thread(tmp_path: Path) -> None:
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(fit(tmp_path)[0]))
    thread.start()
    thread.join()
    assert results[0].metrics["epoch"] == 2


# -- out of memory


class GrowsAt:
    """Takes more than the card has from training pass `at` on, for more than `limit` samples."""

    def __init__(self, at: int, limit: int) -> None:
        self.at, self.limit, self.passes = at, limit, 0

    def __call__(self, training: bool, samples: int) -> int:
        self.passes += training and samples > self.limit
        return 64 * MiB if training and samples > self.limit and self.passes >= self.at else 1


@pytest.mark.parametrize("at", [4, 6, 9, 11])  # passes 1 and 2 are the dry run; 5 updates an epoch
def test_memory_runs_out_in_the_middle_of_an_epoch(at: int, tmp_path: Path) -> None:
    data = Seen()
    result, [net] = fit(tmp_path, "memory.limit=32MiB", appetite=GrowsAt(at, 4), data=data)
    assert outcomes(result) == [("requested", "fits"), ("requested", "oom"), ("half", "fits")]
    failed = result.attempts[1]
    assert failed.phase == f"forward, after update {at - 3}"
    assert failed.reason.startswith("Simulated card out of memory")
    assert 0 < (failed.peak_allocated_bytes or 0) <= 32 * MiB
    committed = [numbers for numbers in net.trained if any(number >= 1 for number in numbers)]
    assert committed.pop(at - 3) == committed[at - 3] + committed[at - 2]  # the failed update, and its samples again
    counts = Counter(number for numbers in committed for number in numbers)
    assert counts == dict.fromkeys(range(40), 2)
    assert result.metrics["updates"] == (at - 3) + (80 - 8 * (at - 3)) // 4
    assert result.rung == "half"
    assert any(change.key == "optimizer.lr" and "sqrt rule" in change.why for change in result.changes)


def test_weights_and_optimizer_are_carried_to_the_next_rung(tmp_path: Path) -> None:
    """The second rung's learning rate is nothing, so its weights are those that the first one has left."""
    steps = {"frozen": ["trainer.batch_size=4", "optimizer.lr=0"]}
    alone, [first] = fit(tmp_path / "a", "schedule=constant", "trainer.epochs=1", steps=steps)
    carried, [net] = fit(
        tmp_path / "b", "schedule=constant", "memory.limit=32MiB", appetite=GrowsAt(8, 4), steps=steps
    )  # both epochs: 5 updates of rung requested, then 10 of rung frozen
    assert (alone.rung, carried.rung) == ("requested", "frozen")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), net.parameters(), strict=True))
    saved = checkpoint.load(tmp_path / "b" / "checkpoints" / "last.pt")
    assert {float(state["step"]) for state in saved["optimizer"]["state"].values()} == {5.0 + 10.0}


def test_memory_runs_out_in_the_optimizer_step(tmp_path: Path) -> None:
    """Weights and gradients fit, Adam's two moments do not; SGD has none."""
    steps = {"plain": ["optimizer.name=momentum", "optimizer.momentum=0"]}

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(192, 6 * MiB // 4 // 193)
            self.head = nn.Linear(self.body.out_features, 3)

        def forward(self, x: Tensor) -> Tensor:
            assert float(x[0, 0, 0, 0]) >= 0  # not known of shapes alone: no prediction, so that the rung is tried
            out: Tensor = self.head(self.body(x.flatten(1)))
            return out

    result = Trainer(
        settings("memory.limit=32MiB", steps=steps),
        model=lambda config, classes: Wide(),
        train_data=Seen(),
        val_data=Seen(6),
        output_dir=tmp_path,
    ).fit()
    assert outcomes(result) == [("requested", "oom"), ("plain", "fits")]
    assert result.attempts[0].phase == "optimizer step"
    assert result.used.optimizer == "momentum"


def test_memory_runs_out_in_evaluation(tmp_path: Path) -> None:
    """Its own batch is halved, and training keeps its own."""

    def appetite(training: bool, samples: int) -> int:
        return 64 * MiB if not training and samples > 2 else 1

    result, _ = fit(tmp_path, "memory.limit=32MiB", appetite=appetite)
    assert outcomes(result) == [("requested", "fits")]
    assert result.used.batch_size == 8


def test_evaluation_that_grows_later(tmp_path: Path) -> None:
    passes: list[int] = []

    def appetite(training: bool, samples: int) -> int:
        passes.append(training)
        return 64 * MiB if not training and samples > 2 and sum(passes) > 4 else 1

    result, _ = fit(tmp_path, "memory.limit=32MiB", appetite=appetite)
    assert outcomes(result) == [("requested", "fits")]
    events = [event for event in result.events if "evaluation" in event]
    assert events[0] == "out of memory in evaluation: its batch 6 -> 3; training keeps its own"
    assert "its batch 3 -> 1" in events[1]


def test_another_model_starts_anew(tmp_path: Path) -> None:
    """What the larger one has learned is kept beside it, and the smaller one's head is sized to the classes."""
    steps = {"small": ["model.name=mobilenetv3_small_050"]}
    made: list[tuple[str, int, Net]] = []
    grows = GrowsAt(8, 0)

    def make(config: ModelConfig, classes: int) -> nn.Module:
        net = Net(classes, grows if config.name == "efficientnet_b0" else nothing)
        made.append((config.name, classes, net))
        return net

    data = Seen()
    trainer = Trainer(
        settings("memory.limit=32MiB", steps=steps), model=make, train_data=data, val_data=Seen(6), output_dir=tmp_path
    )
    result = trainer.fit()
    trained = [(name, classes) for name, classes, net in made if net.trained]
    assert trained == [("efficientnet_b0", 3), ("mobilenetv3_small_050", 3)]
    assert "model efficientnet_b0 -> mobilenetv3_small_050: the new model starts from epoch 1" in result.events
    kept = checkpoint.load(tmp_path / "checkpoints" / "before-mobilenetv3_small_050.pt")
    assert (kept["rung"], kept["updates"], kept["config"]["model"]["name"]) == ("requested", 5, "efficientnet_b0")
    assert (result.metrics["epoch"], result.metrics["updates"]) == (2, 10)
    assert (result.requested.model, result.used.model) == ("Net", "Net (mobilenetv3_small_050)")
    best = checkpoint.load(tmp_path / "checkpoints" / "best-efficientnet_b0.pt")
    assert best["config"]["model"]["name"] == "efficientnet_b0"
    rows = [row.split(",") for row in (tmp_path / "metrics.csv").read_text().splitlines()[1:]]
    assert [(row[1], row[-1]) for row in rows] == [
        ("1", "Net"), ("1", "Net (mobilenetv3_small_050)"), ("2", "Net (mobilenetv3_small_050)"),
    ]  # fmt: skip


def test_an_exhausted_ladder_frees_everything(tmp_path: Path) -> None:
    alive: list[weakref.ref[Any]] = []

    def appetite(training: bool, samples: int) -> int:
        return 64 * MiB

    def make(config: ModelConfig, classes: int) -> nn.Module:
        net = Net(classes, appetite)
        alive.extend(weakref.ref(thing) for thing in (net, *net.parameters()))
        return net

    trainer = Trainer(
        settings("memory.limit=32MiB", steps=STEPS),
        model=make,
        train_data=Seen(),
        val_data=Seen(6),
        output_dir=tmp_path,
    )
    with pytest.raises(LadderExhausted, match=r"(?s)requested: oom.*half: oom.*quarter: oom.*what to try"):
        trainer.fit()
    del trainer
    gc.collect()
    assert alive
    assert [thing for thing in alive if thing() is not None] == []


@pytest.mark.usefixtures("soon_known")
def test_peaks_are_those_of_a_card_that_counts_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each of three epochs, with a last batch of 5 and an evaluation that needs the most."""
    peaks: list[list[tuple[str, ...]]] = []
    for every in (COUNTED_EVERY, 1):
        monkeypatch.setattr("adaptive_trainer.memory.simulated.COUNTED_EVERY", every)
        folder = tmp_path / str(every)
        fit(
            folder, "memory.limit=64MiB", "trainer.epochs=3", data=Seen(45),
            appetite=lambda training, samples: samples * MiB if training else [9 * MiB, 3 * MiB],
        )  # fmt: skip
        with (folder / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        peaks.append([(row["peak_allocated_bytes"], row["peak_reserved_bytes"]) for row in rows])
    assert peaks[0] == peaks[1]
    assert len(peaks[0]) == 3


# -- what is not memory


class Broken(Seen):
    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, label = super().__getitem__(index)
        return image, 7 if index == 30 else label


def test_a_bad_label_costs_no_rung(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sample 30 has label 7"):
        fit(tmp_path, data=Broken())
    assert (tmp_path / "attempts.jsonl").read_text().count("\n") == 1


def test_a_shape_mismatch_passes_through_unchanged(tmp_path: Path) -> None:
    def make(config: ModelConfig, classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(5, classes))

    trainer = Trainer(settings(steps=STEPS), model=make, train_data=Seen(), val_data=Seen(6), output_dir=tmp_path)
    with pytest.raises(RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied \(8x192 and 5x3\)"):
        trainer.fit()
    lines = (tmp_path / "attempts.jsonl").read_text().splitlines()
    assert len(lines) == 1
    assert '"outcome": "failed"' in lines[0]


def test_an_error_of_the_loss_in_the_middle_passes_through(tmp_path: Path) -> None:
    calls = Counter[str]()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        calls["loss"] += output.requires_grad  # not where it is found out what kind of loss it is
        if calls["loss"] == 6:
            raise KeyError("what I forgot")
        return nn.functional.cross_entropy(output, target)

    with pytest.raises(KeyError, match="what I forgot"):
        fit(tmp_path, loss=loss)


# -- nothing is left behind


def process_state() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "dtype": torch.get_default_dtype(),
        "cards": list(usage.simulated_devices),
        "handlers": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
        "grad": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("ends", ["well", "exhausted", "in an error"])
def test_a_job_changes_nothing_for_the_process(ends: str, tmp_path: Path) -> None:
    fit(tmp_path / "first")  # torch installs its own handler of SIGCHLD once
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    before = process_state()
    try:
        hungry = GrowsAt(1, 0) if ends == "exhausted" else nothing
        data = Broken() if ends == "in an error" else None
        fit(tmp_path, "trainer.deterministic=true", "memory.limit=32MiB", appetite=hungry, data=data)
        assert ends == "well"
    except (LadderExhausted, ValueError):
        assert ends != "well"
    assert process_state() == before


def test_two_jobs_in_one_process_are_the_same(tmp_path: Path) -> None:
    one, other = (fit(tmp_path / name, "seed=3")[0] for name in "ab")
    timeless = one.metrics.keys() - {"seconds"}
    assert {key: one.metrics[key] for key in timeless} == {key: other.metrics[key] for key in timeless}


# -- policies


@pytest.mark.parametrize(
    ("policy", "optimizer", "said"),
    [
        ("auto", "adamw", "0.001 -> 0.000707 (sqrt rule"),
        ("auto", "sgd", "0.001 -> 0.0005 (linear rule"),
        ("linear", "adamw", "0.001 -> 0.0005 (linear rule"),
        ("none", "adamw", "stays 0.001: trainer.lr_policy=none"),
    ],
)
def test_the_learning_rate_policy_is_logged(
    policy: str, optimizer: str, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="adaptive_trainer"):
        fit(
            tmp_path, f"trainer.lr_policy={policy}", f"optimizer.name={optimizer}", "memory.limit=32MiB",
            appetite=GrowsAt(1, 4),
        )  # fmt: skip
    assert said in caplog.text


@pytest.mark.parametrize("climb", [True, False])
def test_climbing_when_there_is_room_again(climb: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card grows from 8 to 32 MiB after the second epoch, as when another program ends."""
    from adaptive_trainer.memory.limit import Capacity

    epochs = tmp_path / "metrics.csv"

    def room(self: Capacity) -> int:
        has_left = epochs.exists() and epochs.read_text().count("\n") > 2
        assert self.simulated is not None
        self.simulated.capacity = self.simulated._allocator.capacity = (32 if has_left else 8) * MiB
        return self.simulated.capacity

    def appetite(training: bool, samples: int) -> int:
        return 12 * MiB if training and samples > 4 else 1

    monkeypatch.setattr(Capacity, "room", room)
    monkeypatch.setattr(SimulatedDevice, "__init__", _small(SimulatedDevice.__init__))
    result, _ = fit(tmp_path, "memory.limit=32MiB", "trainer.epochs=4", f"ladder.climb={climb}", appetite=appetite)
    went_up = [("requested", "oom"), ("half", "fits"), ("requested", "fits")]
    assert outcomes(result) == (went_up if climb else went_up[:2])
    assert result.rung == ("requested" if climb else "half")
    assert any("there is room again: trying rung requested above half" in event for event in result.events) == climb


def _small(init: Callable[[SimulatedDevice, int], None]) -> Callable[[SimulatedDevice, int], None]:
    def smaller(self: SimulatedDevice, capacity: int) -> None:
        init(self, 8 * MiB)

    return smaller


class Alternating:
    """Takes one large block or many small ones, in turn, which share no cache: it is flushed at every update."""

    def __init__(self) -> None:
        self.passes = 0

    def __call__(self, training: bool, samples: int) -> list[int]:
        if not training or samples <= 4:
            return []
        self.passes += 1
        return [24 * MiB] if self.passes % 2 else [MiB] * 20


def test_thrashing_is_told(tmp_path: Path) -> None:
    result, _ = fit(tmp_path, "memory.limit=40MiB", "trainer.log_every=5", appetite=Alternating())
    assert outcomes(result) == [("requested", "fits")]
    [event] = [event for event in result.events if "flushed its cache" in event]  # once, not at every look
    assert event.startswith("rung requested fits, but the allocator flushed its cache 5 times in 5 updates")
    assert "ladder.avoid_thrashing=true steps down" in event


def test_thrashing_counts_as_out_of_memory_on_request(tmp_path: Path) -> None:
    data = Seen()
    options = ("memory.limit=40MiB", "trainer.log_every=5", "ladder.avoid_thrashing=true")
    result, [net] = fit(tmp_path, *options, appetite=Alternating(), data=data)
    assert outcomes(result) == [("requested", "fits"), ("requested", "oom"), ("half", "fits")]
    assert "flushed its cache" in result.attempts[1].reason
    counts = Counter(number for numbers in net.trained for number in numbers if number)
    assert {counts[number] for number in range(1, 40)} == {2}  # every sample once an epoch


def test_no_thrashing_where_the_cache_is_used(tmp_path: Path) -> None:
    result, _ = fit(tmp_path, "memory.limit=100MiB", "trainer.log_every=5", appetite=Alternating())
    assert not [event for event in result.events if "flushed" in event]


def test_data_that_is_a_tensor(tmp_path: Path) -> None:
    data = TensorDataset(torch.rand(20, 3, 8, 8), torch.arange(20) % 3)
    assert fit(tmp_path, data=data)[0].metrics["updates"] == 2 * 3


def test_no_thrashing_rung_is_left_where_there_is_none_below(tmp_path: Path) -> None:
    options = ("memory.limit=40MiB", "trainer.log_every=5", "ladder.avoid_thrashing=true")
    result, _ = fit(tmp_path, *options, appetite=Alternating(), steps={})
    assert outcomes(result) == [("requested", "fits")]


def test_a_climb_that_fails_goes_back_to_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rung above has another optimizer and another precision, made anew for the try."""
    from adaptive_trainer.memory.limit import Capacity

    rooms = iter(range(10**9, 2 * 10**9))
    monkeypatch.setattr(Capacity, "room", lambda self: next(rooms))  # more each time it is asked for
    monkeypatch.setattr(Judge, "assess", lambda self, config: ("", None))
    steps = {"small": ["optimizer=sgd", "trainer.precision=fp16", "trainer.batch_size=4"]}

    def appetite(training: bool, samples: int) -> int:
        return 64 * MiB if training and samples > 4 else 1

    ends = []
    for climb in (False, True):
        folder = tmp_path / str(climb)
        options = ("memory.limit=32MiB", "trainer.epochs=4", f"ladder.climb={climb}")
        result, _ = fit(folder, *options, appetite=appetite, steps=steps)
        assert (("requested", "oom") in outcomes(result)[1:]) == climb
        ends.append(checkpoint.load(folder / "checkpoints" / "last.pt"))
    for part in ("model", "scaler", "optimizer"):
        assert repr(ends[0][part]) == repr(ends[1][part])


@pytest.mark.parametrize(("size", "batch", "micro", "odd"), [(25, 8, 2, 7), (28, 9, 4, 8), (24, 8, 2, 0)])
def test_the_dry_run_makes_the_update_with_the_largest_part(
    size: int, batch: int, micro: int, odd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last updates of an epoch are split otherwise, so that none has a single sample; 0: as all others."""
    tried: list[int] = []

    def noted(update: Update, sizes: Recipe, *, odd: int) -> int:
        tried.append(odd)
        return dry_run(update, sizes, odd=odd)

    monkeypatch.setattr(trial, "dry_run", noted)
    settings = compose_config([*BASE, f"trainer.batch_size={batch}", f"trainer.micro_batch_size={micro}"])
    settings.trainer.epochs = 1

    def model(*_: Any) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.BatchNorm1d(3))

    Trainer(settings, model=model, train_data=Seen(size), val_data=Seen(6), output_dir=tmp_path).fit()
    assert tried == [odd]


class Full(Seen):
    """Makes its images on a card that is full, for a while."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.left = times

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if len(self.keys) >= 20 and self.left:
            self.left -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
        return super().__getitem__(index)


def test_memory_that_runs_out_in_the_data_set_costs_a_rung_and_no_sample(tmp_path: Path) -> None:
    data = Full(times=2)
    result, [net] = fit(tmp_path, "memory.limit=32MiB", "trainer.epochs=1", data=data)
    assert outcomes(result) == [("requested", "fits"), ("requested", "oom"), ("half", "fits")]
    assert result.attempts[1].phase.startswith("loading data, after update")
    assert sorted(n for numbers in net.trained for n in numbers if n) == list(range(1, 40))


def test_memory_that_runs_out_once_in_the_data_set_costs_nothing(tmp_path: Path) -> None:
    result, [net] = fit(tmp_path, "memory.limit=32MiB", "trainer.epochs=1", data=Full(times=1))
    assert outcomes(result) == [("requested", "fits")]
    assert sorted(n for numbers in net.trained for n in numbers if n) == list(range(1, 40))


@pytest.mark.parametrize(("times", "batches"), [(1, [6]), (2, [3, 3])])
def test_memory_that_runs_out_in_the_validation_set(times: int, batches: list[int], tmp_path: Path) -> None:
    """Once: the same batch is read again. Twice: evaluation takes half of it."""
    seen: list[int] = []

    class Watched(Net):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                seen.append(len(x))
            return super().forward(x)

    val = Full(times)
    val.size, val.keys = 6, [-1] * 20
    cfg = settings("memory.limit=32MiB", "trainer.epochs=1", steps=STEPS)
    made: Any = lambda config, classes: Watched(classes, nothing)  # noqa: E731
    result = Trainer(cfg, model=made, train_data=Seen(), val_data=val, output_dir=tmp_path).fit()
    assert outcomes(result) == [("requested", "fits")]
    assert seen[-len(batches) :] == batches


@pytest.mark.parametrize(("before", "after", "keys"), [("sgd", "adamw", 3), ("adamw", "sgd", 1)])
def test_resumed_with_another_optimizer_it_starts_anew(before: str, after: str, keys: int, tmp_path: Path) -> None:
    fit(tmp_path, f"optimizer={before}", "trainer.epochs=1")
    result, _ = fit(tmp_path, f"optimizer={after}", "resume=auto")
    assert (result.metrics["epoch"], result.metrics["updates"]) == (2, 10)
    assert f"resumed with another optimizer.name: {before} -> {after}" in result.events
    saved = checkpoint.load(tmp_path / "checkpoints" / "last.pt")["optimizer"]["state"]
    assert {len(values) for values in saved.values()} == {keys}


@pytest.mark.parametrize(
    ("optimizer", "before", "after"),
    [("adamw", "weight_decay=0", "weight_decay=0.1"), ("rmsprop", "momentum=0", "momentum=0.9")],
)
def test_resumed_with_settings_that_need_other_state_the_optimizer_starts_anew(
    optimizer: str, before: str, after: str, tmp_path: Path
) -> None:
    fit(tmp_path, f"optimizer.name={optimizer}", f"optimizer.{before}", "trainer.epochs=1")
    result, _ = fit(tmp_path, f"optimizer.name={optimizer}", f"optimizer.{after}", "resume=auto")
    assert result.metrics["updates"] == 10
    assert "the optimizer starts anew: what the checkpoint has of it is of another kind" in result.events


def norm(*_: Any) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 3))


def test_what_a_stage_leaves_takes_no_memory_of_the_next(tmp_path: Path) -> None:
    stages = ",".join(f"{{name: {name}, overrides: ['optimizer.lr=0.00{name}']}}" for name in "123")
    cfg = settings(f"phases.stages=[{stages}]", "trainer.epochs=1", "trainer.ema_decay=0.9", steps={})
    result = Trainer(cfg, model=norm, train_data=Seen(), val_data=Seen(6), output_dir=tmp_path).fit()
    assert outcomes(result) == [("requested", "fits")] * 3
    assert len({attempt.peak_allocated_bytes for attempt in result.attempts}) == 1


def stages_of(*overrides: list[str]) -> str:
    """Stages a, b, c, ... with these overrides."""
    parts = (f"{{name: {name}, overrides: {list(each)}}}" for name, each in zip("abcd", overrides, strict=False))
    return f"phases.stages=[{', '.join(parts)}]"


def test_the_best_of_a_stage_is_kept_when_the_next_begins(tmp_path: Path) -> None:
    result, _ = fit(tmp_path, stages_of(["optimizer.lr=0.01"], ["optimizer.lr=20"]), steps={})
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["best-a.pt", "best.pt", "last.pt"]
    assert "the best of a is kept in checkpoints/best-a.pt" in result.events
    assert [torch.load(tmp_path / "checkpoints" / name)["stage"] for name in names[:2]] == [0, 1]


def test_a_stage_with_another_model_says_that_it_starts_anew(tmp_path: Path) -> None:
    result, _ = fit(tmp_path, stages_of([], ["model.name=mobilenetv3_small_050"]), "trainer.epochs=1", steps={})
    assert "model efficientnet_b0 -> mobilenetv3_small_050: no weights are carried on" in result.events
    result, _ = fit(tmp_path / "same", stages_of([], ["optimizer.lr=0.1"]), "trainer.epochs=1", steps={})
    assert not any("no weights" in event for event in result.events)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["device=cuda", "data.root=x"], "stage 'b': device, data.root cannot change between stages"),
        (["memory.limit=1MiB"], "stage 'b': memory.limit cannot change between stages"),
        (["trainer.deterministic=true"], "stage 'b': trainer.deterministic cannot change between stages"),
        (["trainer.batch_size=99"], "trainer.batch_size=99 is above the 40 samples"),
    ],
)
def test_what_a_stage_cannot_set(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(tmp_path, stages_of([], overrides), steps={})
    with pytest.raises(ConfigError, match="stage name 'a' is used twice"):
        fit(tmp_path, "phases.stages=[{name: a}, {name: a}]", steps={})


def test_what_stages_may_set(tmp_path: Path) -> None:
    """What none differs in, a seed of their own, and no name."""
    both = "trainer.deterministic=true"
    stages = f"phases.stages=[{{overrides: ['{both}']}}, {{overrides: ['{both}', 'seed=3']}}]"
    result, _ = fit(tmp_path, stages, "trainer.epochs=1", steps={})
    assert [stage["name"] for stage in result.stages] == ["stage-1", "stage-2"]
    assert checkpoint.load(tmp_path / "checkpoints" / "last.pt")["position"]["seed"] == 3
    assert fit(tmp_path, stages, "trainer.epochs=2", "resume=auto", steps={})[0].metrics["epoch"] == 2


class Named(nn.Module):
    """Gives its scores under a name."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"scores": self.body(x / 8)}


def test_where_accuracy_is_not_known_the_least_loss_is_the_best(tmp_path: Path) -> None:
    cfg = settings("schedule=constant", "trainer.epochs=5", steps={})

    def loss(output: Any, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output["scores"], labels)

    result = Trainer(
        cfg, model=lambda *_: Named(), loss=loss, train_data=Seen(), val_data=Seen(6), output_dir=tmp_path
    ).fit()
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert {row[key] for row in rows for key in ("val_accuracy", "train_accuracy")} == {"nan"}
    least = min(float(row["val_loss"]) for row in rows)
    assert torch.load(tmp_path / "checkpoints" / "best.pt")["best"] == pytest.approx(-least)
    assert json.loads((tmp_path / "result.json").read_text())["metrics"]["val_accuracy"] is None
    assert sum("accuracy is not known" in event for event in result.events) == 1


class Grows(nn.Module):
    """Keeps what it has seen in a buffer that grows, and one that its first forward pass makes."""

    seen: Tensor

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, classes))
        self.register_buffer("seen", torch.zeros(0))
        self.register_buffer("late", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen = torch.cat([self.seen, x[:, 0, 0, 0]])
            self.late = x[:1, 0, 0]
            if "made" not in self._buffers:
                self.register_buffer("made", x.mean())
        output: Tensor = self.body(x / 8)
        return output


def test_buffers_that_grow_are_loaded_and_resumed(tmp_path: Path) -> None:
    def trained(folder: str, epochs: int) -> Trainer:
        cfg = settings(f"trainer.epochs={epochs}", "schedule=constant", "resume=auto", steps={})
        parts: Any = {"model": lambda *_: Grows(), "train_data": Seen(), "val_data": Seen(6)}
        trainer = Trainer(cfg, output_dir=tmp_path / folder, **parts)
        trainer.fit()
        return trainer

    whole = trained("a", 2)
    trained("b", 1)
    parts = trained("b", 2)
    assert whole.model is not None
    assert parts.model is not None
    expected, found = whole.model.state_dict(), parts.model.state_dict()
    loaded = load_model(tmp_path / "b" / "checkpoints" / "last.pt", lambda *_: Grows()).state_dict()
    assert sorted(expected) == ["body.1.bias", "body.1.weight", "late", "made", "seen"]
    assert len(expected["seen"]) == 80
    for other in (found, loaded):
        assert [key for key in expected if not torch.equal(expected[key], other[key])] == []
    trained_with = torch.load(tmp_path / "b" / "checkpoints" / "best.pt")
    assert sorted(trained_with["made_buffers"]) == ["late", "made", "seen"]
    cfg = settings("trainer.epochs=1", "trainer.ema_decay=0.9", steps={})
    with pytest.raises(ConfigError, match="the network has made buffers since its moving average was made"):
        Trainer(cfg, model=lambda *_: Grows(), train_data=Seen(), output_dir=tmp_path / "c").fit()
    with pytest.raises(CheckpointError, match=r"does not fit what <lambda> makes \(.*size mismatch for body.1.weight"):
        load_model(tmp_path / "b" / "checkpoints" / "last.pt", lambda *_: Grows(5))


class Scale(nn.Module):
    """Has a parameter and a buffer that another network has not."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((192,), 2.0))
        self.register_buffer("shift", torch.ones(192))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.get_buffer("shift")


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    def model(middle: type[nn.Module]) -> Any:
        return lambda *_: nn.Sequential(nn.Flatten(), middle(), nn.Linear(192, 3))

    cfg = settings("trainer.epochs=1", steps={})
    Trainer(cfg, model=model(Scale), train_data=Seen(), val_data=Seen(6), output_dir=tmp_path).fit()
    for name in ("best.pt", "last.pt"):
        with pytest.raises(CheckpointError, match="Unexpected key"):
            load_model(tmp_path / "checkpoints" / name, model(nn.Identity))
        load_model(tmp_path / "checkpoints" / name, model(Scale))


def test_parameters_of_a_loss_are_told_of(tmp_path: Path) -> None:
    class Scaled(nn.CrossEntropyLoss):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, output: Tensor, labels: Tensor) -> Tensor:
            return super().forward(output * self.scale, labels)

    result, _ = fit(tmp_path, "trainer.epochs=1", steps={}, loss=Scaled())
    assert any("the loss has parameters, which nothing trains" in event for event in result.events)


class Complex(nn.Module):
    """Has a complex parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(192, 3, dtype=torch.complex64) / 50)

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1).to(torch.complex64) @ self.weight).abs()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_complex_parameters_are_trained(optimizer: str, tmp_path: Path) -> None:
    cfg = settings(f"optimizer={optimizer}", "trainer.epochs=1", steps={})
    trainer = Trainer(cfg, model=lambda *_: Complex(), train_data=Seen(), val_data=Seen(6), output_dir=tmp_path)
    assert trainer.fit().outcome == "trained"


def test_lazy_parameters_are_refused(tmp_path: Path) -> None:
    cfg = settings(steps={})
    trainer = Trainer(
        cfg, model=lambda *_: nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), train_data=Seen(), output_dir=tmp_path
    )
    with pytest.raises(ConfigError, match=r"Sequential has lazy parameters.*run it once on an image"):
        trainer.fit()


def test_the_folder_stays_where_it_is_when_the_caller_changes_his(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    class Moves(Seen):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            os.chdir("/")
            return super().__getitem__(index)

    fit(Path("here"), "trainer.epochs=1", data=Moves())
    assert (tmp_path / "here" / "result.json").exists()


class Counting(nn.Flatten):
    """Its state is no tensor, and of a version of its own."""

    _version = 2
    versions: ClassVar[list[Any]] = []

    def get_extra_state(self) -> dict[str, int]:
        return {"count": 3}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"count": 3}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        self.versions.append(local_metadata.get("version"))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_all_that_a_network_keeps_goes_to_the_next_stage(tmp_path: Path) -> None:
    cfg = settings("phases.stages=[{name: a}, {name: b}]", "trainer.epochs=1", steps={})
    trainer = Trainer(
        cfg,
        model=lambda *_: nn.Sequential(Counting(), nn.Linear(192, 3)),
        train_data=Seen(),
        val_data=Seen(6),
        output_dir=tmp_path,
    )
    result = trainer.fit()
    assert outcomes(result) == [("requested", "fits")] * 2
    assert Counting.versions == [2]


class Spoiled(nn.CrossEntropyLoss):
    """No number from the second update of training on."""

    def __init__(self, nets: list[Net]) -> None:
        super().__init__()
        self.nets = nets

    def forward(self, output: Tensor, labels: Tensor) -> Tensor:
        loss = super().forward(output, labels)
        return loss * float("nan") if self.nets and len(self.nets[-1].trained) > DRY_RUN_UPDATES + 1 else loss


def test_a_step_down_keeps_no_weights_whose_loss_is_no_number(tmp_path: Path) -> None:
    nets: list[Net] = []

    def appetite(training: bool, samples: int) -> int:
        return 64 * MiB if len(nets[-1].trained) == DRY_RUN_UPDATES + 4 else 1

    def make(config: ModelConfig, classes: int) -> nn.Module:
        nets.append(Net(classes, appetite))
        return nets[-1]

    cfg = settings("memory.limit=32MiB", "trainer.log_every=100", steps=STEPS)
    with pytest.raises(DivergedError, match="training loss is nan"):
        Trainer(cfg, model=make, loss=Spoiled(nets), train_data=Seen(), val_data=Seen(6), output_dir=tmp_path).fit()
    said = [json.loads(line)["outcome"] for line in (tmp_path / "attempts.jsonl").read_text().splitlines()]
    assert said[:2] == ["fits", "oom"]
    assert checkpoint.load(tmp_path / "checkpoints" / "last.pt")["updates"] == 0


class OneLeft(Seen):
    """Of the first batch of eight all but one cannot be read."""

    broken = frozenset(Position(0, 0, 0, 40).permutation()[:7])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index in self.broken:
            raise OSError("broken")
        return super().__getitem__(index)


def test_a_single_sample_that_broken_ones_leave_is_not_trained(tmp_path: Path) -> None:
    cfg = settings("data.on_error=skip", "trainer.batch_size=8", "trainer.epochs=1", steps={})
    result = Trainer(cfg, model=norm, train_data=OneLeft(), val_data=Seen(6), output_dir=tmp_path).fit()
    assert result.metrics["updates"] == 5
    left = "of a batch of 8, broken images have left one, and BatchNorm cannot train on one"
    assert [event for event in result.events if event.startswith("of a batch")] == [left]


def test_the_best_model_is_saved_before_the_state_that_knows_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[str] = []
    original = checkpoint.save

    def save(path: Path, content: dict[str, Any]) -> None:
        saved.append(path.name)
        original(path, content)

    monkeypatch.setattr(checkpoint, "save", save)
    fit(tmp_path, "trainer.epochs=1")
    assert saved == ["last.pt", "best.pt", "last.pt"]


def test_what_this_card_has_proven_before_is_not_proven_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card's memory lasts from one run to the next; here it is given."""
    ends, learned, samples = [], [], []
    monkeypatch.setattr(Judge, "learn", lambda self, config, entry: learned.append(entry))
    for number, known in enumerate((None, Measurement(MiB, None, 5 * MiB, 6 * MiB))):
        monkeypatch.setattr(Judge, "earlier_dry_run", lambda self, config, known=known: known)
        result, nets = fit(tmp_path / str(number))
        ends.append(checkpoint.load(tmp_path / str(number) / "checkpoints" / "last.pt"))
        samples.append(sum(map(len, nets[0].trained)))
    assert samples == [2 * 8 + 2 * 40, 2 * 40]
    [entry] = result.attempts
    assert (entry.outcome, entry.reason) == ("fits", "proven on this card before")
    assert (entry.peak_allocated_bytes, entry.peak_reserved_bytes) == (5 * MiB, 6 * MiB)
    assert len(learned) == 1, "nothing was learned of what was not tried"
    for part in ("model", "optimizer", "random", "meters"):
        assert repr(ends[0][part]) == repr(ends[1][part])


def test_an_earlier_proof_that_training_contradicts_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation meets nothing that this run has tried, and is halved; an update that fails costs the rung."""
    forgotten: list[int] = []
    known = Measurement(MiB, None, 5 * MiB, 6 * MiB)
    monkeypatch.setattr(Judge, "assess", lambda self, config: ("", None))
    monkeypatch.setattr(Judge, "earlier_dry_run", lambda self, config: known if config.trainer.batch_size > 2 else None)
    monkeypatch.setattr(Judge, "forget", lambda self, config: forgotten.append(config.trainer.batch_size))

    def appetite(training: bool, samples: int) -> int:
        return 64 * MiB if samples > (4 if training else 2) else 1

    result, nets = fit(tmp_path, "memory.limit=32MiB", "trainer.eval_batch_size=4", appetite=appetite)
    assert [(entry.rung, entry.outcome) for entry in result.attempts] == [
        ("requested", "fits"), ("requested", "oom"), ("half", "fits"),
    ]  # fmt: skip
    assert forgotten == [8]
    assert [event for event in result.events if "evaluation" in event] == [
        "out of memory in evaluation: its batch 4 -> 2; training keeps its own"
    ]
    kept = Counter(number for batch in nets[0].trained for number in batch if len(batch) <= 4)
    assert set(kept.values()) == {2}, "each sample once an epoch"


def test_a_proof_that_halved_its_evaluation_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run would begin with the evaluation that did not fit, and give up its graph for it."""
    learned: list[str] = []
    monkeypatch.setattr(Judge, "assess", lambda self, config: ("", None))
    monkeypatch.setattr(Judge, "learn", lambda self, config, entry: learned.append(entry.outcome))
    for most in (2, 8):

        def appetite(training: bool, samples: int, most: int = most) -> int:
            return 64 * MiB if not training and samples > most else 1

        result, _ = fit(tmp_path / str(most), "memory.limit=32MiB", appetite=appetite)
        said = "evaluation takes batches of 1: 6 at a time do not fit; training keeps its own"
        assert (said in result.events) == (most == 2)
    assert learned == ["fits"]


@pytest.mark.parametrize(("samples", "expected"), [(40, "proven on this card before"), (39, "")])
def test_what_an_earlier_dry_run_has_not_shown_gets_one(
    samples: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last update of an epoch, 7 samples at once, takes more than the others, 2 times 4."""
    monkeypatch.setattr(Judge, "earlier_dry_run", lambda self, config: Measurement(MiB, None, 5 * MiB, 6 * MiB))
    result, _ = fit(tmp_path, "trainer.micro_batch_size=7", data=Seen(samples))
    assert [entry.reason for entry in result.attempts] == [expected]


def test_a_card_is_for_plans(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\(NVIDIA GeForce RTX 2060\) is for task=plan and task=memory"):
        fit(tmp_path / "run", "card=rtx2060")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "kind"), [(Net(3, nothing), "a Net"), ("resnet18", "a str"), (lambda: None, "a function")]
)
def test_a_network_is_no_function_that_makes_one(model: Any, kind: str) -> None:
    said = rf"model is {kind}; give a function of \(model settings, number of classes\)"
    with pytest.raises(ConfigError, match=said):
        Trainer(settings(steps={}), model=model)


@pytest.mark.parametrize(
    ("loss", "said"),
    [("ce", "a str"), (nn.CrossEntropyLoss, "the class CrossEntropyLoss"), (lambda output: output, "a function")],
)
def test_what_is_no_loss(loss: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"loss is {said}; give a function of \(output, labels\)"):
        Trainer(settings(steps={}), loss=loss)


@pytest.mark.parametrize(
    ("loss", "kind"),
    [(nn.CrossEntropyLoss(reduction="none"), r"tensor of shape \(8,\)"), (lambda output, labels: 1.0, "float")],
)
def test_what_a_loss_gives_that_is_none_of_a_batch(loss: Any, kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"the loss of a batch is a {kind}, and is to be a tensor of one number"):
        fit(tmp_path, loss=loss)


class Pair(nn.Linear):
    """Gives two tensors."""

    def forward(self, input: Tensor) -> Any:
        return super().forward(input.flatten(1)), input


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda *_: nn.Sequential(nn.Flatten(), nn.Linear(192, 2)),
            r"scores of shape \(8, 2\), and there are 3 classes",
        ),
        (lambda *_: Pair(192, 3), "the network gives a tuple, and cross entropy takes a tensor of scores"),
    ],
)
def test_what_is_no_score_for_each_class(make: Any, said: str, tmp_path: Path) -> None:
    cfg = settings(steps={})
    with pytest.raises(ConfigError, match=said):
        Trainer(cfg, model=make, train_data=Seen(), val_data=Seen(6), output_dir=tmp_path).fit()


def test_what_the_caller_has_chosen_for_tensors_changes_nothing(tmp_path: Path) -> None:
    expected, _ = fit(tmp_path / "a")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            found, _ = fit(tmp_path / "b")
        with torch.inference_mode():
            again, _ = fit(tmp_path / "c")
            assert torch.is_inference_mode_enabled()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    losses = [result.metrics["val_loss"] for result in (expected, found, again)]
    assert losses[0] == losses[1] == losses[2]


def test_settings_of_another_kind() -> None:
    plain: Any = {"trainer": {"epochs": 1}}
    with pytest.raises(ConfigError, match=r"the settings are a dict; compose_config\(\[...\]\) makes what"):
        Trainer(plain)
    with pytest.raises(ConfigError, match=r"the settings lack task, .*compose_config"):
        Trainer(OmegaConf.create({"a": 1}))
    with pytest.raises(ConfigError, match="a Trainer trains, and task=plan"):
        Trainer(compose_config(["task=plan"]))


def test_one_training_at_a_time_in_a_process(tmp_path: Path) -> None:
    """Both would seed, and draw from, the same random numbers."""
    refused: list[ConfigError] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if not refused:
            with pytest.raises(ConfigError, match="another training runs in this process") as caught:
                fit(tmp_path / "inner")
            refused.append(caught.value)
        return nn.functional.cross_entropy(output, target)

    result, _ = fit(tmp_path / "outer", loss=loss)
    assert (result.outcome, len(refused)) == ("trained", 1)
    assert fit(tmp_path / "inner")[0].outcome == "trained"


def test_a_function_that_makes_no_network(tmp_path: Path) -> None:
    makes_nothing: Any = lambda config, classes: None  # noqa: E731
    with pytest.raises(ConfigError, match=r"model is to make a torch\.nn\.Module, and has made a NoneType"):
        Trainer(settings(steps={}), model=makes_nothing, train_data=Seen(), output_dir=tmp_path).fit()
