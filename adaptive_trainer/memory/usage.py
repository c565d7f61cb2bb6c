"""How much memory is used, and by whom: plain numbers for the trainer, lines for people.

Without a GPU they are of the simulated device that trains just now, where there is one.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol, TextIO, TypeVar, overload

import torch

from adaptive_trainer import oom
from adaptive_trainer.memory.processes import processes_on
from adaptive_trainer.utils.device import name_of

P = ParamSpec("P")
R = TypeVar("R")

SHORT = 0.8  # share of the room above which memory counts as really short


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes of a device that this process's tensors fill (`allocated`) and that its allocator holds (`reserved`).

    Peaks count since the last `reset_peaks`; `num_alloc_retries`, how often the allocator had to flush its cache to
    serve a request, since the process began.
    """

    allocated: int = 0
    reserved: int = 0
    peak_allocated: int = 0
    peak_reserved: int = 0
    num_alloc_retries: int = 0


class _Simulated(Protocol):
    """`simulated.SimulatedDevice`, whose module needs this one."""

    capacity: int

    def usage(self) -> Usage: ...
    def reset_peaks(self) -> None: ...
    def empty_cache(self) -> None: ...


simulated_devices: list[_Simulated] = []  # those in use, the innermost last; `memory.limit.limited` keeps the list


def format_bytes(n: int | None) -> str:
    """Bytes for people: `5600 MiB`; below 10 MiB in KiB, below 10 KiB in bytes; `unknown` for None."""
    if n is None:
        return "unknown"
    for unit, size in (("MiB", 2**20), ("KiB", 2**10)):
        if abs(n) >= 10 * size:
            return f"{n / size:.0f} {unit}"
    return f"{n} bytes"


def in_mib(n: int) -> str:
    """Bytes for people in MiB whatever their size, to stand beside others: `34 MiB`, `4.0 MiB`."""
    return f"{n / 2**20:.{0 if n >= 10 * 2**20 else 1}f} MiB"


def snapshot(device: torch.device) -> Usage:
    """What is used of a CUDA device, or of the simulated device in use; zeros where neither is known."""
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        return Usage(
            stats.get("allocated_bytes.all.current", 0),
            stats.get("reserved_bytes.all.current", 0),
            stats.get("allocated_bytes.all.peak", 0),
            stats.get("reserved_bytes.all.peak", 0),
            stats.get("num_alloc_retries", 0),
        )
    return simulated_devices[-1].usage() if simulated_devices else Usage()


def is_short(device: torch.device) -> bool:
    """Whether memory is really short: more than 0.8 of what this process may have is reserved.

    That is its cap, or what other processes leave of a CUDA device, or the size of the simulated device in use. False
    where nothing limits memory, and where the device is mute.
    """
    try:
        reserved = snapshot(device).reserved
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            free, total = torch.cuda.mem_get_info(index)
            room = min(free + reserved, int(torch.cuda.get_per_process_memory_fraction(index) * total))
            return reserved > SHORT * room
        return bool(simulated_devices) and reserved > SHORT * simulated_devices[-1].capacity
    except RuntimeError:  # of a device that answers nothing any more
        return False


def reset_peaks(device: torch.device) -> None:
    """Start counting a device's peaks anew; a `monitor_gpu_memory` that is under way keeps what it has seen."""
    for monitor in _monitors:  # the peak of a monitor spans resets by others
        monitor.note_peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif simulated_devices:
        simulated_devices[-1].reset_peaks()


def describe_users(device: torch.device) -> str:
    """Say who else holds memory of the device, and how much is held outside this process's allocator."""
    if device.type != "cuda":
        return "no other process uses this device's memory"
    free, total = torch.cuda.mem_get_info(device)
    outside = max(0, total - free - snapshot(device).reserved)
    text = f"{format_bytes(outside)} are held outside this process's allocator (its own CUDA context included)"
    found = processes_on(device)
    if isinstance(found, str):
        return f"{text}; by whom is not known: {found}"
    others = [f"{user.name} (pid {user.pid}): {format_bytes(user.bytes)}" for user in found if user.pid != os.getpid()]
    return f"{text}; {', '.join(others) or 'NVML names no other process (in a container it may not see them)'}"


