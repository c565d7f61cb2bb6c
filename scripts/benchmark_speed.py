"""Images per second of one training update on one CUDA card: this package, a bare loop, accelerate, lightning, timm.

Usage: python -m scripts.benchmark_speed [--blocks N] [--cases N ...] [--limits] [--plot FILE]

Every contender is a process of its own with the same network, the same pinned batch and the same mathematics (AdamW,
fused; fp16 with loss scaling). They run blocks of updates in turn, in an order that alternates; a figure is the median
of the blocks. Peers that are not installed are left out. In brackets are the seconds until the first update is done,
with nothing compiled before and no other contender at work. `--limits` adds, for each case, the least memory of
PyTorch's allocator with which a contender makes three updates, found by halving; that takes many minutes.

timm's train script is not part of its package: its update is put together here from the parts that it uses, without
its meter of the loss, which waits for the card at every update.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils import NativeScaler
from torch import Tensor, nn
from torch.utils.data import DataLoader

from adaptive_trainer import compose_config
from adaptive_trainer.ladder.resolve import resolve
from adaptive_trainer.memory.limit import limited
from adaptive_trainer.models.losses import build_loss
from adaptive_trainer.models.zoo import build_model
from adaptive_trainer.step.backends.compiled import Compiled
from adaptive_trainer.step.engine import Engine
from adaptive_trainer.training.session import Parts, enter
from scripts.timing import (
    CUDA,
    Contender,
    alternating,
    answers_to,
    heading,
    is_installed,
    need_cuda,
    per_update,
    row,
    table,
)

MODEL = "efficientnet_b0"
WARM_UP, UPDATES, IN_BLOCK = 20, 20, 10
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """A recipe: samples in an update, in a micro-batch, and the rest."""

    name: str
    batch: int
    micro: int
    size: int
    precision: str

    @property
    def is_channels_last(self) -> bool:
        """Whether every contender uses that memory format."""
        return self.name.endswith("channels_last")

    @property
    def memory_format(self) -> torch.memory_format:
        """Of the batch and the weights."""
        return torch.channels_last if self.is_channels_last else torch.contiguous_format


CASES = (
    Case("8@160 fp32", 8, 8, 160, "fp32"), Case("8@224 fp32", 8, 8, 224, "fp32"),
    Case("24@224 fp32", 24, 24, 224, "fp32"), Case("amp: 8@160 fp16", 8, 8, 160, "fp16"),
    Case("accumulate: 2 x 4@160 fp16", 8, 4, 160, "fp16"), Case("8@160 bf16 channels_last", 8, 8, 160, "bf16"),
    Case("8@224 bf16 channels_last", 8, 8, 224, "bf16"), Case("24@224 bf16 channels_last", 24, 24, 224, "bf16"),
    Case("24@224 fp32 channels_last", 24, 24, 224, "fp32"),
)  # fmt: skip
LARGE_BF16 = CASES[7]
RUNGS = [CASES[0], CASES[2], CASES[3]]  # three that differ: small, large, half precision
Block = Callable[[int], float]  # seconds of one of so many updates


def batch_of(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(case.batch, 3, case.size, case.size, generator=generator)
    images = images.contiguous(memory_format=case.memory_format)
    return images.pin_memory(), torch.randint(10, (case.batch,), generator=generator).pin_memory()


def parts_of(case: Case) -> tuple[nn.Module, torch.optim.Optimizer, list[tuple[Tensor, Tensor]]]:
    """A fresh network, its optimizer, and the micro-batches of one update."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=10).to(memory_format=case.memory_format)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    images, labels = batch_of(case)
    parts = zip(images.split(case.micro), labels.split(case.micro), strict=True)  # type: ignore[no-untyped-call]
    return model, optimizer, [(some.pin_memory(), theirs.pin_memory()) for some, theirs in parts]


def bare(case: Case, mode: str = "") -> Block:
    """A plain loop; with the network compiled in a mode of `torch.compile`, where one is named."""
    plain, optimizer, parts = parts_of(case)
    plain = plain.to(CUDA).train()
    model: Callable[[Tensor], Tensor] = torch.compile(plain, mode=mode) if mode else plain
    scaler, loss_of = torch.amp.GradScaler("cuda", enabled=case.precision == "fp16"), nn.CrossEntropyLoss()  # fmt: skip

    def update() -> None:
        for images, labels in parts:
            x, y = images.to(CUDA, non_blocking=True), labels.to(CUDA, non_blocking=True)
            with torch.autocast("cuda", HALF.get(case.precision), enabled=case.precision in HALF):
                loss = loss_of(model(x), y) / len(parts)
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return partial(per_update, update)


