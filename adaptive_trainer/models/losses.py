"""Losses, and the denominators of their means: what makes a batch in parts the same as the whole batch.

The mean of a batch is that of its parts, each weighted by its share of the loss's own denominator. That is the number
of samples for most losses, and another one for those that weigh classes or leave labels out. A loss of the caller's may
give its sum and denominator itself.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_flatten, tree_unflatten

from adaptive_trainer import oom
from adaptive_trainer.config.schema import BALANCED, Config
from adaptive_trainer.errors import ConfigError
from adaptive_trainer.utils.belongings import Belongings
from adaptive_trainer.utils.random import RandomStates

Loss = Callable[[Tensor, Tensor], Any]  # of (output, labels): a tensor of one number, or a pair (sum, denominator)
MEAN, SUM, WEIGHTED, OTHER = "mean", "sum", "weighted", "other"
OF_TORCH = "torch.nn.modules.loss"
PLAIN = (functional.cross_entropy, functional.nll_loss)
MOST_CLASSES = 2048  # of which the weights are looked for
CHECKED = 16  # made-up samples
RTOL = 1e-4  # of losses in single precision
ADVICE = "a loss may return a pair of tensors, its sum and its denominator; trainer.class_weights knows its own"


class CrossEntropy(nn.CrossEntropyLoss):
    """Cross entropy that refuses scores of another shape: on a card, a missing one would end the whole process.

    In evaluation mode it is the plain one, without class weights and smoothing: the same measure for any training.

    Args:
        num_classes: the least number of scores.
        label_smoothing, weight: as `nn.CrossEntropyLoss` has them.
    """

    def __init__(self, num_classes: int, label_smoothing: float = 0.0, weight: Tensor | None = None) -> None:
        super().__init__(weight, label_smoothing=label_smoothing)
        self.num_classes = num_classes

    def forward(self, output: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of scores (N, classes) and labels (N,).

        Raises:
            ConfigError: these are no scores, or too few.
        """
        if not isinstance(output, Tensor):
            raise ConfigError(
                f"the network gives a {type(output).__name__}, and cross entropy takes a tensor of scores; give the "
                "Trainer a loss that takes it"
            )
        if output.ndim < 2 or output.shape[1] < self.num_classes:
            raise ConfigError(
                f"the network gives scores of shape {tuple(output.shape)}, and there are {self.num_classes} classes; "
                "(images, classes) is needed"
            )
        if not self.training:
            return functional.cross_entropy(output, labels)
        return super().forward(output, labels)


def build_loss(config: Config, num_classes: int, weights_of_data: Sequence[float] = ()) -> nn.Module:
    """Mean cross entropy of (output, labels), with `trainer.label_smoothing` and `trainer.class_weights`.

    Args:
        weights_of_data: what `trainer.class_weights=balanced` comes to; all are 1 where the data is not known, as in a
            plan.

    Raises:
        ConfigError: there are not as many weights as classes.
    """
    weights = config.trainer.class_weights
    if weights is None:
        return CrossEntropy(num_classes, config.trainer.label_smoothing)
    if weights == BALANCED:
        weights = weights_of_data or [1.0] * num_classes
    if len(weights) != num_classes:
        raise ConfigError(
            f"trainer.class_weights has {len(weights)} numbers and there are {num_classes} classes; give one for each, "
            f"in their order, or {BALANCED}"
        )
    return CrossEntropy(num_classes, config.trainer.label_smoothing, torch.tensor(weights, dtype=torch.float32))


def balanced(labels: np.ndarray[Any, Any], num_classes: int) -> list[float]:
    """Weights by which each class counts as much as any other, as scikit-learn has them: samples / (classes * count).

    A class without samples has the weight 1 and is not counted.
    """
    counts = np.bincount(labels, minlength=num_classes)
    present = np.count_nonzero(counts)
    return [float(len(labels) / (present * count)) if count else 1.0 for count in counts]


