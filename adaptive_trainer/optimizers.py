"""Optimizers and learning-rate schedules by name from timm, the moving average of weights, and the GradScaler."""

from __future__ import annotations

import difflib
import functools
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from adaptive_trainer.config import Config, OptimizerConfig, ScheduleConfig
from adaptive_trainer.errors import ConfigError

__all__ = [
    "CrossEntropy",
    "Schedule",
    "build_ema",
    "build_loss",
    "build_optimizer",
    "build_scaler",
    "build_schedule",
    "check_optimizer",
    "make_momentum",
]

FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)  # one kernel for all parameters, on CPU and CUDA
CHOOSES_IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable", "maximize")
SCHEDULES = ("none", "constant", "cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt")
WARMUP_LR = 1e-5


def build_optimizer(model: nn.Module, config: OptimizerConfig, device: torch.device) -> Optimizer:
    """The timm optimizer that `config.name` names, over the model's parameters.

    Biases and parameters of one dimension have no weight decay. The fused implementation is used where torch has one
    for the device and `config.kwargs` do not choose another.

    Raises:
        ConfigError: the name is unknown, needs what this trainer does not do, or `config.kwargs` do not suit it.
    """
    check_optimizer(config)
    problem = ""
    try:
        kwargs = {**(_fused(config, device) if _is_real(model) else {}), **config.kwargs}
        optimizer: Optimizer = create_optimizer_v2(
            model, config.name, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum, **kwargs
        )
        make_momentum(optimizer)
        return optimizer
    except (TypeError, ValueError, AssertionError, ImportError) as error:
        problem = str(error).splitlines()[0]
    given = f" with optimizer.kwargs={config.kwargs}" if config.kwargs else ""
    raise ConfigError(f"optimizer.name={config.name}{given} cannot be built: {problem}")


def check_optimizer(config: OptimizerConfig) -> None:
    """Refuse an optimizer that is none of timm's, or needs what this trainer does not do.

    Raises:
        ConfigError: it is so.
    """
    name, known = config.name.lower(), _known()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or ["adamw", "sgd", "lion"]
        raise ConfigError(f"unknown optimizer.name={config.name}: did you mean {', '.join(near)}? (a timm optimizer)")
    info = get_optimizer_info(name)
    if info.second_order:
        raise ConfigError(
            f"optimizer.name={config.name} needs second derivatives, which cost the memory that is short; use adamw"
        )
    takes = {"eps": info.has_eps, "betas": info.has_betas}
    ignored = [key for key in config.kwargs if not takes.get(key, True)]
    if ignored:
        raise ConfigError(f"optimizer.name={config.name} does not take optimizer.kwargs {', '.join(ignored)}")


@functools.cache
def _known() -> list[str]:
    return [str(each) for each in list_optimizers()]


def _is_real(model: nn.Module) -> bool:
    """Complex parameters have no fused implementation."""
    return not any(parameter.is_complex() for parameter in model.parameters())


def _fused(config: OptimizerConfig, device: torch.device) -> dict[str, Any]:
    if device.type not in ("cpu", "cuda") or any(key in config.kwargs for key in CHOOSES_IMPLEMENTATION):
        return {}
    if config.kwargs.get("dampening"):  # would apply to the first step too, with a momentum that is there before it
        return {}
    is_fused = get_optimizer_class(config.name, bind_defaults=False) in FUSED
    return {"fused": True} if is_fused else {}


def kind_of_state(config: OptimizerConfig) -> tuple[Any, ...]:
    """What decides which state, and which groups of parameters, an optimizer of these settings has."""
    has_momentum = get_optimizer_info(config.name.lower()).has_momentum and config.momentum > 0
    return config.name, config.kwargs, config.weight_decay > 0, has_momentum


