"""How much memory training may use: a real cap on a CUDA device, or a simulated device where there is none.

On CUDA the cap limits the caching allocator, so that a big device runs out of memory where a small one would. Without
CUDA, `SimulatedDevice` counts live tensor bytes and raises `torch.OutOfMemoryError` where a device of that size would.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from adaptive_trainer import oom
from adaptive_trainer.config.limit import SETTING, Limit, parse_limit
from adaptive_trainer.config.schema import DIGITS, Config
from adaptive_trainer.errors import ConfigError
from adaptive_trainer.memory import usage
from adaptive_trainer.memory.simulated import SimulatedDevice
from adaptive_trainer.memory.usage import Usage, format_bytes
from adaptive_trainer.utils.device import device_of

DEFAULT_SIMULATED = 512 * 2**20
DEMO_DATA = (DIGITS, "torchvision.datasets.FakeData")  # which show what the ladder does


@dataclass(eq=False)
class Capacity:
    """The memory that training may use on one device. `limited` makes it.

    Attributes:
        device: the device.
        bytes: the cap; None where none is set.
        description: the device and the cap, in words.
        simulated: the simulated device, where there is one.
        total: bytes of the whole device; None where that is not known.
        foreign: bytes that the caller's own tensors held on a CUDA device before.
        same_kernels: lack of memory may not change which kernels operators take, see `memory.kernels`.
        settle: called where a rung has passed its dry run; on a shared card its memory is leased, see `memory.leases`.
    """

    device: torch.device
    bytes: int | None
    description: str
    simulated: SimulatedDevice | None = None
    total: int | None = None
    foreign: int = 0
    same_kernels: bool = False
    settle: Callable[[], None] = lambda: None

    @property
    def size(self) -> int | None:
        """The cap, else all of the device; None where that is not known."""
        return self.total if self.bytes is None else self.bytes

    def device_work(self, kind: Hashable = None) -> AbstractContextManager[None]:
        """Enclose what a device would do: forward, backward, optimizer step. Data loading stays outside.

        Args:
            kind: names work whose operators and shapes are always the same: a simulated device need not count each
                repetition of it. None: it counts.

        Raises:
            ConfigError: a simulated device meets compiled code, such as the step of some optimizers.
        """
        return nullcontext() if self.simulated is None else self.simulated.work(kind)

    def usage(self) -> Usage:
        """What is used now and was used at the most, in bytes; zeros where nothing counts (a CPU with no limit)."""
        return self.simulated.usage() if self.simulated is not None else usage.snapshot(self.device)

    def peaks(self) -> tuple[int | None, int | None]:
        """Peak allocated and peak reserved bytes since the last `reset_peaks`; None where nothing counts."""
        if self.device.type != "cuda" and not usage.simulated_devices:
            return None, None
        used = self.usage()
        return used.peak_allocated, used.peak_reserved

    def reset_peaks(self) -> None:
        """Start counting peaks anew."""
        usage.reset_peaks(self.device)

    def empty_cache(self) -> None:
        """Give back what is reserved and not allocated."""
        if self.simulated is not None:
            self.simulated.empty_cache()
        elif self.device.type == "cuda":
            torch.cuda.empty_cache()

    def room(self) -> int | None:
        """Bytes that training could hold in tensors now; None where that is not known."""
        if self.device.type != "cuda":
            return self.bytes
        # What the allocator has reserved is its own to hand out again; what other processes hold is not.
        left = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)
        return (left if self.bytes is None else min(left, self.bytes)) - self.foreign

    def cap(self, nbytes: int) -> None:
        """Limit what may be used from now on; at the end of `limited` the limit is as before."""
        self.bytes = nbytes
        if self.simulated is not None:
            self.simulated.resize(nbytes)
        elif self.total is not None:
            torch.cuda.set_per_process_memory_fraction(_fraction(nbytes, self.total), self.device)

    def unreserved(self) -> int:
        """Bytes that a CUDA device's allocator could still take for this process."""
        return (self.room() or 0) + self.foreign - self.usage().reserved

    def pressure(self) -> bool:
        """As `usage.is_short`."""
        return usage.is_short(self.device)


def limit_for(config: Config, device: torch.device, *, is_own_data: bool = False) -> object:
    """`memory.limit` for a training: where it is null and there is no CUDA, a simulated device for the demo data alone.

    Args:
        is_own_data: the data is the caller's, and not what the settings name.
    """
    is_demo = not is_own_data and config.data.train.get("_target_") in DEMO_DATA
    is_open = parse_limit(config.memory.limit) == Limit()
    return "none" if device.type == "cpu" and is_open and not is_demo else config.memory.limit


