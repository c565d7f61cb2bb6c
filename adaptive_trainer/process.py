"""What a run changes for the whole process, put back when it ends: random numbers and backend switches."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import numpy as np
import torch

__all__ = ["private_process_state", "seed_everything"]

T = TypeVar("T")


@contextmanager
def private_process_state(*, deterministic: bool, tf32: bool | None = None) -> Iterator[None]:
    """Run the block with deterministic algorithms or not, and undo every process-wide change afterwards.

    Args:
        tf32: whether a card may round the inputs of fp32 convolutions and matrix products to TF32 (10 bits after the
            point); None leaves that as it is.
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed, had_cuda = torch.initial_seed(), torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if had_cuda else []
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    dtype = torch.get_default_dtype()
    if deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    try:
        with _tf32(tf32):
            yield
    finally:
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        torch.set_default_dtype(dtype)
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if had_cuda:
            torch.cuda.set_rng_state_all(cuda)
        elif torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(seed)  # what CUDA begins with where nothing has used it yet


@contextmanager
def _tf32(allow: bool | None) -> Iterator[None]:
    """By both of torch's interfaces: where they differ, the older cannot be read, and torch.compile reads both.

    The older one knows nothing of what is set by the newer alone, which is therefore put back last.
    """
    if allow is None:
        yield
        return
    matmul, cudnn, newer = _read(torch.get_float32_matmul_precision), _read(_cudnn_allows_tf32), _newer_precisions()
    try:
        torch.set_float32_matmul_precision("high" if allow else "highest")
        torch.backends.cudnn.allow_tf32 = allow
        for backend, _ in newer:
            backend.fp32_precision = "tf32" if allow else "ieee"
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if cudnn is not None:
            torch.backends.cudnn.allow_tf32 = cudnn
        for backend, precision in newer:
            backend.fp32_precision = precision


def _read(setting: Callable[[], T]) -> T | None:
    """None where the older interface refuses, because the newer has been used to set what the older cannot say."""
    with suppress(RuntimeError):
        return setting()
    return None


def _cudnn_allows_tf32() -> bool:
    return torch.backends.cudnn.allow_tf32


def _newer_precisions() -> list[tuple[Any, str]]:
    """What fp32 matrix products and convolutions are computed in: a backend's settings, and the value they have."""
    on: Any = torch.backends
    settings = [on.cuda.matmul, on.cudnn.conv, on.cudnn.rnn, on.mkldnn.matmul]
    return [(each, each.fp32_precision) for each in settings]


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's random numbers, the GPUs' included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
