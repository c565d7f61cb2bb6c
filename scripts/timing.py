"""What the benchmarks share: timing, contenders in processes of their own, and tables."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import date
from typing import IO, TypeVar

import torch

T = TypeVar("T")

CUDA = torch.device("cuda", 0)
PACKAGES = ("torch", "torchvision", "timm", "accelerate", "lightning")
BLOCKS = 9


def per_update(step: Callable[[], object], updates: int, device: torch.device = CUDA) -> float:
    """Seconds of one of so many updates in a row."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(updates):
        step()
    synchronize(device)
    return (time.perf_counter() - started) / updates


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternating(blocks: Mapping[str, Callable[[], T]], count: int = BLOCKS) -> dict[str, list[T]]:
    """What each block gives, `count` times, in turn and in an order that alternates."""
    found: dict[str, list[T]] = {name: [] for name in blocks}
    for turn in range(count):
        for name in list(blocks)[:: 1 if turn % 2 else -1]:
            found[name].append(blocks[name]())
    return found


def ratio(mine: list[float], other: list[float]) -> float:
    """The median of the ratios of pairs that were measured one after the other."""
    return statistics.median(a / b for a, b in zip(mine, other, strict=True))


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(*names: str) -> Iterator[str]:
    """The head of a table."""
    yield row(*names)
    yield "|---" * len(names) + "|"


def heading(what: str, *, on_card: bool = True) -> str:
    """A line that names the device, the versions and the day."""
    if on_card and torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name(CUDA)}, {os.cpu_count()} CPU cores"
    else:
        device = f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} CPU cores"
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES if is_installed(name))
    return f"### {what}: {device}, Python {platform.python_version()}, {found}, {date.today()}"


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def need_cuda() -> None:
    """End the script where there is no card."""
    if not torch.cuda.is_available():
        raise SystemExit("this needs a real card, and there is no CUDA here")


class Contender:
    """A process that works once for every line it is sent, and answers with a line.

    Args:
        command: Python's arguments.
        noise: where what it prints beside its answers goes.
    """

    def __init__(self, command: list[str], noise: IO[str], env: dict[str, str] | None = None) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, *command], stdin=pipe, stdout=pipe, stderr=noise, text=True, env=env
        )

    def answer(self) -> str:
        """The next line; empty where the process has ended."""
        return self._process.stdout.readline() if self._process.stdout is not None else ""

    def ask(self) -> str:
        """Let it work once; its answer, empty where the process has ended."""
        with suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.write("go\n")
                self._process.stdin.flush()
            return self.answer()
        return ""

    def end(self) -> None:
        """Let it go."""
        self._process.kill()
        self._process.communicate()


def answers_to() -> IO[str]:
    """Where a contender writes its answers; what libraries print goes to the noise from here on."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers
