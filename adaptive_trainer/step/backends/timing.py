"""How long updates take: what two ways to run them are compared by."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

TIMED = 5  # updates of each kind that are compared


class Timed:
    """The seconds of updates of one kind."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: list[float] = []

    def __len__(self) -> int:
        """How many were timed."""
        return len(self._seconds)

    @contextmanager
    def one(self) -> Iterator[None]:
        """Time the update inside."""
        self._wait()  # what was launched before is not of this update
        started = time.perf_counter()
        yield
        self._wait()
        self._seconds.append(time.perf_counter() - started)

    @property
    def seconds(self) -> float:
        """The median."""
        return statistics.median(self._seconds)

    def is_faster(self, other: Timed) -> bool:
        """Whether these updates take less time than the others."""
        return self.seconds < other.seconds

    @property
    def text(self) -> str:
        """The median, for people."""
        return f"{1e3 * self.seconds:.1f} ms"

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
