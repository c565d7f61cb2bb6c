"""What common operators give on fake tensors, known at once.

PyTorch finds the result of an operator on fake tensors by other operators, or by looking up whether it has seen the
like; a trace has thousands of them. Most are plain: a tensor like the input, a new one, a convolution.
What is not plain, by operator or by layout, is left to PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._mode_utils import no_dispatch

aten = torch.ops.aten
CPU = torch.device("cpu")


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
    """A new tensor of a given size."""
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
    """A view of a tensor, which PyTorch makes of one without data as of any other."""
    x = args[0]
    if not _is_fake(x):
        return NotImplemented
    with in_kernel_invocation_manager(x.fake_mode):
        return FakeTensor(x.fake_mode, func(*args, **kwargs), x.fake_device)


def _elementwise(_: Any, args: Sequence[Any], kwargs: Any) -> Any:
    tensors = [a for a in args if isinstance(a, Tensor)]
    return _like(args[0]) if args[0].is_floating_point() and _are_alike(*tensors) else NotImplemented


def _broadcast(_: Any, args: Sequence[Any], kwargs: Any) -> Any:
    return _like(args[0]) if _is_broadcast(args) else NotImplemented


def _is_broadcast(args: Sequence[Any]) -> bool:
    """Whether it is of a tensor and a number, or of two of which the second is repeated along the first."""
    x, y = args[:2]
    if not isinstance(x, Tensor) or isinstance(y, complex) or not x.is_floating_point() or not _are_alike(x):
        return False
    return not isinstance(y, Tensor) or _are_alike(x, y) or _are_repeated(x, y)


def _changed(_: Any, args: Sequence[Any], kwargs: Any) -> Any:
    """A tensor that was changed in place."""
    is_plain = _is_broadcast(args) if len(args) > 1 else args[0].is_floating_point() and _are_alike(args[0])
    return args[0] if is_plain else NotImplemented


def _mean(_: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x, dims, keep = args[0], args[1], len(args) > 2 and args[2]
    if kwargs or not dims or not _is_fake(x) or _layout(x) != torch.contiguous_format or not x.is_floating_point():
        return NotImplemented
    gone = {d % x.ndim for d in dims if -x.ndim <= d < x.ndim}
    if len(gone) != len(dims):
        return NotImplemented
    shape = [1 if d in gone else n for d, n in enumerate(x.shape) if keep or d not in gone]
    return _new(x, shape)


def _convolution(func: Any, args: Sequence[Any], kwargs: Any) -> Any:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = args
    layout = _layout_convolved(x, weight, bias)
    if transposed or layout is None or not len(stride) == len(padding) == len(dilation) == 2:
        return NotImplemented
    out, inner = weight.shape[:2]
    sides = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    is_sound = x.shape[1] == groups * inner and out % groups == 0 and (bias is None or bias.shape == (out,))
    if not is_sound or min(sides) < 1:
        return NotImplemented
    return _new(x, (x.shape[0], out, *sides), layout)


def _convolution_backward(_: Any, args: Sequence[Any], kwargs: Any) -> Any:
    gradient, x, weight, transposed, wanted = args[0], args[1], args[2], args[7], args[10]
    layout = _layout_convolved(x, weight, gradient)
    if transposed or layout is None:
        return NotImplemented
    results = _new(x, x.shape, layout), _new(weight, weight.shape, layout), _new(weight, weight.shape[:1])
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


def _is_fake(value: Any) -> bool:
    """Whether every tensor in it is without data, on the CPU, and with no value that is known all the same."""
    if isinstance(value, list | tuple):
        return all(map(_is_fake, value))
    if not isinstance(value, Tensor):
        return True
    return type(value) is FakeTensor and value.fake_device == CPU and value.constant is None


def _layout(x: Tensor) -> torch.memory_format | None:
    """The memory format whose strides it has, also where a side is 1 and others would do; None: neither."""
    order = range(x.ndim)
    for layout, inward in ((torch.contiguous_format, order), (torch.channels_last, (0, 2, 3, 1))):
        if (layout == torch.contiguous_format or x.ndim == 4) and _has_strides(x, inward):
            return layout
    return None


def _has_strides(x: Tensor, inward: Sequence[int]) -> bool:
    expected = 1
    for d in reversed(inward):
        if x.stride(d) != expected:
            return False
        expected *= x.shape[d]
    return expected > 0


def _are_alike(x: Any, *others: Any) -> bool:
    """Whether all have no data, one type and one layout without gaps, which an elementwise result has too."""
    dense = x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
    same = all(t.dtype == x.dtype and t.shape == x.shape and t.stride() == x.stride() for t in others)
    return bool(dense and same and x.numel()) and all(map(_is_fake, (x, *others)))


def _are_repeated(x: Any, y: Any) -> bool:
    """Whether `y` has the sides of `x`, or 1, both in the usual layout and of one type."""
    sides = x.ndim == y.ndim and all(m in (1, n) for n, m in zip(x.shape, y.shape, strict=True))
    return sides and x.dtype == y.dtype and _is_fake((x, y)) and _layout(x) == _layout(y) == torch.contiguous_format


def _layout_convolved(x: Any, weight: Any, other: Any) -> torch.memory_format | None:
    """The layout that images and weights have both, and so their convolution; None where it is not one of images."""
    fits = x.ndim == weight.ndim == 4 and x.dtype == weight.dtype and _is_fake((x, weight, other))
    layout = _layout(x)
    return layout if fits and layout == _layout(weight) else None


def _like(x: FakeTensor, dtype: torch.dtype | None = None) -> FakeTensor:
    with no_dispatch():
        made = torch.empty_strided(x.shape, x.stride(), dtype=dtype or x.dtype, device="meta")
        return FakeTensor(x.fake_mode, made, x.fake_device)


def _new(x: FakeTensor, shape: Sequence[int], layout: torch.memory_format = torch.contiguous_format) -> FakeTensor:
    with no_dispatch():
        made = torch.empty(shape, dtype=x.dtype, device="meta", memory_format=layout)
        return FakeTensor(x.fake_mode, made, x.fake_device)


def _overloads(names: str) -> list[Any]:
    packets = (name.partition(".") for name in names.split())
    return [getattr(getattr(aten, name), overload or "default") for name, _, overload in packets]


RULES: dict[Any, Callable[[Any, Sequence[Any], Mapping[str, Any]], Any]] = {
    torch.ops.prim.device.default: _device,
    aten.mean.dim: _mean,
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
    aten.native_batch_norm.default: _batch_norm,
    aten.native_batch_norm_backward.default: _batch_norm_backward,
    **dict.fromkeys(_overloads("empty.memory_format empty_strided zeros"), _made),
    **dict.fromkeys(_overloads("empty_like zeros_like ones_like"), _made_like),
    **dict.fromkeys(_overloads("detach expand permute slice.Tensor t transpose.int unsqueeze view"), _viewed),
    **dict.fromkeys(
        _overloads(
            "gelu gelu_backward hardsigmoid hardsigmoid_backward hardswish hardswish_backward relu sigmoid "
            "sigmoid_backward silu silu_backward threshold_backward"
        ),
        _elementwise,
    ),
    **dict.fromkeys(_overloads("add.Tensor div.Scalar div.Tensor mul.Scalar mul.Tensor sub.Tensor"), _broadcast),
    **dict.fromkeys(_overloads("add_.Tensor mul_.Tensor relu_ zero_"), _changed),
}
