"""What recomputed and offloaded activations save on a CUDA card, and what they cost: as one CUDA graph, at equal bits.

Usage: python -m scripts.benchmark_offload [--recipes N ...]

The smallest limit is found as by predict_accuracy. A factor is the time of an update over that with all activations
kept. What slower buses would make of it is modelled from the bytes that move (`prediction.transfer`), with the
computation of this card; the model's figure for this card's own rate shows what that is worth.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from adaptive_trainer import compose_config, oom
from adaptive_trainer.config.schema import Config
from adaptive_trainer.ladder.resolve import recipe, resolve
from adaptive_trainer.memory.limit import limited
from adaptive_trainer.models.losses import build_loss
from adaptive_trainer.models.zoo import build_model
from adaptive_trainer.planning.device_spec import spec_of
from adaptive_trainer.planning.predictor import Predictor
from adaptive_trainer.prediction.estimator import Prediction
from adaptive_trainer.prediction.transfer import GB, PCIE_3, added_seconds
from adaptive_trainer.step.engine import Engine
from adaptive_trainer.training.measure import measure
from adaptive_trainer.training.session import Parts, enter
from scripts.predict_accuracy import smallest_limit
from scripts.timing import CUDA, heading, need_cuda, per_update, row, table

MiB = 1 << 20
CLASSES, WARM_UP, UPDATES = 10, 6, 20
COPIED = 512 * MiB
RECIPES = (
    ("efficientnet_b0", 24, 224, "fp32"), ("efficientnet_b0", 24, 224, "fp16"), ("efficientnet_b3", 24, 300, "fp32"),
    ("vit_small_patch16_224", 24, 224, "fp16"), ("resnet50", 24, 224, "fp32"),
)  # fmt: skip
KEPT = ("none", False)
WAYS = (KEPT, ("cheap", False), ("cheap", True), ("none", True))


@dataclass(frozen=True)
class Result:
    """One recipe trained one way: seconds of an update, bytes."""

    seconds: float
    predicted: Prediction
    reserved: int  # with no limit
    smallest: int
    is_found: bool  # or else the search has ended, and the smallest limit is beyond


def config_of(name: str, batch: int, size: int, precision: str, recompute: str, offload: bool) -> Config:
    of_trainer = {"batch_size": batch, "precision": precision, "recompute": recompute, "offload": offload}
    settings = [f"trainer.{key}={value}" for key, value in of_trainer.items()]
    more = ["ladder=none", "device=cuda", "data.num_workers=0", f"model.name={name}", f"data.image_size={size}"]
    return resolve(compose_config([*settings, *more]))[0].settings


def measured(config: Config) -> Result:
    found = Predictor(spec_of(config), num_classes=CLASSES).predict(config)
    if found.min_capacity_bytes is None:
        raise SystemExit(f"not predicted: {found.reason}")
    _, reserved = measure(config, CLASSES) or (0, 0)
    smallest, too_small = smallest_limit(config, CLASSES, found.min_capacity_bytes)
    return Result(_seconds(config), found, reserved, smallest, smallest > too_small)


def _seconds(config: Config) -> float:
    """Of an update as a graph."""
    used = recipe(config)
    images = torch.rand(used.batch_size, 3, used.image_size, used.image_size).pin_memory()
    labels = torch.randint(CLASSES, (used.batch_size,)).pin_memory()
    events: list[str] = []
    with limited(CUDA, None) as capacity:
        parts = Parts(build_model, build_loss, "", CLASSES, 10 * used.batch_size, CUDA, capacity)
        engine = Engine(enter(config, parts).update, "graph", used.batch_size, events.append)
        step = partial(engine.run, images, labels, samples=0)
        per_update(step, WARM_UP)
        if engine.backend.graph is None:
            raise SystemExit(f"no graph: {events}")
        seconds = per_update(step, UPDATES)
    del engine, step
    oom.release(CUDA)
    return seconds


def rate_here() -> float:
    """Bytes a second from pinned memory to the card, the better of a few copies."""
    here, there = torch.empty(COPIED, dtype=torch.uint8).pin_memory(), torch.empty(COPIED, dtype=torch.uint8).cuda()
    return max(COPIED / per_update(lambda: there.copy_(here, non_blocking=True), 1) for _ in range(5))


def rows(numbers: list[int]) -> Iterator[str]:
    rate = rate_here()
    modelled = [f"PCIe 3 x{lanes}, modelled" for lanes in PCIE_3]
    yield heading(f"offloaded activations, host to card {rate / GB:.0f} GB/s")
    yield ""
    yield from table(
        "recipe", "recompute", "offload", "reserved, MiB: predicted / found",
        "smallest limit, MiB: predicted / found", "moved one way, MiB",
        "ms an update", "factor", "modelled here", *modelled,
    )  # fmt: skip
    for number in numbers:
        name, batch, size, precision = RECIPES[number]
        results = {way: measured(config_of(*RECIPES[number], *way)) for way in WAYS}
        kept = results[KEPT].seconds
        for (recompute, offload), found in results.items():
            factors, moved, beyond = (
                [found.seconds / kept],
                found.predicted.offloaded_bytes,
                "" if found.is_found else ">",
            )
            for each in (rate, *PCIE_3.values()) if offload else ():
                compute = results[recompute, False].seconds
                factors.append((compute + added_seconds(moved, each, compute)) / kept)
            texts = [f"{factor:.2f}" for factor in factors]
            yield row(
                f"{name} {batch}@{size} {precision}", recompute, "yes" if offload else "no",
                f"{(found.predicted.reserved_bytes or 0) / MiB:.0f} / {found.reserved / MiB:.0f}",
                f"{(found.predicted.min_capacity_bytes or 0) / MiB:.0f} / {beyond}{found.smallest / MiB:.0f}",
                f"{moved / MiB:.0f}", f"{1e3 * found.seconds:.1f}", *texts, *["-"] * (2 + len(PCIE_3) - len(texts)),
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", type=int, nargs="+", default=[*range(len(RECIPES))], choices=range(len(RECIPES)))
    arguments = parser.parse_args()
    need_cuda()
    logging.disable(logging.WARNING)
    for line in rows(arguments.recipes):
        print(line, flush=True)


if __name__ == "__main__":
    main()
