"""The proof of a rung: whole updates and one evaluation batch at its real shapes, on made-up images, all undone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptive_trainer import oom
from adaptive_trainer.data.cached.gpu_transforms import DeviceBatch, fitting
from adaptive_trainer.errors import OutOfMemory
from adaptive_trainer.step.undo import Undo
from adaptive_trainer.step.update import Update

PROVEN_UPDATES = 2  # the optimizer makes its state in the first; the second meets the full peak
Batch = tuple[Tensor, Tensor]  # images and labels


@dataclass(frozen=True, slots=True)
class Shapes:
    """Sizes of the tensors that training will meet: square RGB images, integer labels.

    Attributes:
        odd: samples in the update, of those that training will meet, whose largest part is the largest: the last ones
            of an epoch are split otherwise.
        stored_size: height and width of stored images (`data.cache`), of which a batch waits on the device; 0: none.
    """

    batch_size: int
    eval_batch_size: int
    image_size: int
    num_classes: int
    odd: int = 0
    stored_size: int = 0


def prove(update: Update, shapes: Shapes) -> int:
    """Show that a recipe fits: whole updates and one evaluation batch at real shapes, then undo them all.

    Returns:
        The evaluation batch size that fits: the one asked for, halved until it does.

    Raises:
        OutOfMemory: it does not fit; the state is as before.
        DeviceUnusable: the device answers nothing any more.
        RuntimeError: nothing ran.
    """
    state = update.state
    trace = Undo(state, update.device, on_host=True)
    before = state.updates
    with trace.unless_done():
        trace.before_step()
        with update.proving():
            proven, eval_batch = _prove(update, shapes)
        trace.roll_back()
    proven -= before
    if proven < PROVEN_UPDATES:
        raise RuntimeError(f"a proof of {PROVEN_UPDATES} updates committed {proven}")
    return eval_batch


def _prove(update: Update, shapes: Shapes) -> tuple[int, int]:
    """Count of updates afterwards, and the evaluation batch size that fits."""
    scaler = update.state.scaler
    if scaler.is_enabled():  # a step that overflows is left out, and would prove nothing
        scaler.scale(torch.zeros((), device=update.device))  # makes its tensors where there are none
        scaler.update(1.0)
    made_up = _made_up(max(shapes.batch_size, shapes.odd), shapes)
    _prove_updates(update, shapes, made_up)
    return update.state.updates, _prove_evaluation(update, shapes, made_up)


def _prove_updates(update: Update, shapes: Shapes, made_up: Batch) -> None:
    batch = _batches(update, shapes, made_up, max(shapes.batch_size, shapes.odd))
    update.held = oom.held(update.device)
    for _ in range(PROVEN_UPDATES):
        update.run(*batch(shapes.batch_size), samples=0)
    makes_copies = update.step_memory.may_allocate and update.device.type == "cuda"
    for _ in range(2 if makes_copies else 0):  # the first makes them beside the weights, where they stay
        update.run(*batch(shapes.batch_size), samples=0)
    if update.largest_part(shapes.odd) > update.largest_part(shapes.batch_size):
        update.run(*batch(shapes.odd), samples=0)


def _prove_evaluation(update: Update, shapes: Shapes, made_up: Batch) -> int:
    size = shapes.eval_batch_size
    if size > len(made_up[1]):
        made_up = _made_up(size, shapes)
    while True:
        try:
            _evaluate(update, shapes, made_up, size)
        except OutOfMemory:
            if size == 1:
                raise
        else:
            return size
        size //= 2


def _evaluate(update: Update, shapes: Shapes, made_up: Batch, size: int) -> None:
    model = update.state.model if update.state.ema is None else update.state.ema.module
    batch = _batches(update, shapes, made_up, size)  # it holds what waits on the device
    update.evaluate(model, *batch(size))


def _batches(update: Update, shapes: Shapes, made_up: Batch, most: int) -> Callable[[int], Batch]:
    """What gives batches of up to `most` samples: each anew, and held where the loader of training holds them.

    Raises:
        OutOfMemory: what stored images need on the device does not fit; so does what it gives.
    """
    if not shapes.stored_size:
        fresh = Tensor.clone if update.device.type == "cpu" else Tensor.detach  # a card copies what it is given
        return lambda size: (fresh(made_up[0][:size]), fresh(made_up[1][:size]))
    is_channels_last = update.memory_format == torch.channels_last
    sizes = (most, shapes.image_size, shapes.stored_size)
    buffers = fitting(update.device, lambda: DeviceBatch(*sizes, update.device, channels_last=is_channels_last))

    def batch(size: int) -> Batch:
        images, labels = fitting(update.device, lambda: buffers.resample(size))
        for there, here in zip((images, labels), made_up, strict=True):
            there.copy_(here[:size])
        return images, labels

    return batch


def _made_up(size: int, shapes: Shapes) -> Batch:
    """Random images (size, 3, S, S) and labels (size,) that draw nothing from the run's own random numbers."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(size, 3, shapes.image_size, shapes.image_size, generator=generator)
    return images, torch.randint(shapes.num_classes, (size,), generator=generator)