def accelerate(case: Case) -> Block:
    from accelerate import Accelerator

    model, optimizer, parts = parts_of(case)
    precision = "no" if case.precision == "fp32" else case.precision
    accelerator = Accelerator(mixed_precision=precision, gradient_accumulation_steps=len(parts))
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    loss_of = nn.CrossEntropyLoss()

    def update() -> None:
        for images, labels in parts:
            x, y = images.to(CUDA, non_blocking=True), labels.to(CUDA, non_blocking=True)
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    loss = loss_of(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()

    return partial(per_update, update)


def lightning(case: Case) -> Block:
    import lightning as pl

    model, optimizer, parts = parts_of(case)
    times: list[float] = []

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model, self.loss_of = model, nn.CrossEntropyLoss()

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            loss: Tensor = self.loss_of(self.model(batch[0]), batch[1])
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer

    class Clock(pl.Callback):  # type: ignore[misc]
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if index == len(parts):  # the first update finds the loop not running yet
                torch.cuda.synchronize()
                times.append(time.perf_counter())

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            torch.cuda.synchronize()
            times.append(time.perf_counter())

    module = Module()

    def block(updates: int) -> float:
        times.clear()
        trainer = pl.Trainer(
            accelerator="gpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[Clock()],
            precision={"fp32": "32-true", "fp16": "16-mixed", "bf16": "bf16-mixed"}[case.precision],
            accumulate_grad_batches=len(parts),
        )  # fmt: skip
        batches: Any = parts * (updates + 1)
        trainer.fit(module, DataLoader(batches, batch_size=None))
        return (times[1] - times[0]) / updates

    return block


def timm_script(case: Case) -> Block:
    """An update as timm's train script does it, with its optimizer and its loss scaler."""
    model, _, parts = parts_of(case)
    model = model.to(CUDA).train()
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, fused=True)
    scaler: Any = NativeScaler() if case.precision == "fp16" else None  # type: ignore[no-untyped-call]
    autocast = partial(torch.autocast, "cuda", HALF.get(case.precision), enabled=case.precision in HALF)
    loss_of = nn.CrossEntropyLoss()

    def update() -> None:
        for number, (images, labels) in enumerate(parts, start=1):
            x, y = images.to(CUDA, non_blocking=True), labels.to(CUDA, non_blocking=True)
            with autocast():
                loss = loss_of(model(x), y) / len(parts)
            is_last = number == len(parts)
            if scaler is not None:
                scaler(loss, optimizer, need_update=is_last)
                continue
            loss.backward()
            if is_last:
                optimizer.step()
        optimizer.zero_grad()

    return partial(per_update, update)


def engine_of(case: Case, engine: str, *overrides: str) -> Engine:
    """This package's engine on a fresh network, with no limit on memory."""
    config = resolve(
        compose_config([
            f"model.name={MODEL}", f"trainer.batch_size={case.batch}", f"trainer.micro_batch_size={case.micro}",
            f"data.image_size={case.size}", f"trainer.precision={case.precision}",
            f"trainer.channels_last={case.is_channels_last}", *overrides,
        ])
    )[0].settings  # fmt: skip
    cap: AbstractContextManager[Any] = limited(CUDA, None)
    parts = Parts(build_model, build_loss, "", 10, 1024, CUDA, cap.__enter__())
    return Engine(enter(config, parts).update, engine, case.batch, lambda text: print(text, file=sys.stderr))


def adaptive_trainer(case: Case, engine: str) -> Block:
    runs = engine_of(case, engine)
    images, labels = batch_of(case)
    return partial(per_update, lambda: runs.run(images, labels, samples=0))


def compiled(case: Case) -> Block:
    """This package's engine, once compiled code has taken over where that is faster."""
    runs = engine_of(case, "compile")
    images, labels = batch_of(case)
    step = partial(runs.run, images, labels, samples=0)

    def block(updates: int) -> float:
        while updates > 1 and isinstance(runs.backend, Compiled):  # more than the first
            step()
        return per_update(step, updates)

    return block


CONTENDERS: dict[str, Callable[[Case], Block]] = {
    "bare loop": bare,
    "torch.compile": partial(bare, mode="default"),
    "reduce-overhead": partial(bare, mode="reduce-overhead"),
    "accelerate": accelerate,
    "lightning": lightning,
    "timm": timm_script,
    "ours, eager": lambda case: adaptive_trainer(case, "eager"),
    "ours": lambda case: adaptive_trainer(case, "auto"),
    "ours, compile": compiled,
}


def serve(name: str, number: int) -> None:
    """Be one contender: for every line read, run a block and answer with the seconds of an update."""
    logging.disable(logging.WARNING)
    answers = answers_to()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        started = time.perf_counter()
        block = CONTENDERS[name](CASES[number])
        block(1)
        print(time.perf_counter() - started, file=answers)
        block(2)  # loads what is left of the kernels
        print("ready", file=answers)
        for _ in sys.stdin:
            print(block(IN_BLOCK), file=answers)


