"""Techniques that save memory in training and leave its results as they are, bit for bit: one module each.

A new technique is a module here that is like `Saver`, its key in `config.schema.TrainerConfig`, and its test.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any, Protocol, cast

from torch import nn

from adaptive_trainer.config.schema import TrainerConfig


class Saver(Protocol):
    """What the module of a technique has. `KEY` names its setting, of `trainer`."""

    KEY: str

    def apply(self, model: nn.Module, value: Any, /) -> None:
        """Do to the network, in place, what this value of the setting asks, and undo what another value has asked."""

    def compile_refusal(self, model: nn.Module, /) -> str:
        """Say why the network cannot be compiled as the technique has left it; empty where it can."""


SAVERS: tuple[Saver, ...] = tuple(
    cast(Saver, importlib.import_module(f"{__name__}.{module.name}")) for module in pkgutil.iter_modules(__path__)
)


def apply_savers(model: nn.Module, settings: TrainerConfig) -> None:
    """Switch every technique on or off in the network, in place, as the settings ask."""
    for saver in SAVERS:
        saver.apply(model, getattr(settings, saver.KEY))


def saver_settings(settings: TrainerConfig) -> dict[str, Any]:
    """Pick the settings of all techniques, by key: a prediction of memory depends on each."""
    return {saver.KEY: getattr(settings, saver.KEY) for saver in SAVERS}


def compile_refusal(model: nn.Module) -> str:
    """Say which technique keeps the network from being compiled, and why; empty where none does."""
    return next(filter(None, (saver.compile_refusal(model) for saver in SAVERS)), "")
