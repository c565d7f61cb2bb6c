"""Losses, and how those of the parts of a batch make that of the whole.

Each part is weighted by its share of the loss's denominator: the number of samples for most losses, and another one for
those that weigh classes or leave labels out. A loss of the caller's may give its sum and denominator itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from adaptive_trainer import oom
from adaptive_trainer.config.schema import BALANCED, Config
from adaptive_trainer.errors import ConfigError
from adaptive_trainer.models.loss_kinds import NOT_MEMORY, Found, LossKind, declared, find_out, is_of_torch
from adaptive_trainer.utils.belongings import Belongings
from adaptive_trainer.utils.random import RandomStates

Loss = Callable[[Tensor, Tensor], Any]  # of (output, labels): a tensor of one number, or a pair (sum, denominator)


class CrossEntropy(nn.CrossEntropyLoss):
    """Cross entropy that refuses scores of another shape: on a CUDA device, a missing one would end the whole process.

    In evaluation mode it is the plain one, without class weights and smoothing: the same measure for any training.

    Args:
        num_classes: the least number of scores.
        label_smoothing, weight: as `nn.CrossEntropyLoss` has them.
    """

    def __init__(self, num_classes: int, label_smoothing: float = 0.0, weight: Tensor | None = None) -> None:
        super().__init__(weight, label_smoothing=label_smoothing)
        self.num_classes = num_classes
        self.counts_all = weight is None  # its labels are checked to be classes, so none is left out

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
        return super().forward(output, labels) if self.training else functional.cross_entropy(output, labels)


def build_loss(config: Config, num_classes: int, weights_of_data: Sequence[float] = ()) -> nn.Module:
    """Build the mean cross entropy of (output, labels), with `trainer.label_smoothing` and `trainer.class_weights`.

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
        """Read the sum over the samples, and its denominator."""
        return float(self.value) * self.factor, self.samples if self.weight is None else float(self.weight)

    def share(self, samples: int) -> Tensor:
        """What this part adds to the loss of an update of so many samples."""
        whole = self.samples == samples
        if self.weight is not None:
            # `correct` puts the denominator of the whole update in place of its samples, when it is known.
            return self.value * _inverse(self.weight) if whole else self.value / samples
        return self.value if whole or self.is_sum else self.value * (self.samples / samples)


@torch.no_grad()
def correct(parameters: Sequence[nn.Parameter], samples: int, weights: Sequence[Tensor]) -> None:
    """Divide the gradients of summed shares by the denominator of the whole update instead of its samples."""
    weight = torch.stack(list(weights)).sum()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_(gradients, samples * _inverse(weight))


def _inverse(weight: Tensor) -> Tensor:
    return torch.where(weight == 0, 0, 1 / weight)  # where no label counts, nothing is learned


