"""What this package adds to an update, and what compiling brings.

undo: a transaction against the same update that keeps nothing to undo it. loop: the training loop against the same
engine called directly. compile: before and after compiled code takes over, and what the change costs. layout: where
channels_last pays. start: how long its kernels take to load. cpu: an eager update on the CPU against a bare loop.

Usage: python -m scripts.benchmark_update undo|loop|compile|layout|start|cpu
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from adaptive_trainer import compose_config, oom
from adaptive_trainer.config.schema import Config, ModelConfig
from adaptive_trainer.data.datasets import build_datasets
from adaptive_trainer.data.loader import Batch
from adaptive_trainer.data.pipeline import Pipeline
from adaptive_trainer.data.position import Position
from adaptive_trainer.ladder.resolve import resolve
from adaptive_trainer.memory.limit import Capacity, limited
from adaptive_trainer.memory.simulated import COUNTED_FIRST
from adaptive_trainer.models.losses import build_loss
from adaptive_trainer.models.zoo import build_model
from adaptive_trainer.report.listeners import Listener
from adaptive_trainer.step.backends.compiled import Compiled
from adaptive_trainer.step.backends.cuda_graph import Graph
from adaptive_trainer.step.backends.recorded import Recorded
from adaptive_trainer.step.engine import Engine
from adaptive_trainer.step.undo import Progress, Undo
from adaptive_trainer.training.epochs.loop import Loop
from adaptive_trainer.training.epochs.stopping import StopSignal
from adaptive_trainer.training.session import Parts, enter
from adaptive_trainer.utils.global_state import private_process_state
from scripts.benchmark_speed import CASES, LARGE_BF16, RUNGS, UPDATES, WARM_UP, Case, batch_of, engine_of
from scripts.timing import BLOCKS, CUDA, alternating, heading, need_cuda, per_update, ratio, row, synchronize, table

CPU = torch.device("cpu")
NETWORKS = 9
PAIRS, IN_PAIR = 240, 2  # of one network's updates with and without undo: many short ones, the host being unsteady
MiB = 1 << 20


def void(_: object) -> None:
    """For a hook that has nothing to do."""


# ---- undo: a transaction against the same update without ------------------------------------------------------------


class NoUndo(Undo):
    """Keeps nothing."""

    def begin(self) -> None:
        self.progress = Progress.IDLE

    def before_step(self, *, on_host: bool = False, copies: bool = True) -> None:
        self.progress = Progress.STEPPING


def undo() -> Iterator[str]:
    """A row for each recipe and engine; a graph keeps nothing to undo it."""
    need_cuda()
    yield from table("recipe", "engine", "with undo, ms", "without, ms", "ratio (median of pairs)", "extra peak, MiB")
    for case in (*RUNGS, LARGE_BF16):
        yield row(case.name, "eager", *_undone(case, "eager"))
    for overrides in (["+optimizer.kwargs.foreach=true"], ["optimizer=sgd"]):
        yield row(f"{CASES[2].name} {overrides[0]}", "eager", *_undone(CASES[2], "eager", *overrides))
    for case in RUNGS:
        yield row(case.name, "graph", *_undone(case, "graph"))


def _undone(case: Case, kind: str, *overrides: str) -> tuple[str, ...]:
    images, labels = batch_of(case)
    without = _with_peak(case, kind, overrides, NoUndo)[1]  # its engine goes at once
    engine, peak = _with_peak(case, kind, overrides, Undo)
    undos = {"with": engine.update._undo, "without": NoUndo(engine.update.state, CUDA)}
    run = partial(engine.run, images, labels, samples=0)

    def block(name: str) -> float:
        engine.update._undo = undos[name]
        return per_update(run, IN_PAIR)

    found = alternating({name: partial(block, name) for name in undos}, PAIRS)
    ms = (f"{1e3 * statistics.median(found[name]):.2f}" for name in undos)
    return (*ms, f"{ratio(found['with'], found['without']):.4f}", f"{(peak - without) / MiB:.1f}")


def _with_peak(case: Case, kind: str, overrides: tuple[str, ...], undo: type[Undo]) -> tuple[Engine, int]:
    """A warm engine that keeps such an undo, and the peak of its memory in one update, in bytes."""
    images, labels = batch_of(case)
    oom.release(CUDA)
    base = torch.cuda.memory_allocated(CUDA)
    engine = engine_of(case, kind, *overrides)
    engine.update.free_copies()
    engine.update._undo = undo(engine.update.state, CUDA)
    step = partial(engine.run, images, labels, samples=0)
    per_update(step, WARM_UP)  # a graph is recorded on the way
    torch.cuda.reset_peak_memory_stats(CUDA)
    step()
    return engine, torch.cuda.max_memory_allocated(CUDA) - base


# ---- loop: the whole harness against its engine ----------------------------------------------------------------------


class Prepared(Pipeline):
    """Data that are there: one batch again and again, or a loader's."""

    batch: Batch | None = None

    def train(self, position: Position) -> Generator[Batch, None, None]:
        if self.batch is None:
            yield from super().train(position)
        else:
            yield from [self.batch] * (position.size // self.batch.samples)


class Printed(Listener):
    """Prints decisions."""

    def event(self, text: str) -> None:
        print(text, file=sys.stderr)


class Timed(Loop):
    """A loop on such data that notes when an epoch has come into its stride.

    Attributes:
        prepared: what it trains on.
        unmeasured: updates at the start of an epoch, in which a loader starts.
        started_at: the clock after these.
        in_engine: seconds in the engine since then.
    """

    prepared: Prepared
    unmeasured: int = 1
    updates_done: int = 0
    started_at: float = 0.0
    in_engine: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        given, run = self.pipeline, self.engine.run
        self.pipeline = self.prepared = Prepared(
            given.data, given.config, self.device, given.make_room, given.channels_last, given.pressure, given.event
        )

        def clocked(images: Tensor, labels: Tensor, *, samples: int) -> None:
            entered = time.perf_counter()
            run(images, labels, samples=samples)
            self.in_engine += time.perf_counter() - entered

        self.engine.run = clocked  # type: ignore[method-assign]

    def _stop_if_asked(self) -> None:
        super()._stop_if_asked()
        self.updates_done += 1
        if self.updates_done == self.unmeasured:
            synchronize(self.device)  # or what the card has still to do of these would count
            self.started_at, self.in_engine = time.perf_counter(), 0.0


def loop_of(config: Config, device: torch.device, updates: int, capacity: Capacity) -> Timed:
    size, samples = config.data.image_size, updates * config.trainer.batch_size
    images = torch.rand(config.trainer.batch_size, 3, size, size).repeat(updates, 1, 1, 1)
    data = TensorDataset(images, torch.arange(samples) % 10)
    parts = Parts(build_model, build_loss, "", 10, samples, device, capacity)
    sets = build_datasets(config, data, TensorDataset(images[:8], torch.arange(8)))
    no_keeper: Any = None  # nothing is saved within an epoch
    return Timed(enter(config, parts), sets, 8, Printed(), no_keeper, StopSignal())


def epoch(loop: Timed, batch: Batch | None, outside: list[float] | None = None) -> float:
    """Seconds of an update in one epoch of the loop, without its first tenth, in which a loader starts.

    Args:
        outside: takes the seconds of an update that the loop spent outside of the engine.
    """
    state, loop.prepared.batch, loop.updates_done = loop.session.state, batch, 0
    updates: int = state.position.size // loop.session.config.trainer.batch_size
    loop.unmeasured = updates // 10
    state.position = Position(0, 0, 0, state.position.size)
    synchronize(loop.device)
    loop._train_epoch()
    synchronize(loop.device)
    seconds: float = time.perf_counter() - loop.started_at
    measured = updates - loop.unmeasured
    if outside is not None:
        outside.append((seconds - loop.in_engine) / measured)
    return seconds / measured


def direct(loop: Timed) -> Callable[[Tensor, Tensor], None]:
    """The same engine without a loop around it: the graph replayed, or the update run."""
    graph, update = loop.engine.backend.graph, loop.session.update
    return graph.replay if isinstance(graph, Graph) else partial(update.run, samples=0)


def bare_epoch(loop: Timed, loader: DataLoader[list[Tensor]]) -> float:
    """Seconds of an update in one epoch of a bare loop with the same engine, without its first tenth."""
    run = direct(loop)
    for number, (images, labels) in enumerate(loader, start=1):
        run(images, labels)
        if number == loop.unmeasured:
            synchronize(loop.device)
            started = time.perf_counter()
    synchronize(loop.device)
    return (time.perf_counter() - started) / (len(loader) - loop.unmeasured)


def loop() -> Iterator[str]:
    """A row for each recipe and engine; one on the CPU where there is no card."""
    device = CUDA if torch.cuda.is_available() else CPU
    recipes = [*((case, "graph", 200) for case in RUNGS), (CASES[0], "eager", 40)]
    workers = 8
    if device == CPU:
        recipes, workers = [(replace(CASES[0], name="8@64 fp32 on the CPU", size=64), "eager", 30)], 1
    yield from table(
        "recipe", "engine", "engine alone, ms", "loop, one batch, ms", "ratio", "outside the engine, ms",
        f"bare loop, {workers} workers, ms", f"loop, {workers} workers, ms", "ratio",
    )  # fmt: skip
    for case, name, updates in recipes:
        config = resolve(compose_config([
            "model.name=efficientnet_b0", f"trainer.batch_size={case.batch}", f"data.image_size={case.size}",
            f"trainer.precision={case.precision}", f"trainer.engine={name}", "data.transforms=none",
            f"data.num_workers={workers}", "trainer.epochs=1000",
        ]))[0].settings  # fmt: skip
        with limited(device, "none") as capacity:
            found = looped(loop_of(config, device, updates, capacity), updates)
        outside = f"{1e3 * statistics.median(found['outside']):.3f}" if name == "eager" else "-"
        ms = {key: f"{1e3 * statistics.median(values):.3f}" for key, values in found.items()}
        one = f"{ratio(found['one batch'], found['alone']):.4f}"
        loaded = f"{ratio(found['loader'], found['bare loader']):.4f}"
        yield row(case.name, name, ms["alone"], ms["one batch"], one, outside, ms["bare loader"], ms["loader"], loaded)


def looped(mine: Timed, updates: int) -> dict[str, list[float]]:
    """Seconds of an update, the engine called directly and by the loop, on one batch and on a loader's.

    "outside" is what the loop spends outside of the engine. A graph is waited for there, so of it that says nothing.
    """
    trainer, size = mine.session.config.trainer, mine.session.config.data.image_size
    images, labels = torch.rand(trainer.batch_size, 3, size, size), torch.arange(trainer.batch_size) % 10
    if mine.device.type == "cuda":
        images, labels = images.pin_memory(), labels.pin_memory()
    batch = Batch(images, labels, trainer.batch_size, [])
    epoch(mine, batch)  # records the graph
    bare = partial(direct(mine), images, labels)
    data: Any = mine.data.train
    loader: DataLoader[list[Tensor]] = DataLoader(
        data, trainer.batch_size, shuffle=True, num_workers=mine.session.config.data.num_workers,
        pin_memory=mine.device.type == "cuda", persistent_workers=True,
    )  # fmt: skip
    outside: list[float] = []
    with closing(mine.pipeline):
        found = alternating({
            "alone": lambda: per_update(bare, updates, mine.device),
            "one batch": lambda: epoch(mine, batch, outside),
            "bare loader": lambda: bare_epoch(mine, loader),
            "loader": lambda: epoch(mine, None),
        })  # fmt: skip
    return {**found, "outside": outside}


# ---- cpu: an eager update on the CPU against a bare loop -------------------------------------------------------------


def small_network(config: ModelConfig, num_classes: int) -> nn.Module:
    if config.name != "small":
        return build_model(config, num_classes)
    layers: list[nn.Module] = []
    for width, following in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(width, following, 3, 2, 1, bias=False), nn.BatchNorm2d(following), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, num_classes))


