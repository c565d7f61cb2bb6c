"""What a caller gives the Trainer of his own: settings, what makes a network, a loss."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from dataclasses import fields
from typing import Any
from weakref import WeakSet

import torch
from omegaconf import DictConfig
from torch import nn

from adaptive_trainer.config.schema import Config, ModelConfig
from adaptive_trainer.errors import ConfigError, explained
from adaptive_trainer.planning.networks import ModelFactory

log = logging.getLogger(__name__)


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
    # a network can itself be called with two arguments, as far as its signature says; so can the class of a loss
    if isinstance(model, nn.Module) or not (model is None or _takes_two(model)):
        raise ConfigError(
            f"model is {_named(model)}; give a function of (model settings, number of classes) that makes it, since a "
            "rung may start anew"
        )
    if isinstance(loss, type) or not (loss is None or _takes_two(loss)):
        raise ConfigError(f"loss is {_named(loss)}; give a function of (output, labels), such as nn.CrossEntropyLoss()")


def _takes_two(function: Any) -> bool:
    try:
        inspect.signature(function).bind(None, None)
    except (TypeError, ValueError) as error:
        return isinstance(error, ValueError)  # some functions written in C do not say
    return True


def _named(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def noting(make: ModelFactory, made: dict[str, str]) -> ModelFactory:
    """`make`, which notes the class of each network under the `model.name` that it was made for.

    A network that is given more than once is copied each time.
    """
    seen = WeakSet[nn.Module]()  # weak, as a network that a descent has left must be free to go
    copied: set[str] = set()

    def made_and_noted(config: ModelConfig, num_classes: int) -> nn.Module:
        network = _made(make, config, num_classes)
        if not isinstance(network, nn.Module):
            raise ConfigError(f"model is to make a torch.nn.Module, and has made a {type(network).__name__}")
        is_again = network in seen
        if is_again and config.name not in copied:  # said once, though each rung asks again
            copied.add(config.name)
            log.info("the network exists already: a copy of it is trained, and it stays as it is")
        seen.add(network)
        made[config.name] = type(network).__name__
        # shapes alone are made of it, or it is trained: what is asked for again has to be as it was
        has_values = not all(parameter.is_meta for parameter in network.parameters())
        return _copied(network) if is_again or (_on_meta() and has_values) else network

    return made_and_noted


def _on_meta() -> bool:
    return torch.get_default_device().type == "meta"  # a plan, which asks for shapes alone


def _made(make: ModelFactory, config: ModelConfig, num_classes: int) -> nn.Module:
    if not _on_meta():
        return make(config, num_classes)
    with warnings.catch_warnings():  # weights that a factory loads go nowhere here, which PyTorch warns of
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter in the checkpoint to a meta")
        return make(config, num_classes)


def _copied(network: nn.Module) -> nn.Module:
    def refused(error: Exception) -> ConfigError:
        return ConfigError(
            f"model gives a {type(network).__name__} that exists already, and it cannot be copied "
            f"({type(error).__name__}: {error}); make a new one each time"
        )

    with explained(refused):  # by whatever it holds
        return copy.deepcopy(network)
