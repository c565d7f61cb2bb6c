"""What kind of mean, or sum, a loss is: torch's own say it, of others it is found out by their values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from adaptive_trainer import oom

OF_TORCH = ("torch.nn.modules.loss", "adaptive_trainer.models.losses")
PLAIN = (functional.cross_entropy, functional.nll_loss)
MOST_CLASSES = 2048  # of which the weights are looked for
CHECKED = 16  # made-up samples
MOST_REFERENCES = 4  # classes that others are weighed against, one after the other
RTOL = 1e-4  # of losses in single precision
NOT_MEMORY = frozenset({oom.Kind.OTHER})


class LossKind(StrEnum):
    """How the losses of parts make that of the whole."""

    MEAN = "mean"  # over samples
    SUM = "sum"
    WEIGHTED = "weighted"  # a mean with a denominator of its own
    OTHER = "other"
    UNKNOWN = ""  # not known yet


NOTES = {
    LossKind.SUM: "the loss is a sum over samples: those of micro-batches are added, and are not divided",
    LossKind.WEIGHTED: "the loss is a mean weighted by class, by its values: micro-batches are weighted by what their "
    "labels count",
    LossKind.OTHER: "the loss is neither a mean over samples nor a sum, by its values: parts are weighted by their "
    "samples, so that micro-batches and trainer.eval_batch_size have a part in the result; a loss may return a pair of "
    "tensors, its sum and its denominator; trainer.class_weights knows its own",
}


@dataclass(frozen=True)
class Found:
    """The kind of a loss, and the weights of classes (classes,) where its values have shown them."""

    kind: LossKind
    weights: Tensor | None = None

    @property
    def note(self) -> str:
        """What the user is to know of it; empty where nothing is special."""
        is_expected = self.kind is LossKind.WEIGHTED and self.weights is None  # the loss itself says so
        return "" if is_expected else NOTES.get(self.kind, "")


def is_of_torch(loss: Any) -> bool:
    """Whether it is one of torch's losses, or ours, or a subclass that leaves the forward pass as it is."""
    forward = type(loss).forward if isinstance(loss, nn.Module) else None
    return getattr(forward, "__module__", "") in OF_TORCH


def declared(loss: Any) -> LossKind:
    """What torch's own losses, and those that only add settings to them, say of themselves."""
    if loss in PLAIN:
        return LossKind.MEAN
    if not is_of_torch(loss) or loss.reduction not in ("mean", "sum"):
        return LossKind.UNKNOWN
    if loss.reduction == "sum" or not isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss):
        return LossKind(loss.reduction)
    return LossKind.MEAN if getattr(loss, "counts_all", False) else LossKind.WEIGHTED


def find_out(loss: Any, output: Any, labels: Tensor, classes: int | None) -> Found:
    """Find out the kind of a loss by its values; labels are less than `classes`, where that is known."""
    value = loss(output, labels)
    if isinstance(value, tuple):
        return Found(LossKind.WEIGHTED)
    are_scores = isinstance(output, Tensor) and output.ndim == 2 and labels.ndim == 1
    # A label that the loss does not know would end the process on a CUDA device. Scores are not always as many as
    # classes: one number may decide between two, and others are features.
    classes = classes or max(output.shape[1] if are_scores else 0, int(labels.max()) + 1)
    if not are_scores or labels.is_floating_point() or classes > MOST_CLASSES:
        return Found(_by_parts(loss, output, labels, float(value)))
    for dtype in (torch.float64, torch.float32):  # a loss whose own tensors are of one type may refuse the other
        found = oom.attempt(partial(_by_classes, loss, output.shape[1], classes, labels, dtype), kinds=NOT_MEMORY)
        if isinstance(found, Found):
            return found
    return Found(LossKind.OTHER)


def _by_parts(loss: Any, output: Any, labels: Tensor, whole: float) -> LossKind:
    """Compare the loss of a batch with those of two parts of it."""
    samples = len(labels)
    first = samples // 3 or 1
    if first == samples:
        return LossKind.OTHER
    one, two = (
        float(loss(tree_map(itemgetter(part), output), labels[part])) for part in (slice(first), slice(first, samples))
    )
    if math.isclose((first * one + (samples - first) * two) / samples, whole, rel_tol=RTOL):
        return LossKind.MEAN
    return LossKind.SUM if math.isclose(one + two, whole, rel_tol=RTOL) else LossKind.OTHER


def _by_classes(loss: Any, width: int, classes: int, labels: Tensor, dtype: torch.dtype) -> Found:
    """Compare made-up scores (N, width): a batch with its samples, and with what pairs say of each class's weight."""
    scores = torch.randn(CHECKED, width, generator=torch.Generator().manual_seed(0)).to(labels.device, dtype)
    theirs = torch.arange(CHECKED, device=labels.device, dtype=labels.dtype) * 7 % classes
    alone = torch.stack([loss(scores[i : i + 1], theirs[i : i + 1]) for i in range(CHECKED)])
    whole = loss(scores, theirs)
    if torch.isclose(whole, alone.sum(), rtol=RTOL):
        return Found(LossKind.SUM)
    # A reference has to count: else its loss alone is 0 / 0, or 0 where the denominator is clamped.
    counting = set(theirs[alone.isfinite() & (alone != 0)].tolist())
    for reference in sorted(counting)[:MOST_REFERENCES]:
        weights = _weights_of(loss, torch.zeros_like(scores[:2]), classes, reference, labels)
        counts = weights[theirs]
        mean = (counts * alone.nan_to_num()).sum() / counts.sum()
        if not (weights.isfinite() & (weights >= 0)).all() or not torch.isclose(whole, mean, rtol=RTOL):
            continue  # a clamp may leave next to nothing of a class that does not count
        is_plain = torch.isclose(weights, weights.new_ones(()), rtol=RTOL).all()
        return Found(LossKind.MEAN) if is_plain else Found(LossKind.WEIGHTED, weights)
    return Found(LossKind.OTHER)


def _weights_of(loss: Any, scores: Tensor, classes: int, reference: int, labels: Tensor) -> Tensor:
    """How much each class counts in the mean (classes,), where the reference counts 1.

    Of a pair the loss is p = (w a + b) / (w + 1), where a and b are those of the two alone: w = (p - b) / (a - p).
    """
    # The first sample says nothing and the second is right: their losses differ whatever the class.
    scores[1, reference % scores.shape[1]] = 3 + math.log(classes)
    pairs = labels.new_tensor([[label, reference] for label in range(classes)])
    b = loss(scores[1:], pairs[0, 1:])
    a = torch.stack([loss(scores[:1], pair[:1]) for pair in pairs])
    p = torch.stack([loss(scores, pair) for pair in pairs])
    return torch.where(torch.isclose(p, b, rtol=1e-6), 0, (p - b) / (a - p))  # of one that does not count, a is 0 / 0
