"""What must hold on a real CUDA card, as tables.

caps: the rung that is found under a cap, against brute force. first: how soon the first update is committed, against a
run that starts on that rung. soak: a run disturbed by another process, against its replay.

Usage: python scripts/gpu_checks.py [caps] [first] [soak] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.utils.data import Dataset

from adaptive_trainer import Result, Trainer, compose_config, oom
from adaptive_trainer.config.schema import Config, RungConfig
from adaptive_trainer.data.datasets import build_datasets
from adaptive_trainer.data.loader import Loader
from adaptive_trainer.ladder.resolve import recipe, resolve
from adaptive_trainer.memory.limit import limited
from adaptive_trainer.models.losses import build_loss
from adaptive_trainer.models.memory_format import to_channels_last
from adaptive_trainer.models.optimizers import build_optimizer
from adaptive_trainer.models.zoo import build_model
from adaptive_trainer.planning.judge import Judge
from adaptive_trainer.step.update import Update
from adaptive_trainer.training.session import Parts, Session, enter
from adaptive_trainer.training.trial import Trial
from adaptive_trainer.utils.global_state import private_process_state, seed_everything

MiB = 1 << 20
CUDA = torch.device("cuda", 0)
CAPS = (5600, 2600, 1300, 700, 550, 400, 240, 190, 140)
FAKE = ["data=fakedata", "data.train.size=48", "data.val.size=24", "data.num_workers=0", "device=cuda"]
SOAK_UPDATES = 200


# ---- caps: the rung that the descent lands on, against brute force -------------------------------------------------


def plain_training_fits(config: Config) -> bool:
    """Whether a loop written by hand trains three updates and evaluates a batch at these settings."""
    failure = None
    try:
        _plain_training(config)
    except Exception as error:
        failure = oom.describe(error, pressure=lambda: True)
        if failure.kind is not oom.Kind.DEVICE:
            raise
    oom.release(CUDA)
    return failure is None


def _plain_training(config: Config) -> None:
    used = recipe(config)
    model = build_model(config.model, 10).to(CUDA)
    if config.trainer.channels_last:
        to_channels_last(model)
    optimizer = build_optimizer(model, config.optimizer, CUDA)
    scaler = GradScaler("cuda", enabled=used.precision == "fp16")
    half = torch.bfloat16 if used.precision == "bf16" else torch.float16
    images = torch.rand(used.batch_size, 3, used.image_size, used.image_size)
    labels = torch.randint(10, (used.batch_size,))
    loss_of = nn.CrossEntropyLoss()
    for _ in range(3):
        for x, y in zip(images.split(used.micro_batch_size), labels.split(used.micro_batch_size), strict=True):  # type: ignore[no-untyped-call]
            with torch.autocast("cuda", half, enabled=used.precision != "fp32"):
                loss = loss_of(model(x.to(CUDA)), y.to(CUDA)) * (len(y) / used.batch_size)
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    with torch.no_grad(), torch.autocast("cuda", half, enabled=used.precision != "fp32"):
        float(loss_of(model.eval()(images[: used.eval_batch_size].to(CUDA)), labels[: used.eval_batch_size].to(CUDA)))


def brute_force(cap: int) -> str:
    """The first rung of the default ladder at which the plain loop trains under `cap` MiB; "none" where none does."""
    ladder = resolve(compose_config([*FAKE, "trainer.epochs=1"]))
    with limited(CUDA, f"{cap}MiB"):
        return next((rung.name for rung in ladder if plain_training_fits(rung.settings)), "none")


@dataclass
class Descent:
    """One run under a cap.

    Attributes:
        rung: where it ended.
        tried: rungs that ran out of memory on the way.
        skipped: rungs that were predicted to be hopeless.
        seconds: of the descent and the training.
        allocated: bytes allocated before each attempt and after the run.
    """

    rung: str
    tried: int
    skipped: int
    seconds: float
    allocated: list[int] = field(default_factory=list)


def descend_under(cap: int, folder: Path, *, predicting: bool) -> Descent:
    """Train one short epoch under `cap` MiB; without predictions every rung on the way really runs out of memory."""
    allocated: list[int] = []
    dry_run = Trial.dry_run

    def measured(trial: Trial, config: Config) -> int:
        allocated.append(torch.cuda.memory_allocated(CUDA))
        return dry_run(trial, config)

    started = time.perf_counter()
    blind = nullcontext() if predicting else patch.object(Judge, "assess", lambda *_: ("", None))
    with patch.object(Trial, "dry_run", measured), blind:
        result = Trainer(compose_config([*FAKE, f"memory.limit={cap}MiB"]), output_dir=folder / f"cap-{cap}").fit()
    seconds = time.perf_counter() - started
    oom.release(CUDA)
    allocated.append(torch.cuda.memory_allocated(CUDA))
    tried, skipped = (sum(a.outcome == outcome for a in result.attempts) for outcome in ("oom", "skipped"))
    return Descent(result.rung, tried, skipped, seconds, allocated)


def caps(folder: Path) -> Iterator[str]:
    """A row for each cap."""
    yield from (
        "| cap, MiB | brute force | rung | OOMs | memory back | rung with prediction | skipped | OOMs |",
        "|---|---|---|---|---|---|---|---|",
    )
    for cap in CAPS:
        wanted = brute_force(cap)
        real, predicted = (descend_under(cap, folder, predicting=predicting) for predicting in (False, True))
        allocated = real.allocated + predicted.allocated
        back = "yes" if len(set(allocated)) == 1 else f"no: {allocated}"
        blind = f"{real.rung} | {real.tried} | {back}"
        yield f"| {cap} | {wanted} | {blind} | {predicted.rung} | {predicted.skipped} | {predicted.tried} |"


# ---- first: from `fit()` to the first committed update, with what an earlier run has learned, and started there ------


def until_first_update(overrides: list[str], folder: Path) -> tuple[float, Result]:
    """Seconds from `fit()` to the first committed update, and the run's result."""
    times: list[float] = []
    run = Update.run

    def committed(update: Update, images: Tensor, labels: Tensor, *, samples: int) -> None:
        run(update, images, labels, samples=samples)
        if samples and not times:
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)

    trainer = Trainer(compose_config([*FAKE, *overrides]), output_dir=tempfile.mkdtemp(dir=folder))
    with patch.object(Update, "run", committed):
        started = time.perf_counter()
        result = trainer.fit()
    del trainer
    oom.release(CUDA)
    return times[0], result


