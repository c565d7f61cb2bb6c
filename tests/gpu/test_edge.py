"""CUDA graphs at the edge of memory: what else needs memory takes turns with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_trainer import Trainer, compose_config, oom
from adaptive_trainer.data.cached.gpu_transforms import fitting
from adaptive_trainer.memory.compaction import compact
from adaptive_trainer.memory.limit import Capacity, limited
from adaptive_trainer.step.engine import Engine
from scripts import benchmark_edge, gpu_checks
from tests.gpu.test_gpu import make_update
from tests.support.faults import differences, dump

pytestmark = pytest.mark.gpu
MiB = 1 << 20
SMALL = ["trainer.batch_size=8", "data.image_size=160", "optimizer.lr=0.0009765625"]  # the same in float32
GOES, OVER = "the CUDA graph goes", "not a CUDA graph"


@pytest.fixture
def same_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions add up in one order, however they are launched."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@contextmanager
def room_of(nbytes: int) -> Iterator[None]:
    """No more than that beside what is reserved now."""
    oom.release(gpu_checks.CUDA)
    total = torch.cuda.get_device_properties(gpu_checks.CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + nbytes) / total, gpu_checks.CUDA)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, gpu_checks.CUDA)


def rounds(engine: Engine, images: Tensor, labels: Tensor) -> list[tuple[float, float, float]]:
    """Whole and odd batches, trained and evaluated; the figures of the evaluations."""
    model, found = engine.update.state.model, []
    for number in range(5):
        engine.run(images, labels.roll(number), samples=0)
        found += [engine.evaluate(model, images, labels), engine.evaluate(model, images[:3], labels[:3])]
        engine.run(images[:5], labels[:5], samples=0)
    return found


def fill(mib: int) -> None:
    """Need so much for a moment; OutOfMemory where it is not there."""

    def take() -> None:
        torch.empty(mib * MiB, dtype=torch.uint8, device="cuda").fill_(1)

    fitting(gpu_checks.CUDA, take)


def started(kind: str, capacity: Capacity, settings: list[str]) -> tuple[Engine, Tensor, Tensor, list[str]]:
    torch.manual_seed(0)
    update, images, labels = make_update(settings, capacity)
    events: list[str] = []
    engine = Engine(update, kind, len(labels), events.append)
    for _ in range(4):
        engine.run(images, labels, samples=0)
    return engine, images, labels, events


@pytest.mark.usefixtures("same_kernels")
@pytest.mark.parametrize(
    ("settings", "room"),
    # The gradients of Lion's graph stay, and an eager update has its own.
    [(SMALL, 8), ([*SMALL, "optimizer=lion"], 48), ([*SMALL, "trainer.precision=fp16"], 8)],
)
def test_other_batches_take_no_memory_beside_a_graph_and_have_the_bits_of_eager_ones(
    settings: list[str], room: int
) -> None:
    found = {}
    for kind in ("graph", "eager"):
        with limited(gpu_checks.CUDA, None) as capacity:
            engine, images, labels, events = started(kind, capacity, settings)
            graph = engine.backend.graph
            assert (graph is not None) is (kind == "graph"), events
            with room_of((room if kind == "graph" else 4096) * MiB):
                before = torch.cuda.memory_reserved()
                figures = rounds(engine, images, labels)
                grown = torch.cuda.memory_reserved() - before
            assert engine.backend.graph is graph, events
            assert kind == "eager" or grown <= room * MiB
            found[kind] = figures, dump(engine.update.state)
    assert found["graph"][0] == found["eager"][0]
    assert differences(found["graph"][1], found["eager"][1]) == []


def test_a_graph_that_went_for_a_moment_is_recorded_again() -> None:
    with limited(gpu_checks.CUDA, "700MiB") as capacity:
        engine, images, labels, events = started("graph", capacity, SMALL)
        for _ in range(3):
            for _ in range(25):
                engine.run(images, labels, samples=0)
            assert engine.backend.graph is not None, events
            engine.beside(lambda: fill(500))
            assert engine.backend.graph is None
        engine.run(images, labels, samples=0)
        assert engine.backend.graph is not None, events
        assert sum(GOES in event for event in events) == 1, events
        assert not any(OVER in event for event in events), events


def test_what_is_left_in_the_memory_of_a_graph_is_not_written_over() -> None:
    left: list[Tensor] = []
    with limited(gpu_checks.CUDA, None) as capacity:
        engine, images, labels, events = started("graph", capacity, SMALL)
        with room_of(8 * MiB):
            engine.beside(lambda: fill(100), stays=False)
            engine.beside(lambda: left.append(torch.arange(5 * MiB, device="cuda")), stays=False)
        for _ in range(3):
            engine.run(images, labels, samples=0)
    assert engine.backend.graph is not None, events
    assert torch.equal(left[0].cpu(), torch.arange(5 * MiB))
    assert any("leaves tensors there" in event for event in events), events


@pytest.mark.usefixtures("same_kernels")
def test_weights_that_are_moved_close_together_give_back_memory_and_train_on() -> None:
    states, gained = [], []
    for moves in (False, True):
        with limited(gpu_checks.CUDA, None) as capacity:
            stays = torch.empty(2 * MiB, dtype=torch.uint8, device="cuda")  # holds a segment, with room for others
            torch.manual_seed(0)
            update, images, labels = make_update(SMALL, capacity)
            for _ in range(4):
                update.run(images, labels, samples=0)
                if moves:
                    oom.release(gpu_checks.CUDA)
                    before = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
                    compact(update.tensors(), gpu_checks.CUDA)
                    gained.append(before[0] - torch.cuda.memory_reserved())
                    assert torch.cuda.memory_allocated() <= before[1]  # blocks that were not worth splitting
            states.append(dump(update.state))
            assert len(stays) == 2 * MiB
    assert differences(*states) == []
    assert min(gained) >= 0
    assert max(gained) > 0, gained


@pytest.mark.parametrize("cache", ["none", "ram"])
@pytest.mark.parametrize("number", range(len(benchmark_edge.RECIPES)))
def test_a_graph_stays_for_the_whole_run_at_the_edge(number: int, cache: str, tmp_path: Path) -> None:
    """Five epochs at 1.02 times the smallest limit, with evaluation and odd last batches."""
    few = ["data=fakedata", "data.train.size=58", "data.val.size=29", "data.num_workers=0", f"data.cache={cache}"]
    settings: list[Any] = [*benchmark_edge.settings_of(number), *few, "trainer.epochs=5", "trainer.engine=graph"]
    limit = int(1.02 * benchmark_edge.smallest_limit(settings))
    config = compose_config([*settings, "ladder=none", "device=cuda", f"memory.limit={limit}"])
    result = Trainer(config, output_dir=tmp_path).fit()
    assert any("one CUDA graph" in event for event in result.events), result.events
    assert not any(text in event for event in result.events for text in (GOES, OVER)), result.events
