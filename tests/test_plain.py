"""What is known of an operator's result is what PyTorch itself finds on fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from adaptive_trainer.memory.plain import plain_result

aten = torch.ops.aten
FORMATS = [torch.contiguous_format, torch.channels_last]
TYPES = [torch.float32, torch.float16, torch.bfloat16]


def described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device, value.requires_grad
    return tuple(map(described, value)) if isinstance(value, tuple | list) else value


@st.composite
def images(draw: st.DrawFn) -> Callable[[], Tensor]:
    shape = (*draw(st.tuples(*3 * [st.integers(1, 5)])), draw(st.integers(2, 5)))
    dtype, layout = draw(st.sampled_from(TYPES)), draw(st.sampled_from(FORMATS))
    if draw(st.booleans()):
        return lambda: torch.empty(shape[1:], dtype=dtype)
    return lambda: torch.empty(shape, dtype=dtype).contiguous(memory_format=layout)


@settings(deadline=None)
@given(
    make=images(), other=images(), affine=st.booleans(), training=st.booleans(), mask=st.tuples(*3 * [st.booleans()])
)
def test_known_results_are_those_of_pytorch(
    make: Callable[[], Tensor], other: Callable[[], Tensor], affine: bool, training: bool, mask: tuple[bool, bool, bool]
) -> None:
    with FakeTensorMode():
        x = make()
        channel = torch.empty(x.shape[1])
        weight = channel if affine else None
        forward = (x, weight, weight, channel, channel, training, 0.1, 1e-5)
        compare(aten.native_batch_norm.default, forward)
        for gradient in (make(), torch.empty_like(x, memory_format=torch.contiguous_format)):
            saved = channel[: x.shape[1] if training else 0].to(x.dtype)
            backward = (gradient, x, weight, channel, channel, saved, saved, training, 1e-5, [True, *mask[1:]])
            compare(aten.native_batch_norm_backward.default, backward)
            compare(aten.silu_backward.default, (gradient, x))
        if other().shape == x.shape:
            compare(aten.silu_backward.default, (other(), x))
        assert plain_result(torch.ops.prim.device.default, (x,)) == x.device


def compare(func: Any, args: tuple[Any, ...]) -> None:
    found = plain_result(func, args)
    if found is not None:
        assert described(found) == described(func(*args)), func


@pytest.mark.parametrize("make", [lambda: torch.empty(2, 3, 4, 8)[..., ::2], lambda: torch.zeros(2, 3, 4, 4)])
def test_what_is_not_plain_is_left_to_pytorch(make: Callable[[], Tensor]) -> None:
    real = make()
    with FakeTensorMode() as mode:
        gapped = make()
        dense = torch.empty(2, 3, 4, 4)
        for x in (gapped,) if gapped.stride() != dense.stride() else (real,):
            assert plain_result(aten.silu_backward.default, (x, x)) is None
            assert plain_result(aten.silu_backward.default, (dense, x)) is None
        assert plain_result(aten.silu_backward.default, (dense, dense.half())) is None
        assert plain_result(aten.relu.default, (dense,)) is None
        found = plain_result(aten.silu_backward.default, (dense, dense))
        assert found.fake_mode is mode
