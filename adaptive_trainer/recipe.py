"""What decides the memory and the mathematics of a training: one description for all who ask. Needs nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

# What result.json and checkpoints say of a recipe, in this order.
REPORTED = (
    "model", "image_size", "batch_size", "micro_batch_size", "eval_batch_size", "precision", "checkpoint_activations",
    "optimizer", "lr", "num_workers", "tf32",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Sizes, precision, memory format and the rest, with every derived size filled in.

    Attributes:
        batch_size: samples in one update.
        micro_batch_size: most samples in one forward and backward.
        eval_batch_size: samples in one evaluation batch.
        image_size: height and width of the images, which are RGB.
        stored_size: height and width of stored images (`data.cache`), of which a batch waits on the device; 0: none.
        num_classes: labels are less; 0 where it is not known yet.
        precision: `fp32`, `bf16` or `fp16`.
        clip_grad: largest gradient norm.
        channels_last: weights and images have that memory format.
    """

    batch_size: int
    micro_batch_size: int
    eval_batch_size: int = 0
    image_size: int = 224
    stored_size: int = 0
    num_classes: int = 0
    model: str = ""
    optimizer: str = ""
    lr: float = 0.0
    precision: str = "fp32"
    checkpoint_activations: bool = False
    clip_grad: float | None = None
    channels_last: bool = False
    tf32: bool | None = None
    num_workers: int = 0

    @property
    def accumulation(self) -> int:
        """Micro-batches in one update."""
        return math.ceil(self.batch_size / self.micro_batch_size)

    def eval_batch(self, val_size: int | None) -> int:
        """Samples of an evaluation batch where there are `val_size` to evaluate, or nobody knows how many."""
        return self.eval_batch_size if val_size is None else min(self.eval_batch_size, val_size)

    def reported(self) -> dict[str, Any]:
        """What records of a run say of it."""
        return {name: getattr(self, name) for name in REPORTED}

    def no_step_down_to(self, below: Recipe) -> str:
        """Why another recipe is no step down from this one; empty where it is one."""
        sizes = ("batch_size", "micro_batch_size", "image_size")
        grown = [name for name in sizes if getattr(below, name) > getattr(self, name)]
        if grown:
            changes = (f"{name} from {getattr(self, name)} to {getattr(below, name)}" for name in grown)
            return f"it would raise {', '.join(changes)}"
        if self.precision != "fp32" and below.precision != self.precision:
            return f"{self.precision} was asked for and takes no more memory than {below.precision}"
        if self.checkpoint_activations and not below.checkpoint_activations:
            return "it would keep all activations"
        if below.batch_size < self.batch_size and below.micro_batch_size == self.micro_batch_size:
            return f"the micro-batch stays {below.micro_batch_size}, so a smaller batch would save no memory"
        return ""

    def __str__(self) -> str:
        """One line for people."""
        micro = f" in micro-batches of {self.micro_batch_size}" if self.accumulation > 1 else ""
        saved = ", activations recomputed" if self.checkpoint_activations else ""
        return f"{self.model}, batch {self.batch_size}{micro}, image {self.image_size}, {self.precision}{saved}"
