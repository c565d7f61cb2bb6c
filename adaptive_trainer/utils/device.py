"""The device that settings name, and what it cannot do."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from adaptive_trainer.errors import ConfigError, explained
from adaptive_trainer.utils.launch import local_rank

# What autocast computes in, for every precision that the settings may name; None: there is no autocast.
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
FIRST_WITH_TF32 = (8, 0)  # compute capability: Ampere


def device_of(name: str) -> torch.device:
    """The device that `device=NAME` means; `auto` is the first CUDA card, else the CPU.

    Under torchrun a card without a number is that of this rank; ranks share cards where there are fewer of them.

    Raises:
        ConfigError: it does not exist.
    """
    if name == "auto":
        return torch.device("cuda", _card_of_rank()) if torch.cuda.is_available() else torch.device("cpu")
    usable = "use auto, cpu, cuda or cuda:N"
    with explained(lambda _: ConfigError(f"device={name}: there is no such device; {usable}"), (RuntimeError,)):
        device = torch.device(name)
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={name}: nothing is trained on {device.type} devices; {usable}")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ConfigError(f"device={name} was asked for and this machine has {count} CUDA cards; use device=auto")
        return torch.device("cuda", _card_of_rank() if device.index is None else device.index)
    return device


def _card_of_rank() -> int:
    return local_rank() % torch.cuda.device_count()


def name_of(device: torch.device) -> str:
    """The device for people, such as `cuda:1 (Tesla T4)`."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def capability_of(device: torch.device) -> tuple[int, int]:
    """CUDA's compute capability; (0, 0) of a device that is no CUDA one."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def precision_refusal(device: torch.device, precision: str) -> str | None:
    """Why nothing can be computed on this device in bf16 or fp16; None where it can."""
    try:
        if dtype := AUTOCAST[precision]:
            torch.autocast(device.type, dtype)  # which asks the device
    except RuntimeError as error:
        return f"{device} does not take trainer.precision={precision}: {error}"
    return None


def tf32_refusal(device: torch.device) -> str | None:
    """Why TF32 changes nothing on this device; None where it may."""
    found = capability_of(device)
    if found >= FIRST_WITH_TF32:
        return None
    name = f"{torch.cuda.get_device_name(device)}, {found[0]}.{found[1]}" if device.type == "cuda" else str(device)
    return f"TF32 needs a CUDA card of compute capability 8.0 (Ampere) or newer, and this is {name}"


@contextmanager
def synchronizing(*, is_allowed: bool) -> Iterator[None]:
    """Inside, operators that wait for a CUDA card are allowed, or raise a RuntimeError."""
    mode = 0 if is_allowed else 2  # of torch: "default", "error"
    before = torch.cuda.get_sync_debug_mode() if torch.cuda.is_initialized() else mode  # type: ignore[no-untyped-call]
    if before == mode:
        yield
        return
    _set_sync_debug_mode(mode)
    try:
        yield
    finally:
        _set_sync_debug_mode(before)


def _set_sync_debug_mode(mode: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode(mode)
