"""What a caller gives the Trainer of his own: settings, what makes a network, a loss."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from adaptive_trainer.config.schema import Config, ModelConfig
from adaptive_trainer.errors import ConfigError
from adaptive_trainer.training.session import ModelFactory

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
    """`make`, which notes the class of each network under the `model.name` that it was made for.

    A network that is given more than once is copied each time: shapes alone are made of it, or it is trained, and what
    is asked for again has to be as it was.
    """

    seen: list[weakref.ref[nn.Module]] = []
    copied: set[str] = set()

    def made_and_noted(config: ModelConfig, num_classes: int) -> nn.Module:
        with _no_weights_on_meta():
            network = make(config, num_classes)
        if not isinstance(network, nn.Module):
            raise ConfigError(f"model is to make a torch.nn.Module, and has made a {type(network).__name__}")
        is_again = any(known() is network for known in seen)
        if is_again and config.name not in copied:
            copied.add(config.name)
            log.info("the network exists already: a copy of it is trained, and it stays as it is")
        if not is_again:
            seen[:] = [known for known in seen if known() is not None] + [weakref.ref(network)]
        made[config.name] = type(network).__name__
        return _copied(network) if is_again or _is_real_on_meta(network) else network

    return made_and_noted


def _is_real_on_meta(network: nn.Module) -> bool:
    """Whether values were made, or existed, where shapes alone are asked for, which will take their place."""
    on_meta = torch.get_default_device().type == "meta"
    return on_meta and not all(parameter.is_meta for parameter in network.parameters())


def _copied(network: nn.Module) -> nn.Module:
    problem = ""
    try:
        return copy.deepcopy(network)
    except Exception as error:  # of whatever it holds
        problem = f"{type(error).__name__}: {error}"
    raise ConfigError(
        f"model gives a {type(network).__name__} that exists already, and it cannot be copied ({problem}); make a new "
        "one each time"
    )


@contextmanager
def _no_weights_on_meta() -> Iterator[None]:
    """Where shapes alone are asked for, weights that a factory loads go nowhere, which PyTorch warns of."""
    if torch.get_default_device().type != "meta":
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter in the checkpoint to a meta")
        yield
