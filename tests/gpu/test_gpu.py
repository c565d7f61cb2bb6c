"""On a real card: real out-of-memories under real caps, and the rung that brute force finds."""

from __future__ import annotations

import gc
import multiprocessing
import random
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from timm.optim import list_optimizers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import TensorDataset

from adaptive_trainer import Trainer, Transaction, compose_config, descend, limit_memory, make_ladder, oom, predict
from adaptive_trainer.checkpoints import checkpoint
from adaptive_trainer.config.overrides import typed
from adaptive_trainer.config.schema import DataConfig, OptimizerConfig
from adaptive_trainer.data.cached.gpu_transforms import DeviceBatch
from adaptive_trainer.data.cached.prefetch import Prefetcher
from adaptive_trainer.data.cached.store import Decoded, Stored
from adaptive_trainer.data.datasets import DataSets
from adaptive_trainer.data.loader import Batch, Loader
from adaptive_trainer.data.position import Position
from adaptive_trainer.errors import ConfigError, OutOfMemory
from adaptive_trainer.ladder.resolve import recipe, resolve
from adaptive_trainer.memory.limit import Capacity, limited
from adaptive_trainer.models import memory_format as layout
from adaptive_trainer.models.losses import build_loss
from adaptive_trainer.models.optimizers import FUSED, build_ema, build_optimizer, build_scaler
from adaptive_trainer.models.recomputing import offloading
from adaptive_trainer.models.recomputing.following import host_memory_of
from adaptive_trainer.models.savers.offload import apply as offload
from adaptive_trainer.models.zoo import build_model
from adaptive_trainer.planning.device_spec import spec_of
from adaptive_trainer.planning.predictor import Predictor
from adaptive_trainer.recipe import Recipe
from adaptive_trainer.step.backends import compiled
from adaptive_trainer.step.backends.compiling import Compiling, context_bytes
from adaptive_trainer.step.backends.cuda_graph import Graph, GraphRefused
from adaptive_trainer.step.backends.recorded import Recorded
from adaptive_trainer.step.backends.timing import TIMED, Timed
from adaptive_trainer.step.dry_run import dry_run
from adaptive_trainer.step.engine import Engine
from adaptive_trainer.step.undo import TrainState
from adaptive_trainer.step.update import Update
from adaptive_trainer.training.measure import measure
from adaptive_trainer.training.session import METERS, Parts, enter
from adaptive_trainer.utils.global_state import private_process_state, seed_everything
from scripts import benchmark_finders, gpu_checks
from tests.support.faults import Fault, differences, dump

pytestmark = pytest.mark.gpu
SMALL = ["trainer.batch_size=8", "trainer.micro_batch_size=4", "data.image_size=160", "trainer.precision=fp16"]


def make_update(overrides: list[str], capacity: Capacity) -> tuple[Update, Tensor, Tensor]:
    """An update, and a pinned batch for it."""
    config = resolve(compose_config(overrides))[0].settings
    used = recipe(config)
    update = enter(config, Parts(build_model, build_loss, "", 10, 1024, gpu_checks.CUDA, capacity)).update
    images = torch.rand(used.batch_size, 3, used.image_size, used.image_size).pin_memory()
    return update, images, torch.randint(10, (used.batch_size,)).pin_memory()


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


@pytest.mark.parametrize("cap", [900, 1300])
def test_the_largest_batch_is_the_one_that_brute_force_finds(cap: int, tmp_path: Path) -> None:
    oom.release(gpu_checks.CUDA)
    before = torch.cuda.memory_allocated()
    settings = ["trainer.batch_size=max", f"memory.limit={cap}MiB", "ladder=none", "data=fakedata", "device=cuda"]
    few = ["data.train.size=300", "data.val.size=8", "data.num_workers=0", "model.num_classes=10"]
    result = Trainer(compose_config([*settings, *few]), output_dir=tmp_path).fit()
    size = result.used.batch_size
    fits = [n for n in range(size - 2, size + 5) if benchmark_finders.fits_alone(n, cap)]
    assert max(fits) == size
    outcomes = {attempt.rung: attempt.outcome for attempt in result.attempts}
    assert (result.rung, outcomes[f"max-{size}"], outcomes[f"max-{size + 1}"]) == ("requested", "fits", "oom")
    oom.release(gpu_checks.CUDA)
    assert torch.cuda.memory_allocated() == before


@contextmanager
def full_collections() -> Iterator[list[int]]:
    """One entry for every collection of all garbage that is asked for; Python's own are off."""
    found: list[int] = []

    def note(phase: str, about: dict[str, int]) -> None:
        if phase == "start" and about["generation"] == 2:
            found.append(1)

    gc.disable()
    gc.callbacks.append(note)
    try:
        yield found
    finally:
        gc.callbacks.remove(note)
        gc.enable()


