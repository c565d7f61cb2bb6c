"""Images per second of one training update: this package, a bare loop, accelerate and lightning, on one CUDA card.

Usage: python scripts/benchmark.py [--blocks N] [--out FOLDER]

Every contender is a process of its own with the same network, the same pinned batch and the same mathematics (AdamW,
fused; fp16 with loss scaling). They run blocks of updates in turn, in an order that alternates; a figure is the median
of the blocks. Peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
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
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from adaptive_trainer import compose_config
from adaptive_trainer.engine import Engine
from adaptive_trainer.ladder import resolve
from adaptive_trainer.memory.capacity import limited
from adaptive_trainer.models import build_model
from adaptive_trainer.optimizers import build_loss
from adaptive_trainer.session import Parts, enter

CUDA = torch.device("cuda", 0)
MODEL = "efficientnet_b0"
WARM_UP, UPDATES = 20, 20
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """A recipe: samples in an update, in a micro-batch, and the rest. bf16 is with channels_last."""

    name: str
    batch: int
    micro: int
    size: int
    precision: str

    @property
    def memory_format(self) -> torch.memory_format:
        """Of weights and images, for every contender."""
        return torch.channels_last if self.precision == "bf16" else torch.contiguous_format


CASES = (
    Case("8@160 fp32", 8, 8, 160, "fp32"), Case("8@224 fp32", 8, 8, 224, "fp32"),
    Case("24@224 fp32", 24, 24, 224, "fp32"), Case("amp: 8@160 fp16", 8, 8, 160, "fp16"),
    Case("accumulate: 2 x 4@160 fp16", 8, 4, 160, "fp16"), Case("8@160 bf16 channels_last", 8, 8, 160, "bf16"),
    Case("8@224 bf16 channels_last", 8, 8, 224, "bf16"), Case("24@224 bf16 channels_last", 24, 24, 224, "bf16"),
)  # fmt: skip
Block = Callable[[int], float]  # seconds that so many updates take


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


def timed(update: Callable[[], None]) -> Block:
    def block(updates: int) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(updates):
            update()
        torch.cuda.synchronize()
        return time.perf_counter() - started

    return block


def bare(case: Case) -> Block:
    model, optimizer, parts = parts_of(case)
    model = model.to(CUDA).train()
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

    return timed(update)


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

    return timed(update)


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
        return times[1] - times[0]

    return block


def engine_of(case: Case, engine: str, *overrides: str) -> Engine:
    """This package's engine on a fresh network, with no limit on memory."""
    config = resolve(
        compose_config([
            f"model.name={MODEL}", f"trainer.batch_size={case.batch}", f"trainer.micro_batch_size={case.micro}",
            f"data.image_size={case.size}", f"trainer.precision={case.precision}",
            f"trainer.channels_last={case.precision == 'bf16'}", *overrides,
        ])
    )[0].settings  # fmt: skip
    cap: AbstractContextManager[Any] = limited(CUDA, None)
    parts = Parts(build_model, build_loss, "", 10, 1024, CUDA, cap.__enter__())
    return Engine(enter(config, parts).update, engine, case.batch, lambda text: print(text, file=sys.stderr))


def adaptive_trainer(case: Case, engine: str) -> Block:
    runs = engine_of(case, engine)
    images, labels = batch_of(case)
    return timed(lambda: runs.run(images, labels, samples=0))


CONTENDERS: dict[str, Callable[[Case], Block]] = {
    "bare loop": bare,
    "accelerate": accelerate,
    "lightning": lightning,
    "ours, eager": lambda case: adaptive_trainer(case, "eager"),
    "ours": lambda case: adaptive_trainer(case, "auto"),
}


def serve(name: str, number: int) -> None:
    """Be one contender: for every line read, run a block and answer with its seconds."""
    logging.disable(logging.WARNING)
    answer = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        block = CONTENDERS[name](CASES[number])
        block(WARM_UP)
        print("ready", file=answer)
        for _ in sys.stdin:
            print(block(UPDATES), file=answer)


def installed() -> list[str]:
    return [name for name in CONTENDERS if " " in name or name == "ours" or importlib.util.find_spec(name)]


def compare(number: int, blocks: int) -> dict[str, float]:
    """Images per second of each contender in one case."""
    case = CASES[number]
    command = [sys.executable, __file__, "--serve"]
    with tempfile.TemporaryFile("w+") as noise:
        servers = {
            name: subprocess.Popen(
                [*command, name, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise, text=True
            )
            for name in installed()
        }
        seconds: dict[str, list[float]] = {name: [] for name in servers}
        for name, server in servers.items():
            if server.stdout is None or server.stdout.readline() != "ready\n":
                noise.seek(0)
                raise SystemExit(f"{name} did not start:\n{noise.read()[-3000:]}")
        for turn in range(blocks):
            for name in list(servers)[:: 1 if turn % 2 else -1]:
                seconds[name].append(ask(servers[name]))
        for server in servers.values():
            server.communicate()
    return {name: case.batch * UPDATES / statistics.median(times) for name, times in seconds.items()}


def ask(server: subprocess.Popen[str]) -> float:
    if server.stdin is None or server.stdout is None:
        raise RuntimeError("a contender has no pipes")
    server.stdin.write("go\n")
    server.stdin.flush()
    return float(server.stdout.readline())


def versions() -> str:
    names = [name for name in ("torch", "timm", "accelerate", "lightning") if importlib.util.find_spec(name)]
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


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
    axes.set_title(f"{MODEL}, training updates")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=7, help=f"of {UPDATES} updates for each contender")
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(CASES)), help="numbers of cases, from 0")
    parser.add_argument("--out", type=Path, default=None, help="folder for benchmarks.md and benchmarks.png")
    parser.add_argument("--serve", nargs=2, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        serve(arguments.serve[0], int(arguments.serve[1]))
        return
    names = installed()
    peers = [name for name in names if not name.startswith("ours")]
    lines = [f"### images per second: {torch.cuda.get_device_name(CUDA)}, {versions()}, {date.today()}", ""]
    lines += [f"| {MODEL} | {' | '.join(names)} | ours / best other |", "|---" * (len(names) + 2) + "|"]
    print("\n".join(lines), flush=True)
    speeds: dict[str, dict[str, float]] = {}
    for number in arguments.cases:
        speed = speeds[CASES[number].name] = compare(number, arguments.blocks)
        cells = " | ".join(f"{speed[name]:.0f}" for name in names)
        lines.append(f"| {CASES[number].name} | {cells} | {speed['ours'] / max(speed[peer] for peer in peers):.2f} |")
        print(lines[-1], flush=True)
    if arguments.out is not None:
        plot(speeds, arguments.out / "benchmarks.png")
        (arguments.out / "benchmarks.md").write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
