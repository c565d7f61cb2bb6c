"""The forward and backward pass of a network as compiled code (`torch.compile`), for batches of one shape."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from adaptive_trainer import oom
from adaptive_trainer.errors import DeviceUnusable, OutOfMemory
from adaptive_trainer.models.savers import compile_refusal
from adaptive_trainer.step.backends.eager import Eager
from adaptive_trainer.step.backends.recorded import Recorded
from adaptive_trainer.step.program import Accumulate, Forward
from adaptive_trainer.step.update import Update

MAX_TEXT = 300  # characters of a compiler's message


class Compiled(Eager):
    """Compiles at its first batch; on a CUDA card, what was compiled is then recorded as a graph."""

    label = "compiled"

    def __init__(self, update: Update, name: str, event: Callable[[str], None]) -> None:
        super().__init__(update, name, event)
        self._forward: Forward | None = None  # held by nothing else, so that it can go
        self._is_compiled = False
        # While it compiles, any error may be the compiler's. Later another shape may be compiled for anew.
        self._expected: tuple[type[Exception], ...] = (Exception,)

    def run(self, images: Tensor, labels: Tensor, samples: int) -> Eager:
        """Make one update; where compiled code fails, once more without it."""
        if self._is_compiled:
            return super().run(images, labels, samples)
        reason = self._refusal()
        if reason:
            return self._run_uncompiled(reason, images, labels, samples)
        self.event(f"engine: compiling for batches of {len(labels)}, as trainer.engine={self.name} asks")
        started = time.perf_counter()
        self._forward = compile_forward(self.program.state.model)
        done = super().run(images, labels, samples)
        if done is not self:
            return done
        self._is_compiled, self._expected = True, (OutOfMemory, TorchDynamoException)
        self.event(f"engine: compiled, with the first update in {time.perf_counter() - started:.1f} s")
        on_cuda = self.program.device.type == "cuda"
        return Recorded(self.update, self.name, self.event, kernels=self) if on_cuda else self

    def accumulate(self, images: Tensor, labels: Tensor) -> None:
        """Make the gradients by compiled code, where there is some."""
        self.program.accumulate(images, labels, self._forward)

    def run_with(self, accumulate: Accumulate, images: Tensor, labels: Tensor, samples: int) -> Eager:
        """Make one update with gradients from this function; where that fails, once more without compiled code."""
        try:
            with nullcontext() if self._is_compiled else _warnings_ignored():
                return super().run_with(accumulate, images, labels, samples)
        except self._expected as error:
            if isinstance(error, DeviceUnusable) or oom.describe(error).kind is oom.Kind.POISONED:
                raise
            reason = _explained(error)
        return self._run_uncompiled(reason, images, labels, samples)

    def _refusal(self) -> str:
        """Why nothing is to be compiled."""
        if self.update.capacity.simulated is not None:
            return "a simulated card counts operators, which compiled code is not made of (memory.limit=none lifts it)"
        return compile_refusal(self.program.state.model)

    def _run_uncompiled(self, reason: str, images: Tensor, labels: Tensor, samples: int) -> Eager:
        self._forward = None  # what was compiled goes
        oom.release(self.program.device)
        self.event(f"engine: eager, not compiled: {reason}")
        return Eager(self.update, self.name, self.event).run(images, labels, samples)


def compile_forward(model: nn.Module) -> Forward:
    """Return a function of the images that does what `model` does, compiled when it first meets a shape.

    It is compiled whole or not at all. The model stays as it is; what was compiled goes with the function.
    """

    def forward(images: Tensor) -> Any:
        return model(images)

    forward.__code__ = forward.__code__.replace()  # torch keeps compiled code with the code object: one of its own
    compiled: Forward = torch.compile(forward, fullgraph=True, dynamic=False)
    return compiled


@contextmanager
def _warnings_ignored() -> Iterator[None]:
    """The compiler warns of its own modules, and of the TF32 that it would like."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _explained(error: Exception) -> str:
    """The first two lines of a compiler's message that say what is wrong."""
    lines = [line.strip() for line in str(error).splitlines()]
    telling = [line for line in lines if line and not line.endswith("raised:") and not line.startswith("Set TORCH")]
    return "; ".join(telling[:2])[:MAX_TEXT] or type(error).__name__