def contenders() -> list[str]:
    """Those whose package is there."""
    return [name for name in CONTENDERS if name not in ("accelerate", "lightning") or is_installed(name)]


def compare(number: int, blocks: int) -> tuple[dict[str, float], dict[str, float]]:
    """Images per second of each contender in one case, and seconds to its first update."""
    with tempfile.TemporaryFile("w+") as noise, tempfile.TemporaryDirectory() as caches:
        serving: dict[str, Contender] = {}
        first: dict[str, float] = {}
        try:
            for name in contenders():  # alone on the card, where this package times its engines
                serving[name] = contender = served(name, number, noise, Path(caches))
                first[name] = seconds(name, contender.answer)
                if contender.answer() != "ready\n":
                    noise.seek(0)
                    raise SystemExit(f"{name} did not start:\n{noise.read()[-3000:]}")
                for _ in range(WARM_UP // IN_BLOCK):
                    contender.ask()
            asking = {name: partial(seconds, name, contender.ask) for name, contender in serving.items()}
            found = alternating(asking, blocks)
        finally:
            for contender in serving.values():
                contender.end()
    return {name: CASES[number].batch / statistics.median(times) for name, times in found.items()}, first


def served(name: str, number: int, noise: IO[str], caches: Path) -> Contender:
    """Start a contender for which nothing is compiled yet."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(caches / name.replace(" ", "_"))}
    return Contender(["-m", "scripts.benchmark_speed", "--serve", name, str(number)], noise, environment)


def smallest_limit(name: str, number: int) -> int:
    """The least MiB of the allocator with which a contender makes three updates, to 3 %."""
    low, high = 1, 2 * 2**10
    while not fits(name, number, high):
        low, high = high, 2 * high
    while high - low > 0.03 * high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(name, number, middle) else (middle, high)
    return high


def fits(name: str, number: int, limit: int) -> bool:
    """Whether a new process that may use so many MiB makes three updates."""
    command = [sys.executable, "-m", "scripts.benchmark_speed", "--fits", name, str(number), str(limit)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def make_updates(name: str, number: int, limit: int) -> None:
    """Make three updates within so many MiB, or fail."""
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction(limit * 2**20 / total, CUDA)
    CONTENDERS[name](CASES[number])(3)


def seconds(name: str, ask: Callable[[], str]) -> float:
    answer = ask()
    if not answer:
        raise SystemExit(f"{name} has ended before its time")
    return float(answer)


def plot(speeds: dict[str, dict[str, float]], path: Path) -> None:
    """Bars of images per second, a group for each case."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 4.5), layout="constrained")
    names = list(next(iter(speeds.values())))
    for number, name in enumerate(names):
        places = [case + number / (len(names) + 1) for case in range(len(speeds))]
        axes.bar(places, [speed[name] for speed in speeds.values()], 1 / (len(names) + 1), label=name)
    middle = (len(names) - 1) / 2 / (len(names) + 1)
    axes.set_xticks([case + middle for case in range(len(speeds))], list(speeds), fontsize="small", rotation=15)
    axes.set_ylabel("images per second")
    axes.set_title(f"{MODEL}, training updates, {torch.cuda.get_device_name(CUDA)}")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=5, help=f"of {IN_BLOCK} updates for each contender")
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(CASES)), help="numbers of cases, from 0")
    parser.add_argument("--plot", type=Path, default=None, help="file to draw the bars into")
    parser.add_argument("--limits", action="store_true", help="find the smallest limits too")
    parser.add_argument("--serve", nargs=2, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--fits", nargs=3, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.fits is not None:
        make_updates(arguments.fits[0], int(arguments.fits[1]), int(arguments.fits[2]))
        return
    if arguments.serve is not None:
        serve(arguments.serve[0], int(arguments.serve[1]))
        return
    need_cuda()
    names = contenders()
    peers = [name for name in names if not name.startswith("ours")]
    print(heading(f"images per second, median of {arguments.blocks} blocks"), "", sep="\n")
    print(*table(MODEL, *names, "ours / best other"), sep="\n")
    speeds: dict[str, dict[str, float]] = {}
    for number in arguments.cases:
        name, (speed, first) = CASES[number].name, compare(number, arguments.blocks)
        speeds[name], best = speed, max(speed[peer] for peer in peers)
        ours = max(speed[each] for each in names if each not in peers)
        print(row(name, *(f"{speed[each]:.0f} ({first[each]:.0f} s)" for each in names), f"{ours / best:.2f}"))
        if arguments.limits:
            print(row(f"{name}, smallest limit, MiB", *(smallest_limit(each, number) for each in names), ""))
    if arguments.plot is not None:
        plot(speeds, arguments.plot)


if __name__ == "__main__":
    main()
