"""Recompute activations in the backward pass rather than keep them (Chen et al., arXiv 1604.06174).

It saves most of the activations' memory for about a third more time. timm's networks know their own blocks; of others,
the modules that stand in an `nn.Sequential` or `nn.ModuleList` are taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adaptive_trainer.utils.belongings import Belongings
from adaptive_trainer.utils.random import put_all, states_of

log = logging.getLogger(__name__)

KEY = "checkpoint_activations"
CONTAINERS = (nn.Sequential, nn.ModuleList)
LENT = "kept_buffers"  # attribute of a module whose buffers are copies during a second computation
Buffers = dict[str, Tensor | None]


def apply(model: nn.Module, value: bool) -> None:
    """Recompute the activations of the network's blocks, or keep them.

    The second computation leaves buffers alone: statistics of BatchNorm are counted once.
    """
    if not _by_its_own_means(model, value):
        blocks = list(_blocks(model))
        if value and not blocks:
            log.warning("%s has no blocks to recompute: trainer.%s saves nothing", type(model).__name__, KEY)
        for block in blocks:
            _set_forward(block, value)
    if value:
        _keep_buffers_when_recomputing(model)


def compile_refusal(model: nn.Module) -> str:
    """Say why the network cannot be compiled; empty where it can, as where timm recomputes by its own means."""
    if any(_is_ours(module.__dict__.get("forward")) for module in model.modules()):
        return f"recomputed activations (trainer.{KEY}=true) are not compiled"
    return ""


def _by_its_own_means(model: nn.Module, enable: bool) -> bool:
    switch: Callable[[bool], None] | None = getattr(model, "set_grad_checkpointing", None)
    if switch is None:
        return False
    try:
        switch(enable)
    except AssertionError:  # timm's way to say that this network has no checkpointing
        return False
    return True


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The modules with parts of their own that stand directly in a plain container, the outermost first."""
    for child in module.children():
        if type(module) not in CONTAINERS or type(child) in CONTAINERS:
            yield from _blocks(child)
        elif any(True for _ in child.children()) and any(True for _ in child.parameters()):
            yield child


def _is_ours(forward: Any) -> bool:
    return isinstance(forward, partial) and forward.func is _recomputed_later


def _set_forward(block: nn.Module, enable: bool) -> None:
    """Give the block a forward that recomputes, or its own again: its class's, or one that it alone was given."""
    found = block.__dict__.pop("forward", None)
    own = found.args[1] if _is_ours(found) else found
    if enable:
        # Paths to the block's generators lead through these arguments, and checkpoints name them.
        block.__dict__["forward"] = partial(_recomputed_later, block, own, Belongings({"block": block}))
    elif own is not None:
        block.__dict__["forward"] = own


def _recomputed_later(
    block: nn.Module, own: Callable[..., Any] | None, owned: Belongings, *args: Any, **kwargs: Any
) -> Any:
    forward = own or partial(type(block).forward, block)
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    owned.keep()
    before = states_of(owned.generators.values())
    contexts = nullcontext(), _SecondTime(block, before)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: contexts, **kwargs)


class _SecondTime:
    """The block's second computation: it draws what it drew and changes no buffer, as statistics are counted once."""

    def __init__(self, block: nn.Module, before: list[tuple[Any, Any]]) -> None:
        self.block = block
        self.before = before  # states of the generators, of which torch puts back only its own

    def __enter__(self) -> None:
        self.kept = self.block._buffers.copy()
        # The second computation runs without the block's own hooks, which lend to all others: it is lent to here.
        self.block._buffers.update(_copies(self.kept))
        self.now = states_of(generator for generator, _ in self.before)
        put_all(self.before)

    def __exit__(self, *_: object) -> None:
        put_all(self.now)
        _bind(self.block, self.kept)


def _keep_buffers_when_recomputing(model: nn.Module) -> None:
    """Let every module that runs inside a backward pass, so for the second time, change copies of its buffers."""
    for module in model.modules():
        if module._buffers and _lend_buffers not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_lend_buffers)
            module.register_forward_hook(_take_buffers_back, always_call=True)


def _lend_buffers(module: nn.Module, _: Any) -> None:
    # What an interrupted pass has left is of an earlier update, and must not be taken for this one's.
    module.__dict__.pop(LENT, None)
    if torch._C._current_graph_task_id() != -1:  # a backward pass is running in this thread
        kept = module._buffers.copy()
        lent = _copies(kept)  # memory can run out here: nothing is lent then
        module.__dict__[LENT] = kept
        module._buffers.update(lent)


def _take_buffers_back(module: nn.Module, *_: Any) -> None:
    kept = module.__dict__.pop(LENT, None)
    if kept is not None:
        _bind(module, kept)


def _copies(buffers: Buffers) -> Buffers:
    return {name: None if value is None else value.clone() for name, value in buffers.items()}


def _bind(module: nn.Module, buffers: Buffers) -> None:
    module._buffers.clear()  # of what the second computation has made
    module._buffers.update(buffers)
