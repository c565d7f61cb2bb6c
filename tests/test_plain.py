"""What is known of an operator's result is what PyTorch itself finds on fake tensors."""

from __future__ import annotations

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

from adaptive_trainer.memory import fake
from adaptive_trainer.memory.plain import plain_result
from adaptive_trainer.memory.trace import TraceSpec, trace

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


@settings(deadline=None)
@given(
    real=images(), affine=st.booleans(), training=st.booleans(), mask=st.lists(st.booleans(), min_size=3, max_size=3)
)
def test_known_results_are_those_of_pytorch(real: Tensor, affine: bool, training: bool, mask: list[bool]) -> None:
    with FakeTensorMode() as mode:
        x, channel = mode.from_tensor(real), torch.empty(real.shape[1])
        weight = channel if affine else None
        compare(aten.native_batch_norm.default, x, weight, weight, channel, channel, training, 0.1, 1e-5)
        saved = channel[: x.shape[1] if training else 0].to(x.dtype)
        rest = (x, weight, channel, channel, saved, saved, training, 1e-5, mask)
        compare(aten.native_batch_norm_backward.default, torch.empty_like(x), *rest)
        compare(aten.silu_backward.default, torch.empty_like(x), x)
        assert plain_result(torch.ops.prim.device.default, (x,)) == x.device


def compare(func: Any, *args: Any) -> None:
    found = plain_result(func, args)
    assert found is not None
    assert described(found) == described(func(*args)), func
    tensors = [t for t in (found if isinstance(found, tuple) else (found,)) if t is not None]
    storages = {t.untyped_storage()._cdata for t in (*tensors, *(a for a in args if isinstance(a, Tensor)))}
    assert len(storages) >= len(tensors) + 1, "each has memory of its own"


@pytest.mark.parametrize("other", ["gaps", "layout", "type", "data"])
def test_what_is_not_plain_is_left_to_pytorch(other: str) -> None:
    with FakeTensorMode():
        x = torch.empty(2, 3, 4, 4)
        gaps = torch.empty(2, 3, 4, 8)[..., ::2]
        last = x.contiguous(memory_format=torch.channels_last)
    real = torch.empty(2, 3, 4, 4)
    pair = {"gaps": (gaps, gaps), "layout": (last, x), "type": (x.half(), x), "data": (real, x)}[other]
    assert plain_result(aten.silu_backward.default, pair) is None
    assert plain_result(aten.silu_backward.default, (x, x)) is not None
    assert plain_result(aten.relu.default, (x,)) is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["efficientnet_b0", "resnet18"])
def test_a_trace_is_the_same_without(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def traced() -> Any:
        spec = TraceSpec(
            lambda: timm.create_model(name, num_classes=10), lambda model: AdamW(model.parameters()), (3, 64, 64),
            (4, 2), eval_batch_size=4, precision=precision, channels_last=precision == "bf16", undo=True,
        )  # fmt: skip
        return replace(trace(spec), numbers=())  # autocast's cache of weights dies in no fixed order

    calls = set()

    def watched(func: Any, args: Any) -> Any:
        calls.add(func)
        return plain_result(func, args)

    monkeypatch.setattr(fake, "plain_result", watched)
    known = traced()
    assert aten.native_batch_norm.default in calls
    monkeypatch.setattr(fake, "plain_result", lambda func, args: None)
    assert traced() == known
