"""The asked recipe in less memory: what recomputation gives, bit for bit, on one CUDA card.

Usage: python -m scripts.benchmark_exact [--part caps|networks|ladders|all] [--caps NUMBER ...] [--networks NUMBER ...]
       [--updates N] [--seconds N]

`caps`: recipes under limits that are far too small for them, trained by ladder=exact for 5 epochs of 10 updates, with
their evaluations. "bits": weights, buffers and optimizer in the last checkpoint, with deterministic kernels, against
the same training without limit and ladder. "tries": rungs and plans that were tried on the card. "x": the time of an
update as one CUDA graph, with these kernels too, over the time of the same without recomputation and limit, medians of
blocks. What is not timed runs side by side.

`networks`: twenty networks, each under the plan of the least memory whose predicted added time is no more than ADDED.
"bits": sha256 of weights, buffers and optimizer after the updates and an evaluation. The smallest limits on the card
are found by dry runs, to 2 %. Plans are made before, on the CPU, for the card by its name.

`ladders`: 24@224 on 2,400 photos under 1300 MiB, by ladder=default and ladder=exact: what each keeps, how fast it
trains, and what it has learned after the same epochs.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from adaptive_trainer import Result, Trainer, compose_config, oom
from adaptive_trainer.checkpoints import checkpoint
from adaptive_trainer.config.overrides import typed
from adaptive_trainer.config.schema import Config
from adaptive_trainer.errors import LadderExhausted
from adaptive_trainer.ladder.descent import Outcome
from adaptive_trainer.ladder.resolve import with_plan
from adaptive_trainer.memory.limit import limited
from adaptive_trainer.models.losses import build_loss
from adaptive_trainer.models.recomputing.plan import NONE
from adaptive_trainer.models.zoo import build_model
from adaptive_trainer.planning.device_spec import spec_of
from adaptive_trainer.planning.predictor import Predictor
from adaptive_trainer.planning.recomputation import MARGIN, Planner
from adaptive_trainer.step.engine import Engine
from adaptive_trainer.training.measure import measure
from adaptive_trainer.training.session import Parts, enter
from adaptive_trainer.utils.global_state import private_process_state
from scripts.benchmark_data import make_photos
from scripts.timing import CUDA, heading, need_cuda, per_update, row, table

S = TypeVar("S")
T = TypeVar("T")
Cap = tuple[str, int, int, str, int]
MiB, CLASSES = 1 << 20, 10
ADDED = 1.24  # of the twenty networks
SHARES = (0.3, 0.33, 0.36, 0.39, 0.42, 0.45, 0.5, 0.6, 0.7)  # of the plain limit, from the smallest on
CAPS = (
    ("efficientnet_b0", 24, 224, "fp32", 900), ("efficientnet_b0", 24, 224, "fp32", 700),
    ("efficientnet_b0", 24, 224, "fp32", 650), ("efficientnet_b0", 24, 224, "fp16", 560),
    ("efficientnet_b3", 24, 300, "fp32", 2457), ("efficientnet_b4", 16, 380, "fp32", 3686),
)  # fmt: skip
NETWORKS = (
    "efficientnet_b0", "efficientnet_b2", "mobilenetv3_large_100", "mobilenetv2_100", "mnasnet_100", "resnet18",
    "resnet50", "resnext50_32x4d", "regnety_008", "regnetx_016", "densenet121", "convnext_tiny",
    "vit_small_patch16_224", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "torchvision/mobilenet_v3_large",
    "torchvision/efficientnet_v2_s", "torchvision/vit_b_16", "torchvision/swin_t", "torchvision/shufflenet_v2_x1_0",
)  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """A recipe, the plan of it, and what is predicted; bytes and seconds."""

    config: Config
    plain: int
    least: int
    added: float
    seconds: float


def settings(name: str, batch: int, size: int, precision: str) -> Config:
    """The recipe, for the card by its name, with a plan still to be found."""
    return typed(
        compose_config(
            [
                "card=h200", f"model.name={name}", f"model.num_classes={CLASSES}", f"trainer.batch_size={batch}",
                f"data.image_size={size}", f"trainer.precision={precision}", "trainer.channels_last=false",
                "trainer.recompute=auto", "trainer.deterministic=true",
            ]
        )
    )  # fmt: skip


def planned(case: tuple[str, int, int, str]) -> Planned:
    """Plan a recipe for the least memory in little time."""
    config = settings(*case)
    predictor = Predictor(spec_of(config), num_classes=CLASSES)
    planner = Planner(predictor)
    started = time.perf_counter()
    plain = predictor.limit(with_plan(config, NONE)) or 0
    for room in (share * plain for share in SHARES):
        found = planner.planned(config, int(room))
        seconds, started = time.perf_counter() - started, time.perf_counter()
        least, added = predictor.limit(found) or 0, planner.added_time(found) or 0.0
        if MARGIN * least <= room and added <= ADDED:
            break
    return Planned(found, plain, least, added, seconds)


@contextmanager
def engine_of(config: Config, limit: int | None) -> Iterator[Engine]:
    """What trains a recipe by a graph, with deterministic kernels, under a limit in bytes."""
    size = "none" if limit is None else f"{limit // MiB}MiB"
    with private_process_state(deterministic=True, tf32=None), limited(CUDA, size) as capacity:
        capacity.same_kernels = True
        torch.manual_seed(0)
        batch = config.trainer.batch_size
        session = enter(config, Parts(build_model, build_loss, "", CLASSES, batch, CUDA, capacity))
        try:
            yield Engine(session.update, "graph", batch, partial(print, file=sys.stderr))
        finally:  # a row that fails must not take memory from the next
            del session
            gc.collect()
            oom.release(CUDA)


def batches(config: Config) -> list[tuple[Tensor, Tensor]]:
    """Five batches in pinned memory."""
    generator = torch.Generator().manual_seed(0)
    size, batch = config.data.image_size, config.trainer.batch_size
    images = [torch.rand(batch, 3, size, size, generator=generator).pin_memory() for _ in range(5)]
    return [(each, torch.randint(CLASSES, (batch,), generator=generator).pin_memory()) for each in images]


def digest(config: Config, limit: int | None, updates: int) -> str:
    """What training and an evaluation leave, with deterministic kernels."""
    with engine_of(config, limit) as engine:
        data, state = batches(config), engine.update.state
        for number in range(updates):
            images, labels = data[number % len(data)]
            engine.run(images, labels, samples=0)
        engine.evaluate(state.model, *data[0])
        content = [*state.model.state_dict().values()]
        content += [leaf for values in state.optimizer.state.values() for leaf in values.values()]
        found = hashlib.sha256()
        for tensor in content:
            found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()


def timed(config: Config, limit: int | None) -> tuple[float, bool]:
    """Seconds of an update with deterministic kernels, and whether it is a graph."""
    with engine_of(config, limit) as engine:
        images, labels = batches(config)[0]

        def update() -> None:
            engine.run(images, labels, samples=0)

        per_update(update, 6)
        blocks = [per_update(update, 10) for _ in range(5)]
        is_graph = getattr(engine.backend, "graph", None) is not None
        return statistics.median(blocks), is_graph


def smallest(config: Config, guess: int) -> int:
    """Bytes under which a dry run fits, to 2 %; few are needed where the guess is good."""

    def fits(size: int) -> bool:
        here = replace(config, memory=replace(config.memory, limit=f"{size // MiB}MiB"), card=type(config.card)())
        return bool(measure(replace(here, device="cuda"), CLASSES))

    step, low, high = 1.02, guess, guess
    if fits(guess):
        while fits(low := int(low / step)):
            high, step = low, step**2
    else:
        while not fits(high := int(high * step)):
            low, step = high, step**2
    while high > 1.021 * low:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def caps(cases: Sequence[Cap]) -> None:
    """What ladder=exact makes of recipes under limits."""
    names = "recipe", "limit, MiB", "rung", "tries", "bits", "ms, plain", "x", "x predicted"
    print(heading("caps, 50 updates"), "", *table(*names), sep="\n")
    found: list[Descended | str] = list(side_by_side(under_a_cap, cases))
    for case, made in zip(cases, found, strict=True):
        name, batch, size, precision, cap = case
        recipe = f"{name} {batch}@{size} {precision}"
        if isinstance(made, str):
            print(row(recipe, cap, made), flush=True)
            continue
        config = settings(name, batch, size, precision)
        used, planner = with_plan(config, made.plan), Planner(Predictor(spec_of(config), num_classes=CLASSES))
        (usual, _), (slow, is_graph) = timed(with_plan(config, NONE), None), timed(used, cap * MiB)
        engine, added = "" if is_graph else " eager", planner.added_time(used) or 0.0
        times = f"{usual * 1e3:.2f}", f"{slow / usual:.3f}{engine}", f"{added:.3f}"
        print(row(recipe, cap, made.rung, made.tries, bits(made.is_equal), *times), flush=True)


@dataclass(frozen=True)
class Descended:
    """What ladder=exact has found, and whether that has the bits of the training without it."""

    rung: str
    plan: str
    tries: int
    is_equal: bool


def under_a_cap(case: Cap) -> Descended | str:
    """Train a recipe without and with a limit; why that failed, if it did."""
    name, batch, size, precision, cap = case
    config = settings(name, batch, size, precision)
    with tempfile.TemporaryDirectory() as folder:
        whole, exact = Path(folder) / "whole", Path(folder) / "exact"
        try:
            trained(config, whole, "ladder=none")
            found = trained(config, exact, "ladder=exact", f"memory.limit={cap}MiB")
        except LadderExhausted as error:
            return str(error).splitlines()[-1]
        is_equal = all(torch.equal(*pair) for pair in zip(everything(whole), everything(exact), strict=True))
    plan = next((change.used for change in found.changes if change.key == "trainer.recompute"), NONE)
    tries = sum(attempt.outcome != Outcome.SKIPPED for attempt in found.attempts)
    return Descended(found.rung, plan, tries, is_equal)


def side_by_side(work: Callable[[S], T], cases: Sequence[S]) -> Iterator[T]:
    """What each case gives, several at a time in processes of their own: nothing in it may be timed on the card."""
    workers = max(1, min(len(cases), (os.cpu_count() or 1) - 2))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(work, cases)


def bits(are_equal: bool) -> str:
    return "equal" if are_equal else "DIFFER"


def trained(config: Config, folder: Path, *overrides: str) -> Result:
    """The recipe trained on made-up photos."""
    data = ["data=fakedata", "data.train.size=240", "data.val.size=48", "data.num_workers=4", "trainer.epochs=5"]
    sizes = [f"trainer.batch_size={config.trainer.batch_size}", f"data.image_size={config.data.image_size}"]
    sizes += [f"model.name={config.model.name}", f"trainer.precision={config.trainer.precision}", "device=cuda"]
    how = ["trainer.deterministic=true", "trainer.channels_last=false", "verbosity=quiet", "report=false"]
    return Trainer(compose_config([*data, *sizes, *how, *overrides]), output_dir=folder).fit()


def everything(folder: Path) -> list[Tensor]:
    """All that the last checkpoint of a training says of its state."""
    content = checkpoint.load(folder / "checkpoints" / "last.pt")
    kept = [content[key] for key in ("model", "ema", "optimizer", "scaler", "position", "updates")]
    return [torch.as_tensor(leaf) for leaf in tree_leaves(kept) if isinstance(leaf, Tensor | int | float)]


def ladders(epochs: int) -> None:
    """What each ladder makes of a recipe that does not fit."""
    print(*table("ladder", "rung", "images/s, median epoch", "validation accuracy", "seconds in all"), sep="\n")
    with tempfile.TemporaryDirectory() as name:
        make_photos(Path(name) / "photos", 2400)
        data = ["data=imagefolder", f"data.root={name}/photos/train", "data.val_fraction=0.1", "data.num_workers=12"]
        for ladder in ("default", "exact", "default", "exact"):  # the first of each loads kernels, and predicts
            cfg = compose_config(
                [*data, f"ladder={ladder}", "memory.limit=1300MiB", "device=cuda", f"trainer.epochs={epochs}"]
            )
            folder, started = Path(name) / f"{ladder}-{time.time()}", time.perf_counter()
            result = Trainer(cfg, output_dir=folder).fit()
            head, *lines = (folder / "metrics.csv").read_text().splitlines()
            epoch = statistics.median(float(line.split(",")[head.split(",").index("seconds")]) for line in lines)
            accuracy = result.metrics["val_accuracy"]
            seconds = time.perf_counter() - started
            print(row(ladder, result.rung, f"{2160 / epoch:.0f}", f"{accuracy:.3f}", f"{seconds:.1f}"), flush=True)


def networks(names: Sequence[str], updates: int, at_most: float) -> None:
    """How much smaller the smallest limit of each network is in little time."""
    cases = [(name, 24, 224, "fp32") for name in names]
    began = time.perf_counter()
    plans = list(side_by_side(planned, cases))
    print(heading(f"exact, {updates} updates"), f"(plans: {time.perf_counter() - began:.0f} s)", "", sep="\n")
    head = "recipe", "plan in, s", "smallest limit, MiB: plain", "planned", "predicted", "smaller", "bits"
    print(*table(*head), sep="\n", flush=True)
    made: list[tuple[Planned, Least]] = []
    for plan, least in zip(plans, side_by_side(partial(limits, updates), plans), strict=True):
        if isinstance(least, str):
            print(row(in_words(plan.config), least), flush=True)
            continue
        made.append((plan, least))
        sizes = least.plain // MiB, least.planned // MiB, f"{plan.least // MiB} ({plan.least / least.planned - 1:+.1%})"
        smaller = f"{least.plain / least.planned:.2f}", bits(least.is_equal)
        print(row(in_words(plan.config), f"{plan.seconds:.1f}", *sizes, *smaller), flush=True)
    print("", *table("recipe", "limit, MiB", "ms, plain", "x", "x predicted"), sep="\n", flush=True)
    slower = []
    for plan, least in made:
        if time.perf_counter() - began > at_most:
            break
        try:
            (usual, _), (slow, is_graph) = timed(with_plan(plan.config, NONE), None), timed(plan.config, least.room)
        except Exception as error:  # the other rows are worth having
            print(row(in_words(plan.config), repr(error)[:150]), flush=True)
            oom.release(CUDA)
            continue
        slower.append(slow / usual)
        factor = f"{slower[-1]:.3f}" + ("" if is_graph else " eager")
        print(
            row(in_words(plan.config), least.room // MiB, f"{usual * 1e3:.2f}", factor, f"{plan.added:.3f}"), flush=True
        )
    if slower:
        smaller_by = statistics.median(least.plain / least.planned for _, least in made)
        print(f"median: {smaller_by:.2f} times smaller at {statistics.median(slower):.3f} of the time")


def in_words(config: Config) -> str:
    trainer = config.trainer
    return f"{config.model.name} {trainer.batch_size}@{config.data.image_size} {trainer.precision}"


@dataclass(frozen=True)
class Least:
    """The smallest limits of a recipe without and with its plan, and whether both have the same bits; bytes."""

    plain: int
    planned: int
    is_equal: bool

    @property
    def room(self) -> int:
        """A limit in which the plan has a little room."""
        return int(1.03 * self.planned)


def limits(updates: int, plan: Planned) -> Least | str:
    """The smallest limits on the card, and the bits after some updates; why that failed, if it did."""
    plain = with_plan(plan.config, NONE)
    try:
        least = Least(smallest(plain, plan.plain), smallest(plan.config, plan.least), is_equal=True)
        is_equal = digest(plain, None, updates) == digest(plan.config, least.room, updates)
    except Exception as error:  # the other rows are worth having
        return repr(error)[:150]
    return replace(least, is_equal=is_equal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("caps", "networks", "ladders", "all"), default="all")
    parser.add_argument("--updates", type=int, default=50, help="before bits are compared")
    parser.add_argument("--caps", type=int, nargs="*", default=range(len(CAPS)), help="numbers, from 0")
    parser.add_argument("--networks", type=int, nargs="*", default=range(len(NETWORKS)), help="numbers, from 0")
    parser.add_argument("--seconds", type=float, default=3600, help="after which no further row is begun")
    arguments = parser.parse_args()
    need_cuda()
    logging.disable(logging.WARNING)
    if arguments.part in ("ladders", "all"):
        print(heading("ladders under 1300 MiB, 5 epochs"), "", sep="\n")
        ladders(epochs=5)
    if arguments.part in ("caps", "all"):
        caps([CAPS[number] for number in arguments.caps])
    if arguments.part in ("networks", "all"):
        names = [NETWORKS[number] for number in arguments.networks]
        networks(names, arguments.updates, arguments.seconds)


if __name__ == "__main__":
    main()
