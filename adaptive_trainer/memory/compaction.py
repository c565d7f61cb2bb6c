"""Put tensors that stay side by side in the device's memory, so that what lies between them can be given back.

Weights and optimizer state are made while an update's large blocks are free, and are cut from these: a few bytes then
hold a whole segment. An update that runs operator by operator uses the rest of the segment; the pool of a CUDA graph
cannot.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from adaptive_trainer import oom
from adaptive_trainer.errors import DeviceUnusable
from adaptive_trainer.memory.allocator import MIN_BLOCK, SMALL_LIMIT


def compact(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Move what the tensors hold on the device close together. Each stays the object that it is, with the same values.

    Raises:
        torch.OutOfMemoryError: there is no room for a second place beside the first; nothing was moved.
        DeviceUnusable: the values have no place any more.
    """
    here = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == device.type]
    found = {storage._cdata: storage for storage in here}
    # The largest first: the gaps that are left at the ends of segments are small.
    storages = sorted((s for s in found.values() if s.resizable()), key=lambda s: s.nbytes(), reverse=True)
    sizes = [storage.nbytes() for storage in storages]
    kept = _reserved(sizes, device)
    copies = [_storage(size, torch.device("cpu")).copy_(storage) for storage, size in zip(storages, sizes, strict=True)]
    for storage in storages:
        storage.resize_(0)
    oom.release(device)  # the segments that they lay in
    # Only now, so that the new places are not in the old segments, and no other process can take their memory.
    kept.clear()
    try:
        for storage, size in zip(storages, sizes, strict=True):
            storage.resize_(size)
    except torch.OutOfMemoryError as error:
        raise DeviceUnusable(
            f"no memory for the weights, which were moved within it: {error}; go on from the last checkpoint with "
            "resume=auto"
        ) from None
    for storage, copy in zip(storages, copies, strict=True):
        storage.copy_(copy)


def _reserved(sizes: list[int], device: torch.device) -> list[torch.UntypedStorage]:
    """Memory in which blocks of these sizes have room."""
    blocks = [-(-size // MIN_BLOCK) * MIN_BLOCK for size in sizes]
    large = sum(block for block in blocks if block > SMALL_LIMIT)
    small = sum(block for block in blocks if block <= SMALL_LIMIT)
    pieces = [large] * (large > 0) + [SMALL_LIMIT] * -(-small // SMALL_LIMIT)
    return [_storage(piece, device) for piece in pieces]


def _storage(size: int, device: torch.device) -> torch.UntypedStorage:
    return torch.UntypedStorage(size, device=device)  # type: ignore[no-untyped-call]  # no tensor, which may be filled
