"""Give back everything that a failed step holds, and ask whether the device still answers."""

from __future__ import annotations

import gc
import sys
from contextlib import suppress

import torch
from torch.utils._python_dispatch import _disable_current_modes

from adaptive_trainer.oom.classify import Kind, describe


def probe(device: torch.device) -> bool:
    """Whether the device still answers: wait for it, then one tiny computation. Always true on a CPU.

    A device that is merely full answers too.
    """
    if device.type == "cpu":
        return True
    try:
        torch.ones(8, device=device).sum()
        torch.accelerator.synchronize(device)  # not .item(), which torch's sync debug mode may forbid just now
        return True
    except RuntimeError as error:
        return describe(error).kind is Kind.DEVICE


def held(device: torch.device) -> int | None:
    """Bytes that tensors hold on a CUDA device, with the workspaces of cuBLAS given back; None elsewhere."""
    if device.type != "cuda":
        return None
    clear_workspaces(device)
    return torch.cuda.memory_allocated(device)


def release(device: torch.device, before: int | None = None) -> None:
    """Free what nothing refers to any more and give the caching allocator's free memory back to the driver.

    Call it after the `except` block: the error being handled keeps every frame of the failed step alive.

    Args:
        before: what was `held` before the step. Where exactly as much is held now, nothing of the step is left, and
            there is nothing to collect.
    """
    torch.clear_autocast_cache()
    # After an error autograd's queue keeps the tensors of steps that were not run, until the next backward.
    with torch.inference_mode(False), torch.enable_grad(), _disable_current_modes():
        torch.zeros((), device="cpu", requires_grad=True).backward()  # type: ignore[no-untyped-call]
    if before is None or held(device) != before:
        gc.collect()  # most of the time that all this takes: 0.1 to 0.2 s with torch and timm loaded
    if device.type == "cpu":
        return
    torch.accelerator.synchronize(device)
    clear_workspaces(device)
    with suppress(RuntimeError):  # it frees at the driver, which can fail right after an out-of-memory
        torch.accelerator.empty_cache()


def clear_workspaces(device: torch.device) -> None:
    """Free the workspaces that cuBLAS keeps for each stream, on a CUDA device."""
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None and device.type == "cuda":
        clear()


def forget_traceback() -> None:
    """Drop the last error that escaped to a prompt or a notebook cell, with the frames and tensors it holds.

    Outputs of cells (`Out[n]`, `_`) are the user's own and stay.
    """
    # IPython keeps the error in four places, and a later cell that works clears only one of them.
    for name in ("last_exc", "last_value", "last_traceback", "last_type"):
        if getattr(sys, name, None) is not None:
            setattr(sys, name, None)
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is not None:
        shell.InteractiveTB.tb = None
        if shell.last_execution_result is not None:
            shell.last_execution_result.error_in_exec = shell.last_execution_result.error_before_exec = None
