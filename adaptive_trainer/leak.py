"""Whether the memory held between updates grows from one to the next: a leak, which no rung of a ladder can answer."""

from __future__ import annotations

import gc
from collections import Counter, deque
from itertools import pairwise

import torch

from adaptive_trainer.memory.usage import format_bytes

__all__ = ["Growth"]

SAMPLES = 64  # that are kept; so many updates of a rung are each looked at, and later ones every now and then
LEAST = 4  # samples that a growth is read from
NAMED = 3  # kinds of tensors


class Growth:
    """Bytes that tensors hold after the updates of one rung.

    What is made once (optimizer state, copies to undo, a CUDA graph) adds to them in single updates. A leak adds to
    them in every update, and what it adds is still there when a failed update was rolled back and garbage collected.
    """

    def __init__(self) -> None:
        self._held: deque[tuple[int, int]] = deque(maxlen=SAMPLES)
        self._seen = 0

    def is_due(self, updates: int, every: int) -> bool:
        """Whether to look after this update, by its number; later on only after every so many."""
        return self._seen < SAMPLES or updates % every == 0

    def note(self, updates: int, held: int) -> None:
        """After so many updates so many bytes are held."""
        self._held.append((updates, held))
        self._seen += 1

    def text(self, held: int, device: torch.device) -> str:
        """What grows, in words; empty where nothing does.

        Args:
            held: bytes that are held now that the failed update's own are free.
            device: where to look for the tensors.
        """
        late = list(self._held)[len(self._held) // 2 :] if len(self._held) >= 2 * LEAST else list(self._held)
        if len(late) < LEAST or any(after <= before for (_, before), (_, after) in pairwise(late)):
            return ""
        (first, before), (last, after) = late[0], late[-1]
        if 2 * (held - before) < after - before:
            return ""  # most of it was garbage, or belonged to the batch
        grown = (after - before) // (last - first)
        return (
            f"memory held after updates grows by {format_bytes(grown)} an update ({format_bytes(before)} after update "
            f"{first}, {format_bytes(after)} after update {last}), and no rung helps against that"
            f"{_kept(device, last - first)}. Look for what keeps tensors of every update: a list of outputs, or a sum "
            "of losses with the graphs behind them"
        )


def _kept(device: torch.device, updates: int) -> str:
    """The kinds of tensors of which there are as many as updates or more, those that take the most memory first.

    Tensors that only autograd holds are not seen.
    """
    kinds: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    storages = set[int]()
    for value in gc.get_objects():
        if type(value) is not torch.Tensor or value.device != device or value.layout is not torch.strided:
            continue
        storage = value.untyped_storage()
        if storage._cdata in storages:
            continue
        storages.add(storage._cdata)
        kind = f"{' x '.join(map(str, value.shape)) or 'one number'}, {str(value.dtype).removeprefix('torch.')}"
        kinds[kind] += 1
        nbytes[kind] += storage.nbytes()
    named = [f"{kinds[kind]} of {kind}" for kind, _ in nbytes.most_common() if kinds[kind] >= updates][:NAMED]
    return f"; tensors that are there: {'; '.join(named)}" if named else ""