def test_a_recipe_has_one_dry_run_on_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In less room there is another."""
    monkeypatch.setenv("ADAPTIVE_TRAINER_CACHE", str(tmp_path / "cache"))
    found = []
    for number, limit in enumerate((600, 600, 700, 500, 500)):
        settings = [*gpu_checks.FAKE, "trainer.batch_size=8", "data.image_size=64", f"memory.limit={limit}MiB"]
        [entry] = Trainer(compose_config(settings), output_dir=tmp_path / str(number)).fit().attempts
        assert entry.outcome == "fits"
        found.append(entry)
    before = "proven on this card before"
    assert [entry.reason for entry in found] == ["", before, before, "", before]
    assert {entry.peak_allocated_bytes for entry in found[:3]} == {found[0].peak_allocated_bytes}


@pytest.mark.parametrize("holds_itself", [False, True])
def test_what_a_failed_try_has_left_is_collected_and_else_nothing(holds_itself: bool) -> None:
    seen: list[tuple[int, int]] = []

    def attempt(settings: dict[str, int]) -> bool:
        ring: list[object] = [torch.empty(64 << 20, dtype=torch.uint8, device="cuda")]
        ring += [ring] if holds_itself else []
        torch.empty(settings["bytes"], dtype=torch.uint8, device="cuda")
        return True

    with limited(gpu_checks.CUDA, "600MiB"), full_collections() as collections:
        before = torch.cuda.memory_allocated()
        ladder = make_ladder({"bytes": 1 << 30}, {"small": {"bytes": 1}})
        descend(ladder, attempt, on_attempt=lambda _: seen.append((torch.cuda.memory_allocated(), len(collections))))
    assert seen[0] == (before, int(holds_itself))


def test_a_failed_proof_leaves_nothing_and_collects_nothing() -> None:
    with limited(gpu_checks.CUDA, "600MiB") as capacity:
        update, _, _ = make_update(["trainer.batch_size=64"], capacity)
        before = oom.held(gpu_checks.CUDA)
        with full_collections() as collections, pytest.raises(OutOfMemory):
            dry_run(update, Recipe(batch_size=64, micro_batch_size=64, eval_batch_size=64, num_classes=10))
        assert oom.held(gpu_checks.CUDA) == before
    assert collections == []


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
    ("precision", "optimizer", "cache"),
    [
        ("fp32", "adamw", "none"), ("bf16", "adamw", "none"), ("fp16", "adamw", "none"), ("fp32", "sgd", "none"),
        ("fp16", "sgd", "none"), ("bf16", "adamw", "ram"),
    ],
)  # fmt: skip
def test_fifty_updates_as_graphs_have_the_bits_of_eager_ones(
    precision: str, optimizer: str, cache: str, tmp_path: Path
) -> None:
    found, is_last = {}, optimizer == "adamw"
    for engine in ("graph", "auto"):
        never = patch.object(Recorded, "record", lambda *_: "the reference")
        reference = never if engine == "auto" else nullcontext()
        with reference:
            how = {"trainer__precision": precision, "trainer__engine": engine, "trainer__channels_last": is_last}
            trainer = Trainer(small(optimizer=optimizer, data__cache=cache, **how), output_dir=tmp_path / engine)
            found[engine] = trainer.fit()
    assert any("one CUDA graph" in event for event in found["graph"].events)
    assert found["graph"].metrics["updates"] >= 50
    one, other = (everything(tmp_path / engine / "checkpoints" / "last.pt") for engine in found)
    assert [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if not torch.equal(a, b)] == []


@pytest.fixture
def soon_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training waits for the process that compiles, and changes over to its code in any case."""
    answer = Compiling.answer
    monkeypatch.setattr(Compiling, "answer", lambda self: answer(self, None))
    monkeypatch.setattr(compiled, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(compiled, "GAIN", 1e9)
    monkeypatch.setattr(Timed, "is_faster", lambda *_: True)


def test_compiled_updates_are_one_graph_and_close_to_eager_ones(tmp_path: Path, soon_compiled: None) -> None:
    """The step of Lion cannot be recorded, so that graph is of the compiled forward and backward alone."""
    losses, held = {}, {}
    for engine in ("compile", "eager"):
        for optimizer in ("adamw", "lion"):
            folder = tmp_path / engine / optimizer
            settings = {"trainer__engine": engine, "optimizer": optimizer, "optimizer__lr": 1e-3, "trainer__epochs": 4}
            made = small(**settings, model__name="resnet18", trainer__clip_grad="null")  # no dropout
            result = Trainer(made, output_dir=folder).fit()
            said = [event for event in result.events if event.startswith("engine")]
            losses[engine, optimizer] = result.metrics["train_loss"]
            content = checkpoint.load(folder / "checkpoints" / "last.pt")
            held[engine, optimizer] = list(content["model"]), list(content["ema"])
            if engine == "eager":
                assert said == []
                continue
            assert said[0].startswith("engine: another process compiles for batches of"), said
            graphs = [each for each in said if "one CUDA graph" in each]
            assert len(graphs) == 2, said
            for each in graphs:
                assert ("the whole update is one CUDA graph" in each) is (optimizer == "adamw"), said
                assert ("forward and backward are one CUDA graph" in each) is (optimizer == "lion"), said
            assert re.search(r"compiled in \d+ s; .* ms an update from here on|not compiled: .* ms an update", said[-1])
    for optimizer in ("adamw", "lion"):
        assert held["compile", optimizer] == held["eager", optimizer]
        assert losses["compile", optimizer] == pytest.approx(losses["eager", optimizer], rel=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_compiled_updates_learn_what_eager_ones_learn(precision: str, soon_compiled: None) -> None:
    losses = {}
    for name in ("compile", "eager"):
        with limited(gpu_checks.CUDA, None) as capacity:
            torch.manual_seed(0)
            settings = ["trainer.batch_size=8", "data.image_size=64", "model.name=resnet18", "optimizer.lr=1e-4"]
            update, images, labels = make_update([*settings, f"trainer.precision={precision}"], capacity)
            events: list[str] = []
            engine = Engine(update, name, 8, events.append)
            for _ in range(40):
                engine.run(images, labels, samples=8)
            losses[name] = float(update.state.meters["loss"] / update.state.meters["seen"])
        assert any("engine: compiled in" in event for event in events) is (name == "compile"), events
        assert update.state.updates == 40
    assert losses["compile"] == pytest.approx(losses["eager"], rel=0.02 if precision == "fp32" else 0.05)


@pytest.mark.parametrize("recompute", ["none", "blocks"])
def test_nothing_of_compiled_code_and_its_graph_stays_when_the_engine_goes(recompute: str, soon_compiled: None) -> None:
    events: list[str] = []
    with limited(gpu_checks.CUDA, "700MiB") as capacity:
        settings = ["trainer.batch_size=8", "data.image_size=160", f"trainer.recompute={recompute}"]
        update, images, labels = make_update(settings, capacity)
        eager = Engine(update, "eager", 8, events.append)
        for _ in range(3):
            eager.run(images, labels, samples=8)
        oom.release(gpu_checks.CUDA)
        held = torch.cuda.memory_allocated()
        engine = Engine(update, "compile", 8, events.append)
        for _ in range(30):
            engine.run(images, labels, samples=8)
        assert any("engine: compiled in" in event for event in events), events
        assert engine.backend.graph is not None, events
        engine.run(images[:7], labels[:7], samples=7)  # beside the graph there may be no room, and then it goes
        del engine, eager
        oom.release(gpu_checks.CUDA)
        assert torch.cuda.memory_allocated() < held + 2**16, "a few numbers of the random generator may stay"
    assert update.state.updates == 34


def test_the_process_that_compiles_takes_a_context_and_no_more() -> None:
    events: list[str] = []
    with limited(gpu_checks.CUDA, None) as capacity:
        update, images, labels = make_update(["trainer.batch_size=8", "data.image_size=160"], capacity)
        engine = Engine(update, "compile", 8, events.append)
        for _ in range(10):
            engine.run(images, labels, samples=8)
        free = least = torch.cuda.mem_get_info()[0]
        while "compiled in" not in events[-1] and "not compiled" not in events[-1]:
            engine.run(images, labels, samples=8)
            least = min(least, torch.cuda.mem_get_info()[0])
        assert "compiled in" in events[-1] or "ms an update, against" in events[-1], events
        found = context_bytes(gpu_checks.CUDA)
        assert free - least < found + 2**26, f"{(free - least) / 2**20:.0f} MiB; {events}"


@pytest.mark.parametrize("wanted", [True, False])
def test_tf32_reaches_products_and_convolutions(wanted: bool) -> None:
    x, y = torch.rand(256, 256, device="cuda"), torch.rand(256, 256, device="cuda")
    image, kernel = torch.rand(8, 64, 32, 32, device="cuda"), torch.rand(64, 64, 3, 3, device="cuda")
    with private_process_state(deterministic=False, tf32=wanted):
        product, convolution = x @ y, nn.functional.conv2d(image, kernel)
    exact, convolved = x.double() @ y.double(), nn.functional.conv2d(image.double(), kernel.double())
    assert (float((product - exact).abs().max() / exact.max()) > 5e-6) is wanted
    if not wanted:  # where it is allowed cuDNN may still choose another algorithm
        assert float((convolution - convolved).abs().max() / convolved.max()) < 5e-6


def test_a_card_without_tf32_says_so(tmp_path: Path) -> None:
    few = ["data=fakedata", "data.train.size=8", "data.val.size=4", "data.num_workers=0", "trainer.batch_size=4"]
    small = ["model.name=mobilenetv3_small_050", "data.image_size=32", "trainer.epochs=1", "trainer.tf32=true"]
    events = Trainer(compose_config([*few, *small, "device=cuda"]), output_dir=tmp_path).fit().events
    has_it = torch.cuda.get_device_capability() >= (8, 0)
    assert any(event.startswith("trainer.tf32=true changes nothing") for event in events) is not has_it


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


@pytest.mark.parametrize(
    ("what", "reason"), [("waits", "waits for the card"), ("draws", "random"), ("counts", "Reads.count")]
)
def test_what_a_graph_cannot_hold_runs_eager_and_says_why(what: str, reason: str, tmp_path: Path) -> None:
    oom.release(gpu_checks.CUDA)
    before = torch.cuda.memory_allocated()
    result = Trainer(small(trainer__engine="graph"), model=lambda *_: Reads(what), output_dir=tmp_path).fit()
    assert any("eager, not a CUDA graph" in event and reason in event for event in result.events), result.events
    oom.release(gpu_checks.CUDA)
    assert torch.cuda.memory_allocated() == before


def test_a_refused_recording_leaves_no_trace_in_attributes(tmp_path: Path) -> None:
    counts = []
    for engine in ("graph", "eager"):
        trainer = Trainer(small(trainer__engine=engine), model=lambda *_: Reads("counts"), output_dir=tmp_path / engine)
        trainer.fit()
        counts.append(trainer.model.count)  # type: ignore[union-attr]
    assert counts[0] == counts[1]


def recorded(update: Update, images: Tensor, labels: Tensor) -> Graph:
    for _ in range(3):
        update.run(images, labels, samples=0)
    return Graph(update, images, labels, update.program.accumulate)


def test_no_memory_for_the_graph_leaves_training_as_it_was() -> None:
    with limited(gpu_checks.CUDA, "600MiB") as capacity:
        update, images, labels = make_update(["trainer.batch_size=8", "data.image_size=160"], capacity)
        for _ in range(3):
            update.run(images, labels, samples=0)
        oom.release(gpu_checks.CUDA)
        held, weights = torch.cuda.memory_allocated(), gpu_checks.digest(update.state.model)
        ballast = torch.empty(320 << 20, dtype=torch.uint8, device="cuda")
        with pytest.raises(GraphRefused, match="out of memory"):
            Graph(update, images, labels, update.program.accumulate)
        del ballast
        oom.release(gpu_checks.CUDA)
        assert (torch.cuda.memory_allocated(), gpu_checks.digest(update.state.model)) == (held, weights)
        assert torch.cuda.memory_reserved() < held + (64 << 20), "the allocator still flushes its cache"
        graph = Graph(update, images, labels, update.program.accumulate)
        graph.replay(images, labels)
        assert gpu_checks.digest(update.state.model) != weights


def test_a_replay_allocates_nothing_on_a_full_card() -> None:
    with limited(gpu_checks.CUDA, None) as capacity:
        update, images, labels = make_update(SMALL, capacity)
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


def test_batches_on_their_way_to_a_graph_do_not_overtake_each_other() -> None:
    digests = []
    for lane, waits in ((False, True), (True, True), (True, False)):
        with limited(gpu_checks.CUDA, None) as capacity:
            torch.manual_seed(0)
            update, images, labels = make_update(["trainer.batch_size=24", "model.name=resnet18"], capacity)
            graph = recorded(update, images, labels)
            assert graph._lane is not None
            if not lane:
                graph._lane = None
            for number in range(30):  # each in pinned memory that is used again once it has been sent
                batch = torch.rand(images.shape, generator=torch.Generator().manual_seed(number)).pin_memory()
                graph.replay(batch, labels.roll(number))
                if waits:
                    torch.cuda.synchronize()
            digests.append(gpu_checks.digest(update.state.model))
    assert len(set(digests)) == 1


def test_where_memory_runs_out_beside_the_graph_it_lends_its_own() -> None:
    events: list[str] = []
    with limited(gpu_checks.CUDA, "600MiB") as capacity:
        update, images, labels = make_update(["trainer.batch_size=8", "data.image_size=160"], capacity)
        engine = Engine(update, "graph", 8, events.append)
        for _ in range(5):
            engine.run(images, labels, samples=8)
        graph = engine.backend.graph
        engine.run(images[:7], labels[:7], samples=7)
        assert engine.backend.graph is graph is not None
    assert update.state.updates == 6
    assert len(events) == 1


# ---- forward and backward as CUDA graphs -----------------------------------------------------------------------------


WHOLE, PASSES = "engine: the whole update is one CUDA graph", "engine: forward and backward are one CUDA graph"


class Net(nn.Module):
    """BatchNorm, dropout, and a parameter that gets no gradient."""

    def __init__(self, width: int = 16, hidden: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.SiLU(),
            nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.SiLU(),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Dropout(0.3), nn.Linear(hidden, hidden))
        self.last, self.unused = nn.Linear(hidden, 10), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(self.head(self.body(x).mean((2, 3))))
        return output


def made(name: str, capacity: Capacity, *, precision: str = "fp32", net: nn.Module | None = None, **how: Any) -> Update:
    """An update of a fresh network; `how`: `micro_batch_size`, `clip_grad`."""
    seed_everything(0)
    model = (net or Net()).to(gpu_checks.CUDA)
    state = TrainState(
        model,
        build_optimizer(model, OptimizerConfig(name, lr=2**-10), gpu_checks.CUDA),
        build_scaler(precision, gpu_checks.CUDA),
        build_ema(model, 0.9),
        Position(0, 0, 0, 1000),
        meters={meter: torch.zeros((), device=gpu_checks.CUDA) for meter in METERS},
    )
    recipe = Recipe(batch_size=8, precision=precision, **{"micro_batch_size": 8, **how})
    return Update(state, nn.CrossEntropyLoss(), recipe, device=gpu_checks.CUDA, capacity=capacity)


def advance(engine: Engine, updates: int, size: int = 32) -> None:
    """Updates of 8 samples, of which number 15 has only 5, each at another learning rate."""
    generator = torch.Generator().manual_seed(0)
    for number in range(updates):
        count = 5 if number == 15 else 8
        images = torch.rand(count, 3, size, size, generator=generator).pin_memory()
        labels = torch.randint(10, (count,), generator=generator).pin_memory()
        for group in engine.update.state.optimizer.param_groups:
            group["lr"] = 2**-10 * (1 + number / 32)  # the same in float32
        engine.run(images, labels, samples=count)


@pytest.fixture
def same_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions add up in one order, however they are launched."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def trained(name: str, kind: str, **how: Any) -> tuple[dict[str, Any], list[str]]:
    """All of the state after 21 updates, and what the engine said."""
    events: list[str] = []
    with limited(gpu_checks.CUDA, None) as capacity:
        engine = Engine(made(name, capacity, **how), kind, 8, events.append)
        advance(engine, 21)
        found = dump(engine.update.state) | {"rng cuda": torch.cuda.get_rng_state()}
        assert (engine.backend.graph is not None) is (kind == "graph"), events
    return found, events


class Draws(Net):
    """Adds noise from a generator of its own, on the card or on the host."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.generators = {"noise": [torch.Generator(device).manual_seed(5)]}

    def forward(self, x: Tensor) -> Tensor:
        (generator,) = self.generators["noise"]
        noise = torch.randn(x.shape, generator=generator, device=generator.device)
        output: Tensor = super().forward(x + 0.1 * noise.to(x.device))
        return output


@pytest.mark.usefixtures("same_kernels")
@pytest.mark.parametrize("name", ["sgd", "lion"])
def test_a_graph_goes_on_drawing_from_a_generator_that_the_network_owns(name: str) -> None:
    found = []
    for kind in ("graph", "eager"):
        seed_everything(0)
        net = Draws("cuda")
        state, _ = trained(name, kind, net=net)
        found.append(state | {"own generator": net.generators["noise"][0].get_state()})
    assert differences(*found) == []


def test_a_network_that_draws_on_the_host_is_not_recorded() -> None:
    events: list[str] = []
    with limited(gpu_checks.CUDA, None) as capacity:
        engine = Engine(made("sgd", capacity, net=Draws("cpu")), "graph", 8, events.append)
        advance(engine, 5)
    assert any("eager, not a CUDA graph" in event for event in events), events


@pytest.mark.usefixtures("same_kernels")
@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, {}) for name in ("sgd", "lion", "rmsprop", "lamb", "adafactor", "adan", "muon", "nadamw", "radam")),
        ("lion", {"precision": "fp16", "micro_batch_size": 4}),
        ("nadamw", {"precision": "fp16", "micro_batch_size": 4, "clip_grad": 0.1}),
        ("adamw", {"precision": "fp16", "micro_batch_size": 4, "clip_grad": 0.1}),
        ("rmsprop", {"precision": "bf16", "clip_grad": 0.1}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_updates_with_recorded_passes_have_the_bits_of_eager_ones(name: str, how: dict[str, Any]) -> None:
    found, events = trained(name, "graph", **how)
    expected, _ = trained(name, "eager", **how)
    assert events[0].startswith(WHOLE if name in ("sgd", "adamw") else PASSES), events
    assert len(events) == 1
    assert differences(found, expected) == []


@pytest.mark.usefixtures("same_kernels")
def test_a_step_that_waits_for_the_card_is_left_out_of_the_graph() -> None:
    events: list[str] = []
    with limited(gpu_checks.CUDA, None) as capacity:
        update = made("adamw", capacity)
        weight = next(update.state.model.parameters()).detach()

        def read(*_: object) -> None:
            weight.sum().item()

        update.state.optimizer.register_step_pre_hook(read)
        engine = Engine(update, "graph", 8, events.append)
        advance(engine, 21)
        found = dump(update.state)
    expected, _ = trained("adamw", "eager")
    assert events[0].startswith(PASSES), events
    assert "waits for the card" in events[0], events
    assert differences(found, {k: v for k, v in expected.items() if k != "rng cuda"}) == []


def test_which_optimizers_are_recorded_whole() -> None:
    found: dict[str, list[str]] = {WHOLE: [], PASSES: []}
    for name in map(str, list_optimizers()):
        if name.startswith("kron"):  # compiles code of its own, which takes long
            continue
        events: list[str] = []
        with limited(gpu_checks.CUDA, None) as capacity, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what optimizers say of themselves
            try:
                update = made(name, capacity)
            except ConfigError:  # second derivatives, or another package
                continue
            advance(Engine(update, "graph", 8, events.append), 6)
        if len(events) > 1:
            assert "keeps gradients" in events[1]
            continue
        kind = WHOLE if isinstance(update.state.optimizer, FUSED) else PASSES
        assert events[0].startswith(kind), (name, events)
        found[kind].append(name)
    print("".join(f"\n{kind.removeprefix('engine: ')}: {', '.join(names)}" for kind, names in found.items()))
    assert found[WHOLE]
    assert len(found[PASSES]) > 50


def test_a_step_that_comes_to_need_memory_is_undone() -> None:
    """It allocates nothing in five steps; in the sixth it needs 64 MiB and finds 8, as often as it is tried."""
    ballast: list[Tensor] = []

    def fill(*_: object) -> None:
        oom.release(gpu_checks.CUDA)
        with suppress(torch.OutOfMemoryError):
            while True:  # also what is free within segments that are in use
                ballast.append(torch.empty(8 << 20, dtype=torch.uint8, device="cuda"))

    with limited(gpu_checks.CUDA, "1500MiB") as capacity:
        update = made("radamlegacy", capacity, net=Net(width=128, hidden=4096))
        engine = Engine(update, "eager", 8, print)
        advance(engine, 5, size=256)
        update.state.model.register_forward_pre_hook(lambda *_: ballast.clear())
        before, hook = dump(update.state), update.state.optimizer.register_step_pre_hook(fill)
        with pytest.raises(OutOfMemory, match="in optimizer step"):
            advance(engine, 1, size=256)
        hook.remove()
        ballast.clear()
        assert set(differences(dump(update.state), before)) <= {"groups"}  # the rate was set before the update
        advance(engine, 1, size=256)
    assert update.state.updates == 6


class Binding(torch.optim.Optimizer):
    """Binds a new tensor in each step, as a replay would not."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 2**-10, "capturable": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    mean = self.state[parameter].get("mean", torch.zeros_like(parameter))
                    self.state[parameter]["mean"] = mean * 0.5 + parameter.grad
                    parameter.sub_(self.state[parameter]["mean"] * group["lr"])


@pytest.mark.usefixtures("same_kernels")
def test_a_refused_recording_leaves_the_optimizer_no_memory_of_the_graph() -> None:
    ends, events = [], list[str]()
    for kind in ("graph", "eager"):
        with limited(gpu_checks.CUDA, None) as capacity:
            state = made("sgd", capacity).state
            state.optimizer = Binding(state.model.parameters())
            update = Update(
                state, nn.CrossEntropyLoss(), Recipe(batch_size=8, micro_batch_size=8),
                device=gpu_checks.CUDA, capacity=capacity,
            )  # fmt: skip
            engine = Engine(update, kind, 8, events.append)
            advance(engine, 8)
            ends.append(dump(state))
    assert differences(*ends) == [], events
    assert "puts a tensor of its state elsewhere" in str(events)


def test_gradients_that_an_optimizer_comes_to_keep_are_not_written_over() -> None:
    events: list[str] = []
    with limited(gpu_checks.CUDA, None) as capacity:
        update = made("nadamw", capacity)
        kept: list[Tensor] = []

        def keep(*_: object) -> None:
            gradients = [p.grad for p in update.state.model.parameters() if p.grad is not None]
            kept[:] = [gradient.detach() for gradient in gradients] if update.state.updates >= 9 else []

        update.state.optimizer.register_step_post_hook(keep)
        engine = Engine(update, "graph", 8, events.append)
        advance(engine, 9)
        had_graph = engine.backend.graph is not None
        advance(engine, 1)
        before = [(tensor, tensor.clone()) for tensor in kept]
        advance(engine, 1)
        assert before
        assert all(torch.equal(tensor, copy) for tensor, copy in before)
    assert (had_graph, engine.backend.graph is not None) == (True, False), events
    assert "keeps gradients" in events[-1]


@pytest.mark.parametrize("name", ["graph", "auto"])
def test_where_the_step_has_no_memory_beside_the_graph_it_has_the_graphs(name: str) -> None:
    """A step that needs 64 MiB finds 32."""
    events: list[str] = []
    with limited(gpu_checks.CUDA, "1500MiB") as capacity:
        update = made("nadamw", capacity, net=Net(width=128, hidden=4096))
        engine = Engine(update, name, 8, events.append)
        advance(engine, 9 + 2 * TIMED, size=256)  # until it is settled which is faster
        had_graph = engine.backend.graph is not None
        oom.release(gpu_checks.CUDA)
        room = (1500 << 20) - torch.cuda.memory_reserved() - (32 << 20)
        ballast = torch.empty(room >> 21 << 21, dtype=torch.uint8, device="cuda")
        advance(engine, 1, size=256)
        has_graph = engine.backend.graph is not None
        del ballast
        advance(engine, 1, size=256)
        steps = {float(values["step"]) for values in update.state.optimizer.state.values() if values}
    assert (had_graph, has_graph) == (True, True), events
    count = 11 + 2 * TIMED
    assert (update.state.updates, steps) == (count, {float(count)}), "each is made once, and none is lost"
    assert len(events) == 1, events


def test_nothing_of_recorded_passes_stays_when_the_engine_goes() -> None:
    with limited(gpu_checks.CUDA, None) as capacity:
        update = made("lion", capacity)
        events: list[str] = []
        engine = Engine(update, "eager", 8, events.append)
        advance(engine, 4)
        oom.release(gpu_checks.CUDA)
        held = torch.cuda.memory_allocated()
        engine = Engine(update, "graph", 8, events.append)
        advance(engine, 6)
        assert engine.backend.graph is not None, events
        del engine
        oom.release(gpu_checks.CUDA)
        assert torch.cuda.memory_allocated() < held + 2**16, "a few numbers of the random generator may stay"


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
        for batch in Prefetcher(data, batch_size=batch_size, **how).train(Position(3, 1, 0, 203)):
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
        prefetcher = Prefetcher(data, batch_size=batch_size, image_size=64, device=gpu_checks.CUDA)
        found.append(torch.cat([batch.images.cpu() for batch in prefetcher.train(Position(3, 1, 0, 203))]))
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
    """The difference that they make, measured and predicted; the allocator rounds blocks to 2 MiB."""
    grown = []
    for micro in (24, 6):
        keys = ["trainer.batch_size=24", f"trainer.micro_batch_size={micro}", "ladder=none", "device=cuda"]
        configs = [typed(compose_config([*keys, f"data.cache={cache}"])) for cache in ("none", "ram")]
        measured = [measure(config, 10) for config in configs]
        predicted = [predict(config).allocated_bytes for config in configs]
        assert None not in (*measured, *predicted)
        grown.append((measured[1][0] - measured[0][0], predicted[1] - predicted[0]))  # type: ignore[index,operator]
    print(f"bytes that data.cache adds, measured and predicted, at micro-batches of 24 and 6: {grown}")
    assert all(abs(real - expected) <= 6 << 20 for real, expected in grown), grown


def test_for_lack_of_memory_in_loading_the_graph_goes_first_and_comes_again(tmp_path: Path) -> None:
    real, calls = DeviceBatch.resample, []

    def full(buffers: DeviceBatch, count: int) -> tuple[Tensor, Tensor]:
        calls.append(count)
        if 20 <= len(calls) < 24:  # beside the graph and in its memory, each twice
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(buffers, count)

    with patch.object(DeviceBatch, "resample", full):
        result = Trainer(small(data__cache="ram", trainer__engine="graph"), output_dir=tmp_path).fit()
    assert result.rung == "requested"
    assert [a.outcome for a in result.attempts] == ["fits"]
    said = [event for event in result.events if event.startswith("engine")]
    assert len(said) == 2, said
    assert "goes when its memory is wanted in loading data" in said[1]


def test_a_network_by_name_is_in_channels_last_where_that_was_measured_to_pay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pays = torch.cuda.get_device_capability() >= (9, 0)
    monkeypatch.setattr(layout, "LEAST_IN_RUN", 0)
    for name, make_model in (("timm", None), ("own", lambda config, classes: build_model(config, classes))):
        sizes = {"data__image_size": 160, "trainer__micro_batch_size": 8}
        trainer = Trainer(small(trainer__epochs=1, **sizes), model=make_model, output_dir=tmp_path / name)
        result = trainer.fit()
        expected = pays and name == "timm"
        assert trainer.model is not None
        assert trainer.model.get_parameter("conv_stem.weight").is_contiguous() is not expected
        assert any("channels_last=true" in event for event in result.events) is expected
        assert trainer.cfg.trainer.channels_last is None


def test_a_card_that_is_not_here_is_refused_by_all_who_ask() -> None:
    config = typed(compose_config(["device=cuda:99"]))
    for ask in (spec_of, lambda config: measure(config, 10), lambda _: predict(config)):
        with pytest.raises(ConfigError, match=r"device=cuda:99 was asked for and this machine has \d+ CUDA cards"):
            ask(config)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_pinned_batches_of_workers_that_go_on() -> None:
    """A pass that is left half way leaves nothing for the next, neither in the workers nor in the pinning thread."""
    images = TensorDataset(torch.rand(40, 3, 8, 8), torch.arange(40) % 3)
    data = DataSets(images, images, 3, ("a", "b", "c"), DataConfig(transforms="torchvision"))
    how: dict[str, Any] = {"batch_size": 4, "image_size": 8}
    workers, alone = (Loader(data, **how, num_workers=n, pin_memory=n > 0) for n in (2, 0))
    pids = set()
    with closing(workers):
        for epoch in range(3):
            start = Position(0, epoch, 0, 40)
            next(workers.train(start))
            pairs = [*zip(workers.evaluate(8), alone.evaluate(8), strict=True)]
            pairs += zip(workers.train(start), alone.train(start), strict=True)
            assert all(mine.images.is_pinned() and torch.equal(mine.images, his.images) for mine, his in pairs)
            pids.add(frozenset(child.pid for child in multiprocessing.active_children()))
    assert [len(each) for each in pids] == [2]
    assert multiprocessing.active_children() == []


def own_update(model: nn.Module, optimizer: Any, scaler: Any, ema: Any, size: int) -> None:
    """An update of a loop of one's own, with a batch of this size in halves."""
    for _ in range(2):
        images, labels = torch.rand(size // 2, 3, 160, 160, device="cuda"), torch.zeros(size // 2, dtype=torch.long)
        with torch.autocast("cuda", torch.float16):
            loss = nn.functional.cross_entropy(model(images), labels.cuda())
        scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    ema.update(model)


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_a_transaction_leaves_no_trace_on_a_full_card(name: str, on_host: bool) -> None:
    """Batches that do not fit, from far too large to nearly, and updates between them: as if only these had been."""

    def train(sizes: list[int]) -> tuple[dict[str, Any], list[int]]:
        seed_everything(0)
        model = build_model(compose_config(["model.name=efficientnet_b0"]).model, 10).cuda().train()
        optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=1e-3), gpu_checks.CUDA)
        scaler, ema = build_scaler("fp16", gpu_checks.CUDA), build_ema(model, 0.9)
        transaction = Transaction(model, optimizer, scaler=scaler, ema=ema, on_host=on_host)
        state = TrainState(model, optimizer, scaler, ema, Position(0, 0, 0, 1))
        failed = []
        for size in sizes:
            before, numbers = dump(state), torch.cuda.get_rng_state()
            held, phase = oom.held(gpu_checks.CUDA), ""
            try:
                with transaction:
                    own_update(model, optimizer, scaler, ema, size)
            except OutOfMemory as error:
                phase = error.phase
            if phase:
                failed.append(size)
                now = oom.held(gpu_checks.CUDA)
                assert held is not None
                assert now is not None
                assert now <= held
                assert phase == "update"
                assert differences(dump(state), before) == []
                assert torch.equal(torch.cuda.get_rng_state(), numbers)
        return dump(state), failed

    sizes = [4096, 8, 512, 256, 8, 2048, 128, 8, 96, 8]
    with private_process_state(deterministic=True), limit_memory("1200MiB", device="cuda"):
        found, failed = train(sizes)
        assert {4096, 2048, 512} <= set(failed)
        assert 8 not in failed
        expected, none = train([size for size in sizes if size not in failed])
    assert none == []
    assert differences(found, expected) == []


# ---- offloaded activations -------------------------------------------------------------------------------------------


OFFLOADED = ["trainer.offload=true", "model.name=efficientnet_b0", "data.image_size=160"]


def offloaded(kind: str, precision: str, recompute: str, *, offloads: bool, channels_last: bool) -> dict[str, Any]:
    """All of the state after 20 updates of a network with dropout and dropped paths."""
    settings = {"precision": precision, "recompute": recompute, "offload": offloads, "channels_last": channels_last}
    more = {"batch_size": 8, "micro_batch_size": 4, "clip_grad": 0.5, "ema_decay": 0.9}
    overrides = [f"trainer.{key}={value}" for key, value in (settings | more).items()]
    events: list[str] = []
    with limited(gpu_checks.CUDA, None) as capacity:
        seed_everything(0)
        update, images, labels = make_update(
            # a learning rate that a graph's tensor can hold
            [*overrides, "data.image_size=160", "+model.kwargs.drop_path_rate=0.2", f"optimizer.lr={2**-10}"],
            capacity,
        )
        engine = Engine(update, kind, 8, events.append)
        for number in range(20):
            engine.run(torch.roll(images, number, 0).pin_memory(), labels, samples=8)
        assert (engine.backend.graph is not None) is (kind == "graph"), events
        assert (host_memory_of(update.state.model) is not None) is offloads
        return dump(update.state) | {"rng cuda": torch.cuda.get_rng_state()}


@pytest.mark.usefixtures("same_kernels")
@pytest.mark.parametrize("kind", ["eager", "graph"])
@pytest.mark.parametrize(
    ("precision", "recompute", "channels_last"),
    [("fp32", "none", False), ("fp16", "cheap", False), ("bf16", "blocks", True)],
)
def test_offloaded_updates_have_the_bits_of_others(
    kind: str, precision: str, recompute: str, channels_last: bool
) -> None:
    how = {"precision": precision, "channels_last": channels_last}
    found = offloaded(kind, recompute=recompute, offloads=True, **how)  # type: ignore[arg-type]
    expected = offloaded("eager", recompute="none", offloads=False, **how)  # type: ignore[arg-type]
    assert differences(found, expected) == []


@pytest.mark.parametrize(("recompute", "most"), [("none", 0.5), ("cheap", 0.9)])
def test_what_offloaded_updates_take_is_predicted(recompute: str, most: float) -> None:
    def peaks(offloads: bool) -> tuple[int, float]:
        asked = [f"trainer.offload={offloads}", f"trainer.recompute={recompute}", "device=cuda", "data.image_size=224"]
        config = resolve(compose_config(asked))[0].settings
        found = Predictor(spec_of(config), num_classes=10).predict(config)
        allocated, _ = measure(config, 10) or (0, 0)
        return allocated, (found.allocated_bytes or 0) / allocated

    kept, offloaded = peaks(offloads=False), peaks(offloads=True)
    assert offloaded[0] < most * kept[0]
    assert kept[1] == pytest.approx(1, abs=0.02)
    assert offloaded[1] == pytest.approx(1, abs=0.02)


@pytest.mark.usefixtures("same_kernels")
def test_memory_that_runs_out_while_activations_are_on_their_way_leaves_no_trace() -> None:
    """At operators all through the forward and backward pass, after which training goes on as if nothing was."""
    with limited(gpu_checks.CUDA, None) as capacity:
        seed_everything(0)
        update, images, labels = make_update([*OFFLOADED, "trainer.batch_size=8", "trainer.recompute=cheap"], capacity)
        for _ in range(2):
            update.run(images, labels, samples=8)
        before = dump(update.state)
        held, at, raised = oom.held(gpu_checks.CUDA), 0, True
        while raised:
            fault = Fault(at, keeps_failing=True)
            with suppress(OutOfMemory), fault:
                update.run(images, labels, samples=0)
            raised, at = fault.raised > 0, at + 701
            if raised:
                assert oom.held(gpu_checks.CUDA) == held, at
                assert differences(dump(update.state), before) == [], at
        assert at > 1000


def test_host_memory_that_cannot_be_pinned_is_an_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offloading, "CHUNK", 1 << 50)
    with limited(gpu_checks.CUDA, None) as capacity:
        update, images, labels = make_update([*OFFLOADED, "trainer.batch_size=8"], capacity)
        before = dump(update.state)
        with pytest.raises(OutOfMemory, match="cannot be pinned"):
            update.run(images, labels, samples=8)
        assert differences(dump(update.state), before) == []


@pytest.mark.usefixtures("same_kernels")
def test_a_graph_keeps_the_host_memory_that_it_was_recorded_with() -> None:
    """Also when offloading is switched off, and other work pins memory."""
    events: list[str] = []
    with limited(gpu_checks.CUDA, None) as capacity:
        found = []
        for disturbs in (False, True):
            seed_everything(0)
            update, images, labels = make_update([*OFFLOADED, "trainer.batch_size=8"], capacity)
            engine = Engine(update, "graph", 8, events.append)
            for number in range(12):
                engine.run(images, labels, samples=8)
                if disturbs and number == 8:
                    assert isinstance(engine.backend, Recorded)
                    assert engine.backend.graph is not None
                    offload(update.state.model, False)
                    gc.collect()
                    others = [torch.full((2**26,), 7, dtype=torch.uint8).pin_memory() for _ in range(8)]
            found.append(dump(update.state))
        assert differences(*found) == []
        assert all(bool((other == 7).all()) for other in others), "a replay wrote into memory of others"
