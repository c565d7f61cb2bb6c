"""Optimizers and learning-rate schedules by name from timm, the moving average of weights, and the GradScaler."""

from __future__ import annotations

import difflib
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from adaptive_trainer.config.schema import OptimizerConfig, ScheduleConfig
from adaptive_trainer.errors import ConfigError, explained

FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)  # one kernel for all parameters, on CPU and CUDA
CHOOSES_IMPLEMENTATION = {"fused", "foreach", "capturable", "differentiable", "maximize"}
SCHEDULES = ("none", "constant", "cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt")
WARMUP_LR = 1e-5
TICKS = 1000  # of a schedule's clock in one update: timm rounds some lengths to whole ones


def build_optimizer(model: nn.Module, config: OptimizerConfig, device: torch.device) -> Optimizer:
    """Build the timm optimizer that `config.name` names, over the model's parameters.

    Biases and parameters of one dimension have no weight decay. The fused implementation is used where torch has one
    for the device and the parameters and `config.kwargs` do not choose another.

    Raises:
        ConfigError: the name is unknown, needs what this trainer does not do, or `config.kwargs` do not suit it.
    """
    check_optimizer(config)
    kwargs = {**_fused(model, config, device), **config.kwargs}

    def explain(error: Exception) -> ConfigError:
        given = f" with optimizer.kwargs={config.kwargs}" if config.kwargs else ""
        return ConfigError(f"optimizer.name={config.name}{given} cannot be built: {str(error).splitlines()[0]}")

    with explained(explain, (TypeError, ValueError, AssertionError, ImportError)):
        _check_together(kwargs, device)
        optimizer = _created(model, config, kwargs)
    make_momentum(optimizer)
    return optimizer


def _created(model: nn.Module, config: OptimizerConfig, kwargs: dict[str, Any]) -> Optimizer:
    settings = {"lr": config.lr, "weight_decay": config.weight_decay, "momentum": config.momentum, **kwargs}
    try:
        optimizer: Optimizer = create_optimizer_v2(model, config.name, **settings)
        return optimizer
    except ValueError as error:
        if "Nesterov" not in str(error) or config.momentum or "nesterov" in kwargs:
            raise
    # Without momentum Nesterov's step is the plain one; torch refuses it, and timm's `sgd` asks for it by default.
    return create_optimizer_v2(model, config.name, **settings, nesterov=False)


def _check_together(kwargs: dict[str, Any], device: torch.device) -> None:
    """Refuse what torch would refuse only in the first step, or by an error that is no ValueError."""
    if kwargs.get("differentiable"):
        raise ValueError("differentiable=True is for steps inside autograd; leave it out")
    if kwargs.get("capturable") and device.type == "cpu":
        raise ValueError("capturable=True is for a CUDA card, and this is a CPU; leave it out")
    if kwargs.get("fused") and kwargs.get("foreach"):
        raise ValueError("fused=True and foreach=True exclude each other")


def check_optimizer(config: OptimizerConfig) -> None:
    """Refuse an optimizer that is none of timm's, or needs what this trainer does not do.

    Raises:
        ConfigError: it is so.
    """
    name, known = config.name.lower(), list(map(str, list_optimizers()))
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


def _fused(model: nn.Module, config: OptimizerConfig, device: torch.device) -> dict[str, bool]:
    is_chosen = CHOOSES_IMPLEMENTATION & config.kwargs.keys()
    is_complex = any(parameter.is_complex() for parameter in model.parameters())  # for which there is none
    # Dampening would apply to the first step too, as `make_momentum` makes a momentum before it.
    if is_chosen or is_complex or device.type not in ("cpu", "cuda") or config.kwargs.get("dampening"):
        return {}
    return {"fused": True} if _class_of(config.name) in FUSED else {}


def _class_of(name: str) -> Any:
    """The optimizer's class; None where the package that has it is not installed, or is for CUDA alone."""
    try:
        return get_optimizer_class(name, bind_defaults=False)
    except (ImportError, AssertionError):
        return None


def kind_of_state(config: OptimizerConfig) -> tuple[Any, ...]:
    """What decides which state, and which groups of parameters, an optimizer of these settings has."""
    name = config.name.lower()
    kind = _class_of(name)
    taken = {} if kind is None else inspect.signature(kind).parameters
    settings = {key: parameter.default for key, parameter in taken.items()} | config.kwargs
    kinds = {key: _kind_of_setting(value) for key, value in settings.items() if key not in ("lr", "weight_decay")}
    return name, kinds, config.weight_decay > 0, get_optimizer_info(name).has_momentum and config.momentum > 0


