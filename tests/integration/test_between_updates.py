"""What is done between updates, evaluation above all, happens wholly or leaves no trace, and ends in a defined way."""

from __future__ import annotations

import csv
import os
import random
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from adaptive_trainer import Trainer, compose_config
from adaptive_trainer.checkpoints import checkpoint, packing, resume
from adaptive_trainer.errors import CheckpointError, Interrupted, LadderExhausted, OutOfMemory, UserError
from adaptive_trainer.memory.limit import Capacity
from adaptive_trainer.models.optimizers import Schedule
from adaptive_trainer.report import earlier
from adaptive_trainer.report import record as report
from adaptive_trainer.report.lines import Lines
from adaptive_trainer.report.record import Record
from adaptive_trainer.report.result import Result
from adaptive_trainer.step.undo import Undo
from adaptive_trainer.training import trainer
from adaptive_trainer.training.epochs.evaluation import Evaluation
from adaptive_trainer.training.epochs.loop import Loop
from adaptive_trainer.training.epochs.watch import BrokenImages, RunningLoss, Thrashing
from adaptive_trainer.training.rungs import Climbing
from tests.integration.test_resume import differing
from tests.support.faults import Fault, differences, dump
from tests.support.runs import Case, Run, start

SETTINGS = [
    "device=cpu", "memory.limit=none", "ladder=none", "data.image_size=8", "data.transforms=none",
    "data.num_workers=0", "trainer.epochs=2", "trainer.batch_size=8", "trainer.log_every=1",
    "trainer.checkpoint_every=2", "resume=auto", "optimizer.lr=0.01", "trainer.eval_batch_size=4",
]  # fmt: skip


