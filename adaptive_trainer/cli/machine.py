"""What `task=doctor` looks at: plain facts about this machine. To look changes nothing."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

import torch

from adaptive_trainer.memory.processes import GpuProcess, processes_on
from adaptive_trainer.utils.files import default_folder

DRIVER = re.compile(r"Kernel Module\D*(?:x86_64\s+)?(\d+\.[\d.]+)")
SMI_SECONDS = 20  # a driver that hangs does not answer at all


@dataclass(frozen=True)
class Card:
    """A CUDA card.

    Attributes:
        total, free: bytes; what this process's CUDA context takes is not free.
        users: the other processes that hold memory of it, or why they are not known.
        fp16_error: see `fp16_error`.
    """

    name: str
    capability: tuple[int, int]
    total: int
    free: int
    users: list[GpuProcess] | str = field(default_factory=list)
    fp16_error: float | None = None


@dataclass(frozen=True)
class Place:
    """A folder to write to, which need not exist: free bytes of its disk, and why no file can be made; else empty."""

    path: Path
    free: int
    problem: str = ""


@dataclass(frozen=True)
class Machine:
    """The facts.

    Attributes:
        system: linux, wsl, windows, darwin.
        torch: its version.
        cuda: the version of CUDA that torch is built for; None: none.
        architectures: those that torch has kernels for, as `torch.cuda.get_arch_list` names them.
        driver: version of NVIDIA's driver, empty where it does not say; None: there is none.
        refused: why torch takes no card, in its words.
        environment: the variables of the process.
        shared: free bytes of the shared memory that workers hand batches over in; None: not a folder here.
        open_files: how many files a process may open; None: any number.
        address_space: bytes of addresses that a process may use; None: any number.
    """

    system: str
    torch: str
    cuda: str | None
    architectures: tuple[str, ...]
    driver: str | None
    card: Card | None
    output: Place
    cache: Place | None
    refused: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    shared: int | None = None
    open_files: int | None = None
    address_space: int | None = None


def observe(device: str, output_dir: Path) -> Machine:
    """The facts about this machine, for a training on that device (`cpu` looks at no card) into that folder."""
    card, refused = (None, "") if device == "cpu" else _card(int(device.partition(":")[2] or 0))
    cache, shm = default_folder(), Path("/dev/shm")
    return Machine(
        system=_system(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        architectures=tuple(torch.cuda.get_arch_list()),
        driver=driver_version(),
        card=card,
        refused=refused,
        environment=dict(os.environ),
        shared=shutil.disk_usage(shm).free if shm.is_dir() else None,
        open_files=_limit("RLIMIT_NOFILE"),
        address_space=_limit("RLIMIT_AS"),
        output=place(output_dir),
        cache=None if cache is None else place(cache),
    )


def _system() -> str:
    return "wsl" if "microsoft" in platform.release().lower() else platform.system().lower()


def driver_version() -> str | None:
    """The version of NVIDIA's driver, empty where it does not say; None where there is none."""
    with suppress(OSError):
        found = DRIVER.search(Path("/proc/driver/nvidia/version").read_text())
        return found[1] if found else ""
    program = shutil.which("nvidia-smi") or shutil.which("/usr/lib/wsl/lib/nvidia-smi")
    if program is None:
        return None
    with suppress(OSError, subprocess.SubprocessError):
        command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=True)
        return ended.stdout.partition("\n")[0].strip()
    return ""


def _card(index: int) -> tuple[Card | None, str]:
    """The card, or why torch does not take it."""
    if torch.version.cuda is None:
        return None, ""
    try:
        with warnings.catch_warnings(action="ignore"):  # of a card without kernels, for which there is a check
            device = torch.device("cuda", index)
            users = processes_on(device)  # before this process is one of them, in a container under another pid
            free, total = torch.cuda.mem_get_info(device)
            name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
            others = users if isinstance(users, str) else [each for each in users if each.pid != os.getpid()]
            return Card(name, capability, total, free, others, fp16_error(device)), ""
    except (RuntimeError, AssertionError) as error:
        return None, str(error).strip().partition("\n")[0]


def fp16_error(device: torch.device) -> float | None:
    """How far a small convolution and its gradients in fp16 are from those in fp32, as a share of the largest value.

    Returns:
        Infinity where a value is no number; None where it cannot be computed.
    """
    generator = torch.Generator().manual_seed(0)  # on the host: the same numbers everywhere
    images, weights = (torch.randn(shape, generator=generator) for shape in ((8, 32, 28, 28), (32, 32, 3, 3)))

    def computed(dtype: torch.dtype) -> list[torch.Tensor]:
        x, w = (each.to(device, dtype).requires_grad_() for each in (images, weights))
        out = torch.nn.functional.conv2d(x, w, padding=1)
        grads = torch.autograd.grad(out, (x, w), torch.full_like(out, 2**-6))
        return [each.detach().float().cpu() for each in (out, *grads)]

    try:
        pairs = zip(computed(torch.float16), computed(torch.float32), strict=True)
        errors = [float((half - exact).abs().max() / exact.abs().max()) for half, exact in pairs]
    except RuntimeError:  # no kernels, no memory
        return None
    return max(error if error == error else inf for error in errors)  # NaN is not equal to itself


def _limit(name: str) -> int | None:
    """What the shell lets a process have, see `ulimit`."""
    if sys.platform == "win32":
        return None
    import resource

    soft = resource.getrlimit(getattr(resource, name))[0]
    return None if soft == resource.RLIM_INFINITY else soft


def place(path: Path) -> Place:
    """What can be said of a folder to write to; it is not made."""
    path, free = path.expanduser().absolute(), 0
    try:
        nearest = next((each for each in (path, *path.parents) if each.exists()), Path(path.anchor))
        free = shutil.disk_usage(nearest).free
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        return Place(path, free, error.strerror or str(error))
    return Place(path, free)
