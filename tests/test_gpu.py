"""On a real card: real out-of-memories under real caps, and the rung that brute force finds."""

from __future__ import annotations

import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from adaptive_trainer import Trainer, checkpoint, compose_config, oom, predict
from adaptive_trainer.augment import DeviceBatch
from adaptive_trainer.config import DataConfig, typed
from adaptive_trainer.data import Batch, DataSets
from adaptive_trainer.engine import Engine
from adaptive_trainer.feed import train_feed
from adaptive_trainer.graph import Graph, GraphRefused
from adaptive_trainer.measure import measure
from adaptive_trainer.memory.capacity import limited
from adaptive_trainer.position import Position
from adaptive_trainer.store import Decoded, Stored
from adaptive_trainer.update import Update
from scripts import gpu_checks

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("cap", gpu_checks.CAPS)
def test_the_rung_under_a_cap_is_the_one_that_brute_force_finds(cap: int, tmp_path: Path) -> None:
    real = gpu_checks.descend_under(cap, tmp_path / "real", predicting=False)
    predicted = gpu_checks.descend_under(cap, tmp_path / "predicted", predicting=True)
    assert real.rung == predicted.rung == gpu_checks.brute_force(cap)
    assert len({*real.allocated, *predicted.allocated}) == 1, (
        "memory is back to its value before the attempt, every time"
    )
    assert predicted.tried <= 1
    if cap < 2000:
        assert real.tried > 0


# ---- updates as CUDA graphs ----------------------------------------------------------------------------------------


def small(**settings: object) -> DictConfig:
    """A network with BatchNorm and dropout, accumulation, clipping and a moving average."""
    keys = {
        "model.name": "mobilenetv3_small_050", "data.image_size": 64, "trainer.batch_size": 8,
        "trainer.micro_batch_size": 4, "trainer.clip_grad": 1.0, "trainer.ema_decay": 0.9, "device": "cuda",
        "data": "fakedata", "data.train.size": 84, "data.val.size": 8, "data.num_workers": 0, "ladder": "none",
        "schedule": "cosine", "trainer.epochs": 5,
    }  # fmt: skip
    keys |= {name.replace("__", "."): value for name, value in settings.items()}
    return compose_config([f"{key}={value}" for key, value in keys.items()])


def everything(path: Path) -> list[Tensor]:
    content = checkpoint.load(path)
    kept = {key: content[key] for key in ("model", "ema", "optimizer", "scaler", "position", "updates")}
    return [torch.as_tensor(leaf) for leaf in tree_leaves(kept) if isinstance(leaf, Tensor | int | float)]


@pytest.mark.parametrize(
    ("precision", "cache"), [("fp32", "none"), ("bf16", "none"), ("fp16", "none"), ("bf16", "ram")]
)
def test_fifty_updates_as_graphs_have_the_bits_of_eager_ones(precision: str, cache: str, tmp_path: Path) -> None:
    found = {}
    for engine in ("graph", "auto"):
        never = patch.object(Engine, "_record", lambda engine, *_: engine._refuse("the reference"))
        reference = never if engine == "auto" else nullcontext()
        with reference:
            config = small(trainer__precision=precision, trainer__engine=engine, data__cache=cache)
            trainer = Trainer(config, output_dir=tmp_path / engine)
            found[engine] = trainer.fit()
    assert any("one CUDA graph" in event for event in found["graph"].events)
    assert found["graph"].metrics["updates"] >= 50
    one, other = (everything(tmp_path / engine / "checkpoints" / "last.pt") for engine in found)
    assert [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if not torch.equal(a, b)] == []