def first(folder: Path) -> Iterator[str]:
    """A row for each cap; of three runs each, in turn, the medians."""
    yield from (
        "| cap, MiB | rung | with the ladder, s | started there, s | ratio | out of memory, first run and later |",
        "|---|---|---|---|---|---|",
    )
    for cap in (2600, 1300, 700, 550, 240):
        limit = f"memory.limit={cap}MiB"
        _, learned = until_first_update([limit], folder)
        ladder = resolve(compose_config([*FAKE, limit]))
        above = ladder[: next(n for n, rung in enumerate(ladder) if rung.name == learned.rung) + 1]
        there = ["ladder=none", limit, *(override for rung in above for override in rung.overrides)]
        until_first_update(there, folder)
        pairs, failed = [], []
        for _ in range(3):
            seconds, result = until_first_update([limit], folder)
            pairs.append((seconds, until_first_update(there, folder)[0]))
            failed.append(sum(attempt.outcome == "oom" for attempt in result.attempts))
        once = sum(attempt.outcome == "oom" for attempt in learned.attempts)
        mine, direct = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = f"{mine:.2f} | {direct:.2f} | {mine / direct:.2f}"
        yield f"| {cap} | {learned.rung} | {ratio} | {once}, {max(failed)} |"


# ---- soak: another process takes and gives back memory at random; then the same without it -----------------------

HOG = """
import random, sys, time, torch
random.seed(1)
least, most = int(sys.argv[1]), int(sys.argv[2])
torch.zeros(1, device="cuda")
print("ready", flush=True)
while True:
    free = torch.cuda.mem_get_info()[0]
    take = free - random.randint(least, most) * 2**20
    held = None
    if take > 0:
        try:
            held = torch.empty(take, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError:
            pass
    time.sleep(random.uniform(0.02, 0.4))
    del held
    torch.cuda.empty_cache()
    time.sleep(random.uniform(0.0, 0.3))
"""


