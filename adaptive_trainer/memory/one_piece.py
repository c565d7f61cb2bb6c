"""Free memory of a device in one piece, from which blocks are cut with few gaps between them.

Left alone, the allocator takes a segment for each large block that it meets first, and a later block of another size
does not fit any of them. Near a limit an update then lacks memory that is there.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import torch

from adaptive_trainer.memory.allocator import LARGE_ROUNDING, SMALL_LIMIT, MiB
from adaptive_trainer.memory.limit import Capacity

KEPT = 4  # times a small weight: itself, its gradient, and two tensors of the optimizer
REST = 8 * MiB  # small blocks of an update beside these


def small_blocks(weights: Iterable[int]) -> int:
    """Bytes of segments that the small blocks of a training need, about; these are no part of the piece.

    Args:
        weights: bytes of each.
    """
    return KEPT * sum(nbytes for nbytes in weights if nbytes <= SMALL_LIMIT) + REST


def piece(unreserved: int, small: int, small_reserved: int) -> int:
    """Bytes of the piece.

    Args:
        unreserved: what the allocator may still take.
        small: what its segments for small blocks will take.
        small_reserved: what they have taken.
    """
    return max(0, unreserved - max(0, small - small_reserved)) // LARGE_ROUNDING * LARGE_ROUNDING


def join(capacity: Capacity, small: int) -> None:
    """Have the allocator of a CUDA device hold what training may still use in one piece, but for small blocks."""
    torch.accelerator.empty_cache()
    stats = torch.cuda.memory_stats(capacity.device)
    small = max(small, stats["reserved_bytes.small_pool.peak"])
    size = piece(capacity.unreserved(), small, stats["reserved_bytes.small_pool.current"])
    if 2 * size < (capacity.size or 0):  # a graph holds the most, and leaves little to be joined
        return
    with suppress(torch.OutOfMemoryError):  # another process was faster: then piece by piece
        torch.UntypedStorage(size, device=capacity.device)  # type: ignore[no-untyped-call]  # it is free at once
