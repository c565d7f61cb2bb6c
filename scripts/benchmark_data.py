"""Images per second that reach the device, by way of loading, and what share of an epoch waits for them.

Usage: python -m scripts.benchmark_data [--images N] [--workers N]

A folder of JPEG files is made (smooth noise with grain, about 500 x 375). Each way of loading delivers normalised float
batches to the device; blocks of whole epochs, from the second epoch on, run in an order that alternates, and a figure
is the median of the blocks. Then a network is trained on what is delivered, against the same updates on one batch that
is there already.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_loader
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from adaptive_trainer import compose_config
from adaptive_trainer.config.schema import USUAL, Config
from adaptive_trainer.data.cached.build import with_cache
from adaptive_trainer.data.cached.prefetch import Prefetcher
from adaptive_trainer.data.datasets import DataSets, build_datasets
from adaptive_trainer.data.images.transforms import build_transform
from adaptive_trainer.data.loader import Batch, Loader
from adaptive_trainer.data.position import Position
from adaptive_trainer.ladder.resolve import resolve, stored_size
from adaptive_trainer.memory.limit import limited
from adaptive_trainer.models.losses import build_loss
from adaptive_trainer.models.zoo import build_model
from adaptive_trainer.step.engine import Engine
from adaptive_trainer.training.session import Parts, enter
from scripts.timing import CUDA, heading, row, synchronize, table

Batches = Iterable[tuple[Tensor, Tensor]]
Epochs = Callable[[int], Batches]  # from the number of an epoch to its batches, on the device
CLASSES = 10


def make_photos(folder: Path, count: int) -> None:
    """JPEG files of about 500 x 375 in ten classes, and as many folders with one image each to evaluate."""
    rng = np.random.default_rng(0)
    for number in range(count + CLASSES):
        part = "train" if number < count else "val"
        path = folder / part / f"class-{number % CLASSES}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        sides = (int(rng.integers(440, 560)), int(rng.integers(330, 420)))
        pixels = rng.normal(0, 6, (sides[1], sides[0], 3))
        for octave in (3, 9, 27):
            colours = rng.integers(0, 256, (octave, octave, 3), dtype=np.uint8)
            if octave == 3:  # half of it is the class, which can be learned
                of_class = np.random.default_rng(number % CLASSES).integers(0, 256, colours.shape, dtype=np.uint8)
                colours = colours // 2 + of_class // 2
            small = Image.fromarray(colours)
            pixels += np.asarray(small.resize(sides, Image.Resampling.BICUBIC), dtype=np.float64) / 3
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


@dataclass(frozen=True)
class Bench:
    """What all ways of loading share."""

    config: Config
    device: torch.device

    def data(self, cache: str) -> DataSets:
        config = replace(self.config, data=replace(self.config.data, cache=cache))
        data = build_datasets(config)
        if cache == "none":
            return data
        data = with_cache(data, stored_size([config]), event=lambda text: logging.warning("%s", text))
        if data.stored is None:
            raise SystemExit(f"data.cache={cache} has no room here")
        return data

    def ours(self, cache: str) -> Epochs:
        """The loaders as the trainer uses them: workers go on over epochs, stored images are fed anew in each."""
        data, trainer = self.data(cache), self.config.trainer
        how: dict[str, Any] = {"batch_size": trainer.batch_size, "image_size": self.config.data.image_size}
        workers, pinned = self.config.data.num_workers, self.device.type == "cuda"
        loader = (
            Loader(data, **how, num_workers=workers, pin_memory=pinned)
            if data.stored is None
            else Prefetcher(data, **how, device=self.device)
        )

        def epoch(number: int) -> Iterator[tuple[Tensor, Tensor]]:
            batches: Iterable[Batch] = loader.train(Position(0, number, 0, len(data.train)))
            for batch in batches:
                yield self.moved(batch.images, batch.labels)

        return epoch

    def torchvision(self) -> Epochs:
        """ImageFolder and DataLoader with the transforms of the trainer, pinned memory and persistent workers."""
        data = self.config.data
        files = ImageFolder(f"{data.root}/train", build_transform(data, data.image_size, training=True))
        loader = DataLoader(
            files, self.config.trainer.batch_size, shuffle=True, num_workers=data.num_workers,
            pin_memory=self.device.type == "cuda", persistent_workers=data.num_workers > 0,
        )  # fmt: skip
        return lambda _: (self.moved(*batch) for batch in loader)

    def timm(self) -> Epochs:
        """timm's loader, whose prefetcher normalises on the device."""
        data = self.config.data
        least, most = data.crop_scale
        loader = create_loader(
            ImageFolder(f"{data.root}/train"), (3, data.image_size, data.image_size), self.config.trainer.batch_size,
            is_training=True, use_prefetcher=True, scale=(least, most), hflip=data.hflip, color_jitter=0.0,
            interpolation="bilinear", mean=tuple(USUAL["mean"]), std=tuple(USUAL["std"]), num_workers=data.num_workers,
            pin_memory=self.device.type == "cuda", persistent_workers=data.num_workers > 0, device=self.device,
        )  # fmt: skip
        return lambda _: loader

    def moved(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


def delivered(bench: Bench, epochs: dict[str, Epochs], blocks: int) -> dict[str, float]:
    """Images per second of each way: the median of so many epochs, after one to warm up."""
    speeds: dict[str, list[float]] = {name: [] for name in epochs}
    for block in range(blocks + 1):
        for name in list(epochs)[:: 1 if block % 2 else -1]:
            synchronize(bench.device)
            started, count = time.perf_counter(), 0
            for images, _ in epochs[name](block):
                count += len(images)
            synchronize(bench.device)
            if block:
                speeds[name].append(count / (time.perf_counter() - started))
    return {name: statistics.median(found) for name, found in speeds.items()}


@dataclass(frozen=True)
class Trained:
    """One epoch of training."""

    seconds: float
    images: int


def trained(bench: Bench, engine: Engine, batches: Batches) -> Trained:
    synchronize(bench.device)
    started, images = time.perf_counter(), 0
    with closing(iter(batches)) as iterator:  # type: ignore[type-var]
        for batch in iterator:
            engine.run(*batch, samples=0)
            images += len(batch[1])
    synchronize(bench.device)
    return Trained(time.perf_counter() - started, images)


def fixed(bench: Bench, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """As many batches as an epoch has, all of them one that is on the device."""
    size, batch = bench.config.data.image_size, bench.config.trainer.batch_size
    images, labels = torch.rand(batch, 3, size, size, device=bench.device), torch.arange(batch, device=bench.device)
    for _ in range(count // batch):
        yield images, labels % CLASSES
    if count % batch:
        yield images[: count % batch], labels[: count % batch] % CLASSES


def training(bench: Bench, ways: dict[str, Epochs], count: int, blocks: int) -> dict[str, Trained]:
    """The median epoch of each way and of a fixed batch, after one to warm up."""
    found: dict[str, list[Trained]] = {name: [] for name in ("one batch", *ways)}
    with limited(bench.device, "none") as capacity:
        parts = Parts(build_model, build_loss, "", CLASSES, count, bench.device, capacity)
        update = enter(bench.config, parts).update
        settings = bench.config.trainer
        engine = Engine(update, settings.engine, settings.batch_size, lambda text: logging.warning("%s", text))
        for block in range(blocks + 1):
            for name in list(found)[:: 1 if block % 2 else -1]:
                batches = fixed(bench, count) if name == "one batch" else ways[name](block)
                entry = trained(bench, engine, batches)
                found[name] += [entry] if block else []
    return {name: sorted(each, key=lambda e: e.seconds)[len(each) // 2] for name, each in found.items()}


def tables(bench: Bench, count: int, blocks: int) -> Iterator[str]:
    names = {f"ours, data.cache={cache}": bench.ours(cache) for cache in ("disk", "ram", "none")}
    others = {"torchvision ImageFolder, DataLoader": bench.torchvision(), "timm create_loader": bench.timm()}
    config = bench.config
    size, workers = config.data.image_size, config.data.num_workers
    what = f"{count} JPEG files, {config.trainer.batch_size}@{size}, {workers} workers, median of {blocks} epochs"
    yield from (heading(what), "", *table("images per second on the device", ""))
    for name, speed in delivered(bench, {**names, **others}, blocks).items():
        yield row(name, f"{speed:.0f}")
    yield ""
    yield from table(f"training {config.model.name}", "images/s", "longer than with one batch that is always there")
    epochs = training(bench, names, count, blocks)
    least = epochs["one batch"].seconds
    for name, entry in epochs.items():
        yield row(name, f"{entry.images / entry.seconds:.0f}", f"{100 * entry.seconds / least - 100:.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4000, help="JPEG files to make")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that decode")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--size", type=int, default=224, help="of the network's input")
    parser.add_argument("--model", default="efficientnet_b0")
    parser.add_argument("--blocks", type=int, default=5, help="epochs of each way")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.environ["ADAPTIVE_TRAINER_CACHE"] = f"{folder}/cache"
        make_photos(Path(folder) / "photos", arguments.images)
        config = resolve(
            compose_config([
                "data=imagefolder", f"data.root={folder}/photos", f"data.image_size={arguments.size}",
                f"data.num_workers={arguments.workers}", f"trainer.batch_size={arguments.batch}",
                f"model.name={arguments.model}", "ladder=none",
            ])
        )[0].settings  # fmt: skip
        bench = Bench(config, CUDA if torch.cuda.is_available() else torch.device("cpu"))
        for line in tables(bench, arguments.images, arguments.blocks):
            print(line, flush=True)


if __name__ == "__main__":
    main()