@dataclass(frozen=True)
class Terms:
    """The loss of one part of a batch.

    Attributes:
        value: a mean over the samples, or a sum.
        samples: how many there are.
        weight: the denominator of that sum, a scalar on the device; None where it is the samples, or there is none.
        is_sum: the loss is a sum and is not divided.
    """

    value: Tensor
    samples: int
    weight: Tensor | None = None
    is_sum: bool = False

    @property
    def factor(self) -> int:
        """What makes the value a sum."""
        return 1 if self.is_sum or self.weight is not None else self.samples

    def sums(self) -> tuple[float, float]:
        """The sum over the samples, and its denominator."""
        return float(self.value) * self.factor, self.samples if self.weight is None else float(self.weight)

    def share(self, samples: int) -> Tensor:
        """What this part adds to the loss of an update of so many samples.

        With a denominator of its own it is the sum divided by the samples: `correct` does the rest, when the
        denominator of the whole update is known.
        """
        whole = self.samples == samples
        if self.weight is not None:
            return self.value * _inverse(self.weight) if whole else self.value / samples
        return self.value if whole or self.is_sum else self.value * (self.samples / samples)


@torch.no_grad()
def correct(parameters: Sequence[nn.Parameter], samples: int, weights: Sequence[Tensor]) -> None:
    """Divide the gradients of summed shares by the denominator of the whole update instead of its samples."""
    weight = torch.stack(list(weights)).sum()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_(gradients, samples * _inverse(weight))


def _inverse(weight: Tensor) -> Tensor:
    """Of a denominator; where no label counts it is 0, and nothing is learned."""
    return torch.where(weight == 0, 0, 1 / weight)


class Criterion:
    """A loss, and how those of parts make that of the whole.

    torch's own losses say it themselves. Of others it is found out by their values, once (`learn`); in evaluation mode
    a module may be another kind of loss.

    Attributes:
        loss: of (output, labels).
        num_classes: labels are less; None where that is not known.
        note: what is to be said of it, in words; empty where it is a plain mean.
    """

    def __init__(self, loss: Loss, num_classes: int | None = None) -> None:
        self.loss = loss
        self.num_classes = num_classes
        self.note = ""
        kind = _kind(loss)
        # by mode: whether it is training, kind, weights of the classes where they were found out
        self._known: dict[bool, tuple[str, Tensor | None]] = dict.fromkeys((True, False), (kind, None)) if kind else {}
        if kind == SUM:
            self._note()

    @classmethod
    def of(cls, loss: Loss) -> Criterion:
        """The loss itself where it is one."""
        return loss if isinstance(loss, Criterion) else cls(loss)

    @property
    def _mode(self) -> bool:
        return getattr(self.loss, "training", True) is not False

    @property
    def kind(self) -> str:
        """`mean` over samples, `sum`, `weighted` (a mean with a denominator of its own), `other`, or empty: not known
        yet.
        """
        return self._known.get(self._mode, ("", None))[0]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, a loss that is a module is in evaluation mode."""
        modes = (
            [(module, module.training) for module in self.loss.modules()] if isinstance(self.loss, nn.Module) else []
        )
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:  # each its own: a part may be kept in evaluation mode
                module.training = mode

    def to(self, device: torch.device) -> None:
        """Move a loss that is a module."""
        if isinstance(self.loss, nn.Module):
            self.loss.to(device)

    def __call__(self, output: Any, labels: Tensor) -> Terms:
        """The loss of one part.

        Raises:
            ConfigError: it is neither a tensor of one number nor a pair of such.
        """
        samples = len(labels)
        kind, weights = self._known.get(self._mode, ("", None))
        if weights is not None:
            return self._weighed(output, labels, weights.to(labels.device)[labels].sum())
        weight = _denominator(self.loss, labels) if kind == WEIGHTED else None
        if weight is not None:
            value = _summed(self.loss, output, labels)
            return Terms(value, samples, weight.to(torch.promote_types(value.dtype, torch.float32)))
        value = self.loss(output, labels)
        if isinstance(value, tuple) and len(value) == 2 and all(map(_is_number, value)):
            self._known[self._mode] = WEIGHTED, None
            total, weight = value
            return Terms(total, samples, weight.detach().to(torch.promote_types(total.dtype, torch.float32)))
        if not _is_number(value):
            what = f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(
                f"the loss of a batch is a {what}, and is to be a tensor of one number, or two: (sum, denominator)"
            )
        return Terms(value, samples, is_sum=kind == SUM)

    def _weighed(self, output: Tensor, labels: Tensor, weight: Tensor) -> Terms:
        """The sum of a mean whose denominator was found out; of no label that counts it is 0, not 0 / 0."""
        if output.requires_grad:
            output.register_hook(lambda gradient: torch.where(weight == 0, 0, gradient))  # type: ignore[no-untyped-call]
        value = self.loss(output, labels)
        return Terms(torch.where(weight == 0, 0, value * weight), len(labels), weight)

    @torch.no_grad()
    def learn(self, output: Any, labels: Tensor) -> None:
        """Find out what kind of loss it is by its values, if that is not known; it waits for the device.

        Nothing is drawn for that, and nothing changes in a loss that is a module.
        """
        if self._mode in self._known:
            return
        random = RandomStates(labels.device)
        before = random.read(Belongings({"loss": self.loss}).generators.values())
        try:
            found = _found_out(_copy_of(self.loss), output, labels, self.num_classes)
        except Exception as error:  # a loss of the caller's may raise anything when made-up scores do not suit it
            if oom.describe(error).kind is not oom.Kind.OTHER:
                raise
            found = OTHER, None
        finally:
            random.write(before)
        is_said = found[0] in [kind for kind, _ in self._known.values()]
        self._known[self._mode] = found
        if not is_said:
            self._note()

    def _note(self) -> None:
        kind, weights = self._known[self._mode]
        if kind == SUM:
            self.note = "the loss is a sum over samples: those of micro-batches are added, and are not divided"
        elif kind == OTHER:
            self.note = (
                "the loss is neither a mean over samples nor a sum, by its values: parts are weighted by their "
                "samples, so that micro-batches and trainer.eval_batch_size have a part in the result; " + ADVICE
            )
        elif weights is not None:
            self.note = (
                "the loss is a mean weighted by class, by its values: micro-batches are weighted by what their labels "
                "count"
            )


def _copy_of(loss: Loss) -> Loss:
    """What may be called without changing the loss; parameters, which no loss changes, are not copied."""
    if not isinstance(loss, nn.Module):
        return loss
    return copy.deepcopy(loss, {id(parameter): parameter for parameter in loss.parameters()})


def changing_buffers(loss: Any) -> dict[str, Tensor]:
    """The buffers of a loss that its calls may change, by name: those of torch's own losses are settings."""
    if not isinstance(loss, nn.Module):
        return {}
    settings = {id(buffer) for module in loss.modules() if _is_of_torch(module) for buffer in module._buffers.values()}
    return {name: buffer for name, buffer in loss.named_buffers() if id(buffer) not in settings}


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.ndim


