"""Which samples come next: a function of (seed, epoch, committed samples), and of nothing else.

The order of an epoch depends on seed and epoch alone. Batch size, micro-batch size, workers and ranks are no part of
the state, so they may change at any update: every sample is still seen exactly once an epoch, in the same order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch

T = TypeVar("T", list[Any], np.ndarray[Any, Any])
Key = tuple[int, int, int]  # (seed, epoch, index of the sample in the data set)


def key_seed(*parts: int) -> int:
    """A seed of 63 bits that depends on all the numbers, the same in every process and on every machine."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True, slots=True)
class Position:
    """Where training stands.

    Attributes:
        seed: decides the order of every epoch.
        epoch: the running epoch, from 0.
        cursor: committed samples of this epoch, always below `size`.
        size: samples in the training set.
    """

    seed: int
    epoch: int
    cursor: int
    size: int

    def __post_init__(self) -> None:
        """Raise a ValueError where the cursor is outside the data set, or the epoch is negative."""
        if self.epoch < 0 or not 0 <= self.cursor < self.size:
            raise ValueError(
                f"epoch {self.epoch}, cursor {self.cursor} is no position in {self.size} samples: "
                f"the epoch is 0 or more, the cursor 0 to {self.size - 1}"
            )

    def permutation(self) -> list[int]:
        """The order of the samples in this epoch."""
        generator = torch.Generator().manual_seed(key_seed(self.seed, self.epoch))
        order: list[int] = torch.randperm(self.size, generator=generator).tolist()
        return order

    def next_size(self, batch_size: int) -> int:
        """Samples in the next update: at most `batch_size` (one more only for batch size 2)."""
        remaining = self.size - self.cursor
        # No update is left with a single sample where that can be avoided: BatchNorm has no variance of one.
        if remaining == batch_size + 1 and batch_size > 1:
            return batch_size - 1 if batch_size > 2 else 3
        return min(batch_size, remaining)

    def sizes(self, batch_size: int) -> set[int]:
        """Samples in the updates that are left of this epoch, each number once."""
        whole = max(0, (self.size - self.cursor) // batch_size - 2)  # that many at least, before the end
        position, found = self.advance(whole * batch_size), {batch_size} if whole else set()
        while position.epoch == self.epoch:
            found.add(size := position.next_size(batch_size))
            position = position.advance(size)
        return found

    def batches(self, batch_size: int) -> Iterator[list[Key]]:
        """The remaining updates of this epoch, each as the keys of its samples."""
        return ([(self.seed, self.epoch, index) for index in part.tolist()] for part in self.indices(batch_size))

    def indices(self, batch_size: int) -> Iterator[np.ndarray[Any, Any]]:
        """The remaining updates of this epoch, each as the indices of its samples in the data set, int64."""
        order, position = np.array(self.permutation()), self  # once: it takes a while for millions
        while position.epoch == self.epoch:
            size = position.next_size(batch_size)
            yield order[position.cursor : position.cursor + size]
            position = position.advance(size)

    def advance(self, samples: int) -> Position:
        """The position after `samples` more, of those left in this epoch; at its end, the start of the next."""
        remaining = self.size - self.cursor
        if not 0 <= samples <= remaining:
            raise ValueError(f"cannot advance by {samples}: {remaining} samples are left in epoch {self.epoch}")
        if samples == remaining:
            return replace(self, epoch=self.epoch + 1, cursor=0)
        return replace(self, cursor=self.cursor + samples)

    def schedule_step(self, batch_size: int) -> int:
        """Updates that lead here when every update so far had `batch_size` samples: what a schedule counts by."""
        # From position and batch size alone, so that a schedule needs no memory of its own.
        per_epoch = updates_per_epoch(self.size, batch_size)
        return self.epoch * per_epoch + min(math.ceil(self.cursor / batch_size), per_epoch - 1)

    def to_dict(self) -> dict[str, int]:
        """Plain data for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Position:
        """The position that `to_dict` gave."""
        return cls(**{name: int(data[name]) for name in ("seed", "epoch", "cursor", "size")})


def updates_per_epoch(size: int, batch_size: int) -> int:
    """Updates in a whole epoch of `size` samples. For batch size 2 a last single sample joins the update before it."""
    full, rest = divmod(size, batch_size)
    joined = batch_size == 2 and rest == 1 and full > 0
    return full + (rest > 0) - joined


def micro_batches(samples: int, micro_batch_size: int, avoid_single: bool) -> list[int]:
    """Sizes of the forward passes of one update: as few as fit, as even as possible, the larger ones first.

    Args:
        avoid_single: no part of one sample (BatchNorm) where there is more than one. For micro-batch size 2 and an odd
            number of samples, one part then has 3; for micro-batch size 1 the parts have 2 or 3.
    """
    if samples == 0:
        return []
    parts = math.ceil(samples / micro_batch_size)
    if avoid_single:
        parts = max(1, min(parts, samples // 2))
    small, larger = divmod(samples, parts)
    return [small + 1] * larger + [small] * (parts - larger)


def part_of(batch: T, rank: int, weights: Sequence[float], *, avoid_single: bool = True) -> T:
    """The samples of a batch that are on one rank; the arguments are those of `shares`."""
    if len(weights) == 1:
        return batch
    sizes = shares(len(batch), tuple(weights), avoid_single=avoid_single)
    return batch[sum(sizes[:rank]) : sum(sizes[: rank + 1])]


@lru_cache(maxsize=256)  # an epoch has few sizes of batches, and many batches
def shares(samples: int, weights: tuple[float, ...], *, avoid_single: bool = True) -> tuple[int, ...]:
    """Samples of a batch on each rank, in proportion to the weights, which are 0 or more, and not all 0.

    Each rank has the whole samples of its quota; each that is left goes to the rank that is then the least full for its
    weight (D'Hondt's method), of equal ones to the first. So where the weights are what fits on each rank, no rank has
    more than fits, unless the batch has more than all together, or a sample would be alone.

    Args:
        avoid_single: no rank has one alone where there are more, on which BatchNorm cannot train.
    """
    first = 2 if avoid_single and samples > 1 else 1  # what a rank takes that has none
    quotas = (int(samples * weight / sum(weights)) for weight in weights)
    parts = [quota if quota >= first else 0 for quota in quotas]
    while left := samples - sum(parts):
        takes = [1 if part else first for part in parts]
        can = [rank for rank, weight in enumerate(weights) if weight and takes[rank] <= left]
        rank = min(can, key=lambda rank: (parts[rank] + takes[rank]) / weights[rank])
        parts[rank] += takes[rank]
    return tuple(parts)
