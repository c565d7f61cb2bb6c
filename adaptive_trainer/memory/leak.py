"""Whether the memory held between updates grows from one to the next: a leak, which no rung of a ladder can answer."""

from __future__ import annotations

import gc
from collections import Counter, deque
from itertools import pairwise

import torch

from adaptive_trainer.memory.usage import format_bytes

SAMPLES = 64  # that are kept; so many updates of a rung are each looked at, and later ones every now and then
LEAST = 4  # samples that a growth is read from
SUSPECT = 3  # samples, each above the one before, from which on tensors are counted
NAMED = 3  # kinds of tensors


class Growth:
    """Bytes that tensors hold after the updates of one rung.

    What is made once (optimizer state, copies to undo, a CUDA graph) adds to them in single updates. A leak adds to
    them in every update, and what it adds is still there when a failed update was rolled back and garbage collected.

    Args:
        device: where the tensors are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: deque[tuple[int, int]] = deque(maxlen=SAMPLES)
        self._seen = 0
        self._since = 0  # the update after which the tensors were counted, once a growth was suspected
        self._before: Counter[str] = Counter()

    def is_due(self, updates: int, every: int) -> bool:
        """Whether to look after this update, by its number; later on only after every so many."""
        return self._seen < SAMPLES or updates % every == 0

    def note(self, updates: int, held: int) -> None:
        """Note that after so many updates so many bytes are held."""
        self._held.append((updates, held))
        self._seen += 1
        # Counting takes a while, so it waits for a first suspicion.
        if not self._since and len(self._held) >= SUSPECT and _grows(list(self._held)[-SUSPECT:]):
            self._since, (self._before, _) = updates, _census(self.device)

    def text(self, held: int) -> str:
        """Say what grows; empty where nothing does.

        Args:
            held: bytes that are held now that the failed update's own are free.
        """
        late = list(self._held)[len(self._held) // 2 if len(self._held) >= 2 * LEAST else 0 :]
        if len(late) < LEAST or not _grows(late):
            return ""  # what grew in the first half was made once: optimizer state, copies, a graph
        (first, before), (last, after) = late[0], late[-1]
        if 2 * (held - before) < after - before:
            return ""  # most of it was garbage, or belonged to the batch
        grown = (after - before) // (last - first)
        return (
            f"memory held after updates grows by {format_bytes(grown)} an update ({format_bytes(before)} after update "
            f"{first}, {format_bytes(after)} after update {last}), and no rung helps against that"
            f"{self._kept(last)}. Look for what keeps tensors of every update: a list of outputs, or a sum "
            "of losses with the graphs behind them"
        )

    def _kept(self, last: int) -> str:
        """The kinds of tensors that came with each update since they were counted, those with the most memory first."""
        kinds, nbytes = _census(self.device)
        came = {kind: kinds[kind] - self._before[kind] for kind, _ in nbytes.most_common()}
        named = [kind for kind in came if self._since and came[kind] >= max(last - self._since, 1)][:NAMED]
        return f"; tensors that are there: {'; '.join(f'{kinds[kind]} of {kind}' for kind in named)}" if named else ""


def _grows(samples: list[tuple[int, int]]) -> bool:
    return all(before < after for (_, before), (_, after) in pairwise(samples))


def _census(device: torch.device) -> tuple[Counter[str], Counter[str]]:
    """How many tensors there are of each shape and type, but for those that only autograd holds, and their bytes."""
    kinds, nbytes, storages = Counter[str](), Counter[str](), set[int]()
    gc.collect()  # garbage of earlier work would go meanwhile, and be missed
    for value in gc.get_objects():
        if type(value) is not torch.Tensor or value.device != device or value.layout is not torch.strided:
            continue
        storage = value.untyped_storage()
        if storage._cdata not in storages:
            storages.add(storage._cdata)
            kind = f"{' x '.join(map(str, value.shape)) or 'one number'}, {str(value.dtype).removeprefix('torch.')}"
            kinds[kind] += 1
            nbytes[kind] += storage.nbytes()
    return kinds, nbytes