def _kind(loss: Any) -> str:
    """What torch's own losses, and those that only add settings to them, say of themselves."""
    if loss in PLAIN or (type(loss) is CrossEntropy and loss.weight is None):
        return MEAN  # its labels are checked to be classes, so none is left out
    if not _is_of_torch(loss):
        return ""
    if loss.reduction != "mean":
        return SUM if loss.reduction == "sum" else ""
    return WEIGHTED if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) else MEAN


def _is_of_torch(loss: Any) -> bool:
    """Whether it is one of torch's losses, ours, or a subclass that leaves the forward pass as it is."""
    forward = type(loss).forward if isinstance(loss, nn.Module) else None
    return forward is CrossEntropy.forward or getattr(forward, "__module__", "") == OF_TORCH


def _denominator(loss: Any, labels: Tensor) -> Tensor | None:
    """Of the mean that a cross entropy of torch takes; None where it is the samples."""
    if not isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) or labels.is_floating_point():
        return None  # of probabilities of classes all count
    if isinstance(loss, CrossEntropy) and not loss.training:
        return None
    counted = labels != loss.ignore_index
    if loss.weight is None:
        return counted.sum()
    return (loss.weight[torch.where(counted, labels, 0)] * counted).sum()


def _summed(loss: Any, output: Tensor, labels: Tensor) -> Tensor:
    loss.reduction = "sum"
    try:
        total: Tensor = loss(output, labels)
        return total
    finally:
        loss.reduction = "mean"


