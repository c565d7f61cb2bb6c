"""When have the images of a data set changed? What a cache on disk is keyed by, or why it cannot be known."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import TensorDataset

from adaptive_trainer.errors import ConfigError

__all__ = ["fingerprint", "refuse_own_transforms"]

Array = np.ndarray[Any, Any]
OWN_TRANSFORMS = ("transform", "transforms", "target_transform")
PLAIN = (str, bytes, int, float, bool, type(None))


def refuse_own_transforms(data: Any, asked: str) -> None:
    """Refuse a data set that changes its images itself, at random perhaps: they would be kept as they come once.

    Raises:
        ConfigError: it does.
    """
    own = [name for name in OWN_TRANSFORMS if getattr(data, name, None) is not None]
    if own:
        raise ConfigError(
            f"{type(data).__name__} changes its images itself ({', '.join(own)}), and data.cache={asked} would keep "
            "one outcome for all epochs; leave it to data.transforms, or use data.cache=none"
        )


def fingerprint(data: Any, used: Array) -> Iterator[bytes]:
    """What decides the images and labels of a data set, piece by piece: its code, and its files or its arrays.

    Args:
        used: the indices of its samples that count.

    Raises:
        ConfigError: that cannot be known.
    """
    kind = type(data)
    yield f"{kind.__module__}.{kind.__qualname__}".encode()
    for code in (*kind.__mro__[:-1], getattr(data, "loader", None)):
        yield _source_of(code)
    listed = getattr(data, "samples", None)
    if isinstance(listed, list) and len(listed) == len(data) and isinstance(listed[0], tuple):
        yield repr(sorted((k, v) for k, v in vars(data).items() if isinstance(v, PLAIN))).encode()
        for index in used:
            path, label = listed[index]
            yield repr((os.path.abspath(path), *_state_of(path), int(label))).encode()
    elif _has_pixels(data):
        yield used.tobytes()
        yield from _content(sorted(vars(data).items()), kind.__name__)
    else:
        raise ConfigError(
            f"data.cache=disk cannot tell when a {kind.__name__} has changed: it has neither `samples`, a list of "
            "(file, label), nor its images in an array; use data.cache=ram"
        )


def _state_of(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _source_of(code: Any) -> bytes:
    """The text of a class or function where Python can find it, else its name."""
    try:
        return inspect.getsource(code).encode()
    except (OSError, TypeError):
        return str(getattr(code, "__qualname__", type(code))).encode()


def _has_pixels(data: Any) -> bool:
    """Whether it holds its images in an array, or is a `TensorDataset`."""
    arrays = [value for value in vars(data).values() if isinstance(value, Tensor | np.ndarray)]
    return isinstance(data, TensorDataset) or any(a.ndim > 2 and len(a) == len(data) for a in arrays)


def _content(value: Any, owner: str) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        value = value.numpy(force=True)
    if isinstance(value, np.ndarray) and value.dtype != object:
        yield repr((value.dtype.str, value.shape)).encode()
        yield np.ascontiguousarray(value).tobytes()
    elif isinstance(value, PLAIN):
        yield repr(value).encode() + b";"
    elif isinstance(value, list | tuple | dict):
        yield repr((type(value).__name__, len(value))).encode()
        for each in value.items() if isinstance(value, dict) else value:
            yield from _content(each, owner)
    else:
        raise ConfigError(
            f"data.cache=disk cannot tell when a {owner} has changed: it holds a {type(value).__name__}; "
            "use data.cache=ram"
        )
