"""Which samples are held out for validation: the same share of every class, chosen by the seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from adaptive_trainer.data.position import key_seed

Array = np.ndarray[Any, Any]
STRATIFIED, RANDOM = "stratified", "random"  # kinds of splits
LABELS = ("targets", "labels", "_labels")  # what data sets call the list of them


@dataclass(frozen=True)
class Split:
    """How validation samples were held out: plain data for a checkpoint.

    Attributes:
        digest: of the indices that were held out; empty where they are not known yet.
    """

    kind: str
    seed: int
    digest: str = ""


def source(data: Any) -> tuple[Any, Array]:
    """The data set below all subsets that give its samples as they are, and the index there of every sample."""
    index = np.arange(len(data))
    while isinstance(data, Subset) and type(data).__getitem__ is Subset.__getitem__:
        data, index = data.dataset, np.asarray(data.indices)[index]
    return data, index


def known_labels(data: Any) -> Array | None:
    """The label of every sample, (N,), where the data set has a list of whole numbers; None where it has none."""
    base, index = source(data)
    if getattr(base, "target_transform", None) is not None:
        return None  # which makes others of them
    listed = base.tensors[-1] if isinstance(base, TensorDataset) else None
    listed = next((getattr(base, name) for name in LABELS if getattr(base, name, None) is not None), listed)
    if not isinstance(listed, Tensor | np.ndarray | Sequence) or len(listed) != len(base):
        return None
    try:
        labels = np.asarray(listed)
    except ValueError:  # lists of different lengths
        return None
    return labels[index] if labels.ndim == 1 and labels.dtype.kind in "iu" else None


def held_out(total: int, fraction: float, split: Split, labels: Array | None) -> tuple[list[int], Split]:
    """The indices of the validation samples, sorted, and how they were found.

    A class of two samples or more keeps at least one for training and, where the share is large enough for all
    classes, gives one. A class of one sample is trained on. Without labels the samples are chosen at random; so they
    are where every class has one sample.

    Args:
        total: number of samples, two or more.
        split: what is wanted.
        labels: of all samples, (N,), or None.
    """
    order = torch.randperm(total, generator=torch.Generator().manual_seed(key_seed(split.seed))).numpy()
    count = min(max(1, round(total * fraction)), total - 1)
    kind = split.kind if labels is not None and len(np.unique(labels)) < total else RANDOM
    if kind == STRATIFIED and labels is not None:
        _, classes = np.unique(labels, return_inverse=True)
        sizes = np.bincount(classes)
        mixed = order[np.argsort(classes[order], kind="stable")]  # class by class, each in random order
        rank = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        chosen = mixed[rank < np.repeat(_shares(sizes, count), sizes)]
    else:
        chosen = order[:count]  # there are no classes to share between
    found = np.sort(chosen).astype(np.int64)
    return found.tolist(), Split(kind, split.seed, hashlib.blake2b(found.tobytes(), digest_size=8).hexdigest())


def _shares(sizes: Array, count: int) -> Array:
    """How many samples each class gives: `count` in all, in proportion to the sizes."""
    most = sizes - 1
    count = min(count, int(most.sum()))
    exact = sizes * (count / sizes.sum())
    # one at least, where that goes
    least = np.minimum(most, 1) if np.count_nonzero(most) <= count else np.zeros_like(sizes)
    shares: Array = np.clip(np.floor(exact).astype(np.int64), least, most)
    while (missing := count - int(shares.sum())) != 0:
        step = 1 if missing > 0 else -1
        can = shares < most if missing > 0 else shares > least
        wish = np.where(can, step * (exact - shares), -np.inf)
        nearest = np.argsort(-wish, kind="stable")[: min(abs(missing), int(can.sum()))]
        shares[nearest] += step
    return shares
