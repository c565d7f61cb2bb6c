"""Copies of tensors that change, where they lie, and under which names modules hold them.

The buffers of copies are made once: neither taking nor restoring allocates on the device once they exist.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]
OVERLAPS = 1  # torch's word for elements that share memory
DTYPE = operator.attrgetter("dtype")


class Places:
    """Where tensors lie, and as what: storage, offset, shape, strides and dtype, each kept by a second tensor on it.

    `resize_`, `set_` and an assignment to `.data` change all of that while the tensor stays the same object.
    """

    def __init__(self, tensors: Sequence[Tensor] = ()) -> None:
        self.tensors = list(tensors)
        self.kept = [tensor.detach() for tensor in tensors]
        self._dtypes = list(map(DTYPE, tensors))

    def are_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, wherever they lie."""
        return len(tensors) == len(self.tensors) and all(map(operator.is_, tensors, self.tensors))

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, and lie there still."""
        same = self.are_of(tensors) and all(map(Tensor.is_set_to, tensors, self.kept))
        return same and list(map(DTYPE, tensors)) == self._dtypes

    def put_back(self) -> None:
        """Make every tensor what it was, on the memory that it had; what is in that memory is not looked at."""
        for tensor, kept in zip(self.tensors, self.kept, strict=True):
            if not tensor.is_set_to(kept) or tensor.dtype != kept.dtype:
                storage, needed = kept.untyped_storage(), _end(kept) * kept.element_size()
                if storage.nbytes() < needed:  # given back by `resize_` of the storage
                    storage.resize_(needed)
                tensor.data = kept.detach()


def _end(tensor: Tensor) -> int:
    """Elements of its storage up to its last one."""
    if not tensor.numel():
        return 0
    steps = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset()) + 1 + sum(steps)


def _writable(tensor: Tensor) -> Tensor:
    """The tensor; of an expanded view, which nothing can be copied to, the stretch of memory that it lies in."""
    if torch._debug_has_internal_overlap(tensor) != OVERLAPS:
        return tensor
    offset = tensor.storage_offset()
    return tensor.as_strided((_end(tensor) - offset,), (1,), offset)


class Shadow:
    """Copies of a changing list of tensors in buffers that are made once and used again.

    One kernel copies many tensors only where all are of one type on one device, hence the groups.

    Args:
        device: where the copies are; None: beside the tensors.
        can_move: a tensor may come to lie elsewhere. Looking at each takes as long as all else.
    """

    def __init__(self, device: torch.device | None, *, can_move: bool) -> None:
        self.device = device
        self.can_move = can_move
        self.places = Places()
        self.copies: list[Tensor] = []
        self.groups: list[tuple[list[Tensor], list[Tensor]]] = []

    def save(self, tensors: list[Tensor], placed: Sequence[Tensor] = ()) -> None:
        """Copy what the tensors hold; of those `placed`, keep only where they lie."""
        every = [*tensors, *placed]
        if not (self.places.hold if self.can_move else self.places.are_of)(every):
            places = Places(every)
            live = list(map(_writable, places.kept[: len(tensors)]))
            devices = [self.device or tensor.device for tensor in live]
            wanted = list(zip(map(layout, live), devices, strict=True))
            if wanted != [(layout(copy), copy.device) for copy in self.copies]:
                self.copies = [torch.empty_like(t, device=device) for t, device in zip(live, devices, strict=True)]
            self.groups, self.places = _alike(live, self.copies), places
        for live, copies in self.groups:
            torch._foreach_copy_(copies, live)

    def restore(self) -> None:
        """Put back where the tensors lay and what they held."""
        self.places.put_back()
        for live, copies in self.groups:
            torch._foreach_copy_(live, copies)

    def forget_tensors(self) -> None:
        """Keep none of the tensors alive; the copies' memory stays."""
        self.places, self.groups = Places(), []


class Bindings:
    """Which parameters and buffers modules have, by name.

    Args:
        owners: dictionaries of modules.
    """

    def __init__(self, owners: list[dict[str, Any]]) -> None:
        self.owners = owners
        self.forget_tensors()

    def forget_tensors(self) -> None:
        """Keep nothing alive."""
        self._filled: list[dict[str, Any]] = []
        self._empty = self.owners
        self._names: list[str] = []
        self._values: list[Any] = []
        self._kept: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def keep(self) -> bool:
        """Note what is bound; returns whether it is what was noted before: comparing is much faster than noting."""
        if not any(self._empty) and list(chain.from_iterable(self._filled)) == self._names:
            values = chain.from_iterable(map(dict.values, self._filled))
            if all(map(operator.is_, values, self._values)):
                return True
        self._filled = [owner for owner in self.owners if owner]
        self._empty = [owner for owner in self.owners if not owner]
        self._names = list(chain.from_iterable(self._filled))
        self._values = list(chain.from_iterable(map(dict.values, self._filled)))
        self._kept = [(owner, dict(owner)) for owner in self._filled]
        return False

    def put_back(self) -> None:
        """Bind what was bound, and nothing else."""
        for owner in self.owners:
            owner.clear()  # of what the first forward pass may have made
        for owner, tensors in self._kept:
            owner.update(tensors)


def _alike(live: list[Tensor], copies: list[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
    groups: defaultdict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for tensor, copy in zip(live, copies, strict=True):
        mine, theirs = groups[tensor.device, tensor.dtype]
        mine.append(tensor)
        theirs.append(copy)
    return list(groups.values())


def layout(tensor: Tensor) -> Layout:
    """What decides the memory that a tensor takes on a device."""
    return tensor.shape, tensor.stride(), tensor.dtype