class Reads(nn.Module):
    """Does on the host what a graph cannot hold, or would not repeat."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.body, self.count = what, nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 10)), 0
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "waits":
            x = x * float(x.mean().item() > -1)
        elif self.what == "draws":
            x = x * (1 + random.random())
        elif self.what == "counts":
            self.count += 1
        output: Tensor = self.dropout(self.body(x))
        return output


@pytest.mark.parametrize(("what", "reason"), [("waits", "waits for the card"), ("draws", "random"), ("counts", "attr")])
def test_what_a_graph_cannot_hold_runs_eager_and_says_why(what: str, reason: str, tmp_path: Path) -> None:
    oom.release(gpu_checks.CUDA)
    before = torch.cuda.memory_allocated()
    result = Trainer(small(trainer__engine="graph"), model=lambda *_: Reads(what), output_dir=tmp_path).fit()
    assert any("eager, not a CUDA graph" in event and reason in event for event in result.events), result.events
    oom.release(gpu_checks.CUDA)
    assert torch.cuda.memory_allocated() == before


def recorded(update: Update, images: Tensor, labels: Tensor) -> Graph:
    for _ in range(3):
        update.run(images, labels, samples=0)
    return Graph(update, images, labels)


def test_no_memory_for_the_graph_leaves_training_as_it_was() -> None:
    with limited(gpu_checks.CUDA, "600MiB") as capacity:
        update, images, labels = gpu_checks.make_update(
            ["trainer.batch_size=8", "data.image_size=160"], capacity, undo=True
        )
        for _ in range(3):
            update.run(images, labels, samples=0)
        oom.release(gpu_checks.CUDA)
        held, weights = torch.cuda.memory_allocated(), gpu_checks.digest(update.state.model)
        ballast = torch.empty(320 << 20, dtype=torch.uint8, device="cuda")
        with pytest.raises(GraphRefused, match="out of memory"):
            Graph(update, images, labels)
        del ballast
        oom.release(gpu_checks.CUDA)
        assert (torch.cuda.memory_allocated(), gpu_checks.digest(update.state.model)) == (held, weights)
        assert torch.cuda.memory_reserved() < held + (64 << 20), "the allocator still flushes its cache"
        graph = Graph(update, images, labels)
        graph.replay(images, labels)
        assert gpu_checks.digest(update.state.model) != weights


def test_a_replay_allocates_nothing_on_a_full_card() -> None:
    with limited(gpu_checks.CUDA, None) as capacity:
        update, images, labels = gpu_checks.make_update(gpu_checks.SMALL, capacity, undo=True)
        graph = recorded(update, images, labels)
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()
        with gpu_checks.other_process("0", "1"):
            for _ in range(50):
                graph.replay(images, labels)
                torch.cuda.synchronize()
        after = torch.cuda.memory_stats()
    for count in ("allocation.all.allocated", "num_ooms", "num_alloc_retries", "num_device_alloc"):
        assert after[count] == before[count]


def test_where_memory_runs_out_beside_the_graph_it_goes_and_the_update_is_made() -> None:
    events: list[str] = []
    with limited(gpu_checks.CUDA, "600MiB") as capacity:
        update, images, labels = gpu_checks.make_update(
            ["trainer.batch_size=8", "data.image_size=160"], capacity, undo=True
        )
        engine = Engine(update, "graph", 8, events.append)
        for _ in range(5):
            engine.run(images, labels, samples=8)
        assert engine._graph is not None
        engine.run(images[:7], labels[:7], samples=7)
    assert update.state.updates == 6
    assert "wanted in" in events[-1]


# ---- stored images -------------------------------------------------------------------------------------------------


def kept(count: int = 203, size: int = 73) -> DataSets:
    """Random images in memory, at random original sizes."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    labels, sizes = np.arange(count) % 10, rng.integers(30, 90, (count, 2))
    decoded = Decoded(images, labels, sizes, rng.random(count) > 0.02, np.zeros(count, np.uint32))
    stored, names = Stored(decoded, np.arange(count)), Names()
    names.samples = [(f"{n}.png", 0) for n in range(count)]
    return DataSets(names, names, 10, tuple("abcdefghij"), DataConfig(cache="ram"), (stored, stored))


class Names:
    samples: list[tuple[str, int]]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> None:
        raise AssertionError("it is stored")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("batch_size", [1, 8, 24])
