"""Faults from outside: the N-th operator, or the N-th call of a host function, fails, or the process is killed there.

A fault is plain data with a text of its own (`operator:812:oom:1:before`), so that a failure can be repeated.
"""

from __future__ import annotations

import errno
import functools
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import adaptive_trainer

PACKAGE = str(Path(adaptive_trainer.__file__).parent)
HERE = str(Path(__file__).parent)
UNTIL_STEP_DOWN = 0  # of Fault.times

ERRORS: dict[str, Callable[[str], BaseException]] = {
    "oom": lambda at: torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate 20.00 MiB. Injected at {at}"),
    "bad_alloc": lambda at: RuntimeError("std::bad_alloc"),
    "memory": lambda at: MemoryError(f"injected at {at}"),
    "ENOMEM": lambda at: OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    "ENOSPC": lambda at: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "quoted": lambda at: ValueError(f"an image says: CUDA out of memory. Injected at {at}"),  # no lack of memory
}
# Host functions that are called by name, each with what it can really fail with.
HOST_FUNCTIONS: dict[str, tuple[str, ...]] = {
    "builtins.open": ("ENOMEM", "ENOSPC"),
    "io.open": ("ENOMEM", "ENOSPC"),
    "os.fsync": ("ENOSPC",),
    "os.replace": ("ENOMEM", "ENOSPC"),
    "os.mkdir": ("ENOSPC",),
    "torch.save": ("memory", "oom", "ENOSPC"),
    "torch.get_rng_state": ("memory", "oom"),
    "torch.empty_like": ("memory", "oom"),
    "torch.split": ("memory", "oom"),
    "random.getstate": ("memory",),
    "numpy.random.get_state": ("memory",),
    "numpy.asarray": ("memory",),
    "json.dumps": ("memory",),
    "PIL.Image.open": ("memory", "ENOMEM"),
    "PIL.Image.Image.convert": ("memory",),
    "torch.utils.data.dataloader._BaseDataLoaderIter.__next__": ("memory", "ENOMEM", "bad_alloc", "oom"),
    "torch.utils.data._utils.collate.default_collate": ("memory", "oom"),
}


@dataclass(frozen=True)
class Fault:
    """What fails, where and how.

    Attributes:
        door: `operator`, `call` (any Python call within the package or out of it), a name in `HOST_FUNCTIONS`, or
            `reading` (of a sample of the training set).
        at: number of the operator, call or sample, from 0.
        error: a name in `ERRORS`, or of a signal that this process sends itself.
        times: how many operators or calls in a row fail; `UNTIL_STEP_DOWN`: all, until an attempt is recorded.
        after: the operator has run when its memory is refused.
    """

    door: str
    at: int
    error: str
    times: int = 1
    after: bool = False

    def __str__(self) -> str:
        return f"{self.door}:{self.at}:{self.error}:{self.times}:{'after' if self.after else 'before'}"

    @classmethod
    def parse(cls, text: str) -> Fault:
        """The fault of such a text."""
        door, at, error, times, when = text.split(":")
        return cls(door, int(at), error, int(times), when == "after")


@dataclass(frozen=True)
class Site:
    """Where an operator or call is: its number, what and whence, and whether it takes new memory."""

    number: int
    where: str
    allocates: bool


