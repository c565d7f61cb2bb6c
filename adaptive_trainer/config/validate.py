"""What settings cannot be right, whatever the data and the device are: every problem in one `ConfigError`.

Nothing here imports torch, so that a mistake is told at once.
"""

from __future__ import annotations

from math import isfinite

from adaptive_trainer.config.schema import BALANCED, LARGEST, CardConfig, Config, DataConfig, TrainerConfig, with_usual
from adaptive_trainer.errors import ConfigError

PRECISIONS = ("fp32", "bf16", "fp16")
ENGINES = ("auto", "eager", "graph", "compile")
LR_POLICIES = ("none", "linear", "sqrt", "auto")
TRANSFORMS = ("torchvision", "timm", "none")
CROP_MODES = ("center", "squash")
INTERPOLATIONS = ("bilinear", "bicubic")
ON_ERROR = ("raise", "skip")
CACHES = ("none", "ram", "disk")
TASKS = ("train", "plan", "memory")
METRICS = ("val_accuracy", "val_loss", "train_accuracy", "train_loss", "peak_allocated_bytes", "seconds")
LARGEST_SEED = 2**63 - 1  # that every generator takes, above and below 0


def check(config: Config) -> None:
    """Raise one ConfigError that names every value which cannot be right, whatever the data and the device are."""
    problems = [*_out_of_range(config), *_no_transform(config.data), *_not_a_choice(config)]
    problems += [*_no_batch(config.trainer), *_no_class_weights(config)]
    if problems:
        raise ConfigError("; ".join(problems))


def check_no_card(card: CardConfig) -> None:
    """Refuse a card that is named for a training, which takes the memory that there is.

    Raises:
        ConfigError: it is.
    """
    if card != CardConfig():
        size = "6GiB" if card.memory_mib is None else f"{card.memory_mib}MiB"
        raise ConfigError(
            f"card=... ({card.name}) is for task=plan and task=memory; training uses the card of this machine, or a "
            f"simulated one where there is none, of which memory.limit={size} sets the size"
        )


def _no_batch(trainer: TrainerConfig) -> list[str]:
    batch, micro = trainer.batch_size, trainer.micro_batch_size
    if batch == LARGEST:
        text = (
            f"trainer.batch_size={LARGEST} with trainer.micro_batch_size={micro}: in micro-batches a batch of any size "
            "fits; give trainer.batch_size a number, or leave trainer.micro_batch_size null"
        )
        return [] if micro is None else [text]
    if type(batch) is not int or batch < 1:
        return [f"trainer.batch_size={batch} is neither a whole number above 0 nor {LARGEST}, the largest that fits"]
    if micro is not None and micro > batch:
        return [f"trainer.micro_batch_size={micro} is above trainer.batch_size={batch}; make it at most {batch}"]
    return []