class Criterion:
    """A loss of (output, labels), with what is known of its kind.

    Attributes:
        num_classes: labels are less; None where that is not known.
        note: what the user is to know of it, in words; empty where it is a plain mean.
    """

    def __init__(self, loss: Loss, num_classes: int | None = None) -> None:
        self.loss = loss
        self.num_classes = num_classes
        self._declared = Found(declared(loss))
        self._found: dict[bool, Found] = {}  # by mode, as a module may be another kind of loss in evaluation
        self.note = self._declared.note

    @classmethod
    def of(cls, loss: Loss, device: torch.device | None = None) -> Criterion:
        """Take the loss itself where it is one; move a loss that is a module to the device, where one is given."""
        criterion = loss if isinstance(loss, Criterion) else cls(loss)
        if device is not None and isinstance(criterion.loss, nn.Module):
            criterion.loss.to(device)
        return criterion

    @property
    def _mode(self) -> bool:
        return getattr(self.loss, "training", True) is not False

    @property
    def _known(self) -> Found:
        return self._found.get(self._mode, self._declared)

    @property
    def kind(self) -> LossKind:
        """What is known of it in its present mode."""
        return self._known.kind

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, a loss that is a module is in evaluation mode."""
        modules = list(self.loss.modules()) if isinstance(self.loss, nn.Module) else []
        modes = [module.training for module in modules]
        try:
            for module in modules:
                module.training = False
            yield
        finally:
            for module, mode in zip(modules, modes, strict=True):  # a part may be kept in evaluation mode
                module.training = mode

    def __call__(self, output: Any, labels: Tensor) -> Terms:
        """The loss of one part.

        Raises:
            ConfigError: it is neither a tensor of one number nor a pair of such.
        """
        known = self._known
        if known.weights is not None:
            return _weighed(self.loss, output, labels, known.weights.to(labels.device)[labels].sum())
        value: Any = _as_pair(self.loss, output, labels) if known.kind is LossKind.WEIGHTED else None
        if value is None:
            value = self.loss(output, labels)
        if isinstance(value, tuple) and len(value) == 2 and all(map(_is_number, value)):
            self._found[self._mode] = Found(LossKind.WEIGHTED)
            total, weight = value
            return Terms(total, len(labels), weight.detach().to(torch.promote_types(total.dtype, torch.float32)))
        if not _is_number(value):
            what = f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(
                f"the loss of a batch is a {what}, and is to be a tensor of one number, or two: (sum, denominator)"
            )
        return Terms(value, len(labels), is_sum=known.kind is LossKind.SUM)

    @torch.no_grad()
    def learn(self, output: Any, labels: Tensor) -> None:
        """Find out what kind of loss it is by its values, if that is not known; it waits for the device.

        Nothing is drawn for that, and nothing changes in a loss that is a module.
        """
        if self.kind:
            return
        random = RandomStates(labels.device)
        before = random.read(Belongings({"loss": self.loss}).generators.values())
        try:
            found = oom.attempt(
                lambda: find_out(_copy_of(self.loss), output, labels, self.num_classes), kinds=NOT_MEMORY
            )
        finally:
            random.write(before)
        if isinstance(found, oom.Failure):  # a loss may raise anything when it is copied or given made-up scores
            found = Found(LossKind.OTHER)
        if found.kind not in [known.kind for known in self._found.values()]:  # else it is said already
            self.note = found.note or self.note
        self._found[self._mode] = found


def changing_buffers(loss: Any) -> dict[str, Tensor]:
    """The buffers of a loss that its calls may change, by name: those of torch's own losses are settings."""
    if not isinstance(loss, nn.Module):
        return {}
    settings = {id(buffer) for module in loss.modules() if is_of_torch(module) for buffer in module._buffers.values()}
    return {name: buffer for name, buffer in loss.named_buffers() if id(buffer) not in settings}


def _copy_of(loss: Loss) -> Loss:
    """What may be called without changing the loss; parameters, which no loss changes, are not copied."""
    if not isinstance(loss, nn.Module):
        return loss
    return copy.deepcopy(loss, {id(parameter): parameter for parameter in loss.parameters()})


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.ndim


def _weighed(loss: Loss, output: Tensor, labels: Tensor, weight: Tensor) -> Terms:
    """The sum of a mean whose denominator was found out; of no label that counts it is 0, not 0 / 0."""
    if output.requires_grad:
        output.register_hook(lambda gradient: torch.where(weight == 0, 0, gradient))  # type: ignore[no-untyped-call]
    value = loss(output, labels)
    return Terms(torch.where(weight == 0, 0, value * weight), len(labels), weight)


def _as_pair(loss: Any, output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | None:
    """Sum and denominator of a cross entropy of torch's; None where the denominator is the samples."""
    is_plain = isinstance(loss, CrossEntropy) and not loss.training
    if is_plain or not isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) or labels.is_floating_point():
        return None  # of probabilities of classes all count
    counted = labels != loss.ignore_index
    weight = counted.sum() if loss.weight is None else (loss.weight[torch.where(counted, labels, 0)] * counted).sum()
    loss.reduction = "sum"
    try:
        return loss(output, labels), weight
    finally:
        loss.reduction = "mean"
