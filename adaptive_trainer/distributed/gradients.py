"""The sum of all ranks' gradients, in one flat buffer for each dtype that is made once."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adaptive_trainer.distributed.peers import Peers

NONE = -1.0  # instead of a checksum: this rank had no samples


class Gradients:
    """Sums the gradients of parameters over the ranks.

    Args:
        parameters: all that are trained, in the same order on every rank.
        peers: the ranks.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], peers: Peers) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._peers = peers
        self._buffers: list[Tensor] = []
        self._views: list[Tensor] = []
        self._weight: Tensor
        self._known: tuple[float, list[bool]] | None = None  # which parameters have gradients, and the checksum

    @property
    def tensors(self) -> list[Tensor]:
        """What stays on the device from one update to the next."""
        return [*self._buffers, *([self._weight] if self._buffers else [])]

    def prepare(self) -> float:
        """Make the buffers, so that nothing allocates after the vote; return a checksum of which gradients there are.

        Raises:
            torch.OutOfMemoryError: there is no room for them.
        """
        if not self._views:
            self._make()
        here = [parameter.grad is not None for parameter in self._parameters]
        return float(zlib.crc32(bytes(here))) if any(here) else NONE

    def settle(self, checksums: Sequence[float]) -> None:
        """Find out which parameters have a gradient on some rank.

        Args:
            checksums: of all ranks, as `prepare` has given them.
        """
        theirs = {checksum for checksum in checksums if checksum != NONE}
        if self._known is None or theirs != {self._known[0]}:  # it has changed
            mine = [parameter.grad is not None for parameter in self._parameters]
            union = [any(column) for column in zip(*self._peers.gathered(mine), strict=True)]
            self._known = (next(iter(theirs)) if len(theirs) == 1 else NONE, union)

    @torch.no_grad()
    def collect(self, weights: Sequence[Tensor]) -> None:
        """Copy this rank's gradients, and the sum of its denominators, to the buffers."""
        for buffer in (*self._buffers, self._weight):
            buffer.zero_()
        grads = [parameter.grad for parameter in self._parameters]
        pairs = [(view, grad) for view, grad in zip(self._views, grads, strict=True) if grad is not None]
        if pairs:
            torch._foreach_copy_([view for view, _ in pairs], [grad for _, grad in pairs])
        for weight in weights:
            self._weight.add_(weight.detach())

    def add(self, *, with_weights: bool) -> None:
        """Sum the buffers over the ranks; what else may fail has come to its end on all of them."""
        for buffer in self._buffers:
            self._peers.add(buffer)
        if with_weights:
            self._peers.add(self._weight)

    def hand_out(self) -> Tensor:
        """Make views of the buffers the gradients; return the sum of all denominators."""
        assert self._known is not None, "settled"
        for parameter, view, has_one in zip(self._parameters, self._views, self._known[1], strict=True):
            parameter.grad = view if has_one else None
        return self._weight

    def _make(self) -> None:
        places: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for parameter in self._parameters:
            places.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        sizes = {place: sum(parameter.numel() for parameter in group) for place, group in places.items()}
        buffers = {place: torch.zeros(size, dtype=place[0], device=place[1]) for place, size in sizes.items()}
        views: dict[int, Tensor] = {}
        for place, group in places.items():
            parts = torch.split(buffers[place], [parameter.numel() for parameter in group])
            for parameter, part in zip(group, parts, strict=True):
                views[id(parameter)] = _like(parameter, part)
        self._weight = torch.zeros((), device=self._parameters[0].device)
        # last, and all at once: memory may run out above
        self._buffers, self._views = list(buffers.values()), [views[id(parameter)] for parameter in self._parameters]


def _like(parameter: nn.Parameter, part: Tensor) -> Tensor:
    """A view of the shape of a parameter, and in its memory format, which fused steps ask for."""
    for dims, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if parameter.ndim == dims and parameter.is_contiguous(memory_format=memory_format):
            return part.as_strided(parameter.shape, parameter.stride(), part.storage_offset())
    return part.view(parameter.shape)
