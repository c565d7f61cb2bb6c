"""One optimizer update as a transaction: it happens wholly, or it leaves no trace.

`Update.run` copies what the update will change, runs the micro-batches, the clipping and the step, and commits position
and counters last. On an out-of-memory everything is rolled back, what the failed update held is freed, and the same
samples are tried once more (an out-of-memory can be spurious); a second failure is raised as `OutOfMemory` for the
descent to answer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from adaptive_trainer import oom
from adaptive_trainer.data.position import Position, micro_batches
from adaptive_trainer.errors import ConfigError, DeviceUnusable, OutOfMemory
from adaptive_trainer.memory.limit import Capacity
from adaptive_trainer.models.losses import Criterion, Loss, Terms, correct
from adaptive_trainer.models.stepping import StepMemory
from adaptive_trainer.models.zoo import has_batch_norm
from adaptive_trainer.step.undo import Progress, TrainState, Undo, layout
from adaptive_trainer.utils.device import AUTOCAST

log = logging.getLogger(__name__)

T = TypeVar("T")
Accumulate = Callable[[Tensor, Tensor], None]


class Update:
    """Runs updates on one state under one recipe.

    Args:
        state: what is trained.
        loss: of (output, labels), see `losses`.
        device: where it runs.
        capacity: the memory it may use.
        micro_batch_size: most samples in one forward and backward.
        precision: `fp32`, `bf16` or `fp16`.
        clip_grad: largest gradient norm, or None.
        channels_last: give the model its images in that memory format.
    """

    def __init__(
        self,
        state: TrainState,
        loss: Loss | Criterion,
        *,
        device: torch.device,
        capacity: Capacity,
        micro_batch_size: int,
        precision: str,
        clip_grad: float | None,
        channels_last: bool = False,
    ) -> None:
        self.state = state
        self.criterion = Criterion.of(loss)
        state.loss = self.criterion.loss
        self.device = device
        self.capacity = capacity
        self.micro_batch_size = micro_batch_size
        self.precision = precision
        self.clip_grad = clip_grad
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        self.phase = "begin"
        self._forward_pass: Callable[[Tensor], Any] | None = None  # instead of the model's own
        self._accumulation: Accumulate | None = None  # instead of `accumulate`
        self.held: int | None = None  # bytes, before the updates of a proof
        self.is_proving = False
        self._token = object()  # tells the work of this update from that of another with the same shapes
        self._modules = list(state.model.modules())
        self._averaged = [] if state.ema is None else [module._buffers for module in state.ema.module.modules()]
        self._undo = Undo(state, device)
        self._undo.begin()  # its copies are made now, so that no update has to
        self._undo.end()
        self.step_memory = StepMemory(state.optimizer, self._undo.parameters, device)
        self.avoid_single = has_batch_norm(state.model)

    def run(self, images: Tensor, labels: Tensor, *, samples: int) -> None:
        """One update on images (N, C, H, W) and labels (N,), after which `samples` more count as done.

        Raises:
            OutOfMemory: it failed twice; the state is as before, bit for bit, and what it held is freed.
            DeviceUnusable: the device answers nothing any more.
            Exception: whatever is not about memory, unchanged, after a roll-back.
        """
        after = self.state.position.advance(samples)  # now, as nothing may fail between a step and its count
        if len(labels):
            self._transact("begin", self._kind(images, labels), partial(self._change_all, images, labels))
            for parameter in self._undo.parameters:
                parameter.grad = None
        self.commit(after)

    def commit(self, position: Position) -> None:
        """Count an update as done, after which training has come to this position."""
        self.state.position = position
        self.state.updates += 1

    def work(self, images: Tensor, labels: Tensor) -> None:
        """What an update does on the device, with nothing kept to undo it: what a CUDA graph records."""
        self.accumulate(images, labels)
        self._step(undoable=False)

    @contextmanager
    def calling(self, forward: Callable[[Tensor], Any] | None) -> Iterator[None]:
        """Updates inside call this function of the images instead of the model; None: the model."""
        self._forward_pass = forward
        try:
            yield
        finally:
            self._forward_pass = None

    @contextmanager
    def accumulating(self, accumulate: Accumulate) -> Iterator[None]:
        """Updates inside get their gradients from this function of images and labels instead of `accumulate`."""
        self._accumulation = accumulate
        try:
            yield
        finally:
            self._accumulation = None

    @contextmanager
    def proving(self) -> Iterator[None]:
        """Updates inside count all of their memory. What their steps do to the values of weights and optimizer state is
        the caller's to undo, until the step is known to allocate.
        """
        self.is_proving = True
        try:
            yield
        finally:
            self.held, self.is_proving = None, False
            self.step_memory.forget()
            self._undo.let_go()

    @contextmanager
    def undone(self) -> Iterator[None]:
        """What is changed inside, but for the values of weights and optimizer state, is as before afterwards."""
        self.phase = "begin"
        self._undo.begin()
        self._undo.before_step(copies=False)  # a recorded step may bind tensors that no kernel has filled
        try:
            yield
        finally:
            self._undo.roll_back()
            self._undo.end()

    def largest_part(self, samples: int) -> int:
        """Samples in the largest forward pass of an update."""
        return max(micro_batches(samples, self.micro_batch_size, self.avoid_single), default=0)

    def free_copies(self) -> None:
        """Give back the memory of the copies, which the next update makes anew."""
        self._undo.free()

    def _transact(self, phase: str, kind: Hashable, work: Callable[[], T]) -> T:
        """What the work returns, which is done wholly or leaves no trace; once more where memory runs out.

        Raises:
            OutOfMemory: it failed twice; what it held is freed.
        """
        try:
            done = self._attempt(phase, kind, work)
            if isinstance(done, oom.Failure) and not done.exact:
                log.warning("out of memory in %s (%s): rolled back, the same samples once more", self.phase, done.text)
                done = self._attempt(phase, kind, work)
        finally:
            self._undo.end()
        if isinstance(done, oom.Failure):
            raise OutOfMemory(done.text, phase=self.phase)
        return done

    def _attempt(self, phase: str, kind: Hashable, work: Callable[[], T]) -> T | oom.Failure:
        """What the work returns, or the reason why it was rolled back."""
        self.phase = phase
        try:
            self._undo.begin()
            with self.capacity.device_work(kind):
                return work()
        except BaseException as error:
            failure = oom.describe(error, pressure=self.capacity.pressure)
            if not failure.fills(self.device):
                if failure.kind is not oom.Kind.POISONED:
                    self._undo.roll_back()
                raise
        self._recover(failure)
        return failure

    def _change_all(self, images: Tensor, labels: Tensor) -> None:
        self.phase = "forward"
        (self._accumulation or self.accumulate)(images, labels)
        self._step()

    def _kind(self, images: Tensor, labels: Tensor, evaluated: nn.Module | None = None) -> Hashable:
        """What a simulated card need not count again: the same shapes, once the optimizer has made its state."""
        if self.is_proving or (evaluated is None and not self.step_memory.is_warm):
            return None
        return self._token, id(evaluated), self.micro_batch_size, layout(images), layout(labels)

    def _recover(self, failure: oom.Failure) -> None:
        if self.phase == "optimizer step" and self._undo.progress is not Progress.STEPPING:
            raise DeviceUnusable(
                "out of memory in an optimizer step whose kind allocates nothing, so no copy was kept: "
                f"{failure.text}. The weights may be half updated; go on from the last checkpoint with resume=auto"
            )
        self._undo.roll_back()
        if not oom.probe(self.device):
            raise DeviceUnusable(f"{self.device} answers nothing any more after: {failure.text}")
        oom.release(self.device, self.held)

    def accumulate(self, images: Tensor, labels: Tensor) -> None:
        """Forward and backward of every micro-batch, each weighted by its share of the loss's denominator."""
        torch.clear_autocast_cache()  # within autocast of the caller's it holds weights as they were an update ago
        state = self.state
        if not all(module.training for module in self._modules):  # setting it is many times slower than looking
            state.model.train()
        total = len(labels)
        sizes = micro_batches(total, self.micro_batch_size, self.avoid_single)
        parts = [(images, labels)]
        if len(sizes) > 1:
            parts = list(zip(torch.split(images, sizes), torch.split(labels, sizes), strict=True))
        weights = []
        for part, target in parts:
            self.phase = "forward"
            x = self._to_device(part)
            y = target.to(self.device, non_blocking=True)
            output = self._forward(x)
            terms = self._terms(output, y)
            self._measure(output, y, terms)
            self.phase = "backward"
            share = terms.share(total)
            state.scaler.scale(share).backward()  # type: ignore[no-untyped-call]
            weights += [] if terms.weight is None else [terms.weight]
        if len(weights) > 1:
            correct(self._undo.parameters, total, weights)

    def _terms(self, output: Any, labels: Tensor) -> Terms:
        """The loss of one part."""
        self.criterion.learn(output, labels)
        with self._autocast():
            return self.criterion(output, labels)

    def _to_device(self, images: Tensor) -> Tensor:
        return images.to(self.device, non_blocking=True, memory_format=self.memory_format)

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype, kind = AUTOCAST.get(self.precision), self.device.type
        if dtype is None and not torch.is_autocast_enabled(kind):  # by the caller
            return nullcontext()
        return torch.autocast(kind, dtype, enabled=dtype is not None)

    def _forward(self, x: Tensor) -> Any:
        with self._autocast():
            return (self._forward_pass or self.state.model)(x)

    @torch.no_grad()
    def _measure(self, output: Any, target: Tensor, terms: Terms) -> None:
        meters = self.state.meters
        if terms.weight is not None and "weight" not in meters:
            meters["weight"] = meters["seen"].clone()
        meters["loss"].add_(terms.value, alpha=terms.factor)
        meters["seen"].add_(len(target))
        if "weight" in meters:
            meters["weight"].add_(len(target) if terms.weight is None else terms.weight)
        if _is_classification(output, target):
            meters["correct"].add_((output.argmax(1) == target).sum())

    def _step(self, *, undoable: bool = True) -> None:
        """Clip, step, adapt the scale, average: from the first change of a weight on, only a copy can undo it."""
        state, scaler = self.state, self.state.scaler
        self.phase = "clipping"
        if scaler.is_enabled():
            scaler.unscale_(state.optimizer)
            for overflow in scaler._found_inf_per_device(state.optimizer).values():
                state.meters["skipped"].add_(overflow)
        if self.clip_grad is not None:
            nn.utils.clip_grad_norm_(self._undo.parameters, self.clip_grad)
        if self._undo.can_move:
            self._follow_layouts()
        memory = self.step_memory
        memory.look()
        if undoable and memory.may_allocate is not False:
            is_unknown = memory.may_allocate is None
            self._undo.before_step(on_host=is_unknown, copies=not (is_unknown and self.is_proving))
        if memory.is_warm and memory.may_allocate is None:
            memory.measure(self._change)
        else:
            self._change()

    def _change(self, entering: Callable[[], None] | None = None) -> None:
        """Change the weights; `entering` is called first, unless the scaler leaves the step out."""

        def enter(*_: Any) -> None:
            self.phase = "optimizer step"
            if entering is not None:
                entering()

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

    def _follow_layouts(self) -> None:
        """Average what has another shape or dtype than its average anew: the two have no mean.

        Before the step, in which no memory may be needed that was not seen.
        """
        for averaged, module in zip(self._averaged, self._modules, strict=bool(self._averaged)):
            for name, value in module._buffers.items():
                mean = averaged.get(name)
                if mean is not None and value is not None and _kind(mean) != _kind(value):
                    averaged[name] = value.detach().clone()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float, float]:
        """Sum of the loss, its denominator and number of right answers of one evaluation batch.

        The last is NaN where the output is no scores.

        Raises:
            OutOfMemory: it failed twice; what it changed is as before, and what it held is freed.
        """
        kind = self._kind(images, labels, evaluated=model)
        return self._transact("evaluation", kind, lambda: self._evaluate(model.eval(), images, labels))

    def _evaluate(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float, float]:
        torch.clear_autocast_cache()
        y = labels.to(self.device, non_blocking=True)
        with self._autocast():
            output = model(self._to_device(images))
        with self.criterion.evaluating():
            loss, weight = self._terms(output, y).sums()
        correct = float((output.argmax(1) == y).sum()) if _is_classification(output, y) else math.nan
        return loss, weight, correct


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _is_classification(output: Any, target: Any) -> bool:
    return isinstance(output, Tensor) and isinstance(target, Tensor) and output.ndim == 2 and target.ndim == 1
