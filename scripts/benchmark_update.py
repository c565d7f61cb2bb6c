"""Where the time of one update goes, and what this package adds to a bare loop.

where: kernels, launches, copies and waiting in one update, against the time that its memory traffic takes at least.
loop: the training loop against the same engine called directly. cpu: an eager update on the CPU against a bare loop.
compile: eager, graph and compile, and how long compiling takes. What undo costs is in `gpu_checks.py cost`.

Usage: python -m scripts.benchmark_update [where] [loop] [cpu] [compile] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import TensorDataset

from adaptive_trainer import compose_config
from adaptive_trainer.config import Config, ModelConfig
from adaptive_trainer.data import Batch, build_datasets
from adaptive_trainer.engine import Engine
from adaptive_trainer.ladder import resolve
from adaptive_trainer.loop import Hooks, Loop, StopSignal
from adaptive_trainer.memory.capacity import Capacity, limited
from adaptive_trainer.models import build_model
from adaptive_trainer.optimizers import build_loss
from adaptive_trainer.position import Position
from adaptive_trainer.process import private_process_state
from adaptive_trainer.session import Parts, enter
from scripts.benchmark import CASES, CUDA, batch_of, engine_of

CPU = torch.device("cpu")
NAMED = {case.name: case for case in CASES}
RUNGS = [NAMED[name] for name in ("8@160 fp32", "24@224 fp32", "amp: 8@160 fp16")]
WARM_UP, UPDATES, PROFILED, BLOCKS, NETWORKS = 20, 20, 10, 9, 9


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def per_update(step: Callable[[], None], updates: int, device: torch.device = CUDA) -> float:
    """Seconds of one of so many updates in a row."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(updates):
        step()
    synchronize(device)
    return (time.perf_counter() - started) / updates


def alternating(blocks: dict[str, Callable[[], float]], count: int = BLOCKS) -> dict[str, list[float]]:
    """What each block gives, `count` times, in turn and in an order that alternates."""
    found: dict[str, list[float]] = {name: [] for name in blocks}
    for turn in range(count):
        for name in list(blocks)[:: 1 if turn % 2 else -1]:
            found[name].append(blocks[name]())
    return found


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def table(*names: str) -> Iterator[str]:
    """The head of a table."""
    yield row(*names)
    yield "|---" * len(names) + "|"


def ratio(mine: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(mine, other, strict=True))


# ---- where: one update, kernel by kernel -----------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Bytes that operators read and write on a device: each input once, each output once, views nothing.

    An operator that changes an argument in place reads and writes it; one that only fills it writes it. Elements that
    an expanded tensor repeats count once. What a kernel reads again, or keeps in scratch memory, does not count: it is
    what the operators must move when each is a kernel that finds nothing in a cache.
    """

    FILLS = ("copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_")  # their first argument

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.bytes, self.operators = device, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        moved = self._moved(func, args, kwargs or {}, out)
        self.bytes += moved
        self.operators += moved > 0
        return out

    def _moved(self, func: Any, args: Any, kwargs: Any, out: Any) -> int:
        schema, name = func._schema, func._schema.name.rpartition("::")[2]
        is_changing = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
        if not any(is_changing) and any(r.alias_info is not None for r in schema.returns):
            return 0  # a view
        given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
        total, held = 0, {id(leaf) for leaf in tree_leaves(given)}
        for argument, is_changed in zip(schema.arguments, is_changing, strict=True):
            size = self._size(given.get(argument.name))
            is_only_filled = is_changed and (
                argument.is_out or (name in self.FILLS and argument is schema.arguments[0])
            )
            total += 0 if is_only_filled else size
            if name.startswith("_fused_") and argument.name == "grads" and given.get("grad_scale") is None:
                continue  # declared as changed, and changed only where it is scaled
            total += size if is_changed else 0
        if not name.startswith(("empty", "new_empty")):
            total += sum(self._size(leaf) for leaf in tree_leaves(out) if id(leaf) not in held)
        return total

    def _size(self, value: Any) -> int:
        return sum(
            _own_bytes(t) for t in tree_leaves(value) if isinstance(t, Tensor) and t.device.type == self.device.type
        )


def _own_bytes(tensor: Tensor) -> int:
    """Bytes of the elements that have memory of their own."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride or not size else 1
    return elements * tensor.element_size()


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy of 1 GiB reads and writes within the device."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    return 2 * source.nbytes / min(per_update(lambda: void(target.copy_(source)), 10, device) for _ in range(5))


def void(_: object) -> None:
    """For the value of an expression that is not wanted."""


@dataclass
class Timeline:
    """What a profiler saw of a number of updates on the card, an update: milliseconds, counts, bytes."""

    kernel_ms: float
    kernels: float
    launches: float
    copy_ms: float
    copied: float
    busy_ms: float


