"""The forward pass of a network as graphs of operators, which this process or another one compiles.

torch finds the graphs here (Dynamo) and holds none of the network's classes in them: another process needs nothing of
the caller's to compile them, and no device. What it has compiled lies in torch's caches on the disk, where this process
finds it. So both have to ask for it with the same graph, the same settings and the same configuration of the compiler.
"""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node

from adaptive_trainer.errors import AdaptiveTrainerError
from adaptive_trainer.models.recomputing.following import suspended
from adaptive_trainer.step.program import Forward

INDUCTOR = {
    "fx_graph_cache": True,
    # Both would run kernels on the device, which the other process may not.
    "shape_padding": False,
    "joint_graph_constant_folding": False,
    # Trying out variants of each kernel takes longer, as training stands still, than it gains.
    "triton.autotune_pointwise": False,
}
# The backward pass is compiled with the forward pass, and not when it is first run.
AUTOGRAD = {"force_non_lazy_backward_lowering": True, "enable_autograd_cache": True}
PLAIN = (Tensor, nn.Parameter)


class NotCompiled(AdaptiveTrainerError):
    """A graph cannot be compiled, or was not; says why."""


@dataclass(frozen=True)
class Input:
    """A tensor that a graph takes: a weight, a buffer or the images."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str
    requires_grad: bool
    is_parameter: bool

    @classmethod
    def of(cls, value: Any) -> Input:
        """Describe a tensor.

        Raises:
            NotCompiled: it is none, or one of another kind.
        """
        if type(value) not in PLAIN:
            raise NotCompiled(f"its forward pass takes a {type(value).__name__}, and compiled are tensors")
        is_parameter = isinstance(value, nn.Parameter)
        return cls(
            tuple(value.shape), value.stride(), value.dtype, str(value.device), value.requires_grad, is_parameter
        )

    def without_data(self) -> Tensor:
        """Such a tensor, within a `FakeTensorMode`."""
        made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return nn.Parameter(made, self.requires_grad) if self.is_parameter else made.requires_grad_(self.requires_grad)


@dataclass(frozen=True)
class Autocast:
    """The state of autocast on a device."""

    kind: str
    dtype: torch.dtype
    is_enabled: bool
    caches: bool

    @classmethod
    def now(cls, kind: str) -> Autocast:
        """Read it."""
        is_enabled, caches = torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled()
        return cls(kind, torch.get_autocast_dtype(kind), is_enabled, caches)

    def entered(self) -> AbstractContextManager[Any]:
        """Inside it is so again."""
        return torch.autocast(self.kind, self.dtype, self.is_enabled, self.caches)


@dataclass(frozen=True)
class Pass:
    """The forward pass for images of one shape, as plain data."""

    graph: bytes  # a pickled GraphModule
    inputs: tuple[Input, ...]
    autocast: Autocast

    @classmethod
    def of(cls, graph: GraphModule, inputs: list[Any]) -> Pass:
        """Take it from what torch hands to a compiler.

        Raises:
            NotCompiled: it cannot be handed to another process.
        """
        described = tuple(map(Input.of, inputs))
        bare = GraphModule(graph, graph.graph)  # without notes of where in the caller's code an operator stands
        for node in bare.graph.find_nodes(op="placeholder"):
            node.type = None
        bare.recompile()
        try:
            data = pickle.dumps(bare)
        except Exception as error:  # of whatever a graph holds
            raise NotCompiled(f"its graph cannot be handed to another process ({error})") from None
        return cls(data, described, Autocast.now(torch.device(described[0].device).type))

    def compiled(self, compile_one: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """Compile it, or take what was compiled from torch's cache.

        Args:
            compile_one: is given each graph that is not in the cache, and all that inductor's `compile_fx_inner` takes.
        """
        from torch._inductor import compile_fx as inductor  # seconds of importing
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        fake, graph = FakeTensorMode(shape_env=ShapeEnv()), pickle.loads(self.graph)
        with fake:
            inputs = [each.without_data() for each in self.inputs]
            _Noted(graph).run(*inputs)
        with torch._guards.tracing(torch._guards.TracingContext(fake)), self.autocast.entered(), torch.enable_grad():
            made: Any = inductor.compile_fx(graph, inputs, inner_compile=compile_one or inductor.compile_fx_inner)
        return cast(Callable[..., Any], made)


class _Noted(Interpreter):
    """Notes with each operator what it gives, without which torch does not cache a graph."""

    def run_node(self, n: Node) -> Any:
        n.meta["example_value"] = super().run_node(n)
        return n.meta["example_value"]


@contextmanager
def configured(budget: float = 1.0) -> Iterator[None]:
    """Configure the compiler, alike in both processes.

    Args:
        budget: share of the activations that may be kept for the backward pass; the rest is recomputed.
    """
    from torch._functorch import config as autograd
    from torch._inductor import config as inductor

    with inductor.patch(INDUCTOR), autograd.patch({**AUTOGRAD, "activation_memory_budget": budget}):
        yield


def refuse_to_compile(*_: Any, **__: Any) -> Any:
    """Be what compiles where nothing is to be compiled.

    Raises:
        NotCompiled: always.
    """
    raise NotCompiled("the other process has compiled something else than is asked for here")


class Captured:
    """A network's forward pass, whose graphs are found as it first meets images of a shape.

    It is captured whole or not at all. The model stays as it is; what was captured goes with this object.

    Attributes:
        passes: the graphs that were found, one for each shape.
    """

    def __init__(self, model: nn.Module) -> None:
        self.passes: list[Pass] = []
        self._works: list[_Work] = []
        self._is_complete = False

        def forward(images: Tensor) -> Any:
            return model(images)

        forward.__code__ = forward.__code__.replace()  # torch keeps what it finds with the code object: one of its own
        self._model = model
        mine = weakref.ref(self)  # torch keeps what compiles for ever

        def take(graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            owner = mine()
            assert owner is not None, "its forward pass runs"
            return owner._take(graph, inputs)

        self._forward: Forward = torch.compile(forward, fullgraph=True, dynamic=False, backend=take)

    def forward(self, images: Tensor) -> Any:
        """Do what the model does, by the graphs that were found; by compiled code once `compile` was called."""
        with suspended(self._model):  # the compiler recomputes by its own means
            return self._forward(images)

    def compile(self, budget: float = 1.0) -> None:
        """Run compiled code from now on, which lies in torch's cache.

        Raises:
            NotCompiled: it does not.
        """
        self._is_complete = True
        with configured(budget):
            for work, each in zip(self._works, self.passes, strict=True):
                work.run = each.compiled(refuse_to_compile)

    def _take(self, graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """Be the compiler that torch hands a graph to."""
        if self._is_complete:
            raise NotCompiled("the network, or what it is given, has changed since it was compiled")
        self.passes.append(Pass.of(graph, inputs))
        work = _Work(graph)
        self._works.append(work)
        return lambda *inputs: work.run(*inputs)


@dataclass
class _Work:
    """What stands for a graph: the graph itself, operator by operator, and compiled code later."""

    run: Any


@dataclass(frozen=True)
class Settings:
    """What is set in a process and decides what its compiler makes."""

    dtype: torch.dtype
    deterministic: tuple[bool, bool, bool]
    threads: int
    precisions: tuple[str, ...]
    reduced: tuple[Any, Any]
    configs: tuple[bytes, ...]

    @classmethod
    def now(cls) -> Settings:
        """Read them."""
        matmul = torch.backends.cuda.matmul
        return cls(
            torch.get_default_dtype(),
            (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
                _deterministic().fill_uninitialized_memory,
            ),
            torch.get_num_threads(),
            tuple(each.fp32_precision for each in _with_precision()),
            (matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction),
            tuple(config.save_config() for config in _configs()),
        )

    def put(self) -> None:
        """Set them."""
        matmul = torch.backends.cuda.matmul
        torch.set_default_dtype(self.dtype)
        torch.use_deterministic_algorithms(self.deterministic[0], warn_only=self.deterministic[1])
        _deterministic().fill_uninitialized_memory = self.deterministic[2]
        torch.set_num_threads(self.threads)
        for each, precision in zip(_with_precision(), self.precisions, strict=True):
            if each.fp32_precision != precision:
                each.fp32_precision = precision
        matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction = self.reduced
        for config, saved in zip(_configs(), self.configs, strict=True):
            config.load_config(saved)


def _deterministic() -> Any:
    return torch.utils.deterministic


def _with_precision() -> list[Any]:
    on: Any = torch.backends
    return [on, on.cudnn, on.cuda.matmul, on.mkldnn.matmul, on.cudnn.conv, on.cudnn.rnn]  # the widest first


def _configs() -> list[Any]:
    from torch._functorch import config as autograd
    from torch._inductor import config as inductor

    return [inductor, autograd]
