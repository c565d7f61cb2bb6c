"""The trainings that are attacked: a network, settings, data. Eight updates in two epochs, each a few milliseconds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from adaptive_trainer import Trainer, compose_config
from tests.attack import networks

CLASSES = 3
TRAIN, VAL = 24, 10  # samples
UPDATES = 8
COMMON = (
    "device=cpu",
    "data.image_size=16",
    "data.num_workers=0",
    "trainer.batch_size=6",
    "trainer.epochs=2",
    "trainer.checkpoint_every=3",
    "memory.limit=none",
    "ladder=none",
)
Network = Callable[[int], nn.Module]


class Pictures(Dataset[Any]):
    """Pictures of noise, the same each time; `reading` is called with the index before one is read."""

    num_classes = CLASSES

    def __init__(self, size: int, reading: Callable[[int], None] | None = None) -> None:
        self.size, self.reading = size, reading

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if self.reading is not None:
            self.reading(index)
        return picture(index), index % CLASSES


def picture(index: int) -> Image.Image:
    pixels = np.random.default_rng(index).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@functools.cache
def picture_folder(root: Path) -> Path:
    """A folder of PNG files for each class below `root`, which `data=imagefolder` reads."""
    for split, size in (("train", TRAIN), ("val", VAL)):
        for index in range(size):
            folder = root / split / f"class{index % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            picture(index).save(folder / f"{index}.png")
    return root


def weighted_loss(output: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy whose mean has the classes' weights for its denominator."""
    weight = torch.tensor([1.0, 2.0, 4.0], device=output.device)
    return nn.functional.cross_entropy(output.float(), labels, weight=weight)


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        rungs: names and overrides of its ladder; none: `ladder=none`.
        from_files: read pictures from a folder by `data=imagefolder`, instead of a data set in Python.
    """

    name: str
    network: Network
    overrides: tuple[str, ...]
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    from_files: bool = False
    rungs: tuple[tuple[str, tuple[str, ...]], ...] = field(default=())

    def __str__(self) -> str:
        return self.name

    def settings(self, files: Path, *more: str) -> DictConfig:
        """Its settings, with these overrides on top; a plain copy, since composing them takes longest."""
        return _composed(self, files if self.from_files else None, more).copy()

    def below(self, rung: str) -> tuple[str, ...]:
        """The overrides that make the request what this rung of its ladder is: rungs are cumulative."""
        names = [name for name, _ in self.rungs]
        reached = self.rungs[: names.index(rung) + 1] if rung in names else ()
        return ("ladder=none", *(text for _, overrides in reached for text in overrides))

    def trainer(self, settings: DictConfig, output_dir: Path, reading: Callable[[int], None] | None = None) -> Trainer:
        """What trains it into `output_dir`."""
        data: dict[str, Any] = {}
        if not self.from_files:
            data = {"train_data": Pictures(TRAIN, reading), "val_data": Pictures(VAL)}
        return Trainer(
            settings, model=lambda _, classes: self.network(classes), loss=self.loss, output_dir=output_dir, **data
        )


@functools.cache
def _composed(case: Case, files: Path | None, more: tuple[str, ...]) -> DictConfig:
    data = [] if files is None else ["data=imagefolder", f"data.root='{picture_folder(files)}'"]
    rungs = ", ".join(f"{{name: {name}, overrides: {list(texts)}}}" for name, texts in case.rungs)
    ladder = [f"ladder.rungs=[{rungs}]"] if rungs and "ladder=none" not in more else []
    return compose_config([*data, *COMMON, *case.overrides, *ladder, *more])


MICRO, RECOMPUTE, OFFLOAD = "trainer.micro_batch_size=3", "trainer.recompute=blocks", "trainer.offload=true"
# Of the two blocks of `networks.Body`, and of all that is cheap.
CHEAP = "trainer.recompute=cheap"
MOST = "trainer.recompute='most:blocks.0|blocks.1+cheap:rest'"
LEAST = "trainer.recompute='least:blocks.0+most:blocks.1+cheap:rest'"
EMA, CLIP = "trainer.ema_decay=0.9", "trainer.clip_grad=0.5"
FP16, BF16 = "trainer.precision=fp16", "trainer.precision=bf16"
SMOOTH = "trainer.label_smoothing=0.1"
PHASES = "phases.stages=[{name: one, overrides: ['trainer.epochs=1']}, {name: two, overrides: ['optimizer.lr=0.003']}]"


def optimizer(name: str) -> str:
    return f"optimizer.name={name}"


CASES = (
    Case("conv-sgd-clip", networks.Conv, ("optimizer=sgd", CLIP)),
    Case("conv-adamw-fp16-ema", networks.Conv, (FP16, EMA, CLIP, MICRO)),
    Case("conv-lamb-bf16", networks.Conv, (optimizer("lamb"), BF16, SMOOTH)),
    Case("conv-radamlegacy", networks.Conv, (optimizer("radamlegacy"), MICRO)),
    Case("conv-adafactor-weighted", networks.Conv, (optimizer("adafactor"), MICRO), loss=weighted_loss),
    Case("rebinding-nadam-recompute", networks.rebinding, (optimizer("nadam"), RECOMPUTE, MICRO)),
    Case("rebinding-lion", networks.rebinding, ("optimizer=lion", CLIP)),
    Case("reshaping-rmsprop", networks.reshaping, (optimizer("rmsprop"),)),
    Case("reshaping-recompute-bf16", networks.reshaping, (RECOMPUTE, BF16, MICRO)),
    Case("generators-sgd", networks.Generators, ("optimizer=sgd", MICRO)),
    Case("generators-adamw-fp16", networks.Generators, (FP16, CLIP)),
    Case("evaluating-nadam", networks.Evaluating, (optimizer("nadam"),)),
    Case("evaluating-lion-ema", networks.Evaluating, ("optimizer=lion", EMA)),
    Case("conv-phases", networks.Conv, (PHASES, EMA)),
    Case("conv-cache-ram", networks.Conv, ("data.cache=ram",)),
    Case("conv-cache-disk", networks.Conv, ("data.cache=disk",), from_files=True),
    Case("rebinding-lamb-offload", networks.rebinding, (optimizer("lamb"), OFFLOAD, CLIP)),
    Case("reshaping-recompute-offload-fp16", networks.reshaping, (RECOMPUTE, OFFLOAD, FP16, EMA, MICRO)),
    Case("conv-adamw-cheap-ema", networks.Conv, (CHEAP, EMA, MICRO)),
    Case("rebinding-sgd-most-bf16", networks.rebinding, ("optimizer=sgd", MOST, BF16, CLIP)),
    Case("reshaping-nadam-least", networks.reshaping, (optimizer("nadam"), LEAST, MICRO)),
    Case("evaluating-cheap-offload", networks.Evaluating, (CHEAP, OFFLOAD, FP16)),
    Case("conv-simulated-card", networks.Conv, ("memory.limit=64MiB", MICRO)),
)
WORKERS = (
    Case("conv-workers", networks.Conv, ("data.num_workers=2",)),
    Case("evaluating-workers-files", networks.Evaluating, ("data.num_workers=2",), from_files=True),
)
# The learning rate stays, so that a rung is the same settings asked for by hand.
LADDER = (
    ("micro", (MICRO,)),
    ("cheap", (CHEAP,)),
    ("recompute", (RECOMPUTE,)),
    ("offload", (OFFLOAD,)),
    ("small", ("data.image_size=12",)),
    ("batch", ("trainer.batch_size=4",)),
    ("half", (BF16,)),
)
SAME_RATE = "trainer.lr_policy=none"
DESCENDING = (
    Case("down-conv-ema", networks.Conv, (SAME_RATE, EMA, "ladder.climb=true"), rungs=LADDER),
    Case("down-rebinding", networks.rebinding, (SAME_RATE, optimizer("radamlegacy"), CLIP), rungs=LADDER),
    Case("down-reshaping", networks.reshaping, (SAME_RATE, "optimizer=sgd"), rungs=LADDER),
    Case("down-generators", networks.Generators, (SAME_RATE, optimizer("nadam")), rungs=LADDER),
    Case("down-evaluating", networks.Evaluating, (SAME_RATE, optimizer("rmsprop")), rungs=LADDER[::-1]),
    Case(
        "down-average",
        networks.Conv,
        (SAME_RATE, EMA, MICRO),
        rungs=(("slower", ("trainer.ema_decay=0.5",)), ("fp16", (FP16,))),
    ),
)
BY_NAME = {case.name: case for case in (*CASES, *WORKERS, *DESCENDING)}
