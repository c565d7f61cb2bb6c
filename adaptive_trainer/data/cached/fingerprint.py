"""When have the images of a data set changed? What a cache on disk is keyed by, or why it cannot be known."""

from __future__ import annotations

import inspect
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import TensorDataset

from adaptive_trainer.errors import ConfigError

Array = np.ndarray[Any, Any]
OWN_TRANSFORMS = ("transform", "transforms", "target_transform")
PLAIN = (str, bytes, int, float, bool, type(None))


def refuse_own_transforms(data: Any, asked: str) -> None:
    """Raise a ConfigError for a data set that changes its images itself, at random perhaps."""
    own = [name for name in OWN_TRANSFORMS if getattr(data, name, None) is not None]
    if own:
        raise ConfigError(
            f"{type(data).__name__} changes its images itself ({', '.join(own)}), and data.cache={asked} would keep "
            "one outcome for all epochs; leave it to data.transforms, or use data.cache=none"
        )


def fingerprint(data: Any, used: Array) -> Iterator[bytes]:
    """Yield what decides the images and labels of a data set: its code, and its files or its arrays.

    Args:
        used: the indices of its samples that count.

    Raises:
        ConfigError: that cannot be known.
    """
    kind, loader = type(data), getattr(data, "loader", None)
    yield f"{kind.__module__}.{kind.__qualname__}".encode()
    for code in (*kind.__mro__[:-1], loader):
        yield _source_of(code)  # another text may decode otherwise
    yield from _what_can_be_read(vars(loader) if hasattr(loader, "__dict__") else {})
    listed = getattr(data, "samples", None)
    if isinstance(listed, list) and len(listed) == len(data) and isinstance(listed[0], tuple):
        yield from _what_can_be_read({k: v for k, v in vars(data).items() if v is not listed})
        for index in used:
            path, label = listed[index]
            yield repr((os.path.abspath(path), *_state_of(path), int(label))).encode()
    elif isinstance(data, TensorDataset) or any(
        isinstance(value, Tensor | np.ndarray) and value.ndim > 2 and len(value) == len(data)
        for value in vars(data).values()
    ):  # it holds its images itself
        yield used.tobytes()
        yield from _content(sorted(vars(data).items()), kind.__name__)
    else:
        raise ConfigError(
            f"data.cache=disk cannot tell when a {kind.__name__} has changed: it has neither `samples`, a list of "
            "(file, label), nor its images in an array; use data.cache=ram"
        )


def _what_can_be_read(settings: dict[str, Any]) -> Iterator[bytes]:
    """Yield the bytes of attributes, without tallies and what is no plain data: functions, say."""
    for name, value in sorted(settings.items()):
        if not isinstance(value, Counter):  # a tally decides no image
            with suppress(ConfigError):
                yield from (name.encode(), *_content(value, ""))


def _state_of(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return -1, -1  # it is met when it is read
    return found.st_size, found.st_mtime_ns


def _source_of(code: Any) -> bytes:
    """The text of a function or class, or of an object's class, where Python can find it; else its name."""
    if isinstance(code, partial):
        given = {str(key): value for key, value in (*enumerate(code.args), *code.keywords.items())}
        functions = b"".join(_source_of(value) for value in given.values() if callable(value))
        return _source_of(code.func) + functions + b"".join(_what_can_be_read(given))
    is_code = inspect.isroutine(code) or isinstance(code, type)
    try:
        return inspect.getsource(code if is_code else type(code)).encode()
    except (OSError, TypeError):
        return str(getattr(code, "__qualname__", type(code))).encode()


def _content(value: Any, owner: str, above: frozenset[int] = frozenset()) -> Iterator[bytes]:
    """Yield the bytes of a value; for one that is within itself, a marker. What is no plain data is refused."""
    if isinstance(value, Tensor):
        value = value.numpy(force=True)
    if isinstance(value, np.ndarray) and value.dtype != object:
        yield repr((value.dtype.str, value.shape)).encode()
        yield np.ascontiguousarray(value).tobytes()
    elif isinstance(value, PLAIN) or (isinstance(value, list | tuple) and set(map(type, value)) <= set(PLAIN)):
        # a list at once: of labels, say, which can be many
        yield repr(value).encode() + b";"
    elif id(value) in above:
        yield b"itself;"
    elif isinstance(value, list | tuple | dict):
        yield repr((type(value).__name__, len(value))).encode()
        for each in value.items() if isinstance(value, dict) else value:
            yield from _content(each, owner, above | {id(value)})
    else:
        raise ConfigError(
            f"data.cache=disk cannot tell when a {owner} has changed: it holds a {type(value).__name__}; "
            "use data.cache=ram"
        )
