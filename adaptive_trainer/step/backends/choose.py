"""Which backend runs the updates: the one that `trainer.engine` names, or the faster one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from adaptive_trainer.step.backends.compiled import Compiled
from adaptive_trainer.step.backends.eager import Eager
from adaptive_trainer.step.backends.recorded import Recorded
from adaptive_trainer.step.update import Update

TIMED = 5  # updates of each kind that `auto` compares


class Faster(Recorded):
    """Times eager updates and replays of a graph, and keeps the faster."""

    def __init__(self, update: Update, name: str, event: Callable[[str], None]) -> None:
        super().__init__(update, name, event)
        self._eager: list[float] = []  # seconds
        self._timed_replays: list[float] = []

    def run(self, images: Tensor, labels: Tensor, samples: int) -> Eager:
        """Make one update, timed once it is known that it can be recorded, until one kind is settled on."""
        if self.is_over or not self.is_checked or len(self._timed_replays) == TIMED:
            return super().run(images, labels, samples)
        if len(self._eager) < TIMED:
            with self._timed(self._eager):
                return self._run_kernels(images, labels, samples)
        if self.graph is None and (reason := self.record(images, labels)):
            return self.give_up(reason).run(images, labels, samples)
        if not self.is_recorded_for(images, labels):
            return self._run_kernels(images, labels, samples)  # it says nothing of replays
        with self._timed(self._timed_replays):
            done = self.replay(images, labels, samples)
        return self._settled() if done is self and len(self._timed_replays) == TIMED else done

    def _settled(self) -> Eager:
        eager, graph = (1e3 * statistics.median(seconds) for seconds in (self._eager, self._timed_replays))
        if graph < eager:
            self.announce(f"from here on, {graph:.1f} ms an update, against {eager:.1f} ms eager (auto)")
            return self
        self.drop()
        self.event(f"engine: eager, {eager:.1f} ms an update, against {graph:.1f} ms as a CUDA graph (auto)")
        return self.kernels

    @contextmanager
    def _timed(self, seconds: list[float]) -> Iterator[None]:
        torch.cuda.synchronize(self.program.device)  # what was launched before is not of this update
        started = time.perf_counter()
        yield
        torch.cuda.synchronize(self.program.device)
        seconds.append(time.perf_counter() - started)


def _auto(update: Update, name: str, event: Callable[[str], None]) -> Eager:
    return (Faster if update.on_cuda() else Eager)(update, name, event)


# A new way to run updates is a file in this folder and a line here; the settings' schema names what may be asked for.
BACKENDS: dict[str, Callable[[Update, str, Callable[[str], None]], Eager]] = {
    "eager": Eager,
    "graph": Recorded,
    "auto": _auto,
    "compile": Compiled,
}
