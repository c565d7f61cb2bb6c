"""The dry run of a rung: whole updates and one evaluation batch at its real shapes, on made-up images, all undone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adaptive_trainer.data.cached.gpu_transforms import DeviceBatch, fitting
from adaptive_trainer.errors import OutOfMemory
from adaptive_trainer.recipe import Recipe
from adaptive_trainer.step.undo import Undo
from adaptive_trainer.step.update import Update

DRY_RUN_UPDATES = 2  # the optimizer makes its state in the first; the second meets the full peak
Batch = tuple[Tensor, Tensor]  # images and labels


def dry_run(update: Update, sizes: Recipe, *, odd: int = 0) -> int:
    """Show that a recipe fits: whole updates and one evaluation batch at real shapes, then undo them all.

    Args:
        sizes: of the tensors that training will meet.
        odd: size of the update with the largest micro-batch, where that is no usual one: the last samples of an epoch
            are split otherwise. 0: none. Of several ranks all have one, or none.

    Returns:
        The evaluation batch size that fits: the one asked for, halved until it does.

    Raises:
        OutOfMemory: it does not fit; the state is as before.
        DeviceUnusable: the device answers nothing any more.
        RuntimeError: nothing ran.
    """
    run = _DryRun(update, sizes, odd)
    undo = Undo(run.state, run.device, on_host=True)
    before = run.state.updates
    with undo.rolled_back_on_error():
        undo.before_step()
        with update.dry_running():
            run.prepare()
            run.train()
            made = run.state.updates - before
            eval_batch = run.evaluate()
        undo.roll_back()
    if made < DRY_RUN_UPDATES:
        raise RuntimeError(f"a dry run of {DRY_RUN_UPDATES} updates made only {made}")
    return eval_batch


class _DryRun:
    """Trains and evaluates on made-up samples of given sizes."""

    def __init__(self, update: Update, sizes: Recipe, odd: int) -> None:
        self.update = update
        self.sizes, self.has_odd = sizes, odd > 0
        part = update.agreement.part
        self.whole, self.odd = part(sizes.batch_size), part(odd)
        program = update.program
        self.state, self.device = program.state, program.device

    def prepare(self) -> None:
        """Make what must be there before memory is counted."""
        scaler = self.state.scaler
        if scaler.is_enabled():  # a step that overflows is left out, and would show nothing
            scaler.scale(torch.zeros((), device=self.device))  # makes its tensors where there are none
            scaler.update(1.0)
        self.most = max(self.whole, self.odd)
        self.made_up = self._made_up(self.most)
        self.batch = self._batches(self.most)
        self.update.note_held()

    def train(self) -> None:
        whole = self.whole
        for _ in range(DRY_RUN_UPDATES):
            self.update.run(*self.batch(whole), samples=0)
        makes_copies = self.update.step_memory.may_allocate and self.update.on_cuda()
        for _ in range(2 if makes_copies else 0):  # the first makes them beside the weights, where they stay
            self.update.run(*self.batch(whole), samples=0)
        if self.has_odd:
            self.update.run(*self.batch(self.odd), samples=0)
        del self.batch  # evaluation has buffers of its own size

    def evaluate(self) -> int:
        """The largest batch that fits, of the size asked for and its halves."""
        size = self.sizes.eval_batch_size
        if size > self.most:
            self.made_up = self._made_up(size)
        while True:
            try:
                self._evaluate(size)
            except OutOfMemory:
                if size == 1:
                    raise
            else:
                return size
            size //= 2

    def _evaluate(self, size: int) -> None:
        model = self.state.model if self.state.ema is None else self.state.ema.module
        batch = self._batches(size)  # it holds what waits on the device
        self.update.evaluate(model, *batch(size))

    def _batches(self, most: int) -> Callable[[int], Batch]:
        """What gives batches of up to `most` samples: each anew, and held where the loader of training holds them.

        Raises:
            OutOfMemory: what stored images need on the device does not fit; so does what it gives.
        """
        made_up, stored = self.made_up, self.sizes.stored_size
        if not stored:
            fresh = Tensor.clone if self.device.type == "cpu" else Tensor.detach  # a card copies what it is given
            return lambda size: (fresh(made_up[0][:size]), fresh(made_up[1][:size]))
        shape = (most, self.sizes.image_size, stored)
        is_channels_last = self.sizes.channels_last
        buffers = fitting(self.device, lambda: DeviceBatch(*shape, self.device, channels_last=is_channels_last))

        def batch(size: int) -> Batch:
            images, labels = fitting(self.device, lambda: buffers.resample(size))
            for there, here in zip((images, labels), made_up, strict=True):
                there.copy_(here[:size])
            return images, labels

        return batch

    def _made_up(self, size: int) -> Batch:
        """Random images (size, 3, S, S) and labels (size,) that draw nothing from the run's own random numbers."""
        generator, side = torch.Generator().manual_seed(0), self.sizes.image_size
        images = torch.rand(size, 3, side, side, generator=generator)
        return images, torch.randint(self.sizes.num_classes, (size,), generator=generator)
