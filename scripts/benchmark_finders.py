"""Finding a batch size that fits: this package, accelerate's finder and lightning's, on one CUDA card.

Usage: python -m scripts.benchmark_finders [--caps MIB ...] [--rounds N]

EfficientNet-B0 at 224 in fp32 with fused AdamW, under a cap on the allocator (`memory.limit` for this package,
`torch.cuda.set_per_process_memory_fraction` for the others). Every contender is a process of its own, and they work in
turn, in an order that alternates. A figure is the median of the rounds, after one round that stands in a column of its
own: in it kernels are loaded and, for this package, what is predicted and measured is cached. The clock runs from the
call of `fit`, or of the finder, to the end of the first update that stays; building the network is in it for everyone,
because accelerate's decorated function does it. Images are ready in host memory. "first run" of this package finds an
empty cache in every round: all is predicted and run dry anew.

accelerate and this package start from 24, or from 1024; "from 1024" of this package is a ladder that halves the batch.
accelerate multiplies by 0.9 and lightning starts from 2, as they do by default. Every finder's size has to hold for
three updates. Brute force makes dry runs of sizes around this package's own, each in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from adaptive_trainer import Trainer, compose_config
from adaptive_trainer.config.schema import RungConfig
from adaptive_trainer.errors import OutOfMemory
from adaptive_trainer.ladder.resolve import resolve
from adaptive_trainer.memory.limit import limited
from adaptive_trainer.models.losses import build_loss
from adaptive_trainer.models.zoo import build_model
from adaptive_trainer.recipe import Recipe
from adaptive_trainer.step.dry_run import dry_run
from adaptive_trainer.step.engine import Engine
from adaptive_trainer.training.session import Parts, enter
from scripts.timing import Contender, answers_to, heading, need_cuda, row, synchronize, table

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
MODEL, SIZE, CLASSES, SAMPLES = "efficientnet_b0", 224, 10, 8192
MiB = 1 << 20
UPDATES = 3
LONGEST = 300  # seconds of one round
AROUND = 3  # sizes on each side of the one that was found, for brute force
Answer = dict[str, Any]  # seconds, batch, failed


class Images(Dataset[tuple[Tensor, int]]):
    """The same image again and again, ready in memory."""

    classes = tuple(str(n) for n in range(CLASSES))

    def __init__(self, samples: int = SAMPLES) -> None:
        self.samples = samples
        self.image = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.image, index % CLASSES


def make_model() -> nn.Module:
    model: nn.Module = timm.create_model(MODEL, num_classes=CLASSES)
    return model


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)


def cap_allocator(cap: int) -> None:
    if DEVICE.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(cap * MiB / torch.cuda.get_device_properties(DEVICE).total_memory)


class Done(Exception):
    """The first update of a training has been made."""


def ours(cap: int, batch: str, *, halving: bool = False) -> Answer:
    cfg = compose_config([
        f"model.name={MODEL}", f"data.image_size={SIZE}", "data.transforms=none", "data.num_workers=0",
        f"trainer.batch_size={batch}", f"memory.limit={cap}MiB", f"device={DEVICE}",
    ])  # fmt: skip
    if halving:
        sizes = [int(batch) >> n for n in range(1, 10)]
        cfg.ladder.rungs = [RungConfig(f"batch-{size}", [f"trainer.batch_size={size}"]) for size in sizes]
    folder, answer, run = Path(tempfile.mkdtemp()), Answer(), Engine.run

    def first(engine: Engine, images: Tensor, labels: Tensor, *, samples: int) -> None:
        run(engine, images, labels, samples=samples)
        synchronize(DEVICE)
        answer.update(seconds=time.perf_counter() - started, batch=engine.batch_size)
        raise Done

    Engine.run = first  # type: ignore[method-assign,assignment]
    try:
        trainer = Trainer(cfg, train_data=Images(), val_data=Images(CLASSES), output_dir=folder)
        synchronize(DEVICE)  # CUDA starts before the clock, for all
        started = time.perf_counter()
        with contextlib.suppress(Done):
            trainer.fit()
        attempts = [json.loads(line) for line in (folder / "attempts.jsonl").read_text().splitlines()]
    finally:
        Engine.run = run  # type: ignore[method-assign]
        shutil.rmtree(folder, ignore_errors=True)
    return {**answer, "failed": sum(entry["outcome"] == "oom" for entry in attempts)}


def first_run(cap: int, batch: str) -> Answer:
    """The same, with nothing known of earlier runs."""
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, ADAPTIVE_TRAINER_CACHE=folder):
        return ours(cap, batch)


def accelerate(cap: int, start: int) -> Answer:
    from accelerate.utils import find_executable_batch_size

    cap_allocator(cap)
    answer = Answer(failed=-1)
    images = torch.rand(start, 3, SIZE, SIZE)
    labels = torch.arange(start) % CLASSES
    if DEVICE.type == "cuda":
        images, labels = images.pin_memory(), labels.pin_memory()

    @find_executable_batch_size(starting_batch_size=start)  # type: ignore[untyped-decorator,unused-ignore]
    def train(batch_size: int) -> None:
        answer["failed"] += 1
        model = make_model().to(DEVICE).train()
        optimizer, loss_of = make_optimizer(model), nn.CrossEntropyLoss()
        for number in range(UPDATES):
            x, y = (part[:batch_size].to(DEVICE, non_blocking=True) for part in (images, labels))
            loss_of(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if number == 0:
                synchronize(DEVICE)
                answer.update(seconds=time.perf_counter() - started, batch=batch_size)

    synchronize(DEVICE)
    started = time.perf_counter()
    train()
    return answer


def lightning(cap: int, mode: str) -> Answer:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import BatchSizeFinder
    from lightning.pytorch.tuner import batch_size_scaling

    cap_allocator(cap)
    answer, is_oom = Answer(failed=0), batch_size_scaling.is_oom_error
    images = Images()

    class Module(pl.LightningModule):  # type: ignore[misc,unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.model, self.loss_of, self.batch_size = make_model(), nn.CrossEntropyLoss(), 2

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            loss: Tensor = self.loss_of(self.model(batch[0]), batch[1])
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return make_optimizer(self)

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(images, batch_size=self.batch_size, shuffle=True)

    class Clock(pl.Callback):  # type: ignore[misc,unused-ignore]
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if "seconds" not in answer:
                synchronize(DEVICE)
                answer.update(seconds=time.perf_counter() - started, batch=module.batch_size)

    def noted(error: BaseException) -> bool:
        answer["failed"] += is_oom(error)
        return bool(is_oom(error))

    batch_size_scaling.is_oom_error = noted
    try:
        with tempfile.TemporaryDirectory() as folder:
            synchronize(DEVICE)
            started = time.perf_counter()
            trainer = pl.Trainer(
                accelerator="gpu" if DEVICE.type == "cuda" else "cpu", devices=1, max_steps=UPDATES, logger=False,
                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                callbacks=[BatchSizeFinder(mode=mode), Clock()], default_root_dir=folder,
            )  # fmt: skip
            trainer.fit(Module())
    finally:
        batch_size_scaling.is_oom_error = is_oom
    return answer


CONTENDERS: dict[str, Callable[[int], Answer]] = {
    "ours, from 24": lambda cap: ours(cap, "24"),
    "ours, from 24, first run": lambda cap: first_run(cap, "24"),
    "accelerate, from 24": lambda cap: accelerate(cap, 24),
    "ours, max": lambda cap: ours(cap, "max"),
    "ours, max, first run": lambda cap: first_run(cap, "max"),
    "ours, from 1024 (halving)": lambda cap: ours(cap, "1024", halving=True),
    "accelerate, from 1024": lambda cap: accelerate(cap, 1024),
    "lightning, power": lambda cap: lightning(cap, "power"),
    "lightning, binsearch": lambda cap: lightning(cap, "binsearch"),
}


def round_of(name: str, cap: int) -> Answer:
    """One round of a contender; what goes wrong becomes `reason`, and nothing is left on the card."""
    try:
        answer = CONTENDERS[name](cap)
    except Exception as error:
        answer = {"reason": f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]}
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)
    return answer


def serve(name: str, cap: int) -> None:
    """Be one contender: for every line read, work once and answer with a line."""
    logging.disable(logging.WARNING)
    answers = answers_to()
    signal.signal(signal.SIGALRM, too_long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in sys.stdin:
            signal.alarm(LONGEST)
            print(json.dumps(round_of(name, cap)), file=answers)
            signal.alarm(0)


def too_long(*_: Any) -> None:
    raise TimeoutError(f"no answer in {LONGEST} s")


def fits_alone(batch: int, cap: int) -> bool:
    """Whether a dry run of this size succeeds in this process, which has done nothing before."""
    config = resolve(compose_config([f"model.name={MODEL}", f"data.image_size={SIZE}", f"trainer.batch_size={batch}"]))[
        0
    ].settings
    with limited(DEVICE, f"{cap}MiB") as capacity:
        parts = Parts(build_model, build_loss, "", CLASSES, SAMPLES, DEVICE, capacity)
        try:
            sizes = Recipe(
                batch_size=batch, micro_batch_size=batch, eval_batch_size=batch, image_size=SIZE, num_classes=CLASSES
            )
            dry_run(enter(config, parts).update, sizes)
        except OutOfMemory:
            return False
    return True


def brute_force(found: int, cap: int) -> str:
    """The largest of many sizes around the found one, with a dry run of each alone."""
    sizes = [*range(max(2, found - AROUND), found + AROUND + 1), 2 * found, 4 * found]
    command = [sys.executable, "-m", "scripts.benchmark_finders", "--dry-run"]

    def alone(size: int) -> bool:
        ended = subprocess.run([*command, str(size), str(cap)], capture_output=True, text=True, check=False)
        if ended.stdout.strip() not in ("True", "False"):
            raise RuntimeError((ended.stderr.strip().splitlines() or ["no answer"])[-1][:200])
        return ended.stdout.strip() == "True"

    try:
        with ThreadPoolExecutor(4) as pool:
            fits = [size for size, fit in zip(sizes, pool.map(alone, sizes), strict=True) if fit]
    except RuntimeError as error:
        return f"failed: {error}"
    return str(max(fits, default=0))


def compare(cap: int, rounds: int, cache: str) -> dict[str, list[Answer]]:
    """The answers of every contender under a cap."""
    env = {**os.environ, "ADAPTIVE_TRAINER_CACHE": cache}
    answers: dict[str, list[Answer]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryFile("w+") as noise:
        serving = {
            name: Contender(["-m", "scripts.benchmark_finders", "--serve", name, str(cap)], noise, env)
            for name in CONTENDERS
        }
        for turn in range(rounds + 1):
            for name in list(serving)[:: 1 if turn % 2 else -1]:
                if not any("reason" in answer for answer in answers[name]):
                    line = serving[name].ask()
                    answers[name].append(json.loads(line) if line else {"reason": "its process has ended"})
        for contender in serving.values():
            contender.end()
    return answers


def line_of(name: str, answers: list[Answer]) -> str:
    """A line of the table: seconds as median and range, and of the first round, batch size, tries that failed."""
    if reasons := [answer["reason"] for answer in answers if "reason" in answer]:
        return row(name, f"failed: {reasons[0]}", "-", "-", "-")
    first, *seconds = [answer["seconds"] for answer in answers]
    spread = f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
    batch, failed = (sorted({answer[key] for answer in answers}) for key in ("batch", "failed"))
    return row(name, spread, f"{first:.2f}", " or ".join(map(str, batch)), " or ".join(map(str, failed)))


def lines_of(cap: int, answers: dict[str, list[Answer]], best: str) -> list[str]:
    return [
        *table(f"{cap} MiB", "seconds to the first update", "in a new process", "batch size", "failed tries"),
        *(line_of(name, given) for name, given in answers.items()),
        row("brute force", "-", "-", best, "-"),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--caps", type=int, nargs="+", default=[2600, 1300, 900], help="MiB of the allocator")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds of each contender")
    parser.add_argument("--serve", nargs=2, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", type=int, nargs=2, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        serve(arguments.serve[0], int(arguments.serve[1]))
        return
    if arguments.dry_run is not None:
        print(fits_alone(*arguments.dry_run))
        return
    need_cuda()
    print(heading(f"{MODEL} at {SIZE}, fp32, median of {arguments.rounds} rounds"), "", sep="\n")
    with tempfile.TemporaryDirectory() as cache:
        for cap in arguments.caps:
            answers = compare(cap, arguments.rounds, cache)
            print(*(line_of(name, given) for name, given in answers.items()), sep="\n", file=sys.stderr)
            found = answers["ours, max"][-1].get("batch")
            print(*lines_of(cap, answers, "-" if found is None else brute_force(found, cap)), sep="\n")


if __name__ == "__main__":
    main()
