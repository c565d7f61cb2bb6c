"""The forward and backward pass of a network as compiled code (`torch.compile`), for batches of one shape."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from adaptive_trainer import oom
from adaptive_trainer.errors import DeviceUnusable, OutOfMemory
from adaptive_trainer.step.program import Accumulate, Forward
from adaptive_trainer.step.update import Update

MAX_TEXT = 300  # characters of a compiler's message


def compile_forward(model: nn.Module) -> Forward:
    """A function of the images that does what `model` does, compiled when it first meets a shape.

    It is compiled whole or not at all. The model stays as it is; what was compiled goes with the function.
    """

    def forward(images: Tensor) -> Any:
        return model(images)

    forward.__code__ = forward.__code__.replace()  # torch keeps compiled code with the code object: one of its own
    compiled: Forward = torch.compile(forward, fullgraph=True, dynamic=False)
    return compiled


def run_compiled(
    update: Update, accumulate: Accumulate, images: Tensor, labels: Tensor, *, samples: int, is_first: bool = False
) -> str:
    """`Update.run` through compiled code; why that failed, with the state as before.

    Args:
        accumulate: makes the gradients by compiled code.
        is_first: the code is compiled on the way, which fails with any kind of error. Later only out-of-memories and
            the compiler's own errors (another shape is compiled for anew) come back as text.

    Raises:
        DeviceUnusable: the device answers nothing any more.
        Exception: what has nothing to do with compiled code, unchanged.
    """
    try:
        with _compilers_warnings_ignored() if is_first else nullcontext():
            update.run(images, labels, samples=samples, accumulate=accumulate)
    except DeviceUnusable:
        raise
    except Exception as error:
        expected = is_first or isinstance(error, OutOfMemory | TorchDynamoException)
        if not expected or oom.describe(error).kind is oom.Kind.POISONED:
            raise
        return _explained(error)
    return ""


@contextmanager
def _compilers_warnings_ignored() -> Iterator[None]:
    """It warns of its own modules, and of the TF32 that it would like."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _explained(error: Exception) -> str:
    """The first two lines of a compiler's message that say what is wrong."""
    lines = [line.strip() for line in str(error).splitlines()]
    telling = [line for line in lines if line and not line.endswith("raised:") and not line.startswith("Set TORCH")]
    return "; ".join(telling[:2])[:MAX_TEXT] or type(error).__name__
