"""The CUDA graph at the edge of memory: whether it lasts, and what an epoch takes, against the same run with room.

Usage: python -m scripts.benchmark_edge [--images N] [--epochs N] [--recipes NUMBER ...] [--limits MIB ...]

The smallest limit of a recipe is found by dry runs, to 1 %. A run trains on JPEG files, evaluates after each epoch on a
tenth of them, and has odd last batches. Its seconds are the median of the epochs from the second on.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from adaptive_trainer import Trainer, compose_config, predict
from adaptive_trainer.config.overrides import typed
from adaptive_trainer.ladder.resolve import resolve
from adaptive_trainer.training.measure import measure
from scripts.benchmark_data import CLASSES, make_photos
from scripts.timing import heading, need_cuda, row, table

MiB = 1 << 20
ROOM = 10 * 1024 * MiB
CLOSE = 1.02  # times the smallest limit
RECIPES = [
    ["efficientnet_b0", "24", "fp32"],
    ["efficientnet_b0", "24", "fp16"],
    ["mobilenetv3_large_100", "24", "fp32"],
    ["resnet50", "8", "fp32"],
    ["vit_small_patch16_224", "8", "fp32"],
]
GONE = ("not a CUDA graph", "the CUDA graph goes", "engine: eager")


def settings_of(number: int) -> list[str]:
    """The overrides of a recipe."""
    name, batch, precision = RECIPES[number]
    sizes = [f"trainer.batch_size={batch}", "data.image_size=224", f"trainer.precision={precision}"]
    return [f"model.name={name}", *sizes, "trainer.channels_last=false", "model.num_classes=10"]


def smallest_limit(overrides: Iterable[str]) -> int:
    """Bytes under which a dry run still fits, to 1 %."""
    settings = [*overrides, "device=cuda", "ladder=none"]
    least = predict(typed(compose_config(settings))).min_capacity_bytes or ROOM
    low, high = int(0.85 * least), int(1.15 * least)
    while high > 1.01 * low:
        middle = (low + high) // 2
        [rung] = resolve(compose_config([*settings, f"memory.limit={middle}"]))
        low, high = (low, middle) if measure(rung.settings, CLASSES) else (middle, high)
    return high


def run(overrides: Iterable[str], limit: int, folder: Path) -> tuple[float, str]:
    """Seconds of an epoch, and what became of the graph."""
    config = compose_config([*overrides, f"memory.limit={limit}", "device=cuda", "ladder=none"])
    result = Trainer(config, output_dir=folder).fit()
    lines = (folder / "metrics.csv").read_text().splitlines()
    at = lines[0].split(",").index("seconds")
    seconds = [float(line.split(",")[at]) for line in lines[1:]]
    gone = [event for event in result.events if any(text in event for text in GONE)]
    return statistics.median(seconds[1:] or seconds), "; ".join(gone) or "kept"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2404, help="JPEG files")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--recipes", type=int, nargs="*", default=range(len(RECIPES)), help="numbers, from 0")
    parser.add_argument("--caches", nargs="*", default=["none", "disk"], help="values of data.cache")
    parser.add_argument("--limits", type=int, nargs="*", default=[2600], help=f"MiB, beside {CLOSE} of the smallest")
    arguments = parser.parse_args()
    need_cuda()
    logging.disable(logging.WARNING)
    print(heading(f"edge: {arguments.images} JPEG files, {arguments.epochs} epochs"), "", sep="\n")
    print(*table("recipe", "data.cache", "limit, MiB", "graph", "s an epoch", "with 10 GiB", "ratio"), sep="\n")
    with tempfile.TemporaryDirectory() as name:
        make_photos(Path(name) / "photos", arguments.images)
        data = [
            "data=imagefolder",
            f"data.root={name}/photos/train",
            "data.val_fraction=0.1",
            f"trainer.epochs={arguments.epochs}",
            f"data.num_workers={arguments.workers}",
        ]
        for number in arguments.recipes:
            for cache in arguments.caches:
                settings = [*settings_of(number), *data, f"data.cache={cache}"]
                least = smallest_limit(settings)
                limits = [int(CLOSE * least), *(mib * MiB for mib in arguments.limits if mib * MiB > CLOSE * least)]
                free, _ = run(settings, ROOM, Path(name) / f"{number}-{cache}-room")
                for limit in limits:
                    seconds, graph = run(settings, limit, Path(name) / f"{number}-{cache}-{limit}")
                    title = " ".join(RECIPES[number])
                    cells = f"{limit / MiB:.0f}", graph, f"{seconds:.2f}", f"{free:.2f}", f"{seconds / free:.2f}"
                    print(row(title, cache, *cells), flush=True)
                    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