def make_momentum(optimizer: Optimizer) -> None:
    """The momentum of a fused SGD, where it is missing: as zeros, so that the first step is like any other.

    torch would make it there without a value, and leave it so where a GradScaler finds an overflow and no step is done.
    """
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else ():
        needed = group["fused"] and group["momentum"] and not group["dampening"]
        for parameter in group["params"] if needed else ():
            if optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the update count: no memory of its own, so it can be built anew at any time.

    Attributes:
        optimizer: whose learning rate `apply` sets.
        lr: the base learning rate.
        values: a timm scheduler over a stand-in optimizer, or None for a constant learning rate.
    """

    optimizer: Optimizer
    lr: float
    values: Any = None

    def lr_at(self, update: int) -> float:
        """The learning rate of update number `update`, from 0."""
        if self.values is None:
            return self.lr
        self.values.step_update(update)
        return float(self.values.optimizer.param_groups[0]["lr"])

    def apply(self, update: int) -> None:
        """Set the learning rate for update number `update`, times `lr_scale` in the groups that have one."""
        lr = self.lr_at(update)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)


def build_schedule(
    optimizer: Optimizer, config: ScheduleConfig, *, lr: float, epochs: int, updates_per_epoch: int
) -> Schedule:
    """The timm schedule that `config.name` names, counted in updates; nothing is changed before `Schedule.apply`.

    Args:
        lr: the base learning rate.

    Raises:
        ConfigError: the name is unknown, not a function of the update count, or `config.kwargs` do not suit it.
    """
    if config.name == "plateau":
        raise ConfigError(
            "schedule.name=plateau follows a metric, and a schedule here is a function of the update count alone; "
            f"use one of {', '.join(SCHEDULES)}"
        )
    problem = ""
    # timm writes into the groups of the optimizer it is given, at once, and keys that a checkpoint would carry along
    stand_in = torch.optim.SGD([nn.Parameter(torch.empty(0))], lr=lr)
    warmup: dict[str, Any] = {"warmup_lr": min(WARMUP_LR, lr), "warmup_epochs": config.warmup_epochs}
    try:
        values, _ = create_scheduler_v2(
            stand_in,
            sched=config.name,
            num_epochs=epochs,
            min_lr=config.min_lr,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
            **{**warmup, **config.kwargs},
        )
        if values is not None or config.name == "none":
            return Schedule(optimizer, lr, values)
    except (TypeError, ValueError) as error:
        problem = str(error).splitlines()[0].rstrip(". ")
    given = f" with schedule.kwargs={config.kwargs}" if config.kwargs else ""
    known = f"; the names are {', '.join(SCHEDULES)}" if config.name not in SCHEDULES else ""
    raise ConfigError(f"schedule.name={config.name}{given} cannot be built: {problem or 'unknown'}{known}")


class CrossEntropy(nn.CrossEntropyLoss):
    """Cross entropy that refuses scores of another shape: on a card, a missing one would end the whole process.

    Args:
        num_classes: the least number of scores.
        label_smoothing: as `nn.CrossEntropyLoss` has it.
    """

    def __init__(self, num_classes: int, label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing=label_smoothing)
        self.num_classes = num_classes

    def forward(self, output: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of scores (N, classes) and labels (N,).

        Raises:
            ConfigError: these are no scores, or too few.
        """
        if not isinstance(output, Tensor):
            raise ConfigError(
                f"the network gives a {type(output).__name__}, and cross entropy takes a tensor of scores; give the "
                "Trainer a loss that takes it"
            )
        if output.ndim < 2 or output.shape[1] < self.num_classes:
            raise ConfigError(
                f"the network gives scores of shape {tuple(output.shape)}, and there are {self.num_classes} classes; "
                "(images, classes) is needed"
            )
        return super().forward(output, labels)


def build_loss(config: Config, num_classes: int) -> nn.Module:
    """Mean cross entropy of (output, labels), with `trainer.label_smoothing`."""
    return CrossEntropy(num_classes, config.trainer.label_smoothing)


def build_ema(model: nn.Module, decay: float | None) -> ModelEmaV3 | None:
    """A moving average of the model's weights and buffers; None when no decay is given."""
    return None if decay is None else ModelEmaV3(model, decay=decay)


def build_scaler(precision: str, device: torch.device) -> GradScaler:
    """The loss scaling that fp16 needs; it does nothing for other precisions. Its tensors exist from the beginning."""
    scaler = GradScaler(device.type, enabled=precision == "fp16")
    if scaler.is_enabled():
        scaler._lazy_init_scale_growth_tracker(device)
    return scaler
