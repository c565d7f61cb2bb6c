"""What one update does, in order: micro-batches, clipping, the optimizer's step, the moving average.

This is the one description of an update. `Update` runs it so that it can be undone, a CUDA graph records it, and
`prediction.tracer` follows it on tensors without data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_trainer.data.position import micro_batches
from adaptive_trainer.errors import ConfigError
from adaptive_trainer.models.batch_norm import has_batch_norm
from adaptive_trainer.models.losses import Criterion, Loss, Terms, correct
from adaptive_trainer.recipe import Recipe
from adaptive_trainer.step.undo import TrainState
from adaptive_trainer.utils.device import AUTOCAST

Forward = Callable[[Tensor], Any]  # a network, of images
Accumulate = Callable[[Tensor, Tensor], None]  # gradients, of images and labels
Change = Callable[..., None]  # `Program.change`
# Sums the gradients over the ranks, from the denominators of the parts here, the samples, and whether the loss is a
# sum; returns whether there are any.
Gather = Callable[[list[Tensor], int, bool], bool]
See = Callable[[Tensor, Tensor], None]  # scores, of an evaluation batch, and labels


class Program:
    """The update of one state under one recipe, with nothing kept to undo it.

    Attributes:
        phase: how far it has come, in words.
        avoid_single: no forward pass of one sample where there are more, as the network has BatchNorm.
        whole: samples of the update on all ranks; None: those that it is given.
        counted: of the gradients that were made last: the denominators of the loss by parts, where it counts something
            else than samples, and whether it is a sum.
    """

    def __init__(self, state: TrainState, loss: Loss | Criterion, recipe: Recipe, device: torch.device) -> None:
        self.state = state
        self.criterion = Criterion.of(loss)
        state.loss = self.criterion.loss
        self.recipe = recipe
        self.device = device
        self.phase = "begin"
        self.foreach: bool | None = None  # torch's choice of how gradients are clipped
        self.avoid_single = has_batch_norm(state.model)
        self.whole: int | None = None
        self.counted: tuple[list[Tensor], bool] = [], False
        self._memory_format = torch.channels_last if recipe.channels_last else torch.preserve_format
        self.parameters = list(state.model.parameters())
        self._modules = list(state.model.modules())
        self._averaged = [] if state.ema is None else [module._buffers for module in state.ema.module.modules()]

    def run(
        self,
        images: Tensor,
        labels: Tensor,
        accumulate: Accumulate | None = None,
        guard: Callable[[Change], None] | None = None,
        gather: Gather | None = None,
    ) -> None:
        """The whole update on images (N, C, H, W) and labels (N,); the gradients stay.

        Args:
            accumulate: makes the gradients instead of the method of that name.
            guard: is given `change`, and calls it once what it would destroy is kept.
            gather: sums the gradients over the ranks.
        """
        self.phase = "forward"
        (accumulate or self.accumulate)(images, labels)
        if gather is not None:
            weights, is_sum = self.counted
            if not gather(weights, len(labels), is_sum):
                return
        self.clip()
        if guard is None:
            self.change()
        else:
            guard(self.change)

    def parts(self, samples: int) -> list[int]:
        """Samples in each forward pass of an update."""
        return micro_batches(samples, self.recipe.micro_batch_size, self.avoid_single)

    def accumulate(self, images: Tensor, labels: Tensor, forward: Forward | None = None) -> None:
        """Forward and backward of every micro-batch, each weighted by its share of the loss's denominator.

        Args:
            forward: is called instead of the model.
        """
        torch.clear_autocast_cache()  # within autocast of the caller's it holds weights as they were an update ago
        state = self.state
        if not all(module.training for module in self._modules):  # setting it is many times slower than looking
            state.model.train()
        total, weights, is_sum = self.whole or len(labels), list[Tensor](), False
        for part in self._split(images, labels):
            self.phase = "forward"
            x, y = self._placed(*part)
            with self._autocast():
                output = (forward or state.model)(x)
            terms = self._terms(output, y)
            self._measure(output, y, terms)
            self.phase = "backward"
            is_sum = terms.is_sum
            share = terms.share(total)
            state.scaler.scale(share).backward()  # type: ignore[no-untyped-call]
            weights += [] if terms.weight is None else [terms.weight]
        # the gradients of one part that is the whole are right
        self.counted = weights if len(weights) > 1 or len(labels) < total else [], is_sum
        if self.counted[0] and self.whole is None:  # else `gather` does, for all ranks
            correct(self.parameters, total, weights)

    def _split(self, images: Tensor, labels: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        sizes = self.parts(len(labels))
        if not sizes:
            return []
        if len(sizes) == 1:
            return [(images, labels)]
        return zip(torch.split(images, sizes), torch.split(labels, sizes), strict=True)

    def _placed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self._to_device(images), labels.to(self.device, non_blocking=True)

    def _to_device(self, images: Tensor) -> Tensor:
        return images.to(self.device, non_blocking=True, memory_format=self._memory_format)

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype, kind = AUTOCAST[self.recipe.precision], self.device.type
        if dtype is None and not torch.is_autocast_enabled(kind):  # by the caller
            return nullcontext()
        return torch.autocast(kind, dtype, enabled=dtype is not None)

    def _terms(self, output: Any, labels: Tensor) -> Terms:
        """The loss of one part."""
        self.criterion.learn(output, labels)
        with self._autocast():
            return self.criterion(output, labels)

    @torch.no_grad()
    def _measure(self, output: Any, target: Tensor, terms: Terms) -> None:
        meters = self.state.meters
        if terms.weight is not None and "weight" not in meters:
            meters["weight"] = meters["seen"].clone()
        meters["loss"].add_(terms.value, alpha=terms.factor)
        meters["seen"].add_(len(target))
        if "weight" in meters:
            meters["weight"].add_(len(target) if terms.weight is None else terms.weight)
        if is_classification(output, target):
            meters["correct"].add_((output.argmax(1) == target).sum())

    def clip(self) -> None:
        """Make the gradients those of the unscaled loss, and no longer than the recipe allows."""
        state, scaler = self.state, self.state.scaler
        self.phase = "clipping"
        if scaler.is_enabled():
            scaler.unscale_(state.optimizer)
            for overflow in scaler._found_inf_per_device(state.optimizer).values():
                state.meters["skipped"].add_(overflow)
        if self.recipe.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_grad, foreach=self.foreach)

    def change(self, entering: Callable[[], None] | None = None) -> None:
        """Step, adapt the scale, average: from the first change of a weight on, only a copy can undo it.

        Args:
            entering: is called as the optimizer's step begins, unless the scaler leaves the step out.
        """

        def enter(*_: Any) -> None:
            if entering is not None:
                entering()
            self.phase = "optimizer step"

        state = self.state
        hook = state.optimizer.register_step_pre_hook(enter)
        try:
            state.scaler.step(state.optimizer)
        finally:
            hook.remove()  # it would keep this update, and its copies, alive at the next rung
        self.phase = "optimizer step"
        state.scaler.update()
        if state.ema is not None:
            if sum(map(len, self._averaged)) != sum(len(module._buffers) for module in self._modules):
                raise ConfigError(  # it would average one tensor with another
                    "the network has made buffers since its moving average was made; make them with the network, or "
                    "use trainer.ema_decay=null"
                )
            state.ema.update(state.model, step=state.updates + 1)

    def follow_layouts(self) -> None:
        """Average what has another shape or dtype than its average anew: the two have no mean."""
        for averaged, module in zip(self._averaged, self._modules, strict=bool(self._averaged)):
            for name, value in module._buffers.items():
                mean = averaged.get(name)
                if mean is not None and value is not None and (mean.shape, mean.dtype) != (value.shape, value.dtype):
                    averaged[name] = value.detach().clone()

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, images: Tensor, labels: Tensor, see: See | None = None
    ) -> tuple[float, float, float]:
        """As `Update.evaluate`."""
        torch.clear_autocast_cache()
        y = labels.to(self.device, non_blocking=True)
        with self._autocast():
            output = model(self._to_device(images))
        with self.criterion.evaluating():
            loss, weight = self._terms(output, y).sums()
        is_scored = is_classification(output, y)
        right = float((output.argmax(1) == y).sum()) if is_scored else math.nan
        if see is not None and is_scored:
            see(output, y)
        return loss, weight, right


def is_classification(output: Any, target: Any) -> bool:
    """Whether the output is a row of scores for each label."""
    return isinstance(output, Tensor) and isinstance(target, Tensor) and output.ndim == 2 and target.ndim == 1