def limited(device: torch.device, limit: object, name: str = SETTING) -> AbstractContextManager[Capacity]:
    """Limit what training may use of `device` while the context is open; contexts may be nested.

    Args:
        device: where training runs.
        limit: `memory.limit`, see `parse_limit`. A fraction is of the CUDA device, or of the default simulated device.
        name: what messages call it.

    Raises:
        ConfigError: the limit cannot be read, is larger than the device, or cannot be set on this kind of device.
    """
    asked = parse_limit(limit, name)
    if device.type == "cuda":
        return _on_cuda(device, asked)
    if device.type == "cpu":
        return _on_cpu(device, asked)
    if asked not in (Limit(), Limit(lifted=True)):
        raise ConfigError(f"{name}={limit!r} cannot be set on {device.type}: only CUDA and the CPU have limits")
    return nullcontext(Capacity(device, None, f"{device.type}, whose memory is neither limited nor measured"))


@contextmanager
def limit_memory(limit: str | float, *, device: str | torch.device = "auto") -> Iterator[Capacity]:
    """Limit the memory of a device for the block: a big device runs out of memory where a small one would.

        with limit_memory("6GiB", device="cuda"):
            descend(ladder, attempt)

    On a CUDA device this is a cap on PyTorch's allocator, for all of the process; the cap that there was comes back at
    the end. On the CPU the block meets a simulated device of that size: the tensors that its operators make or use are
    counted, and `torch.OutOfMemoryError` is raised where a device would raise it. Code of `torch.compile`, which is not
    made of operators, is refused.

    Args:
        limit: a size ("6GiB", "512 MB", a whole number of bytes), a fraction of the device (0.5; without CUDA, of 512
            MiB), or "none" for no limit.
        device: "auto" (the first CUDA device, else the CPU), "cpu", "cuda" or "cuda:N".

    Yields:
        The capacity. `size` is in bytes, and `peaks()` returns the most that was allocated and reserved. Hand it to
        `descend(ladder, train, meter=capacity)`, so that each attempt has its peaks.

    Raises:
        ConfigError: the limit cannot be read, is larger than the device, or there is no such device.
    """
    if limit is None or (isinstance(limit, str) and limit.strip().lower() in ("", "null")):
        raise ConfigError(f"limit_memory was given {limit!r}; write a size, such as limit_memory('6GiB'), or 'none'")
    with limited(device_of(str(device)), limit, "limit") as capacity, capacity.device_work():
        yield capacity


@contextmanager
def _on_cuda(device: torch.device, asked: Limit) -> Iterator[Capacity]:
    total = torch.cuda.get_device_properties(device).total_memory
    cap = asked.of(total)
    name = f"{device} ({torch.cuda.get_device_name(device)}, {format_bytes(total)})"
    if cap is not None and cap > total:
        raise ConfigError(f"{asked.name} is {format_bytes(cap)}, more than all of {name}; ask for less, or for none")
    before = torch.cuda.get_per_process_memory_fraction(device)
    if asked == Limit() and before < 1:
        cap = int(before * total)  # set by whoever calls, who knows better than a default
    oom.release(device, before=0)  # what the allocator has cached counts against the cap
    if cap is not None or asked.lifted:
        torch.cuda.set_per_process_memory_fraction(1.0 if cap is None else _fraction(cap, total), device)
    capped = "with no limit set" if cap is None else f"limited to {format_bytes(cap)} by {asked.name}"
    usage.reset_peaks(device)
    held = usage.snapshot(device).allocated  # by the caller: training cannot have it
    try:
        yield Capacity(device, cap, f"{name}, {capped}", total=total, foreign=held)
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


def _fraction(cap: int, total: int) -> float:
    # The allocator takes the whole number under fraction * total: half a byte more keeps it from falling short.
    return min(1.0, (cap + 0.5) / total)


@contextmanager
def _on_cpu(device: torch.device, asked: Limit) -> Iterator[Capacity]:
    if asked.lifted:
        yield Capacity(device, None, f"the CPU, with no limit on memory ({asked.name}=512MiB simulates a card)")
        return
    size = asked.of(DEFAULT_SIMULATED) or DEFAULT_SIMULATED
    text = f"a simulated card of {format_bytes(size)} (no CUDA here; {asked.name}=none lifts it)"
    simulated = SimulatedDevice(size)
    usage.simulated_devices.append(simulated)
    try:
        yield Capacity(device, size, text, simulated)
    finally:
        usage.simulated_devices.remove(simulated)