def timeline(step: Callable[[], None]) -> Timeline:
    step()
    synchronize(CUDA)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            step()
        synchronize(CUDA)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text(encoding="utf-8"))["traceEvents"] if e.get("ph") == "X"]
    kernels, copies, sets = (
        [e for e in events if e.get("cat") == kind] for kind in ("kernel", "gpu_memcpy", "gpu_memset")
    )
    starts = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
    launches = sum(str(e.get("name")).startswith(starts) for e in events if str(e.get("cat")).startswith("cuda_"))
    return Timeline(
        sum(e["dur"] for e in kernels) / 1e3 / PROFILED,
        len(kernels) / PROFILED,
        launches / PROFILED,
        sum(e["dur"] for e in copies + sets) / 1e3 / PROFILED,
        sum(int(e["args"].get("bytes", 0)) for e in copies) / PROFILED,
        covered([(e["ts"], e["ts"] + e["dur"]) for e in kernels + copies + sets]) / 1e3 / PROFILED,
    )


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    total, end = 0.0, float("-inf")
    for begin, until in sorted(spans):
        total += max(0.0, until - max(begin, end))
        end = max(end, until)
    return total


def where() -> Iterator[str]:
    """A row for each rung and engine."""
    speed = bandwidth(CUDA)
    yield f"A copy within the card moves {speed / 1e9:.0f} GB/s.\n"
    yield from table(
        "recipe", "engine", "wall ms", "kernels ms", "kernels", "launches", "copies ms", "copied KiB", "idle ms",
        "operators move MB", "at least ms", "wall / least",
    )  # fmt: skip
    for case in RUNGS:
        images, labels = batch_of(case)
        for name in ("eager", "graph"):
            engine = engine_of(case, name)

            def step(engine: Engine = engine, images: Tensor = images, labels: Tensor = labels) -> None:
                engine.run(images, labels, samples=0)

            per_update(step, WARM_UP)
            wall = 1e3 * statistics.median(per_update(step, UPDATES) for _ in range(BLOCKS))
            seen = timeline(step)
            with Traffic(CUDA) as traffic:
                engine.update.work(images, labels)
            least = 1e3 * traffic.bytes / speed
            yield row(
                case.name, name, f"{wall:.2f}", f"{seen.kernel_ms:.2f}", f"{seen.kernels:.0f}", f"{seen.launches:.0f}",
                f"{seen.copy_ms:.3f}", f"{seen.copied / 1024:.0f}", f"{wall - seen.busy_ms:.2f}",
                f"{traffic.bytes / 1e6:.0f}", f"{least:.2f}", f"{wall / least:.2f}",
            )  # fmt: skip


# ---- loop: the whole harness against its engine ----------------------------------------------------------------------


