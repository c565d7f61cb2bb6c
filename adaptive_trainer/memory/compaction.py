"""Put tensors that stay side by side in the device's memory, so that what lies between them can be given back.

Weights and optimizer state are made while an update's large blocks are free, and are cut from these: a few bytes then
hold a whole segment. An update that runs operator by operator uses the rest of the segment; the pool of a CUDA graph
cannot.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from adaptive_trainer import oom
from adaptive_trainer.errors import DeviceUnusable
from adaptive_trainer.memory.allocator import MIN_BLOCK, SMALL_LIMIT, SMALL_SEGMENT, segment_for
from adaptive_trainer.utils.device import synchronizing


def compact(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Move what the tensors hold on the device close together. Each stays the object that it is, with the same values.

    Raises:
        torch.OutOfMemoryError: there is no room for a second place beside the first; what was not moved yet stays.
        DeviceUnusable: the values have no place any more.
    """
    here = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == device.type]
    found = {storage._cdata: storage for storage in here}
    # The largest first: the gaps that are left at the ends of segments are small.
    storages = sorted((s for s in found.values() if s.resizable()), key=lambda s: s.nbytes(), reverse=True)
    # Segments of the large may take all the memory there is, and are given back before the small ones want any.
    with synchronizing(is_allowed=True):  # it may be a part of recovery in an update that is about to be recorded
        _move([storage for storage in storages if _rounded(storage.nbytes()) > SMALL_LIMIT], device)
        _move([storage for storage in storages if _rounded(storage.nbytes()) <= SMALL_LIMIT], device)


def _move(storages: list[torch.UntypedStorage], device: torch.device) -> None:
    sizes = [storage.nbytes() for storage in storages]
    kept = _reserved(sizes, device)
    copies = [_storage(size, torch.device("cpu")).copy_(storage) for storage, size in zip(storages, sizes, strict=True)]
    for storage in storages:
        storage.resize_(0)
    oom.release(device)  # the segments that they lay in
    try:
        if _hold_more(kept, device):  # they were cut from what is to be given back
            kept.clear()
            torch.accelerator.empty_cache()
            kept += _reserved(sizes, device)
        _place(storages, sizes, kept, device)
    except torch.OutOfMemoryError as error:
        raise DeviceUnusable(
            f"no memory for the weights, which were moved within it: {error}; go on from the last checkpoint with "
            "resume=auto"
        ) from None
    for storage, copy in zip(storages, copies, strict=True):
        storage.copy_(copy)


def _place(
    storages: list[torch.UntypedStorage], sizes: list[int], kept: list[torch.UntypedStorage], device: torch.device
) -> None:
    """Give storages memory of these sizes: in gaps beside what could not be moved, else where `kept` is."""
    gaps, rest = _gaps(device), list[tuple[torch.UntypedStorage, int]]()
    for storage, size in zip(storages, sizes, strict=True):
        if _fills(gaps, size):  # as the allocator will, as long as `kept` is not free
            storage.resize_(size)
        else:
            rest.append((storage, size))
    if len(rest) < len(storages):
        with suppress(torch.OutOfMemoryError):  # then more than is needed stays
            kept[:] = _reserved([size for _, size in rest], device)
        torch.accelerator.empty_cache()  # or what is left of either would be taken for a gap
    kept.clear()  # only now: meanwhile another process could have taken its memory
    for storage, size in rest:
        storage.resize_(size)


def _gaps(device: torch.device) -> dict[bool, list[int]]:
    """Bytes of free blocks beside others, by whether they are large."""
    gaps: dict[bool, list[int]] = {True: [], False: []}
    for segment in _segments(device):
        free = [block["size"] for block in segment["blocks"] if block["state"] == "inactive"]
        gaps[segment["segment_type"] == "large"] += free
    return gaps


def _hold_more(kept: list[torch.UntypedStorage], device: torch.device) -> bool:
    """Whether something else, or a gap, lies in a segment of theirs."""
    places = {storage.data_ptr() for storage in kept}
    theirs = (s for s in _segments(device) if any(block["address"] in places for block in s["blocks"]))
    return sum(int(segment["total_size"]) for segment in theirs) > sum(storage.nbytes() for storage in kept)


def _segments(device: torch.device) -> list[dict[str, Any]]:
    """What the allocator holds on a card for the current stream, outside of graphs."""
    if device.type != "cuda":
        return []
    index = torch.cuda.current_device() if device.index is None else device.index
    here = index, torch.cuda.current_stream(device).cuda_stream, (0, 0)
    every = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    return [s for s in every if (s["device"], s["stream"], tuple(s["segment_pool_id"])) == here]


def _fills(gaps: dict[bool, list[int]], size: int) -> bool:
    """Take a block of this size from the smallest gap that is large enough; whether there is one."""
    block = _rounded(size)
    mine = gaps[block > SMALL_LIMIT]
    gap = min((each for each in mine if each >= block), default=None)
    if gap is None:
        return False
    mine.remove(gap)
    mine.append(gap - block)
    return True


def _reserved(sizes: list[int], device: torch.device) -> list[torch.UntypedStorage]:
    """Memory in which blocks of these sizes have room."""
    return [_storage(piece, device) for piece in _pieces(sizes)]


def _pieces(sizes: list[int]) -> list[int]:
    """Bytes of blocks that take whole segments: what a segment has left would be a gap, and what fills it holds all."""
    blocks = list(map(_rounded, sizes))
    large = sum(block for block in blocks if block > SMALL_LIMIT)
    small = sum(block for block in blocks if block <= SMALL_LIMIT)
    halves = [SMALL_LIMIT] * (SMALL_SEGMENT // SMALL_LIMIT)  # a larger piece would not lie among the small blocks
    return [segment_for(large)] * (large > 0) + halves * -(-small // SMALL_SEGMENT)


def _rounded(size: int) -> int:
    return -(-size // MIN_BLOCK) * MIN_BLOCK


def _storage(size: int, device: torch.device) -> torch.UntypedStorage:
    return torch.UntypedStorage(size, device=device)  # type: ignore[no-untyped-call]  # no tensor, which may be filled
