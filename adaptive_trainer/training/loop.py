"""Epochs: fetch, update, evaluate, record, checkpoint. Everything it does can be taken up again where it stopped."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from adaptive_trainer import oom
from adaptive_trainer.data.datasets import DataSets
from adaptive_trainer.data.loader import Batch
from adaptive_trainer.data.pipeline import Pipeline, worker_deaths_deferred
from adaptive_trainer.errors import (
    AdaptiveTrainerError,
    DataError,
    DivergedError,
    Interrupted,
    OutOfMemory,
    UserError,
)
from adaptive_trainer.memory.leak import Growth
from adaptive_trainer.step.engine import Engine
from adaptive_trainer.step.undo import Undo
from adaptive_trainer.training.session import Session
from adaptive_trainer.utils.progress import Progress
from adaptive_trainer.utils.screen import duration

log = logging.getLogger(__name__)

OF_MEMORY = (oom.Kind.DEVICE, oom.Kind.HOST, oom.Kind.WORKER)
UPDATES_PER_FLUSH = 5  # a cache that is flushed this often or more is thrashing


class StopSignal:
    """Ctrl-C and SIGTERM become a request to stop after the running update; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.name = ""

    @contextmanager
    def listening(self) -> Iterator[StopSignal]:
        """Listen while the block runs, in the main thread (elsewhere Python takes no signals); then restore."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


class _Loss:
    """The mean training loss: asked for after one update and read after the next, so that a card need not wait."""

    def __init__(self, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        self.is_asked = False
        self.asked_after = 0
        self._sums = torch.zeros(2, dtype=torch.float64, pin_memory=on_cuda)
        self._copied = torch.cuda.Event() if on_cuda else None  # type: ignore[no-untyped-call]

    def ask(self, meters: dict[str, Tensor], updates: int) -> None:
        self.asked_after = updates
        for there, here in zip(self._sums, (meters["loss"], meters.get("weight", meters["seen"])), strict=True):
            there.copy_(here, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self.is_asked = True

    def answer(self) -> float:
        if self._copied is not None:
            self._copied.synchronize()
        self.is_asked = False
        loss, weight = self._sums.tolist()
        return float(loss / (weight or 1))


@dataclass(frozen=True)
class Hooks:
    """What the loop tells others.

    Attributes:
        checkpoint: save the state; True when it is the best so far.
        metrics: one row an epoch.
        event: something was decided, in words, for the record.
        leave: asked after each epoch: is it time to try a rung above?
        way_on: the overrides with which a run that is stopped goes on.
    """

    checkpoint: Callable[[bool], None]
    metrics: Callable[[dict[str, Any]], None]
    event: Callable[[str], None]
    leave: Callable[[], bool]
    way_on: str


@dataclass
class Loop:
    """Trains one session to its last epoch, or until memory runs out, a signal comes, or it is time to climb."""

    session: Session
    data: DataSets
    device: torch.device
    rung: str
    eval_batch_size: int
    hooks: Hooks
    stop: StopSignal
    avoid_thrashing: bool = False
    engine: Engine = field(init=False)
    pipeline: Pipeline = field(init=False)
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        """Put together what it uses; no worker is started yet."""
        config = self.session.config
        self.capacity = self.session.update.capacity
        self._flushes = self.session.state.updates, self.capacity.usage().num_alloc_retries
        self._has_warned = self._has_left_one = False
        self._broken: set[str] = set()  # images that were named
        self._failures = 0  # beside updates, since one passed with all that belongs to it
        self._loss = _Loss(self.device)
        self.growth = Growth(self.device)
        self.engine = Engine(self.session.update, config.trainer.engine, config.trainer.batch_size, self.hooks.event)
        data = replace(self.data, config=config.data)
        self.pipeline = Pipeline(
            data, config, self.device, self.engine.beside_graph, bool(config.trainer.channels_last),
            self.capacity.pressure, self.hooks.event,
        )  # fmt: skip

    def run(self) -> bool:
        """Train until the last epoch is finished (True), or until `hooks.leave` says so (False).

        Raises:
            OutOfMemory: an update, or the evaluation of a single sample, does not fit, or what is done between updates;
                the state is as before it.
            DivergedError: the loss is no longer a number.
            Interrupted: a signal came; the state is saved.
            UserError: the host's memory has run out between updates, twice.
        """
        with worker_deaths_deferred(), closing(self.pipeline):
            while True:
                try:
                    return self._run()
                except Exception as error:
                    failure = oom.describe(error)
                    if isinstance(error, AdaptiveTrainerError) or failure.kind not in OF_MEMORY:
                        raise
                self._answer(failure)

    def _answer(self, failure: oom.Failure) -> None:
        """Go on after an out-of-memory in what is done beside updates, which all can be taken up again."""
        oom.release(self.device)
        self._failures += 1
        if self._failures == 1 and not failure.exact:
            log.warning("out of memory between updates (%s): once more from there", failure.text)
        elif failure.fills(self.device):
            raise OutOfMemory(failure.text, phase="training, between updates")
        else:
            raise UserError(
                f"out of memory between updates, twice: {failure.text}. Close other programs, or lower "
                f"data.num_workers; then go on from the last checkpoint with {self.hooks.way_on}"
            )

    def _run(self) -> bool:
        state = self.session.state
        if state.finished_epochs >= self.session.config.trainer.epochs:
            asked = self.session.config.trainer.epochs
            self.hooks.event(f"{state.finished_epochs} epochs are trained, and trainer.epochs={asked} asks for no more")
        while state.finished_epochs < self.session.config.trainer.epochs:
            if state.position.epoch == state.finished_epochs:
                self._train_epoch()
            self._finish_epoch()
            if self.hooks.leave():
                return False
        return True

    def _train_epoch(self) -> None:
        state, trainer = self.session.state, self.session.config.trainer
        epoch = state.position.epoch
        self.started = time.perf_counter()
        what = f"epoch {epoch + 1}/{trainer.epochs}:"
        with (
            Progress(what, state.position.size, state.position.cursor) as progress,
            closing(self.pipeline.train(state.position)) as batches,
        ):
            for batch in batches:
                self._train_on(batch, epoch, progress)

    def _train_on(self, batch: Batch, epoch: int, progress: Progress) -> None:
        """One update, and what is due after it."""
        state, trainer = self.session.state, self.session.config.trainer
        self.session.schedule.apply(state.position.schedule_step(trainer.batch_size))
        if batch.skipped and not self.session.update.accepts(len(batch.labels)):
            batch = self._without_the_last(batch)
        self.engine.run(batch.images, batch.labels, samples=batch.samples)
        self._tell_kind_of_loss()
        if self.growth.is_due(state.updates, trainer.log_every):
            self.growth.note(state.updates, self.capacity.usage().allocated)
        if self._loss.is_asked:
            progress.note(f"loss {self._read_loss():.3f}")
        progress.advance(batch.samples)
        self._tell_broken(batch)
        if state.updates % trainer.log_every == 0:
            self._loss.ask(state.meters, state.updates)
            self._watch_for_thrashing()
        at_end = state.position.epoch != epoch
        if trainer.checkpoint_every and state.updates % trainer.checkpoint_every == 0 and not at_end:
            self._save()
        self._stop_if_asked()
        self._failures = 0

    def _tell_kind_of_loss(self) -> None:
        """Once, what the first update has found out."""
        if note := self.session.update.take_note():
            self.hooks.event(note)

    def _without_the_last(self, batch: Batch) -> Batch:
        """The batch with no sample, where broken ones have left BatchNorm a single one."""
        if not self._has_left_one:
            self._has_left_one = True
            self.hooks.event(
                f"of a batch of {batch.samples}, broken images have left one, and BatchNorm cannot train on one"
            )
        return batch._replace(images=batch.images[:0], labels=batch.labels[:0])

    def _tell_broken(self, batch: Batch) -> None:
        """Name the images of a batch that were left out, each once, three at a time."""
        broken = [name for name in batch.skipped if name not in self._broken]
        if broken:
            self._broken.update(broken[:3])
            what = "1 broken image is" if len(broken) == 1 else f"{len(broken)} broken images are"
            self.hooks.event(f"{what} left out: {', '.join(broken[:3])}")

    def _watch_for_thrashing(self) -> None:
        """Whether the allocator had to flush its cache again and again since the last look: it works, but slowly.

        Raises:
            OutOfMemory: it did, and such a rung is to be left for the next.
        """
        updates = self.session.state.updates
        retries = self.capacity.usage().num_alloc_retries
        (since, before), self._flushes = self._flushes, (updates, retries)
        flushes = retries - before
        if flushes * UPDATES_PER_FLUSH < updates - since or updates == since or flushes < 2:
            return
        text = f"the allocator flushed its cache {flushes} times in {updates - since} updates"
        if self.avoid_thrashing:
            raise OutOfMemory(f"{text} and ladder.avoid_thrashing is on", phase="training")
        if not self._has_warned:
            self._has_warned = True
            self.hooks.event(
                f"rung {self.rung} fits, but {text}, which is slow; ladder.avoid_thrashing=true steps down"
            )

    def _read_loss(self) -> float:
        loss = self._loss.answer()
        self._check_number("training", loss, self._loss.asked_after)
        return loss

    def _save(self) -> None:
        """A checkpoint within an epoch, of weights whose loss was a number up to now."""
        is_to_be_told = self._loss.is_asked
        self._loss.ask(self.session.state.meters, self.session.state.updates)
        self._read_loss()
        self._loss.is_asked = is_to_be_told
        self.hooks.checkpoint(False)

    def _stop_if_asked(self) -> None:
        if self.stop.name:
            self._save()
            raise self._interrupted()

    def _interrupted(self) -> Interrupted:
        updates = self.session.state.updates
        return Interrupted(
            f"stopped by {self.stop.name} after update {updates}, state saved; go on with {self.hooks.way_on}"
        )

    def _finish_epoch(self) -> None:
        """Evaluate and record, both or neither: what ends it early is as if it had not begun. Then checkpoint."""
        self._loss.is_asked = False  # what follows says more
        row: dict[str, Any] = {}
        with suppress(Interrupted), Undo(self.session.state, self.device, on_host=True).unless_done():
            row, is_best = self._record_epoch()
        if not row:
            self._stop_if_asked()
        self.hooks.checkpoint(is_best)
        self._tell_epoch(row)
        self._failures = 0

    def _record_epoch(self) -> tuple[dict[str, Any], bool]:
        """Its row of figures, and whether it is the best so far."""
        state = self.session.state
        meters = {name: float(value) for name, value in state.meters.items()}
        seen = meters["seen"]
        if not seen:
            raise DataError("no image of the training set can be read; repair the files, or name another data.root")
        train_loss = meters["loss"] / (meters.get("weight", seen) or 1)
        self._check_number("training", train_loss)
        loss, accuracy = self.evaluate()
        self._check_number("validation", loss)
        is_scored = not math.isnan(accuracy)
        seconds = time.perf_counter() - self.started
        allocated, reserved = self.capacity.peaks()
        state.finished_epochs += 1
        for value in state.meters.values():
            value.zero_()
        row = {
            "epoch": state.finished_epochs,
            "updates": state.updates,
            "rung": self.rung,
            "lr": state.optimizer.param_groups[0]["lr"],
            "train_loss": train_loss,
            "train_accuracy": meters["correct"] / seen if is_scored else math.nan,
            "val_loss": loss,
            "val_accuracy": accuracy,
            "skipped_updates": int(meters["skipped"]),
            "peak_allocated_bytes": allocated,
            "peak_reserved_bytes": reserved,
            "seconds": round(seconds, 3),
        }
        score = accuracy if is_scored else -loss
        is_best = state.best is None or score > state.best
        if not is_scored and state.best is None:
            self.hooks.event(
                "accuracy is not known, for the network gives no row of scores for each image: the best is the one "
                "with the least validation loss"
            )
        if is_best:
            state.best = score
        self.hooks.metrics(row)  # last, as it is not taken back
        return row, is_best

    def _tell_epoch(self, row: dict[str, Any]) -> None:
        epoch, epochs, accuracy = row["epoch"], self.session.config.trainer.epochs, row["val_accuracy"]
        left = f", {duration(row['seconds'] * (epochs - epoch))} left" if epoch < epochs else ""
        log.info(
            "epoch %d/%d: loss %.3f, val loss %.3f, val accuracy %s, %s%s",
            epoch, epochs, row["train_loss"], row["val_loss"],
            "unknown" if math.isnan(accuracy) else f"{100 * accuracy:.2f} %", duration(row["seconds"]), left,
        )  # fmt: skip

    def _check_number(self, kind: str, loss: float, update: int | None = None) -> None:
        if math.isfinite(loss):
            return
        precision = self.session.config.trainer.precision
        blame = ""
        if precision == "fp16":
            blame = (
                f" fp16 overflows at 65504, and rung {self.rung!r} trains in it: try trainer.precision=bf16 or fp32."
            )
        raise DivergedError(
            f"the {kind} loss is {loss} after update {update or self.session.state.updates}.{blame} "
            f"A lower optimizer.lr (now {self.session.config.optimizer.lr:g}) or trainer.clip_grad=1 often helps"
        )

    def evaluate(self) -> tuple[float, float]:
        """Mean loss and share of right answers on the validation set, of the moving average where there is one.

        The share is NaN where the network's output is not a row of scores for each image.

        A batch that does not fit is halved for evaluation alone.

        Raises:
            OutOfMemory: a single sample does not fit.
            DataError: no sample can be read.
            Interrupted: a signal came; nothing is saved yet.
        """
        total = len(self.data.val)
        loss, weight, correct, done, seen = 0.0, 0.0, 0.0, 0, 0
        with Progress("evaluation:", total) as progress:
            while done < total:
                batch, size = None, min(self.eval_batch_size, total - done)
                try:
                    with closing(self.pipeline.evaluate(self.eval_batch_size, done)) as batches:
                        for batch in batches:
                            self._tell_broken(batch)
                            sums = self._evaluate_batch(batch)
                            loss, weight, correct = loss + sums[0], weight + sums[1], correct + sums[2]
                            done, seen = done + batch.samples, seen + len(batch.labels)
                            size = min(self.eval_batch_size, total - done)
                            progress.advance(batch.samples)
                            if self.stop.name:
                                raise self._interrupted()
                except OutOfMemory:
                    if size == 1:
                        raise
                else:
                    continue
                self._halve_evaluation(size)
        if not seen:
            raise DataError("no image of the validation set can be read; repair the files, or name another data.root")
        if not weight:
            raise DataError("the loss counts no label of the validation set: all have the weight 0")
        return loss / weight, correct / seen

    def _evaluate_batch(self, batch: Batch) -> tuple[float, float, float]:
        """Sums over one batch."""
        if not len(batch.labels):
            return 0.0, 0.0, 0.0
        state = self.session.state
        model = state.model if state.ema is None else state.ema.module
        return self.engine.evaluate(model, batch.images, batch.labels)

    def _halve_evaluation(self, size: int) -> None:
        smaller = max(1, size // 2)
        self.hooks.event(
            f"out of memory in evaluation: its batch {self.eval_batch_size} -> {smaller}; training keeps its own"
        )
        self.eval_batch_size = smaller
