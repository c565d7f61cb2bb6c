"""Which processes hold memory of a GPU, by NVML."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that holds memory of a GPU. `bytes` is None where the driver does not say (containers, Windows)."""

    pid: int
    name: str
    bytes: int | None


def processes_on(device: torch.device) -> list[GpuProcess] | str:
    """List the processes that hold memory of a CUDA device, the largest first, or say why they are not known.

    In a container the pids are the host's, and some or all processes may be missing.
    """
    try:
        import pynvml
    except ImportError:
        return "nvidia-ml-py is not installed (pip install nvidia-ml-py)"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"NVML: {error}"
    try:
        # torch.cuda.list_gpu_processes knows neither MIG nor names, and fails where the driver does not say how much.
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
        # Desktops and browsers draw, and do not compute; what does both is in both lists.
        running = {each.pid: each for each in [*_drawing(handle), *pynvml.nvmlDeviceGetComputeRunningProcesses(handle)]}
        users = [GpuProcess(pid, _name(pid), process.usedGpuMemory) for pid, process in running.items()]
    except (pynvml.NVMLError, RuntimeError, AssertionError) as error:  # torch: no such device, no driver
        return f"NVML: {error}"
    finally:
        pynvml.nvmlShutdown()  # another library's NVML goes on: it counts who has opened it
    return sorted(users, key=lambda user: -(user.bytes or 0))


def _drawing(handle: Any) -> list[Any]:
    import pynvml

    with suppress(pynvml.NVMLError):  # a card, or a slice of one, that does not draw
        return list(pynvml.nvmlDeviceGetGraphicsRunningProcesses(handle))
    return []


def _name(pid: int) -> str:
    import pynvml

    with suppress(pynvml.NVMLError):  # a container does not see the host's processes
        name = pynvml.nvmlSystemGetProcessName(pid)
        return Path(name.decode(errors="replace") if isinstance(name, bytes) else name).name
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return "unknown program"