class Prepared(Loop):
    """A loop whose data are there: one batch again and again, or a loader's.

    Attributes:
        unmeasured: updates at the start of an epoch, in which a loader starts.
        started_at: the clock after these.
    """

    batch: Batch | None = None
    unmeasured: int = 1
    updates_done: int = 0
    started_at: float = 0.0

    def _open_train_loader(self) -> Iterable[Batch]:
        if self.batch is None:
            return super()._open_train_loader()
        state = self.session.state
        return [self.batch] * (state.position.size // self.batch.samples)

    def _stop_if_asked(self) -> None:
        super()._stop_if_asked()
        self.updates_done += 1
        if self.updates_done == self.unmeasured:
            synchronize(self.device)  # or what the card has still to do of these would count
            self.started_at = time.perf_counter()


def loop_of(config: Config, device: torch.device, updates: int, capacity: Capacity) -> Prepared:
    size, samples = config.data.image_size, updates * config.trainer.batch_size
    images = torch.rand(config.trainer.batch_size, 3, size, size).repeat(updates, 1, 1, 1)
    data = TensorDataset(images, torch.arange(samples) % 10)
    parts = Parts(build_model, build_loss, "", 10, samples, device, capacity)
    hooks = Hooks(void, void, lambda text: print(text, file=sys.stderr), lambda: False)
    sets = build_datasets(config, data, TensorDataset(images[:8], torch.arange(8)))
    return Prepared(enter(config, parts), sets, device, "requested", 8, hooks, StopSignal())


def epoch(loop: Prepared, batch: Batch | None) -> float:
    """Seconds of an update in one epoch of the loop, without its first tenth, in which a loader starts."""
    state, loop.batch, loop.updates_done = loop.session.state, batch, 0
    updates: int = state.position.size // loop.session.config.trainer.batch_size
    loop.unmeasured = updates // 10
    state.position = Position(0, 0, 0, state.position.size)
    synchronize(loop.device)
    loop._train_epoch()
    synchronize(loop.device)
    seconds: float = time.perf_counter() - loop.started_at
    return seconds / (updates - loop.unmeasured)


def direct(loop: Prepared, batch: Batch) -> Callable[[], None]:
    """The same engine without a loop around it: the graph replayed, or the update run."""
    graph, update = loop.engine._graph, loop.session.update
    if graph is None:
        return lambda: update.run(batch.images, batch.labels, samples=0)
    return lambda: graph.replay(batch.images, batch.labels)


def loop() -> Iterator[str]:
    """A row for each recipe and engine; one on the CPU where there is no card."""
    device = CUDA if torch.cuda.is_available() else CPU
    rungs = [(case, name) for case in RUNGS for name in ("graph", "eager")]
    updates, workers = 300, 8
    if device == CPU:
        rungs, updates, workers = [(replace(RUNGS[0], name="8@64 fp32 on the CPU", size=64), "eager")], 30, 1
    yield from table(
        "recipe", "engine", "engine alone, ms", "loop, one batch, ms", "ratio", f"loop, {workers} workers, ms", "ratio"
    )
    for case, name in rungs:
        config = resolve(compose_config([
            "model.name=efficientnet_b0", f"trainer.batch_size={case.batch}", f"data.image_size={case.size}",
            f"trainer.precision={case.precision}", f"trainer.engine={name}", "data.transforms=none",
            f"data.num_workers={workers}", "trainer.epochs=1000",
        ]))[0].settings  # fmt: skip
        with limited(device, "none") as capacity:
            found = looped(loop_of(config, device, updates, capacity), updates)
        ms = {key: f"{1e3 * statistics.median(values):.3f}" for key, values in found.items()}
        one, loaded = (f"{ratio(found[key], found['alone']):.4f}" for key in ("one batch", "loader"))
        yield row(case.name, name, ms["alone"], ms["one batch"], one, ms["loader"], loaded)


def looped(mine: Prepared, updates: int) -> dict[str, list[float]]:
    """Seconds of an update, the engine called directly and by the loop."""
    trainer, size = mine.session.config.trainer, mine.session.config.data.image_size
    images, labels = torch.rand(trainer.batch_size, 3, size, size), torch.arange(trainer.batch_size) % 10
    if mine.device.type == "cuda":
        images, labels = images.pin_memory(), labels.pin_memory()
    batch = Batch(images, labels, trainer.batch_size, [])
    epoch(mine, batch)  # records the graph
    bare = direct(mine, batch)
    return alternating({
        "alone": lambda: per_update(bare, updates, mine.device),
        "one batch": lambda: epoch(mine, batch),
        "loader": lambda: epoch(mine, None),
    })  # fmt: skip


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
    per_update(step, 5, CPU)  # to warm up
    return lambda: per_update(step, updates, CPU)


# ---- compile: what it brings and how long one waits ------------------------------------------------------------------


def compiled() -> Iterator[str]:
    """A row for each recipe and engine, with nothing compiled before."""
    yield from table("recipe", "engine", "images/s", "first update, s", "updates until it has caught up with graph")
    for case in (NAMED["24@224 bf16 channels_last"], NAMED["24@224 fp32"]):
        images, labels = batch_of(case)
        blocks: dict[str, Callable[[], float]] = {}
        first: dict[str, float] = {}
        for name in ("eager", "graph", "compile"):
            engine = engine_of(case, name)

            def step(engine: Engine = engine, images: Tensor = images, labels: Tensor = labels) -> None:
                engine.run(images, labels, samples=0)

            first[name] = per_update(step, 1)
            per_update(step, WARM_UP)
            blocks[name] = partial(per_update, step, UPDATES)
        seconds = {name: statistics.median(values) for name, values in alternating(blocks).items()}
        for name, each in seconds.items():
            gain = seconds["graph"] - each
            caught_up = f"{(first[name] - first['graph']) / gain:.0f}" if name == "compile" and gain > 0 else "-"
            yield row(case.name, name, f"{case.batch / each:.0f}", f"{first[name]:.1f}", caught_up)


PARTS: dict[str, Callable[[], Iterator[str]]] = {"where": where, "loop": loop, "cpu": cpu, "compile": compiled}


def about(part: str) -> str:
    on_card = part != "cpu" and torch.cuda.is_available()
    device = torch.cuda.get_device_name(CUDA) if on_card else f"{platform.machine()}, {torch.get_num_threads()} threads"
    return f"### {part}: {device}, torch {torch.__version__}, timm {timm.__version__}, {date.today()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), choices=[*PARTS, []])
    parser.add_argument("--out", type=Path, default=None, help="folder for benchmark-update.md")
    arguments = parser.parse_args()
    if len(arguments.parts) != 1:  # each in a process of its own
        for name in arguments.parts or PARTS:
            out = [] if arguments.out is None else ["--out", str(arguments.out)]
            subprocess.run([sys.executable, "-m", "scripts.benchmark_update", name, *out], check=False)
        return
    [name] = arguments.parts
    lines = [about(name), ""]
    print("\n".join(lines))
    with tempfile.TemporaryDirectory() as cache, private_process_state(deterministic=False):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # nothing is compiled yet
        for row in PARTS[name]():
            print(row, flush=True)
            lines.append(row)
    print()
    if arguments.out is not None:
        with (arguments.out / "benchmark-update.md").open("a", encoding="utf-8") as file:
            file.write("\n".join([*lines, "", ""]))


if __name__ == "__main__":
    main()