def _kind_of_setting(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_kind_of_setting, value))
    # Of a fraction only whether it is zero, which leaves a part out; whole numbers are sizes and counts.
    return ("fraction", value != 0) if isinstance(value, float) else value


def make_momentum(optimizer: Optimizer) -> None:
    """Make the momentum of a fused SGD where it is missing: as zeros, so that the first step is like any other.

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

    It rises linearly up to the asked rate in the warm-up; the whole curve follows, down to `min_lr` at the last update.

    Attributes:
        optimizer: whose learning rate `apply` sets.
        lr: the base learning rate.
        warmup: updates before the first one at that rate.
        start: the rate of the first update of a warm-up.
        end: updates from the first one at the base rate to the last one of the run.
        floor: the least rate of the curve.
        curve: a timm scheduler over a stand-in optimizer, or None for a constant learning rate.
    """

    optimizer: Optimizer
    lr: float
    warmup: int = 0
    start: float = 0.0
    end: int = 0
    floor: float = 0.0
    curve: Any = None

    def lr_at(self, update: int) -> float:
        """The learning rate of update number `update`, from 0."""
        if update < self.warmup:
            return self.start + (self.lr - self.start) * update / self.warmup
        if self.curve is None or not self.end:
            return self.lr
        step = min(update - self.warmup, self.end)
        self.curve.step_update(step * TICKS + (step == self.end))  # one more, or the last cycle may begin anew
        return max(float(self.curve.optimizer.param_groups[0]["lr"]), self.floor)

    def apply(self, update: int) -> None:
        """Set the learning rate for update number `update`, times `lr_scale` in the groups that have one."""
        lr = self.lr_at(update)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)


def build_schedule(
    optimizer: Optimizer, config: ScheduleConfig, *, lr: float, epochs: int, updates_per_epoch: int
) -> Schedule:
    """Build the timm schedule that `config.name` names, counted in updates; nothing changes before `Schedule.apply`.

    Lengths in `config.kwargs` (`decay_epochs`, ...) are epochs after the warm-up.

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
    kwargs = dict(config.kwargs)
    last = epochs * updates_per_epoch - 1
    warmup = min(round(config.warmup_epochs * updates_per_epoch), last)
    start, floor = min(kwargs.pop("warmup_lr", WARMUP_LR), lr), min(config.min_lr, lr)
    if config.name == "rsqrt" and warmup:
        kwargs.setdefault("stable_timescale", config.warmup_epochs)

    def explain(error: Exception) -> ConfigError:
        given = f" with schedule.kwargs={config.kwargs}" if config.kwargs else ""
        known = f"; the names are {', '.join(SCHEDULES)}" if config.name not in SCHEDULES else ""
        why = str(error).splitlines()[0].rstrip(". ")
        return ConfigError(f"schedule.name={config.name}{given} cannot be built: {why}{known}")

    with explained(explain, (TypeError, ValueError)):
        curve = _curve(config.name, lr, floor, max(last - warmup, 1), updates_per_epoch, kwargs)
    return Schedule(optimizer, lr, warmup, start, last - warmup, floor, curve)


def _curve(name: str, lr: float, floor: float, end: int, updates_per_epoch: int, kwargs: dict[str, Any]) -> Any:
    """A timm scheduler without warm-up whose curve, with all of its cycles, ends after `end` updates."""
    # timm writes into the groups of the optimizer it is given, at once, and keys that a checkpoint would carry along
    stand_in = torch.optim.SGD([nn.Parameter(torch.empty(0))], lr=lr)
    curve, _ = create_scheduler_v2(
        stand_in,
        sched=name,
        num_epochs=end / updates_per_epoch,  # type: ignore[arg-type]
        min_lr=floor,
        warmup_epochs=0,
        warmup_prefix=True,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch * TICKS,
        **kwargs,
    )
    if curve is None and name != "none":
        raise ValueError("unknown")
    if hasattr(curve, "get_cycle_length"):
        curve.t_initial *= end * TICKS / curve.get_cycle_length()
    return curve


def build_ema(model: nn.Module, decay: float | None) -> ModelEmaV3 | None:
    """A moving average of the model's weights and buffers; None when no decay is given."""
    return None if decay is None else ModelEmaV3(model, decay=decay)


def build_scaler(precision: str, device: torch.device) -> GradScaler:
    """The loss scaling that fp16 needs; it does nothing for other precisions. Its tensors exist from the beginning."""
    scaler = GradScaler(device.type, enabled=precision == "fp16")
    if scaler.is_enabled():
        scaler._lazy_init_scale_growth_tracker(device)
    return scaler