def test_stored_images_reach_a_busy_card_as_they_are(batch_size: int, channels_last: bool) -> None:
    """Long kernels on the loop's stream: a copy that did not wait for them would overwrite what they read."""
    data, found = kept(), dict[str, list[Batch]]()
    for device in (torch.device("cpu"), gpu_checks.CUDA):
        how: dict[str, Any] = {"image_size": 64, "device": device, "channels_last": channels_last}
        batches = found[device.type] = []
        for batch in train_feed(data, Position(3, 1, 0, 203), batch_size=batch_size, **how):
            if device.type == "cuda":
                torch.cuda._sleep(random.randrange(3_000_000))  # type: ignore[no-untyped-call]
            copies = batch.images.clone(), batch.labels.clone()
            batches.append(batch._replace(images=copies[0], labels=copies[1]))
    assert len(found["cuda"]) == len(found["cpu"])
    for ours, theirs in zip(found["cuda"], found["cpu"], strict=True):
        assert ours.images.device == gpu_checks.CUDA
        assert torch.equal(ours.labels.cpu(), theirs.labels)
        assert (ours.samples, ours.skipped) == (theirs.samples, theirs.skipped)
        assert torch.allclose(ours.images.cpu(), theirs.images, atol=1e-4)


def test_stored_images_are_the_same_bits_in_any_batch_and_nothing_is_left() -> None:
    data, found = kept(), []
    oom.release(gpu_checks.CUDA)
    before = torch.cuda.memory_allocated()
    for batch_size in (4, 11):
        feed = train_feed(data, Position(3, 1, 0, 203), batch_size=batch_size, image_size=64,
                          device=gpu_checks.CUDA, channels_last=False)  # fmt: skip
        found.append(torch.cat([batch.images.cpu() for batch in feed]))
    assert torch.equal(*found)
    oom.release(gpu_checks.CUDA)
    assert torch.cuda.memory_allocated() == before


def test_deterministic_algorithms_take_stored_images(tmp_path: Path) -> None:
    found = []
    for number in range(2):
        config = small(data__cache="ram", trainer__deterministic=True, trainer__epochs=1, trainer__engine="eager")
        Trainer(config, output_dir=tmp_path / str(number)).fit()
        found.append(everything(tmp_path / str(number) / "checkpoints" / "last.pt"))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_what_stored_images_take_is_predicted() -> None:
    """The difference that they make, measured and predicted; the allocator rounds to 2 MiB."""
    grown = []
    for micro in (24, 6):
        keys = ["trainer.batch_size=24", f"trainer.micro_batch_size={micro}", "ladder=none", "device=cuda"]
        configs = [typed(compose_config([*keys, f"data.cache={cache}"])) for cache in ("none", "ram")]
        measured = [measure(config, 10) for config in configs]
        predicted = [predict(config).allocated_bytes for config in configs]
        assert None not in (*measured, *predicted)
        grown.append((measured[1][0] - measured[0][0], predicted[1] - predicted[0]))  # type: ignore[index,operator]
    print(f"bytes that data.cache adds, measured and predicted, at micro-batches of 24 and 6: {grown}")
    assert all(abs(real - expected) <= 4 << 20 for real, expected in grown), grown


def test_no_memory_for_loading_gives_up_the_graph_first(tmp_path: Path) -> None:
    real, calls = DeviceBatch.resample, []

    def full(buffers: DeviceBatch, count: int) -> tuple[Tensor, Tensor]:
        calls.append(count)
        if len(calls) in (20, 21):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(buffers, count)

    with patch.object(DeviceBatch, "resample", full):
        result = Trainer(small(data__cache="ram", trainer__engine="graph"), output_dir=tmp_path).fit()
    assert result.rung == "requested"
    assert [a.outcome for a in result.attempts] == ["fits"]
    assert any("its memory was wanted in loading data" in event for event in result.events), result.events