def _no_class_weights(config: Config) -> list[str]:
    weights, classes = config.trainer.class_weights, config.model.num_classes
    if weights in (None, BALANCED):
        return []
    is_list = isinstance(weights, list) and all(type(weight) in (int, float) for weight in weights)
    if not is_list or not all(isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        allowed = f"null, {BALANCED}, or a list of numbers from 0 up, one for each class and not all 0"
        return [f"trainer.class_weights={weights} is none of what is allowed: {allowed}"]
    if classes is not None and len(weights) != classes:
        return [f"trainer.class_weights has {len(weights)} numbers and model.num_classes={classes}; give one for each"]
    return []


def _out_of_range(config: Config) -> list[str]:
    t, d, o = config.trainer, config.data, config.optimizer
    least: list[tuple[str, float | None, float]] = [
        ("trainer.epochs", t.epochs, 1),
        ("trainer.micro_batch_size", t.micro_batch_size, 1),
        ("trainer.eval_batch_size", t.eval_batch_size, 1),
        ("trainer.checkpoint_every", t.checkpoint_every, 1),
        ("trainer.log_every", t.log_every, 1),
        ("trainer.label_smoothing", t.label_smoothing, 0),
        ("data.image_size", d.image_size, 1),
        ("data.max_pixels", d.max_pixels, 1),
        ("data.num_workers", d.num_workers, 0),
        ("optimizer.lr", o.lr, 0),
        ("optimizer.weight_decay", o.weight_decay, 0),
        ("optimizer.momentum", o.momentum, 0),
        ("schedule.min_lr", config.schedule.min_lr, 0),
        ("schedule.warmup_epochs", config.schedule.warmup_epochs, 0),
        ("model.num_classes", config.model.num_classes, 2),
    ]
    problems = [f"{key}={value} is below {low:g}" for key, value, low in least if value is not None and value < low]
    problems += [f"{key}={value} is no number" for key, value, _ in least if value is not None and not isfinite(value)]
    open_intervals = [
        ("data.val_fraction", d.val_fraction),
        ("trainer.ema_decay", t.ema_decay),
    ]
    problems += [f"{k}={v} is not between 0 and 1" for k, v in open_intervals if v is not None and not 0 < v < 1]
    if t.clip_grad is not None and not t.clip_grad > 0:
        problems.append(f"trainer.clip_grad={t.clip_grad} is not above 0; null turns clipping off")
    if not -LARGEST_SEED <= config.seed <= LARGEST_SEED:
        problems.append(f"seed={config.seed} is no whole number from {-LARGEST_SEED} to {LARGEST_SEED}")
    below_one = [("trainer.label_smoothing", t.label_smoothing), ("optimizer.momentum", o.momentum)]
    problems += [f"{key}={value} is not below 1" for key, value in below_one if value >= 1]
    if config.schedule.min_lr > o.lr > 0:
        problems.append(f"schedule.min_lr={config.schedule.min_lr} is above optimizer.lr={o.lr}")
    if not config.phases.stages and 1 <= t.epochs < config.schedule.warmup_epochs:  # a stage may be cut short
        problems.append(
            f"schedule.warmup_epochs={config.schedule.warmup_epochs} is above trainer.epochs={t.epochs}: training "
            "would end before its learning rate is reached"
        )
    return problems


def _no_transform(data: DataConfig) -> list[str]:
    problems = []
    if len(data.crop_scale) != 2 or not 0 < data.crop_scale[0] <= data.crop_scale[1] <= 1:
        problems.append(f"data.crop_scale={data.crop_scale} is no pair of shares of the image, 0 < least <= most <= 1")
    if not 0 <= data.hflip <= 1:
        problems.append(f"data.hflip={data.hflip} is no probability from 0 to 1")
    used = with_usual(data)
    mean, std = used.mean or [], used.std or []
    if len(mean) != 3 or len(std) != 3 or not all(map(isfinite, [*mean, *std])) or not min(std) > 0:
        problems.append(f"data.mean={mean}, data.std={std} are not three numbers each, data.std above 0")
    if not 0 < (used.crop_pct or 0) < 2:
        problems.append(f"data.crop_pct={data.crop_pct} is not between 0 and 2")
    per_sample = "transforms=timm" if data.transforms == "timm" else f"auto_augment={data.auto_augment}"
    if data.cache != "none" and (data.transforms == "timm" or data.auto_augment):
        problems.append(
            f"data.cache={data.cache} augments whole batches, and data.{per_sample} works on single images; use "
            "data.cache=none, or data.transforms=torchvision (or none) with data.auto_augment=null"
        )
    return problems


def _not_a_choice(config: Config) -> list[str]:
    choices = [
        ("task", config.task, TASKS),
        ("optimized_metric", config.optimized_metric, METRICS),
        ("trainer.precision", config.trainer.precision, PRECISIONS),
        ("trainer.engine", config.trainer.engine, ENGINES),
        ("trainer.lr_policy", config.trainer.lr_policy, LR_POLICIES),
        ("data.transforms", config.data.transforms, TRANSFORMS),
        ("data.crop_mode", config.data.crop_mode, (None, *CROP_MODES)),
        ("data.interpolation", config.data.interpolation, (None, *INTERPOLATIONS)),
        ("data.on_error", config.data.on_error, ON_ERROR),
        ("data.cache", config.data.cache, CACHES),
    ]
    return [
        f"{key}={value} is none of {', '.join(filter(None, allowed))}"
        for key, value, allowed in choices
        if value not in allowed
    ]
