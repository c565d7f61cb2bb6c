"""The state of an optimizer from another one or from a file: taken over where it can stand for this one's own."""

from __future__ import annotations

import copy
from collections import defaultdict
from reprlib import repr as shortened
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adaptive_trainer import oom
from adaptive_trainer.models.optimizers import make_momentum

LARGEST_NUMBER = 2.0**63  # of what a kernel takes
IMPLEMENTATION = ("fused", "foreach")  # of an optimizer's step: this run's own choice


def load_optimizer(saved: dict[str, Any], optimizer: Optimizer, *, keep_groups: bool, is_trusted: bool = True) -> None:
    """Put what `state_dict` gave into an optimizer whose state is of the same kind.

    Args:
        keep_groups: keep the optimizer's own settings; else only its own implementation.
        is_trusted: it is another optimizer's; anything may be in a file.

    Raises:
        ValueError: what is in the file cannot stand for this optimizer's own.
    """
    expected = {} if is_trusted else _first_state(optimizer)
    own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)  # it takes over the saved groups too, whole
    for group, values in zip(optimizer.param_groups, own, strict=True):
        group.update(values if keep_groups else {key: values[key] for key in IMPLEMENTATION if key in values})
    if not is_trusted:  # after loading, which casts and moves the tensors as a step will read them
        _check(optimizer, own, expected)
    _lay_out_as_weights(optimizer)
    make_momentum(optimizer)


def _check(optimizer: Optimizer, own: list[dict[str, Any]], expected: dict[Any, dict[str, Any]]) -> None:
    for group, values in zip(optimizer.param_groups, own, strict=True):
        check_alike(group, values, "optimizer.param_groups")
    for parameter, values in optimizer.state.items():
        if any(isinstance(value, Tensor) and bool(value.isnan().any()) for value in values.values()):
            raise ValueError("the optimizer's state has values that are no numbers")
        if values:  # a parameter without a gradient has none
            check_alike(values, expected.get(parameter, {}), "optimizer.state")


def check_alike(saved: dict[str, Any], own: dict[str, Any], where: str) -> None:
    """Refuse values that cannot stand for this run's own: steps do not look at what they read.

    Raises:
        ValueError: one is missing, or of another kind.
    """
    for key, value in own.items():
        if key not in saved:
            raise ValueError(f"{where} lacks {key!r}")
        # None says nothing of a kind: `foreach` that is left to torch, a momentum that is not there yet
        if value is not None and _kind_of(saved[key]) != _kind_of(value):
            raise ValueError(f"{where}: {key!r} is {shortened(saved[key])}, and {shortened(value)} is of another kind")


def _kind_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.is_floating_point()  # load_state_dict has cast it
    if isinstance(value, list | tuple):
        return [_kind_of(each) for each in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number" if abs(value) < LARGEST_NUMBER else "no number"  # nor is NaN
    return type(value)


def _first_state(optimizer: Optimizer) -> dict[Any, dict[str, Any]]:
    """What a first step makes of each parameter, without its data; empty where that step looks at values."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    stand_ins = [nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad) for parameter in parameters]
    # deepcopy takes what its memo names for copied: so the copy has stand-ins without data, and no state
    memo: dict[int, Any] = dict(zip(map(id, parameters), stand_ins, strict=True))
    memo[id(optimizer.state)] = defaultdict(dict)
    try:
        rehearsal = copy.deepcopy(optimizer, memo)
        for group in rehearsal.param_groups:  # the plain step: kernels for many tensors ask the device
            group.update({key: False for key in IMPLEMENTATION if key in group})
        for stand_in in stand_ins:
            stand_in.grad = torch.zeros_like(stand_in)
        rehearsal.step()
    except Exception as error:
        if oom.describe(error).kind is not oom.Kind.OTHER:
            raise
        return {}
    return {parameter: rehearsal.state[stand_in] for parameter, stand_in in zip(parameters, stand_ins, strict=True)}


def _lay_out_as_weights(optimizer: Optimizer) -> None:
    # fused steps read weights and state in the order of memory, and do not look at strides
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                values[name] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
