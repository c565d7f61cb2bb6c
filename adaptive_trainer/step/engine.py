"""Runs the updates and evaluations of one rung: whole batches by a backend, all else operator by operator beside it.

Compiled code and graphs are a luxury: where they cannot be had updates go on without, and while their memory is wanted
for something else; the reason is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from torch import Tensor, nn

from adaptive_trainer.step.backends.choose import backend
from adaptive_trainer.step.program import See
from adaptive_trainer.step.update import Update

T = TypeVar("T")


class Engine:
    """Runs the updates of one rung in training.

    Args:
        update: the transaction that runs operator by operator.
        name: one of `choose.BACKENDS`.
        batch_size: samples in a whole batch.
        event: logs what was decided, and why.
        epochs: of the whole run; None where that is not known.
    """

    def __init__(
        self, update: Update, name: str, batch_size: int, event: Callable[[str], None], epochs: int | None = None
    ) -> None:
        self.update = update
        self.batch_size = batch_size
        self.backend = backend(update, name, event)
        self.backend.epochs = epochs
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
        if self.update.agreement.whole(len(labels), samples) == self.batch_size:
            self.backend = self.backend.run(images, labels, samples)
        else:  # the last batch of an epoch
            self.backend.aside(lambda: self.update.run(images, labels, samples=samples))

    def close(self) -> None:
        """End what was begun for later updates."""
        self.backend.close()

    def evaluate(
        self, model: nn.Module, images: Tensor, labels: Tensor, see: See | None = None
    ) -> tuple[float, float, float]:
        """Evaluate one batch, as `Update.evaluate`."""
        return self.backend.aside(lambda: self.update.evaluate(model, images, labels, see))

    def beside(self, work: Callable[[], T], *, stays: bool = True) -> T:
        """Return what the work returns; where memory runs out beside a graph, once more without it.

        Args:
            stays: something on the device that the work makes is needed later. Else the graph lends it its memory.
        """
        return self.backend.beside(work, stays=stays)

    def make_room(self, phase: str) -> bool:
        """Give back memory that updates can do without, which is wanted in `phase`; whether there was any."""
        return self.backend.make_room(phase)

    def _round_rates(self) -> None:
        # To what a graph's tensor can hold, so that updates of both kinds have the same bits.
        for group in self.update.state.optimizer.param_groups:
            group["lr"] = float(np.float32(group["lr"]))
