"""What decides the memory and the mathematics of a training: one description for all who ask. Needs nothing."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

UNUSED = (False, None, "none")  # values of a technique's setting
# What result.json and checkpoints say of a recipe, in this order; the techniques stand between.
REPORTED = ("model", "image_size", "batch_size", "micro_batch_size", "eval_batch_size", "precision")
REPORTED_LAST = ("optimizer", "lr", "num_workers", "tf32")


def plan_in_words(value: str) -> str:
    """A value of `trainer.recompute` for people, such as `14 parts (most), the rest (cheap)` for a plan."""
    if ":" not in value:
        return value
    groups = (group.partition(":") for group in value.split("+"))
    parts = [(level, path) for level, _, paths in groups for path in paths.split("|")]
    counts = Counter(level for level, path in parts if path != "rest")
    said = [f"{count} part{'s' if count > 1 else ''} ({level})" for level, count in counts.items()]
    return ", ".join([*said, *(f"the rest ({level})" for level, path in parts if path == "rest")])


def in_words(key: str, value: Any) -> Any:
    """The value of a setting for people: of a plan of recomputation, which may name many modules, how many."""
    return plan_in_words(value) if key == "trainer.recompute" else value


@dataclass(frozen=True, slots=True)
class Technique:
    """A technique that saves memory."""

    key: str  # its setting of `trainer`
    value: Any  # of the setting
    text: str  # what it does, for people
    without: str  # what a recipe without it would do, for people

    @property
    def is_used(self) -> bool:
        """Whether the setting asks for it."""
        return self.value not in UNUSED


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Sizes, precision, memory format and the rest, with every derived size filled in."""

    batch_size: int  # samples in one update
    micro_batch_size: int  # most samples in one forward and backward
    eval_batch_size: int = 0
    image_size: int = 224  # height and width of the images, which are RGB
    stored_size: int = 0  # height and width of stored images (`data.cache`), of which a batch waits on the device
    num_classes: int = 0  # labels are less; 0 where it is not known yet
    model: str = ""
    optimizer: str = ""
    lr: float = 0.0
    precision: str = "fp32"  # or bf16, fp16
    techniques: tuple[Technique, ...] = ()
    clip_grad: float | None = None  # largest gradient norm
    channels_last: bool = False
    tf32: bool | None = None
    num_workers: int = 0
    shares: tuple[float, ...] = ()  # what the ranks' parts of a batch are in proportion to; none: equal parts

    def weights(self, ranks: int) -> tuple[float, ...]:
        """The shares of so many ranks; equal ones where they are those of another number."""
        return self.shares if len(self.shares) == ranks else (1,) * ranks

    @property
    def accumulation(self) -> int:
        """Micro-batches in one update."""
        return math.ceil(self.batch_size / self.micro_batch_size)

    def eval_batch(self, val_size: int | None) -> int:
        """Samples of an evaluation batch where there are `val_size` to evaluate, or nobody knows how many."""
        return self.eval_batch_size if val_size is None else min(self.eval_batch_size, val_size)

    def reported(self) -> dict[str, Any]:
        """What records of a run say of it."""
        techniques = {technique.key: technique.value for technique in self.techniques}
        first, last = ({name: getattr(self, name) for name in names} for names in (REPORTED, REPORTED_LAST))
        return {**first, **techniques, **last}

    def no_step_down_to(self, below: Recipe) -> str:
        """Why another recipe is no step down from this one; empty where it is one."""
        sizes = ("batch_size", "micro_batch_size", "image_size")
        grown = [name for name in sizes if getattr(below, name) > getattr(self, name)]
        if grown:
            changes = (f"{name} from {getattr(self, name)} to {getattr(below, name)}" for name in grown)
            return f"it would raise {', '.join(changes)}"
        if self.precision != "fp32" and below.precision != self.precision:
            return f"{self.precision} was asked for and takes no more memory than {below.precision}"
        for used, then in zip(self.techniques, below.techniques, strict=True):
            if used.is_used and not then.is_used:
                return used.without
        if below.batch_size < self.batch_size and below.micro_batch_size == self.micro_batch_size:
            return f"the micro-batch stays {below.micro_batch_size}, so a smaller batch would save no memory"
        return ""

    def __str__(self) -> str:
        """One line for people."""
        micro = f" in micro-batches of {self.micro_batch_size}" if self.accumulation > 1 else ""
        saved = "".join(f", {technique.text}" for technique in self.techniques if technique.is_used)
        return f"{self.model}, batch {self.batch_size}{micro}, image {self.image_size}, {self.precision}{saved}"
