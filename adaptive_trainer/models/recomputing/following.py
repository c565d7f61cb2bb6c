"""The forward pass of a network whose activations are recomputed or offloaded: one wrapper for both.

The network's code, its modules and their hooks stay as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from adaptive_trainer.models.recomputing import keeper
from adaptive_trainer.models.recomputing.offloading import HostMemory, Offloading
from adaptive_trainer.models.recomputing.plan import Level, Plan
from adaptive_trainer.models.recomputing.values import Kept

Forward = Callable[..., Any]
# Beside the networks, not in them: copies of a network have none of it, and it is no part of what an update changes.
_host_memory: weakref.WeakKeyDictionary[nn.Module, HostMemory] = weakref.WeakKeyDictionary()


def follow(model: nn.Module, *, plan: Plan | None = None, offload: bool | None = None) -> None:
    """Change what is recomputed, or whether what is kept is offloaded, from the next forward pass on."""
    plan, offload = plan or plan_in(model), is_offloading(model) if offload is None else offload
    own = own_forward(model)
    if not offload:
        _host_memory.pop(model, None)
    # Paths to the network's generators lead through these arguments, and checkpoints name them.
    is_used = offload or not plan.is_empty
    _set_forward(model, partial(_followed, model, own, plan, offload) if is_used else own)


def plan_in(model: nn.Module) -> Plan:
    """The plan of recomputation that is in use."""
    found = _wrapper(model)
    return found.args[2] if found is not None else Plan({})


def is_offloading(model: nn.Module) -> bool:
    """Whether what is kept is offloaded."""
    found = _wrapper(model)
    return found is not None and bool(found.args[3])


def own_forward(model: nn.Module) -> Forward | None:
    """The forward pass that this network alone was given, as it is; None where it is its class's."""
    found = _wrapper(model)
    own: Forward | None = model.__dict__.get("forward") if found is None else found.args[1]
    return own


@contextmanager
def suspended(model: nn.Module) -> Iterator[None]:
    """Inside, the network's forward pass is not followed: nothing is recomputed or offloaded."""
    found = _wrapper(model)
    if found is None:
        yield
        return
    _set_forward(model, own_forward(model))
    try:
        yield
    finally:
        _set_forward(model, found)


def host_memory_of(model: nn.Module) -> HostMemory | None:
    """The host memory that is in use; whoever keeps a CUDA graph of the network keeps it too."""
    return _host_memory.get(model)


def _set_forward(model: nn.Module, forward: Forward | None) -> None:
    """Give a network a forward pass of its own; None: that of its class."""
    model.__dict__.pop("forward", None)
    if forward is not None:
        model.__dict__["forward"] = forward


def _wrapper(model: nn.Module) -> partial[Any] | None:
    found = model.__dict__.get("forward")
    return found if isinstance(found, partial) and found.func is _followed else None


def _followed(model: nn.Module, own: Forward | None, plan: Plan, offload: bool, *args: Any, **kwargs: Any) -> Any:
    forward = own or partial(type(model).forward, model)
    if not (model.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    samples = next((tensor.shape[0] for tensor in given if tensor.ndim), 1)
    least = keeper.SMALL * samples
    with ExitStack() as stack:
        keep = stack.enter_context(_offloading(model, given, least)).keep if offload else Kept
        stack.enter_context(keeper.Keeper(_levels(model, plan.parts), plan.rest, least, keep))
        return forward(*args, **kwargs)


def _offloading(model: nn.Module, given: list[Tensor], least: int) -> Offloading:
    alive = [*model.parameters(), *model.buffers(), *given]
    memory, device = _host_memory.get(model), alive[0].device
    if memory is None or memory.device != device:
        memory = _host_memory[model] = HostMemory(device)
    return Offloading(memory, {id(tensor.untyped_storage()) for tensor in alive}, least)


def _levels(model: nn.Module, parts: Mapping[str, Level]) -> dict[int, Level]:
    return {id(model.get_submodule(path)): level for path, level in parts.items()}
