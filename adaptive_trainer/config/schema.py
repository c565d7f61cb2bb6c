"""The settings of a run: every key, its type, its default and the values that it may have. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from math import isfinite
from typing import Any

BALANCED = "balanced"  # of trainer.class_weights: each class counts as much as any other
DIGITS = "adaptive_trainer.data.digits"  # the data where none is chosen
LARGEST = "max"  # of trainer.batch_size: the largest that fits
EVAL_CROP = 0.875  # side of the centre crop over the shorter side of the image, as usual for ImageNet
USUAL: dict[str, Any] = {
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "crop_pct": EVAL_CROP,
    "crop_mode": "center",
    "interpolation": "bilinear",
}  # what the settings of these names in `data` are where neither the user nor a pretrained network says

PRECISIONS = ("fp32", "bf16", "fp16")
AFTER = ("predict", "evaluate", "export")  # tasks with a trained network
TASKS = ("train", "plan", "memory", "doctor", *AFTER)
RECOMPUTE = ("none", "auto", "cheap", "blocks", "most")  # of trainer.recompute, beside plans
EQUAL, MEMORY, SPEED = "equal", "memory", "speed"  # of trainer.shares, beside a number for each rank
VERBOSITIES = ("quiet", "normal", "debug")
METRICS = ("val_accuracy", "val_loss", "train_accuracy", "train_loss", "peak_allocated_bytes", "seconds")
LARGEST_SEED = 2**63 - 1  # that every generator takes, above and below 0

Rule = tuple[Callable[[Any], bool], str]  # whether a value is allowed, and what is said of one that is not
FINITE: Rule = (isfinite, "is no number")


def _at_least(low: int) -> Rule:
    return lambda value: value >= low, f"is below {low}"


def _below(high: int) -> Rule:
    return lambda value: value < high, f"is not below {high}"


def _between(low: int, high: int) -> Rule:
    return lambda value: low < value < high, f"is not between {low} and {high}"


def _one_of(*choices: str) -> Rule:
    return lambda value: value in choices, f"is none of {', '.join(choices)}"


def _is_batch_size(value: Any) -> bool:
    return value == LARGEST or (type(value) is int and value >= 1)


def _are_class_weights(value: Any) -> bool:
    if not isinstance(value, list):
        return bool(value == BALANCED)
    are_numbers = all(type(weight) in (int, float) and isfinite(weight) and weight >= 0 for weight in value)
    return are_numbers and any(value)


def _are_parts(value: Any) -> bool:
    if not isinstance(value, list):
        return value in (EQUAL, MEMORY, SPEED)
    return any(value) and all(type(part) is int and part >= 0 for part in value)


def _is_recompute(value: str) -> bool:
    return value in RECOMPUTE or all(":" in group for group in value.split("+"))


def _are_shares(value: list[float]) -> bool:
    return len(value) == 2 and 0 < value[0] <= value[1] <= 1


BATCH_SIZE: Rule = (_is_batch_size, f"is neither a whole number above 0 nor {LARGEST}, the largest that fits")
CLASS_WEIGHTS: Rule = (
    _are_class_weights,
    f"is none of what is allowed: null, {BALANCED}, or a list of numbers from 0 up, one for each class and not all 0",
)
PARTS: Rule = (
    _are_parts,
    f"is none of {EQUAL}, {MEMORY}, {SPEED}, and no list of whole numbers from 0 up, one for each rank and not all 0",
)
RECOMPUTATION: Rule = (
    _is_recompute,
    f"is none of {', '.join(RECOMPUTE)}, and no plan such as most:blocks.0|blocks.1+cheap:rest",
)
SHARES: Rule = (_are_shares, "is no pair of shares of the image, 0 < least <= most <= 1")
PROBABILITY: Rule = (lambda value: 0 <= value <= 1, "is no probability from 0 to 1")
CLIPPING: Rule = (lambda value: value > 0, "is not above 0; null turns clipping off")
SEED: Rule = (
    lambda value: -LARGEST_SEED <= value <= LARGEST_SEED,
    f"is no whole number from {-LARGEST_SEED} to {LARGEST_SEED}",
)


def setting(default: Any, *rules: Rule) -> Any:
    """A field of a dataclass, with the rules that its value must keep to; a null that is the default keeps to any."""
    return field(default=default, metadata={"rules": rules})


def technique(default: Any, text: str, without: str, *rules: Rule) -> Any:
    """A field of `TrainerConfig` that switches a technique of `models/savers/`; the texts are those of `Technique`."""
    return field(default=default, metadata={"technique": (text, without), "rules": rules})


@dataclass
class ModelConfig:
    """Which network: a timm name (`efficientnet_b0`) or a torchvision one (`torchvision/mobilenet_v3_small`)."""

    name: str = "efficientnet_b0"
    pretrained: bool = False
    weights: str | None = None  # a checkpoint of a training, which this one starts from, or a task uses
    num_classes: int | None = setting(None, _at_least(2))  # null: as many as the data set has
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataConfig:
    """The data sets (`train`, `val`, `test` are nodes with a `_target_`), their transforms and how they are loaded."""

    train: dict[str, Any] = field(default_factory=dict)
    val: dict[str, Any] | None = field(default_factory=dict)  # empty: val_fraction of train, split by seed
    test: dict[str, Any] | None = field(default_factory=dict)  # evaluated once, at the end of training
    root: str | None = None
    val_fraction: float = setting(0.2, _between(0, 1))
    image_size: int = setting(224, _at_least(1))
    transforms: str = setting("torchvision", _one_of("torchvision", "timm", "none"))
    hflip: float = setting(0.5, PROBABILITY)
    crop_scale: list[float] = field(default_factory=lambda: [0.35, 1.0], metadata={"rules": (SHARES,)})
    auto_augment: str | None = None
    # null in these five: as the weights of a pretrained network expect, else USUAL
    mean: list[float] | None = None
    std: list[float] | None = None
    # side of the crop over that of the resized image, in evaluation
    crop_pct: float | None = setting(None, _between(0, 2))
    # center: of the image, resized by its shorter side; squash: of both sides resized
    crop_mode: str | None = setting(None, _one_of("center", "squash"))
    interpolation: str | None = setting(None, _one_of("bilinear", "bicubic"))
    num_workers: int = setting(2, _at_least(0))
    on_error: str = setting("raise", _one_of("raise", "skip"))
    # of a file: larger ones are broken; null: Pillow's own limit, 178,956,970
    max_pixels: int | None = setting(None, _at_least(1))
    # ram, disk: images are decoded once and augmented on the device
    cache: str = setting("none", _one_of("none", "ram", "disk"))


def with_usual(data: DataConfig) -> DataConfig:
    """The same settings with `USUAL` for what is null."""
    return replace(data, **{key: value for key, value in USUAL.items() if getattr(data, key) is None})


@dataclass
class OptimizerConfig:
    """A timm optimizer by name; `kwargs` go to its constructor (`foreach`, `fused`, `betas`, ...)."""

    name: str = "adamw"
    lr: float = setting(1e-3, FINITE, _at_least(0))
    weight_decay: float = setting(0.05, FINITE, _at_least(0))
    momentum: float = setting(0.9, FINITE, _at_least(0), _below(1))
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class ScheduleConfig:
    """A timm learning-rate schedule by name, a function of the update count; lengths in epochs.

    `warmup_epochs` lead up to `optimizer.lr`; the whole curve follows, down to `min_lr` at the last update.
    """

    name: str = "cosine"
    warmup_epochs: float = setting(0.0, FINITE, _at_least(0))
    min_lr: float = setting(0.0, FINITE, _at_least(0))
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainerConfig:
    """One training run. Accumulation is derived: ceil(batch_size / micro_batch_size).

    `batch_size` is a whole number, or `max` for the largest that fits; a rung has a number.
    """

    epochs: int = setting(1, _at_least(1))
    batch_size: Any = setting(24, BATCH_SIZE)
    micro_batch_size: int | None = setting(None, _at_least(1))  # null: the batch size
    eval_batch_size: int | None = setting(None, _at_least(1))  # null: the micro-batch size
    # equal, memory, speed, or a number for each rank that its part of a batch is in proportion to
    shares: Any = setting(EQUAL, PARTS)
    precision: str = setting("fp32", _one_of(*PRECISIONS))
    # none, auto, cheap, blocks, most or a plan, see models/recomputing/plan.py
    recompute: str = technique("none", "activations recomputed", "it would keep all activations", RECOMPUTATION)
    # what is kept goes to host memory until the backward pass wants it
    offload: bool = technique(False, "activations offloaded", "it would keep activations on the device")
    channels_last: bool | None = None  # null: on a CUDA card, in runs that it is expected to make faster
    tf32: bool | None = None  # null: what torch does
    clip_grad: float | None = setting(None, CLIPPING)
    ema_decay: float | None = setting(None, _between(0, 1))
    label_smoothing: float = setting(0.0, FINITE, _at_least(0), _below(1))
    class_weights: Any = setting(None, CLASS_WEIGHTS)  # balanced, or a number for each class
    lr_policy: str = setting("auto", _one_of("none", "linear", "sqrt", "auto"))
    deterministic: bool = False
    engine: str = setting("auto", _one_of("auto", "eager", "graph", "compile"))
    checkpoint_every: int | None = setting(None, _at_least(1))  # updates; null: at the end of every epoch
    log_every: int = setting(20, _at_least(1))  # updates


@dataclass
class MemoryConfig:
    """`limit`: a size (`5600MiB`), a fraction of the device's, null (the default) or `none` (no limit)."""

    limit: Any = None
    shared: bool = False  # other trainings share the card: each takes a lease of what its rung needs


