"""What common operators give on fake tensors, known at once.

PyTorch finds the result of an operator on fake tensors by other operators, or by looking up whether it has seen the
like. A trace has thousands of them, most of which are plain: a tensor like the input, a new one, a convolution.
What is not plain, by operator or by strides, is left to PyTorch. This halves the time of a first plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._mode_utils import no_dispatch

aten = torch.ops.aten
CPU = torch.device("cpu")
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


def plain_result(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What the operator gives, or NotImplemented where it is not known here."""
    rule = RULES.get(func)
    if rule is not None:
        return rule(func, args, kwargs)
    if func.namespace == "aten" and not func._schema.returns and all(map(_is_fake, args)):
        return None  # it has changed data, of which there is none
    return NotImplemented


def _device(_: Any, args: Sequence[Any], kwargs: Any) -> Any:
    return args[0].fake_device if type(args[0]) is FakeTensor else NotImplemented


def _made(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    mode: FakeTensorMode | None = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    if mode is None or kwargs.get("device") not in (None, CPU) or kwargs.get("pin_memory"):
        return NotImplemented
    with no_dispatch():
        return FakeTensor(mode, func(*args, **{**kwargs, "device": "meta"}), CPU)


def _made_like(_: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    kept = kwargs.get("memory_format") in (None, torch.preserve_format) and not kwargs.get("pin_memory")
    if not kept or kwargs.get("device") not in (None, CPU) or not _are_alike(args[0]):
        return NotImplemented
    return _like(args[0], kwargs.get("dtype"))


def _viewed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x = args[0]
    if not _is_fake(x):
        return NotImplemented
    with in_kernel_invocation_manager(x.fake_mode):  # PyTorch views a tensor without data as any other
        return FakeTensor(x.fake_mode, func(*args, **kwargs), x.fake_device)


def _elementwise(_: Any, args: Sequence[Any], kwargs: Any) -> Any:
    return _like(args[0]) if _is_elementwise(args) else NotImplemented


def _changed(_: Any, args: Sequence[Any], kwargs: Any) -> Any:
    return args[0] if _is_elementwise(args) else NotImplemented


def _is_elementwise(args: Sequence[Any]) -> bool:
    """Whether the result is like the first tensor: the others are numbers, like it, or repeated along it."""
    x, *others = args
    if not isinstance(x, Tensor) or not x.is_floating_point() or not _are_alike(x):
        return False
    if any(isinstance(other, complex) for other in others):
        return False
    return all(_are_alike(x, y) or _is_repeated(x, y) for y in others if isinstance(y, Tensor))


def _mean(_: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x, dims, keep = args[0], args[1], len(args) > 2 and args[2]
    if kwargs or not dims or not _is_fake(x) or _memory_format(x) != CONTIGUOUS or not x.is_floating_point():
        return NotImplemented
    gone = {d % x.ndim for d in dims if -x.ndim <= d < x.ndim}
    if len(gone) != len(dims):
        return NotImplemented
    return _new(x, [1 if d in gone else n for d, n in enumerate(x.shape) if keep or d not in gone])


def _convolution(_: Any, args: Sequence[Any], kwargs: Any) -> Any:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = args
    shared = _format_of_convolution(x, weight, bias)
    if transposed or shared is None or not len(stride) == len(padding) == len(dilation) == 2:
        return NotImplemented
    out, inner = weight.shape[:2]
    sides = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    is_sound = x.shape[1] == groups * inner and out % groups == 0 and (bias is None or bias.shape == (out,))
    if not is_sound or min(sides) < 1:
        return NotImplemented  # PyTorch knows best how to say what is wrong
    return _new(x, (x.shape[0], out, *sides), shared)


def _convolution_backward(_: Any, args: Sequence[Any], kwargs: Any) -> Any:
    gradient, x, weight, transposed, wanted = args[0], args[1], args[2], args[7], args[10]
    shared = _format_of_convolution(x, weight, gradient)
    if transposed or shared is None:
        return NotImplemented
    results = _new(x, x.shape, shared), _new(weight, weight.shape, shared), _new(weight, weight.shape[:1])
    return tuple(result if want else None for result, want in zip(results, wanted, strict=True))


def _batch_norm(_: Any, args: Sequence[Any], kwargs: Any) -> Any:
    x, training = args[0], args[5]
    if not _are_alike(x):
        return NotImplemented
    channels = x.shape[1] if training else 0  # a CPU keeps nothing of a pass without training
    return _like(x), _new(x, [channels]), _new(x, [channels])


def _batch_norm_backward(_: Any, args: Sequence[Any], kwargs: Any) -> Any:
    gradient, x, weight, wanted = args[0], args[1], args[2], args[-1]
    if not _are_alike(x, gradient):
        return NotImplemented
    of = x if weight is None else weight
    return _like(x), *(_new(of, x.shape[1:2]) if want else None for want in wanted[1:])


def _cloned(_: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x, wanted = args[0], kwargs.get("memory_format")
    if wanted == CONTIGUOUS and _is_fake(x):
        return _new(x, x.shape)
    return _like(x) if wanted in (None, torch.preserve_format) and _are_alike(x) else NotImplemented


def _joined(_: Any, args: Sequence[Any], kwargs: Any) -> Any:
    parts, dim = args[0], args[1] if len(args) > 1 else 0
    x = parts[0]
    if not _is_fake(parts) or not -x.ndim <= dim < x.ndim or (shared := _memory_format(x)) is None:
        return NotImplemented
    dim %= x.ndim
    rest = (*x.shape[:dim], *x.shape[dim + 1 :])
    for y in parts:
        if (*y.shape[:dim], *y.shape[dim + 1 :]) != rest or y.dtype != x.dtype or _memory_format(y) != shared:
            return NotImplemented
    return _new(x, (*x.shape[:dim], sum(y.shape[dim] for y in parts), *x.shape[dim + 1 :]), shared)


def _product(_: Any, args: Sequence[Any], kwargs: Any) -> Any:
    *bias, x, y = args
    fits = x.ndim == y.ndim and x.shape[:-2] == y.shape[:-2] and x.shape[-1] == y.shape[-2]
    alike = all(each.dtype == x.dtype for each in (*bias, y))
    if kwargs or not fits or not alike or not _is_fake(args) or any(each.shape != y.shape[-1:] for each in bias):
        return NotImplemented
    return _new(x, (*x.shape[:-1], y.shape[-1]))


def _layer_norm(_: Any, args: Sequence[Any], kwargs: Any) -> Any:
    x, normalized = args[0], args[1]
    if not _is_layer_norm(x, normalized, args):
        return NotImplemented
    rows = (*x.shape[: -len(normalized)], *(1 for _ in normalized))
    return _like(x), _new(x, rows), _new(x, rows)


def _layer_norm_backward(_: Any, args: Sequence[Any], kwargs: Any) -> Any:
    gradient, x, normalized, weight, bias, wanted = *args[:3], *args[5:8]
    if not _is_layer_norm(x, normalized, args) or not _are_alike(x, gradient):
        return NotImplemented
    of = (x, weight, bias)
    return tuple(_like(each) if want and each is not None else None for each, want in zip(of, wanted, strict=True))


def _is_layer_norm(x: Any, normalized: Sequence[int], args: Sequence[Any]) -> bool:
    same = x.dtype == torch.float32 and tuple(x.shape[-len(normalized) :]) == tuple(normalized)
    return same and _is_fake(args) and _memory_format(x) == CONTIGUOUS


def _softmax(_: Any, args: Sequence[Any], kwargs: Any) -> Any:
    x, *others = args
    if others[-1] not in (False, x.dtype) or not x.is_floating_point() or _memory_format(x) != CONTIGUOUS:
        return NotImplemented
    return _like(x) if _are_alike(x, *(y for y in others if isinstance(y, Tensor))) else NotImplemented


def _is_fake(value: Any) -> bool:
    """Whether every tensor in it is without data, on the CPU, and with no value that is known all the same."""
    if isinstance(value, list | tuple):
        return all(map(_is_fake, value))
    if not isinstance(value, Tensor):
        return True
    return type(value) is FakeTensor and value.fake_device == CPU and value.constant is None


def _memory_format(x: Tensor) -> torch.memory_format | None:
    """The format whose strides it has; where a side is 1, `is_contiguous` would let other strides pass."""
    for found, order in ((CONTIGUOUS, range(x.ndim)), (CHANNELS_LAST, (0, 2, 3, 1) if x.ndim == 4 else ())):
        inward = [1, *(x.shape[d] for d in order[:0:-1])]
        if order and x.numel() and [x.stride(d) for d in reversed(order)] == list(accumulate(inward, mul)):
            return found
    return None


def _are_alike(x: Any, *others: Any) -> bool:
    """Whether all have no data, one type and the same strides without gaps, which an elementwise result has too."""
    dense = x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=CHANNELS_LAST))
    same = all(t.dtype == x.dtype and t.shape == x.shape and t.stride() == x.stride() for t in others)
    return bool(dense and same and x.numel()) and all(map(_is_fake, (x, *others)))


def _is_repeated(x: Any, y: Any) -> bool:
    """Whether each side of `y` is that of `x` or 1, both contiguous and of one type."""
    sides = x.ndim == y.ndim and all(m in (1, n) for n, m in zip(x.shape, y.shape, strict=True))
    return sides and x.dtype == y.dtype and _is_fake(y) and _memory_format(x) == _memory_format(y) == CONTIGUOUS


def _format_of_convolution(x: Any, weight: Any, other: Any) -> torch.memory_format | None:
    """What images and weights have both, and so their convolution; None where it is not one of images."""
    fits = x.ndim == weight.ndim == 4 and x.dtype == weight.dtype and _is_fake((x, weight, other))
    found = _memory_format(x)
    return found if fits and found == _memory_format(weight) else None


def _like(x: FakeTensor, dtype: torch.dtype | None = None) -> FakeTensor:
    with no_dispatch():
        made = torch.empty_strided(x.shape, x.stride(), dtype=dtype or x.dtype, device="meta")
        return FakeTensor(x.fake_mode, made, x.fake_device)


def _new(x: FakeTensor, shape: Sequence[int], memory_format: torch.memory_format = CONTIGUOUS) -> FakeTensor:
    with no_dispatch():
        made = torch.empty(shape, dtype=x.dtype, device="meta", memory_format=memory_format)
        return FakeTensor(x.fake_mode, made, x.fake_device)


BY_RULE: dict[Callable[[Any, Sequence[Any], Mapping[str, Any]], Any], str] = {
    _mean: "mean.dim sum.dim_IntList",
    _cloned: "clone",
    _joined: "cat",
    _product: "addmm bmm mm",
    _layer_norm: "native_layer_norm",
    _layer_norm_backward: "native_layer_norm_backward",
    _softmax: "_softmax _softmax_backward_data",
    _convolution: "convolution",
    _convolution_backward: "convolution_backward",
    _batch_norm: "native_batch_norm",
    _batch_norm_backward: "native_batch_norm_backward",
    _made: "empty.memory_format empty_strided zeros",
    _made_like: "empty_like zeros_like ones_like",
    _viewed: "_unsafe_view detach expand permute select.int slice.Tensor squeeze.dim t transpose.int unsqueeze view",
    _elementwise: "gelu gelu_backward hardsigmoid hardsigmoid_backward hardswish hardswish_backward relu sigmoid "
    "sigmoid_backward silu silu_backward threshold_backward add.Tensor div.Scalar div.Tensor mul.Scalar mul.Tensor "
    "sub.Tensor",
    _changed: "add_.Tensor mul_.Tensor relu_ zero_",
}


def operator_of(name: str) -> Any:
    """The operator of a name such as `add.Tensor`; None where there is none."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet, None), overload or "default", None)


RULES = {torch.ops.prim.device.default: _device}
RULES |= {operator_of(name): rule for rule, names in BY_RULE.items() for name in names.split()}
