"""Fault injection in the manner of SQLite's tests: the N-th operator of an update runs out of memory.

What `dump` leaves out has not been compared: a new piece of training state belongs there too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from adaptive_trainer.step.undo import TrainState


class Fault(TorchDispatchMode):
    """Runs out of memory at operator number `at`, from 0.

    Once: before the operator runs. `keeps_failing`: the operator has run when its memory is refused, and everything
    after it is refused at once, until the mode is left.

    Attributes:
        count: operators so far.
        raised: failures so far.
        made: every storage that an operator has made, held weakly, so that what is left over can be counted.
        phases: what `phase` said at each operator.
    """

    def __init__(
        self, at: int | None = None, *, keeps_failing: bool = False, phase: Callable[[], str] = lambda: ""
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.at, self.keeps_failing, self.phase = at, keeps_failing, phase
        self.phases: list[str] = []
        self.count = self.raised = 0
        self.made: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        number, self.count = self.count, self.count + 1
        self.phases.append(self.phase())
        if self._hits(number) and not (self.keeps_failing and number == self.at):
            self._refuse(func)
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, Tensor):
                self.made.append(StorageWeakRef(tensor.untyped_storage()))  # type: ignore[no-untyped-call]
        if self._hits(number):
            self._refuse(func)
        return out

    def _hits(self, number: int) -> bool:
        return self.at is not None and (number == self.at or (self.keeps_failing and number > self.at))

    def _refuse(self, func: Any) -> None:
        self.raised += 1
        raise torch.OutOfMemoryError(f"CUDA out of memory. Injected at operator {self.at} ({func}).")

    def left_over(self, known: set[int]) -> int:
        """Storages made under this mode that still live and are not among the known ones."""
        living = {ref.cdata for ref in self.made if not ref.expired()}  # type: ignore[no-untyped-call]
        return len(living - known)


class Faults(Fault):  # type: ignore[no-untyped-call]
    """Runs out of memory each time that many operators have run since the failure before, or since the beginning."""

    def __init__(self, gaps: list[int]) -> None:
        super().__init__(gaps[0] if gaps else None)
        self.gaps = gaps[1:]

    def _refuse(self, func: Any) -> None:
        at, self.at = self.at, self.count + self.gaps.pop(0) if self.gaps else None
        self.raised += 1
        raise torch.OutOfMemoryError(f"CUDA out of memory. Injected at operator {at} ({func}).")


class DropPath(nn.Module):
    """Drops whole samples of a residual branch, and scales the others by what Python and numpy draw."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(0.8)
        return x * kept * (1 + 0.1 * random.random() + 0.1 * float(np.random.rand()))


class Net(nn.Module):
    """What is known to leave traces: two kinds of BatchNorm, dropout, DropPath, a buffer outside the state_dict."""

    seen: Tensor

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, 2, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.depthwise = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False)
        self.norm2 = nn.BatchNorm2d(channels, momentum=None)
        self.drop_path, self.dropout = DropPath(), nn.Dropout(0.3)
        self.head = nn.Linear(channels, 5)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.shape[0]
        x = nn.functional.silu(self.norm1(self.stem(x)))
        x = x + self.drop_path(nn.functional.silu(self.norm2(self.depthwise(x))))
        out: Tensor = self.head(self.dropout(x.mean((2, 3))))
        return out


def tensors_of(state: TrainState) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the state with a name of its own: what a bit-for-bit comparison looks at."""
    yield from ((f"model/{k}", v.detach()) for k, v in state.model.named_parameters())
    yield from ((f"buffer/{k}", v) for k, v in state.model.named_buffers())
    if state.ema is not None:
        yield from ((f"ema/{k}", v) for k, v in state.ema.module.state_dict().items())
    for number, parameter in enumerate(p for group in state.optimizer.param_groups for p in group["params"]):
        flat, _ = tree_flatten(dict(state.optimizer.state.get(parameter, {})))
        yield from ((f"optimizer/{number}/{k}", v) for k, v in enumerate(flat) if isinstance(v, Tensor))
    yield from ((f"meter/{k}", v) for k, v in state.meters.items())


def dump(state: TrainState) -> dict[str, Any]:
    """Everything that must be equal, bit for bit; what does not exist is not in it."""
    facts: dict[str, Any] = {name: tensor.clone() for name, tensor in tensors_of(state)}
    if state.ema is not None:
        facts |= {f"ema buffer/{name}": tensor.clone() for name, tensor in state.ema.module.named_buffers()}
    return facts | _of_optimizer(state) | _of_scaler(state) | _plain(state)


def _of_optimizer(state: TrainState) -> dict[str, Any]:
    optimizer = state.optimizer
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kinds = [tree_map(lambda v: "tensor" if isinstance(v, Tensor) else v, optimizer.state.get(p)) for p in parameters]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return {
        "optimizer state": repr(kinds),
        "optimizer states": len(optimizer.state),
        "optimizer attributes": sorted(vars(optimizer)),
        "groups": repr(groups),
    }


def _of_scaler(state: TrainState) -> dict[str, Any]:
    scaler = state.scaler
    if not scaler.is_enabled():
        return {}
    stages = [(v["stage"].name, len(v["found_inf_per_device"])) for v in scaler._per_optimizer_states.values()]
    numbers = {"scale": scaler._scale, "growth": scaler._growth_tracker}
    return {"stages": stages} | {k: None if v is None else float(v) for k, v in numbers.items()}


def _plain(state: TrainState) -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return {
        "gradients": sum(p.grad is not None for p in state.model.parameters()),
        "position": state.position,
        "updates": state.updates,
        "epochs": (state.finished_epochs, state.best),
        "rng torch": torch.get_rng_state(),
        "rng python": random.getstate(),
        "rng numpy": (name, bytes(memoryview(keys)), *rest),  # type: ignore[arg-type]
    }


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names of the facts that are not the same bits."""
    return sorted(k for k in a.keys() | b.keys() if k not in a or k not in b or not _same(a[k], b[k]))


def _same(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return type(a) is type(b) and bool(a == b)
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def storages(state: TrainState) -> set[int]:
    """Storages that may live after an update: those of the state."""
    scaler = [getattr(state.scaler, name, None) for name in ("_scale", "_growth_tracker")]
    average = [] if state.ema is None else list(state.ema.module.buffers())
    tensors = [*(v for _, v in tensors_of(state)), *average, *(t for t in scaler if t is not None)]
    return {t.untyped_storage()._cdata for t in tensors}
