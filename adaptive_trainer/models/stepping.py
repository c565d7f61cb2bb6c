"""Whether an optimizer's step may need memory: one that needs none cannot run out of it, and nothing is copied before.

Few optimizers can be trusted to go on as they were seen: others allocate from some step on (RAdam from its sixth), in
every sixth (Lookahead), or as values and learning rates have it. Seen once, a step that allocates nothing is no promise
of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import optimizer as hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Once their state is made, all steps of these do the same; a class derived from one may not.
ALIKE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


def steps_alike(optimizer: Optimizer) -> bool:
    """Whether a step that allocates nothing shows that none will, as long as the same parameters have gradients."""
    own_hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    global_hooks = hooks._global_optimizer_pre_hooks or hooks._global_optimizer_post_hooks
    return type(optimizer) in ALIKE and not own_hooks and not global_hooks


class StepMemory:
    """What is known of the memory that an optimizer's step takes.

    Args:
        optimizer: whose step it is.
        parameters: that it may change.
        device: where they are.

    Attributes:
        may_allocate: the step that was last looked at; None: not known, for its state is still to be made, or none like
            it was measured.
        is_warm: that step finds the state of every parameter that has a gradient.
    """

    def __init__(self, optimizer: Optimizer, parameters: Iterable[nn.Parameter], device: torch.device) -> None:
        self.optimizer = optimizer
        self.parameters = list(parameters)
        self.device = device
        self.may_allocate: bool | None = None
        self.is_warm = False
        self._allocates: bool | None = None
        self._measured: set[int] = set()  # ids of the parameters that had gradients

    def forget(self) -> None:
        """The step that was looked at is undone, and with it the state that it made; what was measured holds."""
        self.may_allocate, self.is_warm = None, False

    def look(self) -> None:
        """Find out about the step that comes next, whose gradients are there."""
        moving = [parameter for parameter in self.parameters if parameter.grad is not None]
        self.is_warm = self._has_state(moving)
        if not self._measured.issuperset(map(id, moving)):  # what was frozen may take other ways
            self._allocates = None
        self.may_allocate = None
        if self.is_warm:
            self.may_allocate = self._allocates if steps_alike(self.optimizer) else True

    def _has_state(self, moving: list[nn.Parameter]) -> bool:
        """Whether the optimizer has made the state of every parameter that has a gradient."""
        made = self.optimizer.state
        if not isinstance(self.optimizer, torch.optim.SGD):
            return all(parameter in made for parameter in moving)
        groups = [group["params"] for group in self.optimizer.param_groups if group["momentum"]]
        needed = [parameter for group in groups for parameter in group if parameter.grad is not None]
        return all(made.get(parameter, {}).get("momentum_buffer") is not None for parameter in needed)

    def measure(self, change: Callable[[Callable[[], None]], None]) -> None:
        """Do the step that was looked at, and see whether it allocates.

        Args:
            change: does it, and calls the function that it is given as the first weight is about to be changed.
        """
        counter = _Allocations(self.device)
        before: list[int] = []
        with counter if self.device.type == "cpu" else nullcontext():
            change(lambda: before.append(counter.total()))
        if before and counter.total():  # else the step was left out, or nobody counts
            self._allocates = counter.total() > before[0]
            self.may_allocate = self._allocates
            self._measured = {id(parameter) for parameter in self.parameters if parameter.grad is not None}


class _Allocations(TorchDispatchMode):
    """Counts blocks of memory: on a CUDA card those of torch's allocator, on a CPU new results of operators inside."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self._operators = 1

    @classmethod
    def is_infra_mode(cls) -> bool:
        """It only looks on, so torch may go on to compile what optimizers ask it to."""
        return True

    def total(self) -> int:
        """The number so far, above 0; 0 where nobody counts (`cudaMallocAsync`)."""
        if self.device.type == "cuda":
            return int(torch.cuda.memory_stats(self.device).get("allocation.all.allocated", 0))
        return self._operators if self.device.type == "cpu" else 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator; a result is new where its memory is not an argument's."""
        out = func(*args, **(kwargs or {}))
        self._operators += len(_storages(out) - _storages((args, kwargs)))
        return out


def _storages(values: Any) -> set[int]:
    return {leaf.untyped_storage()._cdata for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}
