"""Fake tensors that stand in for real ones, and a recorder of every storage that is born and dies.

Under `fake_device` CPU factories give tensors without data. CPU, because without a driver PyTorch's backward refuses
fake CUDA tensors. Where the two devices would keep different tensors the CPU is made to follow CUDA: the operators that
CUDA's autocast runs in float32, and dropout, which on CUDA keeps a mask of one byte per element.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from adaptive_trainer.prediction.plain import operator_of, plain_result

aten = torch.ops.aten
DEVICE = torch.ops.prim.device.default

# Run in float32 by CUDA's autocast and left as they come by the CPU's (aten/src/ATen/autocast_mode.h, list fp32).
FLOAT32 = (
    "layer_norm", "native_layer_norm", "group_norm", "rms_norm", "softplus", "exp", "expm1", "log", "log1p", "log2",
    "log10", "logsumexp", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "reciprocal", "rsqrt", "dist",
    "cosine_similarity", "renorm", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d",
)  # fmt: skip
# The same with an output in float32 and no copy of the input (list fp32_set_opt_dtype).
FLOAT32_OUTPUT = ("sum", "sum.dim_IntList", "cumsum", "cumprod", "linalg_vector_norm", "linalg_matrix_norm")
SOFTMAX = {"softmax.int": aten._softmax, "log_softmax.int": aten._log_softmax}

GEMMS = frozenset({aten.addmm.default, aten.mm.default, aten.bmm.default, aten.baddbmm.default})
TILES = 64 * 128 * 128  # a weight gradient this large keeps tensor cores busy without being split
# Kernels that first copy what is not contiguous, and how many of their arguments that is about
# (aten/src/ATen/native/cuda/layer_norm_kernel.cu, `expect_contiguous`).
CONTIGUOUS = {aten.native_layer_norm.default: 1, aten.native_layer_norm_backward.default: 2}
CONV, CONV_BACKWARD = aten.convolution.default, aten.convolution_backward.default
SUM, ATTENTION_BACKWARD = aten.sum.dim_IntList, aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Kind:
    """What an event is. Marks stand for a workspace that an operator takes and gives back."""

    BORN = 0
    DIED = 1
    GEMM = 2  # matrix product in forward or step
    GEMM_BIAS = 3  # matrix product with a bias added, in forward or step
    GEMM_BACKWARD = 4  # matrix product in backward: on a CUDA device it runs in another thread
    CONV = 5  # convolution that needs its operands in another memory format; the size is that of all operands
    # Weight gradient of a 1x1 convolution, in float32 or in half precision, with the CONV mark of its operands next;
    # the size is that of one float32 weight gradient per sample
    SPLIT = 6
    SPLIT_HALF = 7
    SUM = 8  # a sum over the rows of values that lie side by side; the size is the number of rows
    SUMMED = 9  # the number of values in a row, right after it
    MOVED = 10  # bytes on their way to the host, where activations are offloaded


class NotFollowed(Exception):
    """The network does what is not known here; the message says what."""


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records storages as they are born and die, and marks.

    Args:
        cuda: note what a CUDA card would: marks, and no tensors that stay on the host. Else, all that a CPU holds.

    Attributes:
        kinds, numbers: per event, its `Kind` and which allocation or mark it is about, counted from 0.
        sizes, parts: per allocation or mark, its bytes and the value of `part` at its birth.
        part, in_step: set by the program that is recorded. Within the optimizer's step any number will do where one
            is asked for; a network that asks for one cannot be followed.
        seen: is told of each operator when it has run, with what it was given and what it gave.
    """

    def __init__(self, *, cuda: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cuda = cuda
        self.kinds = bytearray()
        self.numbers: list[int] = []
        self.sizes: list[int] = []
        self.parts = bytearray()
        self.part = 0
        self.in_step = False
        self.seen: Callable[[Any, Any, Any, Any], None] | None = None
        self._known: dict[int, weakref.ref[Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # torch would wrap each call, as if the network might be compiled
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and note what its outputs bring."""
        if func is DEVICE and type(args[0]) is FakeTensor:  # most of all calls: autograd asks each gradient for it
            return args[0].fake_device
        out = self._run(func, args, kwargs or {})
        if self.seen is not None:
            self.seen(func, args, kwargs or {}, out)
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is aten.mkldnn_rnn_layer.default:
            raise NotFollowed("the memory that kernels of LSTMs take is not known")
        if func is aten._local_scalar_dense.default and self.in_step:  # .item(): a step count, which is not 0
            return 1.0 if args[0].dtype.is_floating_point else 1
        out = plain_result(func, args, kwargs)
        if out is NotImplemented:
            out = func(*args, **kwargs)
        if self.cuda and (func is CONV or func is CONV_BACKWARD):
            self._convolution(func, args, out)  # which notes the results between its marks
            return out
        if self.cuda and func in GEMMS:
            self._gemm(func)
        copies = [t for t in args[: CONTIGUOUS.get(func, 0)] if self.cuda and not t.is_contiguous()]
        copied = [self._born(Kind.BORN, t.numel() * t.element_size()) for t in copies]
        # torch.tensor(3.0) is host memory, such as the step count of an optimizer
        self._see(out, on_host=self.cuda and func is aten.lift_fresh.default)
        for number in copied:
            self._event(Kind.DIED, number)
        if self.cuda and func is SUM:
            self._sum(args[0], args[1], out)
        elif self.cuda and func is ATTENTION_BACKWARD:
            self._attention_backward(args[1])
        return out

    def any_died_since(self, number: int) -> bool:
        """Whether an allocation numbered `number` or later is gone again."""
        return any(k == Kind.DIED and n >= number for k, n in zip(self.kinds, self.numbers, strict=True))

    def note_move(self, nbytes: int) -> None:
        """Note that activations go to the host."""
        self._born(Kind.MOVED, nbytes)

    def move_end(self, start: int, to: int) -> None:
        """Move the events from `start` on to index `to`: what is known late may have happened earlier."""
        for events in (self.kinds, self.numbers):
            late = events[start:]
            del events[start:]
            events[to:to] = late

    def _see(self, out: Any, *, on_host: bool = False) -> None:
        if isinstance(out, Tensor):
            self._storage(out, on_host)
        elif isinstance(out, tuple | list):
            for item in out:
                self._see(item)

    def _storage(self, tensor: Tensor, on_host: bool) -> None:
        # torch keeps one Python object per storage, alive as long as the storage is.
        storage = tensor.untyped_storage()
        identity = id(storage)
        if identity in self._known:
            return
        number = -1 if on_host else self._born(Kind.BORN, storage.nbytes())

        def died(_: Any, identity: int = identity, number: int = number) -> None:
            del self._known[identity]
            if number >= 0:
                self._event(Kind.DIED, number)

        self._known[identity] = weakref.ref(storage, died)

    def _born(self, kind: int, nbytes: int) -> int:
        number = len(self.sizes)
        self.sizes.append(nbytes)
        self.parts.append(self.part)
        self._event(kind, number)
        return number

    def _event(self, kind: int, number: int) -> None:
        self.kinds.append(kind)
        self.numbers.append(number)

    def _gemm(self, func: Any) -> None:
        in_backward = torch._C._current_graph_task_id() != -1  # asks autograd, which alone knows
        kind = Kind.GEMM_BACKWARD if in_backward else Kind.GEMM_BIAS if func is aten.addmm.default else Kind.GEMM
        self._born(kind, 0)

    def _sum(self, x: Tensor, dims: Sequence[int] | None, out: Tensor) -> None:
        # Only a sum over all but values that lie side by side takes more than next to nothing.
        reduced = {d % x.ndim for d in dims or range(x.ndim)} if x.ndim else set()
        sides = [(stride, d) for d, (stride, size) in enumerate(zip(x.stride(), x.shape, strict=True)) if size > 1]
        if sides and out.numel() and min(sides)[1] not in reduced:
            self._born(Kind.SUM, x.numel() // out.numel())
            self._born(Kind.SUMMED, out.numel())

    def _attention_backward(self, query: Tensor) -> None:
        # The query's gradient in float32 and a sum for each of its rows: what cuDNN's kernel takes on Hopper.
        self._event(Kind.DIED, self._born(Kind.BORN, 4 * query.numel() + 4 * query.numel() // query.shape[-1]))

    def _convolution(self, func: Any, args: Any, out: Any) -> None:
        forward = func is CONV
        x, weight, y = (args[0], args[1], out) if forward else (args[1], args[2], args[0])
        groups, stride = (args[8], args[3]) if forward else (args[9], args[4])
        operands = sum(t.numel() * t.element_size() for t in (x, weight, y))
        depthwise = groups > 1 and groups == x.shape[1]  # a kernel of PyTorch's own, or one without a workspace
        channels_last = x.is_contiguous(memory_format=torch.channels_last) and x.ndim == 4
        pointwise = groups == 1 and all(n == 1 for n in (*weight.shape[2:], *stride))
        # Each result has a convolution, and a workspace, of its own.
        for number, result in enumerate((out,) if forward else out):
            if not isinstance(result, Tensor):
                continue
            self._storage(result, on_host=False)
            if result.ndim == 1:
                self._sum(y, (0, *range(2, y.ndim)), result)
            if depthwise or channels_last or result.ndim == 1 or (pointwise and (forward or number == 0)):
                continue
            half = x.element_size() == 2
            # cuDNN makes one weight gradient per sample where a whole one would leave multiprocessors idle.
            if pointwise and not (half and weight.numel() >= TILES):
                self._born(Kind.SPLIT_HALF if half else Kind.SPLIT, 4 * x.shape[0] * weight.numel())
            self._born(Kind.CONV, operands)


@contextmanager
def fake_device(*, cuda: bool) -> Iterator[None]:
    """CPU tensors have no data, and follow the rules of CUDA if asked. Real tensors may be mixed in at no cost."""
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    try:
        for name, key, kernel in _kernels() if cuda else ():
            library.impl(name, kernel, key)  # type: ignore[no-untyped-call]
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        library._destroy()  # type: ignore[no-untyped-call]


@cache
def _kernels() -> list[tuple[str, str, Callable[..., Any]]]:
    on_cuda, on_cpu = (
        set(torch._C._dispatch_get_registrations_for_dispatch_key(key)) for key in ("AutocastCUDA", "AutocastCPU")
    )
    # Only where this torch has a rule for CUDA and none for the CPU: else both do the same already.
    rules = {name: _in_float32(operator_of(name)) for name in FLOAT32}
    rules |= {name: _to_float32(operator_of(name)) for name in FLOAT32_OUTPUT}
    rules |= {name: _softmax(operator_of(name), fused) for name, fused in SOFTMAX.items()}
    kernels = [(name, "AutocastCPU", rule) for name, rule in rules.items() if f"aten::{name}" in on_cuda - on_cpu]
    return [*kernels, ("dropout", "AutogradCPU", _dropout), ("scaled_dot_product_attention", "AutogradCPU", _attention)]


def _no_autocast() -> Any:
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU))


def _half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)


def _in_float32(operator: Any) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _no_autocast():
            return operator(*(a.float() if _half(a) else a for a in args), **kwargs)

    return kernel


def _to_float32(operator: Any) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        if _half(args[0]) and kwargs.get("dtype") is None:
            kwargs["dtype"] = torch.float32
        with _no_autocast():
            return operator(*args, **kwargs)

    return kernel


def _softmax(operator: Any, fused: Any) -> Callable[..., Any]:
    def kernel(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
        with _no_autocast():  # CUDA reads half precision and writes float32 in one go, without a copy of the input
            if _half(x) and dtype in (None, torch.float32):
                return fused(x, dim, True)
            return operator(x, dim, dtype)

    return kernel


def _dropout(x: Tensor, p: float, train: bool) -> Any:
    return torch.native_dropout(x, p, train)[0] if train and p and x.numel() else x


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """CUDA keeps no attention matrix where there is dropout, or a mask that learns; the CPU's own choice does."""
    grouped = query.shape[:-2] != key.shape[:-2]
    if query.ndim != 4 or grouped or query.shape[-1] != value.shape[-1]:
        out = aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )
    elif dropout_p == 0 and (attn_mask is None or not attn_mask.requires_grad):
        out = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=_additive(attn_mask, query), scale=scale
        )
    else:
        mask = _additive(attn_mask, query)
        full = None if mask is None else mask.expand(*query.shape[:-1], key.shape[-2])
        needs_gradient = any(t.requires_grad for t in (query, key, value))
        out = aten._scaled_dot_product_efficient_attention(
            query, key, value, full, needs_gradient, dropout_p, is_causal, scale=scale
        )
    return out[0]


def _additive(mask: Tensor | None, query: Tensor) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))


def materialize(model: nn.Module) -> None:
    """Replace parameters and buffers, on meta or with data, by fake ones, module by module as `model.to` does."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                made[id(tensor)] = nn.Parameter(made[id(tensor)], requires_grad=tensor.requires_grad)
        return made[id(tensor)]

    originals = []  # held, so that no two have the same id
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    originals.append(tensor)
                    tensors[name] = fake(tensor)  # type: ignore[assignment]
