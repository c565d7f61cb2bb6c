"""Work that is no part of the training, such as copies that undo it: dispatch modes do not see it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

P = ParamSpec("P")
R = TypeVar("R")


def unseen(function: Callable[P, R]) -> Callable[P, R]:
    """Hide what a function does to tensors from dispatch modes (tracers, the simulated card) and from autograd."""

    @functools.wraps(function)
    def hidden(*args: P.args, **kwargs: P.kwargs) -> R:
        # Looking first is many times faster than disabling nothing.
        modes = nullcontext() if _get_current_dispatch_mode() is None else _disable_current_modes()
        # Copies that are made in inference mode could never be written again outside of it.
        with torch.inference_mode(False), torch.no_grad(), modes:
            return function(*args, **kwargs)

    return hidden
