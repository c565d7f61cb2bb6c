"""What settings cannot be right, whatever the data and the device are: every problem in one `ConfigError`.

Nothing here imports torch, so that a mistake is reported at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite

from omegaconf import DictConfig

from adaptive_trainer.config.limit import parse_limit
from adaptive_trainer.config.overrides import asked
from adaptive_trainer.config.schema import LARGEST, CardConfig, Config, leaves, with_usual
from adaptive_trainer.errors import ConfigError, refuse_all

# What may be typed for the tasks with a trained network, for which all else is as it was in training.
RUNNING = (
    "model.weights", "device", "memory.limit", "output_dir", "trainer.eval_batch_size", "trainer.precision",
    "data.num_workers", "data.max_pixels",
)  # fmt: skip
TAKEN = {
    "predict": (*RUNNING, "data.root"),
    "evaluate": (*RUNNING, "data.root", "data.train", "data.val", "data.test", "data.val_fraction", "seed"),
    "export": ("model.weights", "output_dir"),
}


def check(config: Config) -> None:
    """Raise one ConfigError that names every value which cannot be right, whatever the data and the device are."""
    refuse_all(problems_of(config))


def problems_of(config: Config) -> list[str]:
    """What is wrong with each value, or combination of values, that cannot be right."""
    rules = (_each_alone, _weights, _learning_rate, _transforms, _batch, _class_weights, _memory)
    return [problem for rule in rules for problem in rule(config)]


def check_after(cfg: DictConfig) -> None:
    """Refuse what was typed for a task with a trained network, where nothing would come of it.

    Raises:
        ConfigError: no checkpoint is named, or a setting that the task does not take.
    """
    if cfg.model.weights is None:
        raise ConfigError(f"task={cfg.task} needs a trained network: model.weights=PATH/checkpoints/best.pt")
    taken = TAKEN[cfg.task]
    keys = {text: text.lstrip("+").partition("=")[0] for text in asked(cfg).overrides}
    inside = tuple(f"{key}." for key in taken)
    if foreign := [
        text
        for text, key in keys.items()
        if key not in ("task", "data", "verbosity", *taken) and not key.startswith(inside)
    ]:
        raise ConfigError(
            f"task={cfg.task} does not take {', '.join(foreign)}: the network and its images are as the checkpoint "
            f"says. It takes {', '.join(taken)}"
        )
    if cfg.task == "predict" and not cfg.data.root:
        raise ConfigError("data.root has no value; give a photo, or a folder of photos: data.root=FOLDER")


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


def _each_alone(config: Config) -> Iterator[str]:
    for key, value, rules in leaves(config):
        broken = [text for is_allowed, text in rules if not is_allowed(value)]
        if broken:
            yield f"{key}={value} {broken[0]}"


def _weights(config: Config) -> Iterator[str]:
    if config.model.weights is not None and config.model.pretrained:
        yield f"model.weights={config.model.weights} and model.pretrained=true are two beginnings; leave one out"


def _learning_rate(config: Config) -> Iterator[str]:
    schedule, lr, epochs = config.schedule, config.optimizer.lr, config.trainer.epochs
    if schedule.min_lr > lr > 0:
        yield f"schedule.min_lr={schedule.min_lr} is above optimizer.lr={lr}"
    if not config.phases.stages and 1 <= epochs < schedule.warmup_epochs:  # a stage may be cut short
        yield (
            f"schedule.warmup_epochs={schedule.warmup_epochs} is above trainer.epochs={epochs}: training would end "
            "before its learning rate is reached"
        )


def _transforms(config: Config) -> Iterator[str]:
    data = config.data
    used = with_usual(data)
    mean, std = used.mean or [], used.std or []
    if len(mean) != 3 or len(std) != 3 or not all(map(isfinite, [*mean, *std])) or not min(std) > 0:
        yield f"data.mean={mean}, data.std={std} are not three numbers each, data.std above 0"
    if data.cache != "none" and (data.transforms == "timm" or data.auto_augment):
        per_sample = "transforms=timm" if data.transforms == "timm" else f"auto_augment={data.auto_augment}"
        yield (
            f"data.cache={data.cache} augments whole batches, and data.{per_sample} works on single images; use "
            "data.cache=none, or data.transforms=torchvision (or none) with data.auto_augment=null"
        )


def _batch(config: Config) -> Iterator[str]:
    batch, micro = config.trainer.batch_size, config.trainer.micro_batch_size
    if batch == LARGEST and micro is not None:
        yield (
            f"trainer.batch_size={LARGEST} with trainer.micro_batch_size={micro}: in micro-batches a batch of any size "
            "fits; give trainer.batch_size a number, or leave trainer.micro_batch_size null"
        )
    if batch == LARGEST and (config.ladder.start is not None or config.ladder.same_rung):
        yield (
            f"trainer.batch_size={LARGEST} is found at rung requested, and ladder.start or ladder.same_rung begins "
            "elsewhere; give trainer.batch_size a number"
        )
    if type(batch) is int and micro is not None and micro > batch >= 1:
        yield f"trainer.micro_batch_size={micro} is above trainer.batch_size={batch}; make it at most {batch}"


def _class_weights(config: Config) -> Iterator[str]:
    weights, classes = config.trainer.class_weights, config.model.num_classes
    if isinstance(weights, list) and classes is not None and len(weights) != classes:
        yield f"trainer.class_weights has {len(weights)} numbers and model.num_classes={classes}; give one for each"


def _memory(config: Config) -> Iterator[str]:
    try:
        parse_limit(config.memory.limit)
    except ConfigError as error:
        yield str(error)