@dataclass
class RungConfig:
    """A name and the overrides that make the recipe smaller."""

    name: str = ""
    overrides: list[str] = field(default_factory=list)


@dataclass
class LadderConfig:
    """The rungs, in order; the request itself is rung 0 and is not listed."""

    rungs: list[RungConfig] = field(default_factory=list)
    exact: bool = False  # leave out of the rungs what would change the mathematics
    climb: bool = False
    avoid_thrashing: bool = False
    start: str | None = None  # the rung to begin at; null: the request
    same_rung: bool = False  # all jobs of a sweep begin at the highest rung that is predicted to fit each of them


@dataclass
class PhaseConfig(RungConfig):
    """A stage of training with overrides of its own."""


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
    # What kernels take by; null: estimated from the multiprocessors
    bandwidth_gbs: float | None = None
    tflops: float | None = None  # fp32, without tensor cores
    tensor_tflops: float | None = None  # fp16 with sums in fp32
    # The link to the host's memory; where one is null, generation 3 and 16 lanes are assumed
    pcie_generation: int | None = None
    pcie_lanes: int | None = None


@dataclass
class Config:
    """Every setting of a run."""

    task: str = setting("train", _one_of(*TASKS))
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
    seed: int = setting(0, SEED)
    resume: str | None = None
    output_dir: str | None = None  # null: Hydra's output folder
    verbosity: str = setting("normal", _one_of(*VERBOSITIES))  # of the screen; quiet: warnings and errors only
    report: bool = True  # report.html and plots/, at the end of a training
    trackers: dict[str, Any] = field(default_factory=dict)  # by name, nodes with a `_target_`, as those of the data
    optimized_metric: str = setting("val_accuracy", _one_of(*METRICS))


def leaves(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any, tuple[Rule, ...]]]:
    """The settings in a dataclass, in order: full name, value, and the rules for it.

    An instance may have been given more than its class has.
    """
    known = {each.name: each for each in fields(settings)}
    for name, value in vars(settings).items():
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{name}.")
            continue
        is_default_null = name in known and value is None is known[name].default
        has_rules = name in known and not is_default_null
        yield prefix + name, value, known[name].metadata.get("rules", ()) if has_rules else ()


SETTINGS = tuple(key for key, *_ in leaves(Config()))  # the full names of all