def _found_out(loss: Loss, output: Any, labels: Tensor, classes: int | None) -> tuple[str, Tensor | None]:
    """The kind of a loss, and the weights of classes where it has some."""
    value = loss(output, labels)
    if isinstance(value, tuple):
        return WEIGHTED, None
    are_scores = isinstance(output, Tensor) and output.ndim == 2 and labels.ndim == 1
    # A label that the loss does not know would end the process on a CUDA device. Scores are not always as many as
    # classes: one number may decide between two, and others are features.
    classes = classes or max(output.shape[1] if are_scores else 0, int(labels.max()) + 1)
    if not are_scores or labels.is_floating_point() or classes > MOST_CLASSES:
        return _kind_of_parts(loss, output, labels, value), None
    for dtype in (torch.float64, torch.float32):
        try:
            return _kind_of_classes(loss, (output.shape[1], classes), labels, dtype)
        except RuntimeError as error:  # of a loss whose own tensors have another type
            if oom.describe(error).kind is not oom.Kind.OTHER:
                raise
    return OTHER, None


def _kind_of_parts(loss: Loss, output: Any, labels: Tensor, whole: Tensor) -> str:
    """By the loss of a batch and those of two parts of it."""
    samples = len(labels)
    sizes = [samples // 3 or 1, samples - (samples // 3 or 1)]
    if not sizes[1]:
        return OTHER
    leaves, structure = tree_flatten(output)
    outputs = zip(*(torch.split(tensor, sizes) for tensor in leaves), strict=True)
    parts = zip(outputs, torch.split(labels, sizes), strict=True)
    one, two = (float(loss(tree_unflatten(part, structure), target)) for part, target in parts)
    means = {MEAN: (sizes[0] * one + sizes[1] * two) / samples, SUM: one + two}
    return next((kind for kind, value in means.items() if math.isclose(value, float(whole), rel_tol=1e-4)), OTHER)


def _kind_of_classes(
    loss: Loss, sizes: tuple[int, int], labels: Tensor, dtype: torch.dtype
) -> tuple[str, Tensor | None]:
    """By made-up scores: pairs of samples tell how much each class counts, and a batch whether that is all.

    Args:
        sizes: scores of a sample, and classes.
    """
    width, classes = sizes
    scores = torch.randn(CHECKED, width, generator=torch.Generator().manual_seed(0)).to(labels.device, dtype)
    theirs = torch.arange(CHECKED, device=labels.device, dtype=labels.dtype) * 7 % classes
    alone = torch.stack([loss(scores[i : i + 1], theirs[i : i + 1]) for i in range(CHECKED)]).cpu()
    whole = loss(scores, theirs).cpu()
    if torch.isclose(whole, alone.sum(), rtol=RTOL):
        return SUM, None
    for reference in range(min(classes, 4)):  # one that counts
        weights = _weights_of(loss, sizes, reference, labels, dtype)
        mine = weights[theirs.cpu()]
        mean = (mine * alone.nan_to_num()).sum() / mine.sum()
        if not weights.isfinite().all() or (weights < 0).any() or not torch.isclose(whole, mean, rtol=RTOL):
            continue
        if torch.isclose(weights, weights.new_ones(()), rtol=RTOL).all():
            return MEAN, None
        return WEIGHTED, weights.to(labels.device)
    return OTHER, None


def _weights_of(loss: Loss, sizes: tuple[int, int], reference: int, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """How much each class counts in the mean (classes,), against a reference that counts 1.

    Of a pair the loss is p = (w a + b) / (w + 1), where a and b are those of the two alone: w = (p - b) / (a - p).
    """
    width, classes = sizes
    scores = torch.zeros(2, width, device=labels.device, dtype=dtype)
    scores[1, reference % width] = 3 + math.log(classes)  # this one is right, and the other says nothing: they differ
    pairs = [torch.tensor([label, reference], device=labels.device, dtype=labels.dtype) for label in range(classes)]
    b = loss(scores[1:], pairs[0][1:])
    a = torch.stack([loss(scores[:1], pair[:1]) for pair in pairs])
    p = torch.stack([loss(scores, pair) for pair in pairs])
    weights = (p - b) / (a - p)
    return torch.where(torch.isclose(p, b, rtol=1e-6), 0, weights).cpu()  # alone it is 0 / 0
