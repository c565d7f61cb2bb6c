"""What a caller gives the Trainer of his own: settings, what makes a network, a loss."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

from omegaconf import DictConfig
from torch import nn

from adaptive_trainer.config import Config, ModelConfig
from adaptive_trainer.errors import ConfigError
from adaptive_trainer.session import ModelFactory

__all__ = ["check_arguments", "noting"]


def check_arguments(cfg: Any, model: Any, loss: Any) -> None:
    """Refuse settings, a network or a loss that are something else.

    Raises:
        ConfigError: one is.
    """
    if not isinstance(cfg, DictConfig):
        raise ConfigError(f"the settings are a {type(cfg).__name__}; compose_config([...]) makes what a Trainer takes")
    if missing := [field.name for field in fields(Config) if field.name not in cfg]:
        raise ConfigError(f"the settings lack {', '.join(missing)}; compose_config([...]) makes what a Trainer takes")
    if cfg.task != "train":
        raise ConfigError(f"a Trainer trains, and task={cfg.task}; run that on the command line, or use predict()")
    if isinstance(model, nn.Module) or not (model is None or _takes_two(model)):
        raise ConfigError(
            f"model is {_named(model)}; give a function of (model settings, number of classes) that makes it, since a "
            "rung may start anew"
        )
    if isinstance(loss, type) or not (loss is None or _takes_two(loss)):
        raise ConfigError(f"loss is {_named(loss)}; give a function of (output, labels), such as nn.CrossEntropyLoss()")


def _takes_two(function: Any) -> bool:
    """Whether it can be called with two arguments, as far as it says."""
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # it does not say
        return True
    return True


def _named(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def noting(make: ModelFactory, made: dict[str, str]) -> ModelFactory:
    """`make`, which notes the class of each network under the `model.name` that it was made for."""

    def made_and_noted(config: ModelConfig, num_classes: int) -> nn.Module:
        network = make(config, num_classes)
        if not isinstance(network, nn.Module):
            raise ConfigError(f"model is to make a torch.nn.Module, and has made a {type(network).__name__}")
        made[config.name] = type(network).__name__
        return network

    return made_and_noted