@dataclass
class Injector:
    """Counts operators or calls; at the fault's it raises or kills. Without a fault it notes all sites.

    Attributes:
        attempts: the run's `attempts.jsonl`, which grows when a rung is left.
        hits: where it has struck.
        sites: all operators or calls, where there is no fault.
    """

    door: str
    fault: Fault | None = None
    attempts: Path = Path(os.devnull)
    count: int = 0
    hits: list[str] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    _process: int = field(default_factory=os.getpid)
    _length: int = -1

    def reading(self, index: int) -> None:
        """Fail when that sample is read, in a data worker too, so that strikes are counted by files."""
        fault = self.fault
        if fault is None or self.door != "reading" or index != fault.at:
            return
        for number in range(fault.times):
            with suppress(FileExistsError):
                self.attempts.with_name(f"read-{number}").touch(exist_ok=False)
                self.strike(f"sample {index}")

    @contextmanager
    def active(self) -> Iterator[Injector]:
        """Count, and strike, while the block runs."""
        if self.door == "operator":
            with _Operators(self):
                yield self
        elif self.door == "call":
            with _calls(self):
                yield self
        elif self.door in HOST_FUNCTIONS:
            with _patched(self):
                yield self
        else:  # none, or samples, which call for themselves
            yield self

    def strikes(self, *, after: bool = False) -> bool:
        """Whether what is now done, number `count`, is to fail."""
        fault = self.fault
        if fault is None or os.getpid() != self._process or self.count < fault.at:  # not in data workers
            return False
        if fault.after != after:
            return False
        if fault.times != UNTIL_STEP_DOWN:
            return len(self.hits) < fault.times
        length = self.attempts.stat().st_size if self.attempts.exists() else 0
        if self._length < 0:
            self._length = length
        return length == self._length

    def strike(self, where: str) -> None:
        """Raise the fault's error, or send its signal."""
        assert self.fault is not None
        self.hits.append(where)
        if self.fault.error in ERRORS:
            raise ERRORS[self.fault.error](f"{self.fault} {where}")
        os.kill(os.getpid(), signal.Signals[self.fault.error])

    def note(self, where: str, allocates: bool = True) -> None:
        """Keep a site, where there is no fault, and count."""
        if self.fault is None:
            self.sites.append(Site(self.count, where, allocates))
        self.count += 1


class _Operators(TorchDispatchMode):
    """Every operator of this thread and of the backward passes that it starts."""

    def __init__(self, injector: Injector) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.injector = injector

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        injector = self.injector
        if injector.strikes():
            injector.strike(f"{func} < {whence()}")
        out = func(*args, **(kwargs or {}))
        if injector.strikes(after=True):
            injector.strike(f"{func} < {whence()}")
        if injector.fault is None:
            injector.note(f"{func} < {whence()}", _takes_memory(out, (args, kwargs)))
        else:
            injector.count += 1
        return out


def _takes_memory(out: Any, given: Any) -> bool:
    old = {tensor.untyped_storage()._cdata for tensor in _tensors(given)}
    return any(tensor.untyped_storage()._cdata not in old for tensor in _tensors(out))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


@contextmanager
def _calls(injector: Injector) -> Iterator[None]:
    """Every call of this thread that is made by the package or arrives in it: Python functions and built-in ones.

    Ends of `with` blocks and finalizers are left out: what cleans up cannot be asked to survive itself.
    """

    def look(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call":
            caller = frame.f_back
            if not (_is_ours(code) or (caller is not None and _is_ours(caller.f_code))):
                return
            name = code.co_name
        elif event == "c_call" and _is_ours(code):
            name = argument.__name__
        else:
            return
        if name in ("__exit__", "__del__", "setprofile"):
            return
        if injector.strikes():
            # an error that leaves a profile function ends the profiling too
            injector.strike(f"{name}() < {whence(frame)}")
        if injector.fault is None:
            injector.note(f"{name}() < {whence(frame)}")
        else:
            injector.count += 1

    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(None)


@contextmanager
def _patched(injector: Injector) -> Iterator[None]:
    """Every call of one function that is looked up by name."""
    owner, name = _owner(injector.door)
    real = getattr(owner, name)

    @functools.wraps(real)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        if injector.strikes():
            injector.strike(f"{injector.door} < {whence()}")
        injector.note(f"{injector.door} < {whence()}")
        return real(*args, **kwargs)

    setattr(owner, name, replaced)
    try:
        yield
    finally:
        setattr(owner, name, real)


def _owner(door: str) -> tuple[Any, str]:
    """The module or class that has a function, and its name there."""
    path, _, name = door.rpartition(".")
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        return functools.reduce(getattr, parts[length:], owner), name
    raise ValueError(f"no module has {door}")


@functools.cache
def _is_ours(code: CodeType) -> bool:
    return code.co_filename.startswith(PACKAGE)


def whence(frame: FrameType | None = None, depth: int = 8) -> str:
    """The functions of package and victims that a frame is in, the innermost first."""
    frame = frame or sys._getframe(1)
    names: list[str] = []
    while frame is not None and len(names) < depth:
        code = frame.f_code
        path = code.co_filename
        if path.startswith(PACKAGE) or path.endswith(("networks.py", "cases.py")):
            names.append(f"{Path(path).stem}.{code.co_name}")
        frame = frame.f_back
    return " < ".join(names)