def bare_on_cpu(name: str, images: Tensor, labels: Tensor) -> Callable[[], None]:
    torch.manual_seed(0)
    model = small_network(ModelConfig(name=name), 10).train()
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, 0.05), lr=1e-3, fused=True)
    loss_of = nn.CrossEntropyLoss()

    def update() -> None:
        loss_of(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


def ours_on_cpu(name: str, images: Tensor, labels: Tensor, capacity: Capacity) -> Callable[[], None]:
    overrides = [f"model.name={name}", f"trainer.batch_size={len(images)}", f"data.image_size={images.shape[-1]}"]
    config = resolve(compose_config(overrides))[0].settings
    session = enter(config, Parts(small_network, build_loss, "", 10, 1024, CPU, capacity))
    engine = Engine(session.update, "eager", len(images), void)
    return lambda: engine.run(images, labels, samples=0)


def cpu() -> Iterator[str]:
    """A row for each network."""
    yield from table(
        "network", "bare loop, ms", "ours, ms", "ratio (median of pairs)", "ours on the simulated card, ms", "ratio"
    )
    for name, batch, size, updates in (("efficientnet_b0", 8, 64, 3), ("small", 32, 64, 15)):
        images, labels = torch.rand(batch, 3, size, size), torch.arange(batch) % 10
        found: dict[str, list[float]] = {"bare": [], "ours": [], "card": []}
        with limited(CPU, "none") as free, limited(CPU, "4GiB") as card:
            for _ in range(NETWORKS):  # where its memory lies makes a network some percent faster or slower
                blocks = {
                    "bare": block_on_cpu(bare_on_cpu(name, images, labels), updates),
                    "ours": block_on_cpu(ours_on_cpu(name, images, labels, free), updates),
                    "card": block_on_cpu(ours_on_cpu(name, images, labels, card), updates),
                }
                for key, seconds in alternating(blocks, BLOCKS).items():
                    found[key] += seconds
        ms = {key: f"{1e3 * statistics.median(values):.2f}" for key, values in found.items()}
        ours, card_ratio = (f"{ratio(found[key], found['bare']):.4f}" for key in ("ours", "card"))
        yield row(f"{name} {batch}@{size}", ms["bare"], ms["ours"], ours, ms["card"], card_ratio)


def block_on_cpu(step: Callable[[], None], updates: int) -> Callable[[], float]:
    per_update(step, COUNTED_FIRST + 8, CPU)  # to warm up: the simulated card counts so many in any case
    return lambda: per_update(step, updates, CPU)


# ---- compile: what it brings and how long one waits ------------------------------------------------------------------


def compiled() -> Iterator[str]:
    """A row for each recipe: the speed before and after compiled code takes over, with nothing compiled before."""
    need_cuda()
    yield from table(
        "recipe", "images/s before", "after", "first update, s", "changed over after, s", "stood still, s",
        "card's memory before, while it compiled, after, MiB", "updates until it has caught up",
    )  # fmt: skip
    for case in (LARGE_BF16, CASES[2]):
        yield row(case.name, *_changed_over(case))


def _changed_over(case: Case) -> tuple[str, ...]:
    """What one recipe's row says, after its name."""
    images, labels = batch_of(case)
    engine = engine_of(case, "compile")
    step = partial(engine.run, images, labels, samples=0)
    total, started = torch.cuda.mem_get_info(CUDA)[1], time.perf_counter()

    def used() -> float:
        return (total - torch.cuda.mem_get_info(CUDA)[0]) / 2**20  # of all processes

    first = per_update(step, 1)
    per_update(step, 1)  # captures
    per_update(step, WARM_UP)
    memory, before = [used()], per_update(step, UPDATES)
    memory.append(memory[0])
    longest = 0.0
    while isinstance(engine.backend, Compiled):  # it gives way once it has settled
        block = per_update(step, 1)
        longest, memory[1] = max(longest, block), max(memory[1], used())
    changed, after = time.perf_counter() - started, per_update(step, UPDATES)
    memory.append(used())
    kept = engine.backend.kernels.label if isinstance(engine.backend, Recorded) else engine.backend.label
    caught_up = f"{longest / (before - after):.0f}" if after < before else "-"
    return (
        f"{case.batch / before:.0f}", f"{case.batch / after:.0f} ({kept})", f"{first:.1f}", f"{changed:.0f}",
        f"{longest:.1f}", ", ".join(f"{each:.0f}" for each in memory), caught_up,
    )  # fmt: skip


# ---- layout: where channels_last pays ------------------------------------------------------------------------------


LAYOUTS = (
    ("efficientnet_b0", 4, 160), ("efficientnet_b0", 8, 160), ("efficientnet_b0", 24, 224),
    ("mobilenetv3_large_100", 24, 224), ("mobilenetv3_small_050", 8, 64), ("mobilenetv3_small_050", 24, 96),
    ("resnet50", 8, 64), ("resnet50", 24, 224), ("densenet121", 24, 224), ("convnext_atto", 24, 224),
    ("vit_tiny_patch16_224", 24, 224),
)  # fmt: skip


def layout() -> Iterator[str]:
    """A row for each model and size: how many times as fast a graph is with channels_last, at each precision."""
    need_cuda()
    precisions = ("fp32", "bf16")
    heads = [f"{precision}, images/s" for precision in precisions]
    yield from table("model", *heads, *(f"channels_last, {precision}" for precision in precisions))
    for model, batch, size in LAYOUTS:
        pairs = [_both_layouts(Case("", batch, batch, size, precision), model) for precision in precisions]
        speeds = (f"{batch / plain:.0f}" for plain, _ in pairs)
        yield row(f"{model} {batch}@{size}", *speeds, *(f"{plain / last:.2f}" for plain, last in pairs))


def _both_layouts(case: Case, model: str) -> tuple[float, float]:
    """Seconds of an update without and with channels_last."""
    images, labels = (part.contiguous().pin_memory() for part in batch_of(case))  # as loaders give them
    steps = {}
    for is_last in (False, True):
        engine = engine_of(case, "graph", f"model.name={model}", f"trainer.channels_last={is_last}")
        steps[str(is_last)] = partial(per_update, partial(engine.run, images, labels, samples=0), UPDATES)
        steps[str(is_last)]()
    found = alternating(steps, 5)
    return statistics.median(found["False"]), statistics.median(found["True"])


# ---- start: what the first update of a process waits for -------------------------------------------------------------


STARTS = (
    ("efficientnet_b0", "fp32"), ("efficientnet_b0", "bf16"), ("efficientnet_b0", "fp16"),
    ("mobilenetv3_large_100", "fp32"), ("convnext_atto", "fp32"), ("resnet50", "fp32"), ("resnet50", "bf16"),
)  # fmt: skip


def start() -> Iterator[str]:
    """A row for each model and precision: the first update of a new process, once with each memory format."""
    need_cuda()
    yield from table("model, 24@224", "first update, s", "with channels_last, s")
    for model, precision in STARTS:
        case, seconds = Case("", 24, 24, 224, precision), []
        for is_last in (False, True):
            with ProcessPoolExecutor(1, get_context("spawn")) as new_process:
                seconds.append(new_process.submit(first_update, case, model, is_last).result())
        yield row(f"{model} {precision}", *(f"{each:.1f}" for each in seconds))


def first_update(case: Case, model: str, is_last: bool) -> float:
    """Seconds of an eager update in a process that has made none, on the card or elsewhere."""
    engine = engine_of(case, "eager", f"model.name={model}", f"trainer.channels_last={is_last}")
    images, labels = (part.contiguous().pin_memory() for part in batch_of(case))
    return per_update(partial(engine.run, images, labels, samples=0), 1)


PARTS: dict[str, Callable[[], Iterator[str]]] = {
    "undo": undo,
    "loop": loop,
    "compile": compiled,
    "layout": layout,
    "start": start,
    "cpu": cpu,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    part = parser.parse_args().part
    print(heading(part, on_card=part != "cpu"), "", sep="\n")
    with tempfile.TemporaryDirectory() as cache, private_process_state(deterministic=False):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # nothing is compiled yet
        for line in PARTS[part]():
            print(line, flush=True)


if __name__ == "__main__":
    main()
