"""Runs the updates and evaluations of one rung: whole batches by a backend, all else operator by operator beside it.

Compiled code and graphs are a luxury: where they cannot be had, or their memory is wanted for something else, updates
go on without, and the reason is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from torch import Tensor, nn

from adaptive_trainer.errors import OutOfMemory
from adaptive_trainer.step.backends.choose import BACKENDS
from adaptive_trainer.step.backends.recorded import Recorded
from adaptive_trainer.step.update import Update

T = TypeVar("T")


class Engine:
    """Runs the updates of one rung in training.

    Args:
        update: the transaction that runs operator by operator.
        name: one of `BACKENDS`.
        batch_size: samples in a whole batch.
        event: logs what was decided, and why.
    """

    def __init__(self, update: Update, name: str, batch_size: int, event: Callable[[str], None]) -> None:
        self.update = update
        self.batch_size = batch_size
        self.backend = BACKENDS[name](update, name, event)
        self._rounds = name != "eager" and update.on_cuda()

    def run(self, images: Tensor, labels: Tensor, *, samples: int) -> None:
        """Make one update, as `Update.run`.

        Raises:
            OutOfMemory: it does not fit, with nothing else held; the state is as before.
            DeviceUnusable: the device answers nothing any more.
            Exception: whatever is not about memory, unchanged.
        """
        if self._rounds:
            self._round_rates()
        if len(labels) == self.batch_size:
            self.beside_graph(lambda: self._run_whole(images, labels, samples))
        else:  # the last batch of an epoch
            self.beside_graph(lambda: self.update.run(images, labels, samples=samples))

    def evaluate(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float, float]:
        """Evaluate one batch, as `Update.evaluate`."""
        return self.beside_graph(lambda: self.update.evaluate(model, images, labels))

    def beside_graph(self, work: Callable[[], T]) -> T:
        """Return what the work returns; where memory runs out beside a graph, once more without it."""
        try:
            return work()
        except OutOfMemory as error:
            backend, reason = self.backend, f"its memory was wanted in {error.phase}"
            if not isinstance(backend, Recorded) or backend.graph is None:
                raise
        self.backend = backend.give_up(reason)  # not before: the error's frames hold tensors
        return work()

    def _run_whole(self, images: Tensor, labels: Tensor, samples: int) -> None:
        self.backend = self.backend.run(images, labels, samples)

    def _round_rates(self) -> None:
        # To what a graph's tensor can hold, so that updates of both kinds have the same bits.
        for group in self.update.state.optimizer.param_groups:
            group["lr"] = float(np.float32(group["lr"]))