@contextmanager
def other_process(least: str, most: str) -> Iterator[None]:
    """Another process that takes all of the card but `least` to `most` MiB, and gives it back, again and again."""
    with subprocess.Popen([sys.executable, "-c", HOG, least, most], stdout=subprocess.PIPE, text=True) as hog:
        try:
            if hog.stdout is not None:
                hog.stdout.readline()
            yield
        finally:
            hog.kill()


class Numbered(Dataset[tuple[Tensor, int]]):
    """Images whose first pixel tells their number."""

    classes = tuple("0123456789")

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.rand(3, 224, 224, generator=torch.Generator().manual_seed(index))
        image[:, 0, 0] = index / 4096
        return image, index % 10


@dataclass
class Journal:
    """What was committed, update by update."""

    losses: list[float] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    rungs: list[str] = field(default_factory=list)
    recoveries: int = 0
    memory_differs: list[int] = field(default_factory=list)


SOAK = [
    "data.transforms=none", "data.num_workers=0", "device=cuda", "trainer.deterministic=true", "trainer.batch_size=24",
    "trainer.engine=eager", "trainer.epochs=10", "ladder.climb=true", "schedule=cosine",
]  # fmt: skip
SOAK_RUNGS = (
    ("batch-16", "trainer.micro_batch_size=16"), ("micro-8", "trainer.micro_batch_size=8"),
    ("amp", "trainer.precision=bf16"), ("micro-4", "trainer.micro_batch_size=4"),
    ("micro-2", "trainer.micro_batch_size=2"),
)  # fmt: skip


def soak_config() -> Any:
    config = compose_config(SOAK)
    config.ladder.rungs = [RungConfig(name, [override]) for name, override in SOAK_RUNGS]
    return config


def digest(model: nn.Module) -> str:
    content = hashlib.sha256()
    for tensor in model.state_dict().values():
        content.update(tensor.cpu().contiguous().numpy().tobytes())
    return content.hexdigest()[:16]