class Restless(nn.Module):
    """Counts and draws in evaluation as in training, and what it draws decides what it gives.

    Attributes:
        pause: called in each forward pass in evaluation.
    """

    calls: Tensor
    hidden: Tensor
    pause: Callable[[], object]

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("hidden", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.hidden.add_(torch.rand(2))
        if not self.training:
            Restless.pause()
        noise = torch.rand(()) + random.random() + float(np.random.rand())
        output: Tensor = self.body(x + 0.1 * noise + 0.01 * self.calls + 0.01 * self.hidden.sum())
        return output


Restless.pause = staticmethod(lambda: None)


def pictures(count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(count)
    return TensorDataset(torch.rand(count, 3, 8, 8, generator=generator), torch.arange(count) % 5)


def trained(folder: Path, *overrides: str) -> Result:
    training = Trainer(
        compose_config([*SETTINGS, *overrides]), model=lambda *_: Restless(), train_data=pictures(21),
        val_data=pictures(14), output_dir=folder,
    )  # fmt: skip
    return training.fit()


def end_of(folder: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """The last checkpoint, and the rows of figures without the time they took."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]
    content = checkpoint.load(folder / "checkpoints" / "last.pt")
    content["metrics"].pop("seconds", None)
    return content, rows


def same_end(one: Path, other: Path) -> list[str]:
    (a, rows), (b, others) = end_of(one), end_of(other)
    return [*differing({**a, "request": ""}, {**b, "request": ""}), *(["metrics.csv"] if rows != others else [])]


@pytest.fixture(scope="module", params=["", "trainer.ema_decay=0.9"], ids=["weights", "average"])
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder, overrides = tmp_path_factory.mktemp("undisturbed"), [request.param] if request.param else []
    trained(folder, *overrides)
    return folder, overrides


class Refusing:
    """Stands for a function that has no memory in some of its calls."""

    def __init__(self, real: Callable[..., Any], error: Exception, calls: Callable[[int], bool]) -> None:
        self.real, self.error, self.calls, self.count, self.raised = real, error, calls, 0, 0

    def __get__(self, owner: Any, kind: type | None = None) -> Callable[..., Any]:
        return lambda *args, **kwargs: self(owner, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        if self.calls(self.count):
            self.raised += 1
            raise self.error
        return self.real(*args, **kwargs)


PLACES: dict[str, tuple[Any, str]] = {
    "schedule": (Schedule, "apply"),
    "loss asked for": (RunningLoss, "ask"),
    "loss read": (RunningLoss, "answer"),
    "broken images": (BrokenImages, "name"),
    "a look at the allocator": (Thrashing, "look"),
    "peaks": (Capacity, "peaks"),
    "an epoch's figures": (Record, "metrics"),
    "a line for people": (Lines, "epoch"),
    "a beginning": (Undo, "begin"),
    "a checkpoint": (packing, "pack"),
    "the weights": (nn.Module, "state_dict"),
    "is it time to climb": (Climbing, "is_due"),
    "evaluation": (Evaluation, "run"),
}
ERRORS = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB."),
    RuntimeError("std::bad_alloc"),
]


@pytest.mark.parametrize("place", PLACES)
def test_one_out_of_memory_between_updates_changes_nothing(
    place: str, undisturbed: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first, third and last call in training."""
    expected, overrides = undisturbed
    if not overrides:
        pytest.skip("with an average there is more to keep")
    owner, name = PLACES[place]
    training, calls = begins_with_training(monkeypatch), list[int]()
    real = getattr(owner, name)

    def refuse_in_training(at: int, error: Exception = ERRORS[0]) -> Refusing:
        def hits(_: int) -> bool:
            calls.extend([1] if training else [])
            return len(calls) == at and bool(training)

        training.clear()
        calls.clear()
        refusing = Refusing(real, error, hits)
        monkeypatch.setattr(owner, name, refusing)
        return refusing

    refuse_in_training(0)
    trained(tmp_path / "whole", *overrides)
    last = len(calls)
    for number, at in enumerate(sorted({1, min(3, last), last})):
        refusing = refuse_in_training(at, ERRORS[number])
        trained(tmp_path / str(at), *overrides)
        assert refusing.raised == 1
        assert same_end(tmp_path / str(at), expected) == [], at


def begins_with_training(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Not empty any more once a loop has begun."""
    training, run = list[int](), Loop.run

    def noted(loop: Loop) -> bool:
        training.append(0)
        return run(loop)

    monkeypatch.setattr(Loop, "run", noted)
    return training


@pytest.mark.parametrize("place", PLACES)
def test_memory_that_stays_short_between_updates_ends_in_words(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ERRORS[list(PLACES).index(place) % len(ERRORS)]
    training = begins_with_training(monkeypatch)
    owner, name = PLACES[place]
    refusing = Refusing(getattr(owner, name), error, lambda _: bool(training))
    monkeypatch.setattr(owner, name, refusing)
    said = "out of memory, and trained all the same"  # what fails once an epoch is gone on from each time
    try:
        trained(tmp_path, "ladder.rungs=[{name: less, overrides: ['trainer.batch_size=4']}]", "trainer.epochs=3")
    except (UserError, LadderExhausted) as error:
        said = str(error)
    assert "out of memory" in said or "no rung of the ladder fits" in said
    assert refusing.raised >= 2, "it is tried once more"


def test_a_checkpoint_that_cannot_be_put_together_is_the_users_to_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = Refusing(packing.pack, MemoryError("no room"), lambda _: True)
    monkeypatch.setattr(packing, "pack", refusing)
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*last\.pt: out of memory \(no room\)"):
        trained(tmp_path)
    assert refusing.raised == 2


BESIDE: dict[str, tuple[Any, str]] = {
    "settings": (resume, "start"),
    "a folder's lock": (Record, "held"),
    "the first file": (Record, "begin"),
    "data": (trainer, "build_datasets"),
    "the result": (Record, "result"),
}


@pytest.mark.parametrize("place", BESIDE)
@pytest.mark.parametrize("record_fails", [False, True])
def test_memory_that_runs_out_beside_training_is_the_users_to_mend(
    place: str, record_fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the record of that failure finds no memory either."""
    owner, name = BESIDE[place]
    monkeypatch.setattr(owner, name, Refusing(getattr(owner, name), MemoryError("no room"), lambda _: True))
    if record_fails:
        monkeypatch.setattr(report, "failure", Refusing(earlier.failure, MemoryError("none at all"), lambda _: True))
    with pytest.raises(UserError, match=r"out of memory.*no room"):
        trained(tmp_path)


# -- evaluation


@pytest.mark.parametrize("ema", [False, True])
def test_an_evaluation_batch_leaves_no_trace_of_a_failure(
    ema: bool, capacity: Capacity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every operator fails once, and until the batch is given up; so does what is not memory."""

    def begun() -> tuple[Run, nn.Module]:
        run = start(Case("adamw-fused", "fp32", warm=True, ema=ema), capacity, Restless)
        return run, run.state.model if run.state.ema is None else run.state.ema.module

    run, network = begun()
    before, whole = dump(run.state), Fault()
    update, images, labels = run.update(), run.images[:7], run.labels[:7]
    with whole:
        found = update.evaluate(network, images, labels)
    after = dump(run.state)
    assert {"rng torch", "rng python", "rng numpy"} <= set(differences(before, after))
    for at in range(whole.count):
        run, network = begun()
        with Fault(at):
            assert run.update().evaluate(network, images, labels) == found
        assert differences(dump(run.state), after) == [], at
        run, network = begun()
        update = run.update()
        with Fault(at, keeps_failing=True), suppress(OutOfMemory):
            update.evaluate(network, images, labels)
        assert differences(dump(run.state), before) == [], at
    monkeypatch.setattr(Restless, "pause", staticmethod(lambda: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        update.evaluate(network, images, labels)
    assert differences(dump(run.state), before) == []


@pytest.mark.parametrize("batch", [1, 2, 4, 6])
def test_a_stop_in_an_evaluation_is_as_if_it_had_not_begun(
    batch: int, undisturbed: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first epoch's four batches and the second epoch's."""
    expected, overrides = undisturbed
    training, seen = begins_with_training(monkeypatch), list[int]()

    def pause() -> None:
        if training:
            seen.append(1)
            if len(seen) == batch:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Restless, "pause", staticmethod(pause))
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        trained(tmp_path, *overrides)
    assert len(seen) == batch
    trained(tmp_path, *overrides, "resume=auto")
    assert same_end(tmp_path, expected) == []


def test_an_evaluation_that_fits_on_the_next_rung_alone_begins_there_anew(
    undisturbed: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its third batch fails down to a single sample; the rung below changes what has no part in it."""
    expected, overrides = undisturbed
    training, refused = begins_with_training(monkeypatch), list[int]()

    def pause() -> None:
        """From the third batch on it fails at all sizes: with four samples, two and one, each twice."""
        seen.extend([1] if training else [])
        if len(seen) > 2 and len(refused) < 6:
            refused.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory. Injected.")

    seen = list[int]()
    monkeypatch.setattr(Restless, "pause", staticmethod(pause))
    ladder = "ladder.rungs=[{name: less, overrides: ['trainer.clip_grad=1e9']}]"
    result = trained(tmp_path, *overrides, ladder)
    tried = [(entry.rung, entry.outcome) for entry in result.attempts]
    assert tried == [("requested", "fits"), ("requested", "oom"), ("less", "fits")]
    (mine, rows), (theirs, others) = end_of(tmp_path), end_of(expected)
    for key in ("model", "ema", "buffers", "random", "optimizer", "meters"):
        assert differing(mine[key], theirs[key]) == [], key
    assert [row["val_loss"] for row in rows] == [row["val_loss"] for row in others]
