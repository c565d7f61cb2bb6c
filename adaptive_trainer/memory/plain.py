"""What a few operators give on fake tensors, known at once.

PyTorch finds the results of BatchNorm and of SiLU's gradient by running dozens of small operators on fake tensors, and
that takes much of a process's first trace. They are plain: one tensor like the input, and a value for each channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["plain_result"]

aten = torch.ops.aten


def plain_result(func: Any, args: Sequence[Any]) -> Any:
    """What the operator gives, or None where it is not known here."""
    rule = RULES.get(func)
    return None if rule is None else rule(*args)


def _device(x: Any) -> torch.device | None:
    return x.fake_device if type(x) is FakeTensor else None


def _batch_norm(x: Any, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, *_: Any) -> Any:
    if not _are_alike(x):
        return None
    channels = x.shape[1] if training else 0  # a CPU keeps nothing of a pass without training
    return _like(x), _vector(x, channels), _vector(x, channels)


def _batch_norm_backward(gradient: Any, x: Any, weight: Any, *rest: Any) -> Any:
    if not _are_alike(x, gradient):
        return None
    wanted, like = rest[-1], x if weight is None else weight
    return _like(x), *(_vector(like, x.shape[1]) if want else None for want in wanted[1:])


def _silu_backward(gradient: Any, x: Any) -> Any:
    return _like(x) if _are_alike(x, gradient) else None


def _are_alike(x: Any, *others: Any) -> bool:
    """Whether all have no data, one type and one layout without gaps, which an elementwise result has too."""
    dense = x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
    same = all(t.dtype == x.dtype and t.stride() == x.stride() for t in others)
    return dense and same and all(type(t) is FakeTensor for t in (x, *others))


def _like(x: FakeTensor) -> FakeTensor:
    return _fake(x, lambda: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"))


def _vector(x: FakeTensor, length: int) -> FakeTensor:
    return _fake(x, lambda: torch.empty(length, dtype=x.dtype, device="meta"))


def _fake(x: FakeTensor, make: Callable[[], Tensor]) -> FakeTensor:
    with _disable_current_modes():
        return FakeTensor(x.fake_mode, make(), x.fake_device)


RULES: dict[Any, Callable[..., Any]] = {
    torch.ops.prim.device.default: _device,
    aten.native_batch_norm.default: _batch_norm,
    aten.native_batch_norm_backward.default: _batch_norm_backward,
    aten.silu_backward.default: _silu_backward,
}
