"""Whether convolutions took the kernels that they take where memory is no matter: others give other last bits.

cuDNN's best kernel may want a workspace. Where there is no memory for it, torch says nothing, takes the next kernel,
and keeps to that choice for as long as the process runs. `trainer.deterministic` promises the same bits on a smaller
card.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from adaptive_trainer import oom
from adaptive_trainer.memory.usage import is_short
from adaptive_trainer.utils.kernel_choices import kept
from adaptive_trainer.utils.modes import unseen

_stale: set[torch.device] = set()  # devices with choices to displace, which outlive the work that has failed


class Kernels:
    """Watches one device.

    Args:
        device: where convolutions run.
        is_strict: they are to take the same kernels always.

    Attributes:
        is_watched: there is something to be watched.
    """

    def __init__(self, device: torch.device, *, is_strict: bool) -> None:
        self._device = device
        self.is_watched = is_strict and device.type == "cuda"
        self._before = 0
        self._has_refused = False

    def begin(self) -> None:
        """Work begins.

        Raises:
            torch.OutOfMemoryError: choices that failed work has left are still kept, and there is no memory to displace
                them.
        """
        if self.is_watched and self._device in _stale and (failure := self._displace()) is not None:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory where kernels that were chosen for lack of memory are displaced: {failure.text}"
            )
        self._before, self._has_refused = self._failures(), False

    def check(self) -> None:
        """See whether all operators of the work had memory for their kernels.

        Raises:
            torch.OutOfMemoryError: one had not, and took another kernel.
        """
        if self._failures() > self._before:
            self._has_refused = True
            raise torch.OutOfMemoryError(
                "CUDA out of memory for the workspace of an operator, which took another kernel; "
                "trainer.deterministic=true keeps to the same kernels"
            )

    def restore(self) -> None:
        """After work that has failed for lack of memory: have torch choose anew what was chosen meanwhile.

        Where even that lacks memory, it is made up for when work begins.
        """
        silent = self._failures() - self._before - (not self._has_refused)  # but for the one that was raised
        if silent > 0:
            _stale.add(self._device)
            self._displace()

    def _displace(self) -> oom.Failure | None:
        device = self._device
        failure = oom.retry(lambda: _displace(device), device, pressure=lambda: is_short(device))
        if failure is None:
            _stale.discard(device)
        return failure

    def _failures(self) -> int:
        """Allocations that have failed so far, also those that nobody was told of."""
        if not self.is_watched:
            return 0
        return int(torch.cuda.memory_stats(self._device).get("num_ooms", 0))


@unseen
def _displace(device: torch.device) -> None:
    """Displace the choices of kernels that this thread and the one of backward passes keep."""
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        weight = torch.zeros(1, 1, 1, 1, device=device, requires_grad=True)
        for width in range(1, kept() + 1):  # below 1: torch keeps none, or all, and nothing can be displaced
            images = torch.zeros(1, 1, 1, width, device=device, requires_grad=True)
            functional.conv2d(images, weight).sum().backward()  # type: ignore[no-untyped-call]
