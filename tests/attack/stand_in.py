"""A stand-in for the CUDA graphs of several ranks: does what they would do, operator by operator, on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from adaptive_trainer.step.backends import recorded
from adaptive_trainer.step.backends.cuda_graph import NoRoom
from adaptive_trainer.step.update import Update


class Graphs:
    """Takes memory when it is made, and none in a replay."""

    with_step, is_spoiled = True, False

    def __init__(self, update: Update, images: Tensor, labels: Tensor, accumulate: Any, **_: Any) -> None:
        try:
            self.images, self.labels = torch.zeros_like(images), torch.zeros_like(labels)
        except torch.OutOfMemoryError as error:
            raise NoRoom(str(error)) from None
        self.update, self.whole = update, update.program.whole
        self.counted = update.program.counted

    def lent(self) -> Any:
        return nullcontext()

    def shrink(self) -> bool:
        return False

    def suits(self, images: Tensor, labels: Tensor) -> bool:
        return images.shape == self.images.shape

    def replay(self, images: Tensor, labels: Tensor) -> None:
        agreement, program = self.update.agreement, self.update.program
        program.whole = self.whole  # as it was recorded

        def gather(weights: list[Tensor], samples: int, is_sum: bool) -> bool:
            agreement.collect(weights)
            agreement.add(with_weights=bool(self.counted[0]))
            agreement.hand_out(with_weights=bool(self.counted[0]))
            return True

        with _disable_current_modes():
            program.run(images, labels, gather=gather)
        for parameter in program.parameters:
            parameter.grad = None


@contextmanager
def stood_in() -> Iterator[None]:
    """Inside, `trainer.engine=graph` records on a CPU."""
    with (
        patch.object(recorded, "Graph", Graphs),
        patch.object(recorded, "refusal", lambda program: ""),
        patch.object(recorded, "step_refusal", lambda program: ""),
        patch.object(recorded, "synchronizing_refused", nullcontext),
    ):
        yield