def disturbed(folder: Path, journal: Journal) -> tuple[str, list[str]]:
    """Train while the other process plays; the digest of the weights, and the record's events."""
    attempt, run = Update._attempt, Update.run

    def watched(update: Update, *work: Any) -> Any:
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()  # every update has to ask the driver again
        before = torch.cuda.memory_allocated(CUDA)
        done = attempt(update, *work)
        if isinstance(done, oom.Failure):
            journal.recoveries += 1
            after = torch.cuda.memory_allocated(CUDA)
            if after != before:
                journal.memory_differs.append(after - before)
        return done

    def committed(update: Update, images: Tensor, labels: Tensor, *, samples: int) -> None:
        run(update, images, labels, samples=samples)
        if samples:
            journal.losses.append(float(update.state.meters["loss"]))
            journal.seen += (images[:, 0, 0, 0] * 4096).round().long().tolist()

    with (
        other_process("250", "4000"),
        patch.object(Update, "_attempt", watched),
        patch.object(Update, "run", committed),
    ):
        data = Numbered(SOAK_UPDATES * 24 // 10)
        trainer = Trainer(soak_config(), train_data=data, val_data=Numbered(48), output_dir=folder / "soak")
        result = trainer.fit()
    assert trainer.model is not None
    fallen = [f"{a.rung}:{a.outcome}" for a in result.attempts]
    return digest(trainer.model), fallen


def schedule_of(folder: Path) -> list[tuple[str, int]]:
    """(rung, update from which it trained) of the disturbed run, from its attempts."""
    begins, updates = [], 0
    for line in (folder / "soak" / "attempts.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "after update" in entry["phase"]:
            updates = int(entry["phase"].rpartition(" ")[2])
        if entry["outcome"] == "fits":
            begins.append((entry["rung"], updates))
    return begins


def replay(begins: list[tuple[str, int]], size: int) -> tuple[str, list[float], list[int]]:
    """The same rungs from the same updates on, with nobody disturbing."""
    ladder = {rung.name: rung.settings for rung in resolve(soak_config())}
    first = ladder["requested"]
    losses: list[float] = []
    seen: list[int] = []
    with private_process_state(deterministic=True), limited(CUDA, None) as capacity:
        seed_everything(first.seed)
        data = build_datasets(first, Numbered(size), Numbered(48))
        parts = Parts(build_model, build_loss, "", 10, size, CUDA, capacity)
        session: Session | None = None
        for (rung, _), end in zip(begins, [*(b for _, b in begins[1:]), None], strict=True):
            session = enter(ladder[rung], parts, session)
            _train_until(session, data, end, losses, seen)
        assert session is not None
        return digest(session.state.model), losses, seen


def _train_until(session: Session, data: Any, end: int | None, losses: list[float], seen: list[int]) -> None:
    state, trainer = session.state, session.config.trainer
    loader = Loader(data, batch_size=trainer.batch_size, image_size=224, num_workers=0, pin_memory=True)
    while state.position.epoch < trainer.epochs and (end is None or state.updates < end):
        if state.position.cursor == 0:
            for meter in state.meters.values():
                meter.zero_()
        for batch in loader.train(state.position):
            if end is not None and state.updates >= end:
                return
            session.schedule.apply(state.position.schedule_step(trainer.batch_size))
            session.update.run(batch.images, batch.labels, samples=batch.samples)
            losses.append(float(state.meters["loss"]))
            seen += (batch.images[:, 0, 0, 0] * 4096).round().long().tolist()


def soak(folder: Path) -> Iterator[str]:
    """The disturbed run and its replay, compared."""
    journal = Journal()
    weights, attempts = disturbed(folder, journal)
    oom.release(CUDA)
    size = SOAK_UPDATES * 24 // 10
    begins = schedule_of(folder)
    same_weights, losses, seen = replay(begins, size)
    epochs = [sorted(journal.seen[i : i + size]) == list(range(size)) for i in range(0, len(journal.seen), size)]
    back = "yes" if not journal.memory_differs else f"no: {journal.memory_differs}"
    equal = losses == journal.losses and weights == same_weights and seen == journal.seen
    yield from (
        "| what | value |", "|---|---|",
        f"| committed updates | {len(journal.losses)} |",
        f"| out-of-memories rolled back | {journal.recoveries} |",
        f"| attempts | {', '.join(attempts)} |",
        f"| every sample once an epoch | {'yes' if all(epochs) and len(epochs) == 10 else 'NO'} |",
        f"| losses, samples and weights equal to the undisturbed replay, bit for bit | {'yes' if equal else 'NO'} |",
        f"| memory after each recovery as before the update | {back} |",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    checks: dict[str, Callable[[Path], Iterator[str]]] = {"caps": caps, "first": first, "soak": soak}
    parser.add_argument("checks", nargs="*", default=list(checks), choices=[*checks, []])
    parser.add_argument("--out", type=Path, default=None, help="folder for gpu-checks.md")
    arguments = parser.parse_args()
    if len(arguments.checks) != 1:  # each in a process of its own
        for name in arguments.checks or checks:
            out = [] if arguments.out is None else ["--out", str(arguments.out)]
            subprocess.run([sys.executable, __file__, name, *out], check=False)
        return
    [name] = arguments.checks
    random.seed(0)
    if name == "soak":
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # deterministic products, for the replay
    with tempfile.TemporaryDirectory() as work:
        os.environ["ADAPTIVE_TRAINER_CACHE"] = str(Path(work) / "learned")  # not what other runs have learned
        about = f"{torch.cuda.get_device_name(CUDA)}, torch {torch.__version__}, {date.today()}"
        lines = [f"### {name}: {about}", ""]
        print("\n".join(lines))
        for row in checks[name](Path(work)):
            print(row, flush=True)
            lines.append(row)
    print()
    if arguments.out is not None:
        with (arguments.out / "gpu-checks.md").open("a", encoding="utf-8") as file:
            file.write("\n".join([*lines, "", ""]))


if __name__ == "__main__":
    main()
