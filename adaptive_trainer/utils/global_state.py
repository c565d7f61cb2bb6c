"""What a run changes for the whole process, put back when it ends: random numbers and backend switches."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch

from adaptive_trainer.errors import ConfigError
from adaptive_trainer.utils.random import process_wide, put_all, states_of

_LOCK = threading.Lock()


@contextmanager
def alone_in_process() -> Iterator[None]:
    """Refuse, by a ConfigError, a second training in this process meanwhile."""
    # Both would draw from, and seed, the same random numbers.
    if not _LOCK.acquire(blocking=False):
        raise ConfigError("another training runs in this process, with the same random numbers; use a process for each")
    try:
        yield
    finally:
        _LOCK.release()


@contextmanager
def private_process_state(*, deterministic: bool, tf32: bool | None = None) -> Iterator[None]:
    """Run the block, with deterministic algorithms if asked, and undo every process-wide change afterwards.

    Args:
        tf32: whether a card may round the inputs of fp32 convolutions and matrix products to TF32 (10 bits after the
            point); None leaves that as it is.
    """
    drawn = states_of(process_wide())  # of CUDA's generators too, once they are made
    seed, had_cuda = torch.initial_seed(), torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    dtype, autocast = torch.get_default_dtype(), {kind: torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")}
    try:
        if deterministic:
            torch.use_deterministic_algorithms(True, warn_only=True)  # some operators have no such algorithm
            torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False  # a kernel chosen by its time has a workspace that nobody predicted
        # Whatever the caller has chosen, a training is the same.
        torch.set_default_dtype(torch.float32)
        for kind in autocast:
            torch.set_autocast_enabled(kind, False)
        with _tf32(tf32), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        torch.set_default_dtype(dtype)
        for kind, is_enabled in autocast.items():
            torch.set_autocast_enabled(kind, is_enabled)
        put_all(drawn)
        if not had_cuda and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(seed)  # what CUDA begins with where nothing has used it yet


@contextmanager
def _tf32(allow: bool | None) -> Iterator[None]:
    # By both of torch's interfaces: where they differ, the older cannot be read, and torch.compile reads both.
    if allow is None:
        yield
        return
    matmul, cudnn, newer = _precisions_taken()
    wanted = "tf32" if allow else "ieee"
    try:
        _put_precisions("high" if allow else "highest", allow, [newer[0], *[wanted] * (len(newer) - 1)])
        yield
    finally:
        _put_precisions(matmul, cudnn, newer)


def _precisions_taken() -> tuple[str, bool, list[str]]:
    """What fp32 products and convolutions are computed in, changed so that each can be read: put it back."""
    # The older interface raises an error while the newer has a value that the older cannot express. A setting of the
    # newer that is "none" follows a wider one, and reads as that one.
    newer, every = [], _settings()
    held = [each.fp32_precision for each in every]
    for each, holds, readable in zip(every, held, READABLE, strict=True):
        newer.append(holds if each.fp32_precision == holds else "none")  # what changes with the wider follows them
        _set(each, readable)
    return torch.get_float32_matmul_precision(), _cudnn_allows_tf32() or False, newer


def _put_precisions(matmul: str, cudnn: bool, newer: list[str]) -> None:
    # Convolutions that nobody has set are TF32 until a wider setting says otherwise. Once set, they can never be unset
    # again (torch 2.14), so only what has to change is written; the wider ones, which hide others, last.
    every = list(zip(_settings(), newer, strict=True))
    for each, _ in every[:WIDER]:
        each.fp32_precision = "none"
    torch.set_float32_matmul_precision(matmul)
    if _cudnn_allows_tf32() is not cudnn:
        torch.backends.cudnn.allow_tf32 = cudnn
    for each, precision in reversed(every):
        _set(each, precision)


WIDER = 2  # settings that others follow
READABLE = ("none", "none", "none", "none", "tf32", "tf32")  # each setting, once those before it are so, and the older


def _settings() -> list[Any]:
    """Those of the newer interface, the widest first."""
    on: Any = torch.backends
    return [on, on.cudnn, on.cuda.matmul, on.mkldnn.matmul, on.cudnn.conv, on.cudnn.rnn]


def _set(each: Any, precision: str) -> None:
    if each.fp32_precision != precision:
        each.fp32_precision = precision


def _cudnn_allows_tf32() -> bool | None:
    with suppress(RuntimeError):  # the older interface refuses where the newer says something else
        return torch.backends.cudnn.allow_tf32
    return None


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's random numbers, the GPUs' included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