def print_gpu_memory(file: TextIO | None = None) -> None:
    """Print, per GPU: name, total, allocated, reserved, free on the device, percentages, and who else holds memory."""
    lines = []
    for device in _devices():
        free, total = torch.cuda.mem_get_info(device)
        name = name_of(device)
        lines += [_line(name, total, snapshot(device), free), "  " + describe_users(device)]
    for each in simulated_devices:
        used = each.usage()
        lines.append(_line("simulated card", each.capacity, used, each.capacity - used.reserved))
    empty = "no CUDA GPU here and no simulated card in use: nothing to show"
    print("\n".join(lines) or empty, file=file or sys.stdout)


def _line(name: str, total: int, used: Usage, free: int) -> str:
    parts = [("allocated", used.allocated), ("reserved", used.reserved), ("free on the device", free)]
    shares = [f"{label} {format_bytes(value)} ({100 * value / total:.0f} %)" for label, value in parts]
    return f"{name}: total {format_bytes(total)}, {', '.join(shares)}"


def _devices() -> list[torch.device]:
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def clear_gpu_memory() -> int:
    """Free all device memory that nothing refers to any more, and say how much; returns the freed bytes.

    Works in a notebook after an out-of-memory escaped from a cell, with no restart of the kernel: the traceback that
    IPython keeps, and with it the failed cell's local tensors, is dropped. What the notebook's own variables and
    outputs (`model`, `Out[n]`, `_`) refer to stays.
    """
    oom.forget_traceback()
    # Asking a GPU that this process has not used yet would take some hundred MiB of it for a context.
    devices = _devices() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]

    def used() -> list[Usage]:
        return [snapshot(device) for device in devices] + [each.usage() for each in simulated_devices]

    before = used()
    for device in (torch.device("cpu"), *devices):
        oom.release(device)
    for each in simulated_devices:
        each.empty_cache()
    freed = sum(each.reserved for each in before) - sum(each.reserved for each in used())
    print(f"freed {format_bytes(freed)}; {format_bytes(sum(each.allocated for each in used()))} are still in use")
    return freed


class Monitor:
    """Measures a block of code or the calls of a function: what `monitor_gpu_memory` makes.

    Attributes:
        before, peak, after: allocated bytes at the start, at the most, and at the end of the last block or call.
    """

    def __init__(self, label: str, file: TextIO | None) -> None:
        self.label = label
        self.file = file
        self.before = self.peak = self.after = 0

    def __enter__(self) -> Monitor:
        """Start measuring."""
        is_cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if is_cuda else torch.device("cpu")
        reset_peaks(self.device)
        _monitors.append(self)
        self.before = self.peak = snapshot(self.device).allocated
        return self

    def __exit__(self, *_: object) -> None:
        """Stop measuring and print one line; an error goes on."""
        self.note_peak()
        _monitors.remove(self)
        self.after = snapshot(self.device).allocated
        values = [f"{name} {format_bytes(getattr(self, name))}" for name in ("before", "peak", "after")]
        print(f"{self.label}: {', '.join(values)}", file=self.file or sys.stdout)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorate: every call of `function` is measured."""

        @functools.wraps(function)
        def measured(*args: P.args, **kwargs: P.kwargs) -> R:
            with Monitor(self.label or getattr(function, "__qualname__", "call"), self.file):
                return function(*args, **kwargs)

        return measured

    def note_peak(self) -> None:
        """Keep the peak seen so far, before someone resets the device's own."""
        self.peak = max(self.peak, snapshot(self.device).peak_allocated)


_monitors: list[Monitor] = []


@overload
def monitor_gpu_memory(target: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def monitor_gpu_memory(target: str = "", /, *, file: TextIO | None = None) -> Monitor: ...
def monitor_gpu_memory(target: Any = "", /, *, file: TextIO | None = None) -> Any:
    """Print allocated memory before, at its peak and after: a decorator and a context manager.

        @monitor_gpu_memory
        def train(): ...

        with monitor_gpu_memory("evaluation") as seen:
            ...
        seen.peak  # bytes

    Measures the current CUDA device, or the simulated device in use. Monitors may be nested.
    """
    return Monitor("", file)(target) if callable(target) else Monitor(target, file)
