"""What is known of an operator's result is what PyTorch itself finds on fake tensors."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import AdamW

from adaptive_trainer.prediction import recorder as fake
from adaptive_trainer.prediction.plain import _memory_format, plain_result
from adaptive_trainer.prediction.recorder import Kind
from adaptive_trainer.prediction.tracer import Trace, TraceSpec, trace

aten = torch.ops.aten
FORMATS = [torch.contiguous_format, torch.channels_last]
TYPES = [torch.float32, torch.float16, torch.bfloat16]


def described(value: Any) -> Any:
    if isinstance(value, Tensor):
        memory = value.untyped_storage().nbytes(), value.storage_offset()
        return tuple(value.shape), value.stride(), value.dtype, value.device, value.requires_grad, memory
    return tuple(map(described, value)) if isinstance(value, tuple | list) else value


@st.composite
def images(draw: st.DrawFn) -> Tensor:
    """With values enough for a variance of each channel, and with one stride for each layout."""
    shape = draw(st.tuples(*4 * [st.integers(2, 5)]))
    dtype, layout = draw(st.sampled_from(TYPES)), draw(st.sampled_from(FORMATS))
    if draw(st.booleans()):
        return torch.empty(shape[1:], dtype=dtype)
    return torch.empty(shape, dtype=dtype).contiguous(memory_format=layout)


def compare(func: Any, *args: Any, **kwargs: Any) -> None:
    found, expected = plain_result(func, args, kwargs), func(*args, **kwargs)
    if found is NotImplemented:  # what lies in both formats may be taken for the other than its partner
        assert len({_memory_format(a) for a in args if isinstance(a, Tensor) and a.ndim == 4}) > 1, func
        return
    assert described(found) == described(expected), func
    assert owners(found, args) == owners(expected, args), func


def owners(value: Any, args: Any) -> Any:
    """For each tensor of the result, which of the arguments has its memory; None: its own."""
    if isinstance(value, tuple | list):
        return [owners(item, args) for item in value]
    if not isinstance(value, Tensor):
        return None
    memory = value.untyped_storage()._cdata
    return next((n for n, a in enumerate(args) if isinstance(a, Tensor) and a.untyped_storage()._cdata == memory), None)


@pytest.mark.long
@settings(deadline=None)
@given(
    real=images(), affine=st.booleans(), training=st.booleans(), mask=st.lists(st.booleans(), min_size=3, max_size=3)
)
def test_batch_norm(real: Tensor, affine: bool, training: bool, mask: list[bool]) -> None:
    with FakeTensorMode() as mode:
        x, channel = mode.from_tensor(real), torch.empty(real.shape[1])
        weight = channel if affine else None
        compare(aten.native_batch_norm.default, x, weight, weight, channel, channel, training, 0.1, 1e-5)
        saved = channel[: x.shape[1] if training else 0].to(x.dtype)
        rest = (x, weight, channel, channel, saved, saved, training, 1e-5, mask)
        compare(aten.native_batch_norm_backward.default, torch.empty_like(x), *rest)


@pytest.mark.long
@settings(deadline=None)
@given(real=images())
def test_elementwise(real: Tensor) -> None:
    with FakeTensorMode() as mode:
        x, y = mode.from_tensor(real), mode.from_tensor(real)
        for name in ("gelu", "hardsigmoid", "hardswish", "relu", "sigmoid", "silu"):
            compare(getattr(aten, name).default, x)
        for name in ("gelu", "hardsigmoid", "hardswish", "sigmoid", "silu"):
            compare(getattr(aten, f"{name}_backward").default, x, y)
        compare(aten.threshold_backward.default, x, y, 0)
        for func in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor):
            compare(func, x, y)
            compare(func, x, 2)
        for func in (aten.div.Scalar, aten.mul.Scalar):
            compare(func, x, 0.5)
        compare(aten.add.Tensor, x, y, alpha=2)
        for func in (aten.add_.Tensor, aten.mul_.Tensor):
            compare(func, x, y)
        compare(aten.relu_.default, x)
        compare(aten.zero_.default, x)
        for func in (aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default):
            compare(func, x)
            compare(func, x, dtype=torch.float64, pin_memory=False)
        assert plain_result(torch.ops.prim.device.default, (x,), {}) == x.device


@settings(deadline=None)
@given(
    shape=st.tuples(*4 * [st.integers(1, 4)]), ones=st.tuples(*4 * [st.booleans()]), keep=st.booleans(),
    dims=st.sets(st.integers(-4, 3), min_size=1),
)  # fmt: skip
def test_usual_layouts(shape: tuple[int, ...], ones: tuple[bool, ...], keep: bool, dims: set[int]) -> None:
    with FakeTensorMode():
        x = torch.empty(shape)
        y = torch.empty([1 if is_one else n for n, is_one in zip(shape, ones, strict=True)])
        compare(aten.mul.Tensor, x, y)
        compare(aten.add.Tensor, x, y)
        compare(aten.mul_.Tensor, x, y)
        dims = {d % 4 for d in dims}
        compare(aten.mean.dim, x, sorted(dims), keep)


@settings(deadline=None)
@given(
    sides=st.tuples(st.integers(5, 9), st.integers(5, 9)), kernel=st.integers(1, 3), stride=st.integers(1, 3),
    padding=st.integers(0, 2), dilation=st.integers(1, 2), depthwise=st.booleans(), bias=st.booleans(),
    samples=st.integers(1, 3), channels=st.integers(1, 4), dtype=st.sampled_from(TYPES),
    layout=st.sampled_from(FORMATS), mask=st.lists(st.booleans(), min_size=3, max_size=3),
)  # fmt: skip
def test_convolution(
    sides: tuple[int, int], kernel: int, stride: int, padding: int, dilation: int, depthwise: bool, bias: bool,
    samples: int, channels: int, dtype: torch.dtype, layout: torch.memory_format, mask: list[bool],
) -> None:  # fmt: skip
    groups, out = (channels, channels) if depthwise else (1, channels + 1)
    pairs = [stride] * 2, [padding] * 2, [dilation] * 2
    with FakeTensorMode():
        x = torch.empty(samples, channels, *sides, dtype=dtype, memory_format=layout)
        weight = torch.empty(out, channels // groups, kernel, kernel, dtype=dtype, memory_format=layout)
        b = torch.empty(out, dtype=dtype) if bias else None
        compare(aten.convolution.default, x, weight, b, *pairs, False, [0, 0], groups)
        y = aten.convolution.default(x, weight, b, *pairs, False, [0, 0], groups)
        sizes = [out] if bias else [0]
        mask = [*mask[:2], mask[2] and bias]
        compare(aten.convolution_backward.default, y, x, weight, sizes, *pairs, False, [0, 0], groups, mask)


def test_new_tensors_and_views() -> None:
    with FakeTensorMode():
        compare(aten.empty.memory_format, [2, 3])
        compare(aten.empty.memory_format, [2, 3], dtype=torch.int64, device=torch.device("cpu"), pin_memory=False)
        compare(aten.zeros.default, [])
        compare(aten.empty_strided.default, [2, 3], [1, 2], dtype=torch.float16)
        x = torch.empty(2, 3, 4)[1:]
        compare(aten.detach.default, x)
        compare(aten.expand.default, x, [5, 3, 4])
        compare(aten.permute.default, x, [2, 0, 1])
        compare(aten.slice.Tensor, x, 1, 1, 3)
        compare(aten.t.default, x[0])
        compare(aten.transpose.int, x, 0, 2)
        compare(aten.unsqueeze.default, x, 1)
        compare(aten.view.default, x, [3, 4])
        compare(aten._unsafe_view.default, x, [3, 4])
        compare(aten.select.int, x, 1, 2)
        compare(aten.squeeze.dim, x, 0)
        compare(aten.clone.default, x)
        compare(aten.clone.default, x.transpose(0, 2), memory_format=torch.contiguous_format)
        compare(aten._foreach_add_.Scalar, [x, x], 1.0)


@pytest.mark.parametrize("dtype", TYPES)
def test_products(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        x, y, bias = (torch.empty(shape, dtype=dtype) for shape in ((6, 2, 3), (6, 3, 4), (4,)))
        compare(aten.bmm.default, x, y)
        compare(aten.bmm.default, x.transpose(1, 2).contiguous().transpose(1, 2), y)
        compare(aten.mm.default, x[0], y[0])
        compare(aten.mm.default, y[0].t(), x[0].t())
        compare(aten.addmm.default, bias, x[0], y[0])
        for wrong in ((x[0], x[0]), (x[0], y), (bias[:1], x[0], y[0]), (bias.double(), x[0], y[0])):
            assert plain_result(aten.addmm.default, wrong, {}) is NotImplemented


@settings(deadline=None)
@given(real=images(), other=images(), dim=st.integers(-5, 4))
def test_joined(real: Tensor, other: Tensor, dim: int) -> None:
    with FakeTensorMode() as mode:
        x, y = mode.from_tensor(real), mode.from_tensor(other)
        assert plain_result(aten.cat.default, ([x, x], min(dim % 5, 2)), {}) is not NotImplemented
        for parts in ([x], [x, x, x], [x, y], [x, x[:, :1]]):
            if plain_result(aten.cat.default, (parts, dim), {}) is not NotImplemented:
                compare(aten.cat.default, parts, dim)


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 1, 1), (5, 4)])
def test_layer_norm_and_softmax(shape: tuple[int, ...]) -> None:
    with FakeTensorMode():
        x, weight = torch.empty(shape), torch.empty(shape[-1:])
        for affine in (weight, None):
            compare(aten.native_layer_norm.default, x, list(shape[-1:]), affine, affine, 1e-5)
            _, mean, rstd = aten.native_layer_norm.default(x, list(shape[-1:]), affine, affine, 1e-5)
            mask = [True, affine is not None, False]
            args = (x, x, list(shape[-1:]), mean, rstd, affine, affine, mask)
            compare(aten.native_layer_norm_backward.default, *args)
        compare(aten.native_layer_norm.default, x, list(shape[-2:]), None, None, 1e-5)
        compare(aten._softmax.default, x, -1, False)
        compare(aten._softmax_backward_data.default, x, x, -1, torch.float32)
        compare(aten.sum.dim_IntList, x, [0, -1], True)
        half = x.half()
        assert plain_result(aten.native_layer_norm.default, (half, list(shape[-1:]), None, None, 1e-5), {}) is (
            NotImplemented
        )
        assert plain_result(aten._softmax_backward_data.default, (x, x, -1, torch.float16), {}) is NotImplemented
        assert plain_result(aten._softmax.default, (half, -1, True), {}) is NotImplemented


@pytest.mark.parametrize("other", ["gaps", "layout", "type", "data"])
def test_what_is_not_plain_is_left_to_pytorch(other: str) -> None:
    with FakeTensorMode():
        x = torch.empty(2, 3, 4, 4)
        gaps = torch.empty(2, 3, 4, 8)[..., ::2]
        last = x.contiguous(memory_format=torch.channels_last)
    real = torch.empty(2, 3, 4, 4)
    pair = {"gaps": (gaps, gaps), "layout": (last, x), "type": (x.half(), x), "data": (real, x)}[other]
    for func in (aten.silu_backward.default, aten.mul.Tensor, aten.add_.Tensor):
        assert plain_result(func, pair, {}) is NotImplemented
        assert plain_result(func, (x, x), {}) is not NotImplemented
    assert plain_result(aten.cumsum.default, (x, 0), {}) is NotImplemented


CONVOLUTIONS = {  # weight, bias, stride, groups; of 3 channels of 6 x 6
    "too large": ((4, 3, 7, 7), None, [2, 2], 1),
    "other channels": ((4, 2, 3, 3), None, [2, 2], 1),
    "other groups": ((8, 1, 3, 3), None, [2, 2], 3),
    "other bias": ((4, 3, 3, 3), (5,), [2, 2], 1),
    "one stride": ((4, 3, 3, 3), None, [2], 1),
    "other type": ((4, 3, 3, 3), None, [2, 2], 1),
}


@pytest.mark.parametrize("what", CONVOLUTIONS)
def test_a_convolution_that_is_not_plain_is_left_to_pytorch(what: str) -> None:
    shape, of_bias, stride, groups = CONVOLUTIONS[what]
    with FakeTensorMode():
        x = torch.empty(2, 3, 6, 6)
        weight = torch.empty(shape, dtype=torch.float16 if what == "other type" else None)
        bias = None if of_bias is None else torch.empty(of_bias)
        args = (x, weight, bias, stride, [0, 0], [1, 1], False, [0, 0], groups)
        assert plain_result(aten.convolution.default, args, {}) is NotImplemented
        plain = (x, torch.empty(4, 3, 3, 3), None, [2, 2], [0, 0], [1, 1], False, [0, 0], 1)
        assert plain_result(aten.convolution.default, plain, {}) is not NotImplemented


def test_a_depthwise_convolution_is_known() -> None:
    with FakeTensorMode():
        args = (torch.empty(2, 4, 6, 6), torch.empty(4, 1, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 4)
        assert plain_result(aten.convolution.default, args, {}) is not NotImplemented


def test_arguments_that_are_not_plain_are_left_to_pytorch() -> None:
    with FakeTensorMode():
        x, scalar, empty = torch.empty(2, 3, 4), torch.empty(()), torch.empty(4, 0)
        calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
            (aten.mean.dim, (x, [1]), {"dtype": torch.float64}),
            (aten.mean.dim, (x, [1, -2]), {}),
            (aten.mean.dim, (x, [3]), {}),
            (aten.mean.dim, (scalar, [-1]), {}),
            (aten.mul.Tensor, (x, 1j), {}),
            (aten.mul.Tensor, (x, torch.empty(3, 2, 4).transpose(0, 1)), {}),
            (aten.silu_backward.default, (x, torch.empty(4, 3, 2)), {}),
            (aten.mul.Tensor, (empty.t(), -1), {}),
            (aten.empty.memory_format, ([2],), {"pin_memory": True}),
            (aten.empty_like.default, (x,), {"memory_format": torch.contiguous_format}),
        ]
        for func, args, kwargs in calls:
            assert plain_result(func, args, kwargs) is NotImplemented, (func, args, kwargs)
    assert plain_result(aten.detach.default, (torch.empty(2),), {}) is NotImplemented


def test_a_value_that_is_known_is_left_to_pytorch() -> None:
    with FakeTensorMode():
        count = torch.tensor(3.0)
        assert plain_result(aten.add_.Tensor, (count, 1), {}) is NotImplemented
        assert plain_result(aten._foreach_add_.Scalar, ([count], 1), {}) is NotImplemented
        count += 1
        assert float(count) == 4


def test_a_device_that_is_not_the_cpu_is_left_to_pytorch() -> None:
    with FakeTensorMode():
        x = torch.empty(2, device="meta")
        assert plain_result(aten.empty.memory_format, ([2],), {"device": torch.device("meta")}) is NotImplemented
        assert plain_result(aten.empty_like.default, (x,), {}) is NotImplemented
        assert plain_result(aten.relu.default, (x,), {}) is NotImplemented


def deaths_sorted(found: Trace) -> Trace:
    """With those that die in a row in order, since autocast's cache of weights dies in none that is fixed."""
    numbers: list[int] = []
    for kind, events in itertools.groupby(zip(found.kinds, found.numbers, strict=True), key=lambda event: event[0]):
        dying = [number for _, number in events]
        numbers += sorted(dying) if kind == Kind.DIED else dying
    return replace(found, numbers=tuple(numbers))


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name",
    ["test_efficientnet", "test_vit"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("mobilenetv3_small_050", "resnet18")],
)
def test_a_trace_is_the_same_without(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def traced() -> Any:
        spec = TraceSpec(
            lambda: timm.create_model(name, num_classes=10), lambda model: AdamW(model.parameters()), (3, 64, 64),
            (4, 2), eval_batch_size=4, precision=precision, channels_last=precision == "bf16", undo=True,
        )  # fmt: skip
        return deaths_sorted(trace(spec))

    calls = set()

    def watched(func: Any, args: Any, kwargs: Any) -> Any:
        found = plain_result(func, args, kwargs)
        calls.update([] if found is NotImplemented else [func])
        return found

    monkeypatch.setattr(fake, "plain_result", watched)
    known = traced()
    assert aten.detach.default in calls
    monkeypatch.setattr(fake, "plain_result", lambda *_: NotImplemented)
    assert traced() == known
