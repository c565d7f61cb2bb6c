"""Free memory of a device in one piece, from which blocks are cut with few gaps between them.

Left alone, the allocator takes a segment for each large block that it meets first, and a later block of another size
does not fit any of them. Near a limit an update then lacks memory that is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

import torch
from torch import Tensor

from adaptive_trainer.memory.allocator import LARGE_ROUNDING, SMALL_LIMIT, MiB
from adaptive_trainer.memory.compaction import compact
from adaptive_trainer.memory.limit import Capacity

KEPT = 4  # times a small weight: itself, its gradient, and two tensors of the optimizer
REST = 8 * MiB  # small blocks of an update beside these


def small_blocks(weights: Iterable[int]) -> int:
    """Bytes of segments that the small blocks of a training need, about; these are no part of the piece.

    Args:
        weights: bytes of each.
    """
    return KEPT * sum(nbytes for nbytes in weights if nbytes <= SMALL_LIMIT) + REST


def piece(unreserved: int, small: int, small_peak: int, small_reserved: int) -> int:
    """Bytes of the piece.

    Args:
        unreserved: what the allocator may still take.
        small: what its segments for small blocks will take, about.
        small_peak, small_reserved: what they have taken at the most, and take now.
    """
    return max(0, unreserved - (max(small, small_peak) - small_reserved)) // LARGE_ROUNDING * LARGE_ROUNDING


class OnePiece:
    """Puts the free memory of a CUDA device together before the work of one training.

    Args:
        capacity: the memory that it may use.
        weights: bytes of each weight.
        staying: gives the tensors that lie on the device from one update to the next.
        is_wanted: else nothing is done.

    Attributes:
        may_move: those tensors, to other places; not while a graph finds them where they lie.
    """

    def __init__(
        self,
        capacity: Capacity,
        weights: Iterable[int],
        staying: Callable[[], Iterable[Tensor]],
        *,
        is_wanted: bool,
    ) -> None:
        self.may_move = True
        self._capacity = capacity
        self._small = small_blocks(weights)
        self._staying = staying
        self._is_wanted = is_wanted
        self._has_joined = False
        self.begin()

    def begin(self) -> None:
        """A dry run or a training begins."""
        # A whole card is not taken before it is known that less does not do.
        self._is_due = self._is_wanted and self._capacity.bytes is not None

    def before_work(self) -> None:
        """Put it together, where it is in pieces."""
        if self._is_due:
            self._join()

    def released(self) -> None:
        """The allocator has given back what was free, after work that has failed."""
        self._is_due = self._has_joined

    def before_retry(self) -> None:
        """Have the same work find its memory the other way: a large block may have lacked the one piece, or a small one
        what the piece has taken, as in a last batch of few samples.

        Raises:
            DeviceUnusable: as `compact`.
        """
        if not self._is_wanted:
            return
        if not self._has_joined:
            self._join()
        elif self.may_move:
            with suppress(torch.OutOfMemoryError):  # then it stays, with what was put into it
                compact(self._staying(), self._capacity.device)

    def _join(self) -> None:
        self._is_due, self._has_joined = False, True
        capacity = self._capacity
        torch.accelerator.empty_cache()
        stats = torch.cuda.memory_stats(capacity.device)
        small_peak, small_now = (stats[f"reserved_bytes.small_pool.{when}"] for when in ("peak", "current"))
        most, left = capacity.bytes, capacity.unreserved()
        if most is None:  # the card may be wanted by other processes: no more of it than was held before
            most = stats["reserved_bytes.all.peak"]
            left = min(left, most - stats["reserved_bytes.all.current"])
        size = piece(left, self._small, small_peak, small_now)
        if 2 * size < most:  # a graph holds the most, and leaves little to be joined
            return
        with suppress(torch.OutOfMemoryError):  # another process was faster: then piece by piece
            torch.UntypedStorage(size, device=capacity.device)  # type: ignore[no-untyped-call]  # free at once
