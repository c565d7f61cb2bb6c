"""How many choices of cuDNN's kernels torch keeps: a variable of the environment, read at its first convolution."""

from __future__ import annotations

import os
import re

VARIABLE = "TORCH_CUDNN_V8_API_LRU_CACHE_LIMIT"
OURS = "1000"  # enough for a network, and few enough to be displaced in moments: see `memory.kernels`
OF_TORCH = 10_000  # where the variable is not set, or is no number


def keep_few() -> None:
    """Ask for fewer choices than torch keeps by itself, unless the user has asked for another number."""
    os.environ.setdefault(VARIABLE, OURS)


def kept() -> int:
    """Choices that each thread keeps, as torch reads the variable; 0: all, below 0: none."""
    found = re.match(r"\s*[+-]?\d+", os.environ.get(VARIABLE, ""), re.ASCII)  # what C++ takes for a number
    number = int(found[0]) if found else OF_TORCH
    return number if -(2**31) <= number < 2**31 else OF_TORCH
