"""The settings of a run: every key, its type and its default. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

BALANCED = "balanced"  # of trainer.class_weights: each class counts as much as any other
LARGEST = "max"  # of trainer.batch_size: the largest that fits
EVAL_CROP = 0.875  # side of the centre crop over the shorter side of the image, as usual for ImageNet
USUAL: dict[str, Any] = {
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "crop_pct": EVAL_CROP,
    "crop_mode": "center",
    "interpolation": "bilinear",
}  # what the settings of these names in `data` are where neither the user nor a pretrained network says


@dataclass
class ModelConfig:
    """Which network: a timm name (`efficientnet_b0`) or a torchvision one (`torchvision/mobilenet_v3_small`)."""

    name: str = "efficientnet_b0"
    pretrained: bool = False
    num_classes: int | None = None  # null: as many as the data set has
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataConfig:
    """The data sets (`train` and `val` are nodes with a `_target_`), their transforms and how they are loaded."""

    train: dict[str, Any] = field(default_factory=dict)
    val: dict[str, Any] | None = field(default_factory=dict)  # empty: val_fraction of train, split by seed
    root: str | None = None
    val_fraction: float = 0.2
    image_size: int = 224
    transforms: str = "torchvision"
    hflip: float = 0.5
    crop_scale: list[float] = field(default_factory=lambda: [0.35, 1.0])
    auto_augment: str | None = None
    # null in these five: as the weights of a pretrained network expect, else USUAL
    mean: list[float] | None = None
    std: list[float] | None = None
    crop_pct: float | None = None  # side of the crop over that of the resized image, in evaluation
    crop_mode: str | None = None  # center: of the image, resized by its shorter side; squash: of both sides resized
    interpolation: str | None = None
    num_workers: int = 2
    on_error: str = "raise"
    max_pixels: int | None = None  # of a file: larger ones are broken; null: Pillow's own limit, 178,956,970
    cache: str = "none"  # ram, disk: images are decoded once and augmented on the device


def with_usual(data: DataConfig) -> DataConfig:
    """The same settings with `USUAL` for what is null."""
    return replace(data, **{key: value for key, value in USUAL.items() if getattr(data, key) is None})


@dataclass
class OptimizerConfig:
    """A timm optimizer by name; `kwargs` go to its constructor (`foreach`, `fused`, `betas`, ...)."""

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    momentum: float = 0.9
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class ScheduleConfig:
    """A timm learning-rate schedule by name, a function of the update count; lengths in epochs.

    `warmup_epochs` lead up to `optimizer.lr`; the whole curve follows, down to `min_lr` at the last update.
    """

    name: str = "cosine"
    warmup_epochs: float = 0.0
    min_lr: float = 0.0
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainerConfig:
    """One training run. Accumulation is derived: ceil(batch_size / micro_batch_size).

    `batch_size` is a whole number, or `max` for the largest that fits; a rung has a number.
    """

    epochs: int = 1
    batch_size: Any = 24
    micro_batch_size: int | None = None  # null: the batch size
    eval_batch_size: int | None = None  # null: the micro-batch size
    precision: str = "fp32"
    checkpoint_activations: bool = False
    channels_last: bool | None = None  # null: on a CUDA card, in runs that it is expected to make faster
    tf32: bool | None = None  # null: what torch does
    clip_grad: float | None = None
    ema_decay: float | None = None
    label_smoothing: float = 0.0
    class_weights: Any = None  # balanced, or a number for each class
    lr_policy: str = "auto"
    deterministic: bool = False
    engine: str = "auto"
    checkpoint_every: int | None = None  # updates; null: at the end of every epoch
    log_every: int = 20  # updates


@dataclass
class MemoryConfig:
    """`limit`: a size (`5600MiB`), a fraction of the card, null (the default) or `none` (no limit)."""

    limit: Any = None


@dataclass
class RungConfig:
    """A name and the overrides that make the recipe smaller."""

    name: str = ""
    overrides: list[str] = field(default_factory=list)


@dataclass
class LadderConfig:
    """The rungs, in order; the request itself is rung 0 and is not listed."""

    rungs: list[RungConfig] = field(default_factory=list)
    climb: bool = False
    avoid_thrashing: bool = False


@dataclass
class PhaseConfig:
    """A stage of training with overrides of its own."""

    name: str = ""
    overrides: list[str] = field(default_factory=list)


@dataclass
class PhasesConfig:
    """Stages of training, in order, weights carried on; none listed: one stage, as configured."""

    stages: list[PhaseConfig] = field(default_factory=list)


@dataclass
class CardConfig:
    """A kind of card to plan for, see `configs/card/`."""

    name: str | None = None
    memory_mib: int | None = None
    capability: str | None = None  # compute capability, such as "8.6"
    multiprocessors: int | None = None  # null: as many as a small card has


@dataclass
class Config:
    """Everything a run is told."""

    task: str = "train"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    ladder: LadderConfig = field(default_factory=LadderConfig)
    phases: PhasesConfig = field(default_factory=PhasesConfig)
    card: CardConfig = field(default_factory=CardConfig)
    batch: list[int] = field(default_factory=lambda: [8, 16, 24, 32])  # of task=memory
    size: list[int] = field(default_factory=lambda: [160, 192, 224])  # of task=memory
    device: str = "auto"
    seed: int = 0
    resume: str | None = None
    output_dir: str | None = None  # null: Hydra's output folder
    optimized_metric: str = "val_accuracy"
