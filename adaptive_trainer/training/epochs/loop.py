"""Epochs: fetch, update, evaluate, record, checkpoint. Everything it does can be taken up again where it stopped."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any

from adaptive_trainer import oom
from adaptive_trainer.data.datasets import DataSets
from adaptive_trainer.data.loader import Batch
from adaptive_trainer.data.pipeline import Pipeline
from adaptive_trainer.distributed.peers import Site, all_are_well, meet, peers, voted
from adaptive_trainer.errors import AdaptiveTrainerError, DataError, Interrupted, OutOfMemory, PeerLost, UserError
from adaptive_trainer.memory.leak import Growth
from adaptive_trainer.report.listeners import Listener
from adaptive_trainer.step.engine import Engine
from adaptive_trainer.step.undo import Undo
from adaptive_trainer.training.epochs.evaluation import Evaluation
from adaptive_trainer.training.epochs.stopping import StopSignal
from adaptive_trainer.training.epochs.watch import BrokenImages, RunningLoss, Sampling, Thrashing, finite
from adaptive_trainer.training.keeper import Keeper
from adaptive_trainer.training.session import Session
from adaptive_trainer.utils.progress import Progress

log = logging.getLogger(__name__)


@dataclass
class Loop:
    """Trains one session to its last epoch, or until memory runs out, a signal comes, or it is time to climb.

    Attributes:
        eval_batch_size: samples of an evaluation batch.
        leave: asked after each epoch: is it time to try a rung above?
        way_on: the overrides with which a run that is stopped goes on.
        leaves_thrashing: a rung that lives by flushing the allocator's cache is left for the next.
    """

    session: Session
    data: DataSets
    eval_batch_size: int
    record: Listener
    keeper: Keeper
    stop: StopSignal
    leave: Callable[[], bool] = lambda: False
    way_on: str = ""
    leaves_thrashing: bool = False
    engine: Engine = field(init=False)
    pipeline: Pipeline = field(init=False)
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        """Put together what it uses; no worker is started yet."""
        config, update = self.session.config, self.session.update
        self.device, self.capacity = self.session.capacity.device, self.session.capacity
        self._failures = 0  # beside updates, since one passed with all that belongs to it
        self.growth = Growth(self.device)  # of this rung: another one holds other tensors
        self.loss = RunningLoss(self.session)
        self.sampling = Sampling(self.session, self.record)
        self.broken = BrokenImages(self.record)
        self.thrashing = Thrashing(self.session, self.record, is_left=self.leaves_thrashing)
        trainer = config.trainer
        self.engine = Engine(update, trainer.engine, trainer.batch_size, self.record.event, trainer.epochs)
        self.pipeline = Pipeline(
            self.data, config, self.device, self.engine.beside,
            bool(config.trainer.channels_last), self.capacity.pressure, self.record.event,
        )  # fmt: skip
        self.evaluation = Evaluation(
            self.engine, self.pipeline, self.broken, self.record, self.stop, len(self.data.val), self.eval_batch_size
        )

    def run(self) -> bool:
        """Train until the last epoch is finished (True), or until `leave` says so (False).

        Raises:
            OutOfMemory: an update, or the evaluation of a single sample, does not fit, or what is done between updates;
                the state is as before it.
            DivergedError: the loss is no longer a number.
            Interrupted: a signal came; the state is saved.
            UserError: the host's memory has run out between updates, twice.
        """
        with closing(self.engine), closing(self.pipeline):
            while True:  # position and counts say where to go on
                try:
                    is_done = self._run()
                    all_are_well()
                    return is_done
                except PeerLost as error:
                    saved = "what follows the last checkpoint is lost, for an update was half done"
                    if error.is_whole:
                        self.keeper.save(self.session)
                        saved = "the state is saved" if peers().is_first else "the first rank saves, as far as it lives"
                    raise PeerLost(f"{error}; {saved}: go on with {self.way_on}") from None
                except AdaptiveTrainerError:
                    raise
                except Exception as error:
                    failure = oom.describe(error)
                    if failure.kind not in oom.OF_MEMORY:
                        raise
                    heard = voted(error, Site.RUNG)
                if peers().size > 1:  # what is done again has exchanges in it
                    meet(failure.text, heard, is_last=failure.exact or self._failures > 0)
                    self.loss.is_asked = False  # one of them may have answered already
                self._answer(failure)

    def _answer(self, failure: oom.Failure) -> None:
        """Go on after an out-of-memory in what is done beside updates, which all can be taken up again."""
        oom.release(self.device)  # after the handler, when the failed work's frames are gone
        self._failures += 1
        if failure.fills(self.device) and self.engine.make_room("training, between updates"):
            self._failures -= 1
        elif self._failures == 1 and not failure.exact:
            log.warning("out of memory between updates (%s): once more from there", failure.text)
        elif failure.fills(self.device):
            raise OutOfMemory(failure.text, phase="training, between updates")
        else:
            raise UserError(
                f"out of memory between updates, twice: {failure.text}. Close other programs, or lower "
                f"data.num_workers; then go on from the last checkpoint with {self.way_on}"
            )

    def _run(self) -> bool:
        state, epochs = self.session.state, self.session.config.trainer.epochs
        while state.finished_epochs < epochs:
            if state.position.epoch == state.finished_epochs:  # else only its evaluation is left
                self._train_epoch()
            self._finish_epoch()
            if state.finished_epochs < epochs and self.leave():
                return False
        return True

    def _train_epoch(self) -> None:
        position, trainer = self.session.state.position, self.session.config.trainer
        self.started = time.perf_counter()
        with (
            Progress(
                f"epoch {position.epoch + 1}/{trainer.epochs}:",
                position.size,
                position.cursor,
                figures=self._figures,
                later=(trainer.epochs - position.epoch - 1) * position.size,
                step=trainer.batch_size,
            ) as progress,
            closing(self.pipeline.train(position)) as batches,
        ):
            for batch in batches:
                self._train_on(batch, position.epoch, progress)

    def _figures(self) -> tuple[str, ...]:
        """Loss, accuracy, memory (now, peak, limit) and rung for the line of progress."""
        used, size = self.capacity.usage(), self.capacity.size
        sizes = (used.allocated, used.peak_allocated, *(() if size is None else (size,)))
        memory = "/".join(f"{each / 2**20:.0f}" for each in sizes) + " MiB" if used.peak_allocated else ""
        return (*self.loss.text, memory, f"rung {self.session.rung}")

    def _train_on(self, batch: Batch, epoch: int, progress: Progress) -> None:
        state, trainer, update = self.session.state, self.session.config.trainer, self.session.update
        # by samples, not by updates: a rung with another batch size goes on at the same point of the schedule
        self.session.schedule.apply(state.position.schedule_step(trainer.batch_size))
        if batch.skipped and not update.accepts(len(batch.labels)):
            batch = self.broken.without_the_last(batch)
        self.engine.run(batch.images, batch.labels, samples=batch.samples)
        log.debug("update %d is made", state.updates)
        if note := update.take_note():  # what the first update has found out about the loss
            self.record.event(note)
        if self.growth.is_due(state.updates, trainer.log_every):
            self.growth.note(state.updates, self.capacity.usage().allocated)
        if self.loss.is_asked:
            self.loss.answer()
        self.sampling.look(self.loss.last)
        progress.advance(batch.samples)
        self.broken.name(batch)
        if state.updates % trainer.log_every == 0:
            self.loss.ask()
            self.thrashing.look()
        at_end = state.position.epoch != epoch  # where the epoch's own checkpoint follows
        if trainer.checkpoint_every and state.updates % trainer.checkpoint_every == 0 and not at_end:
            self._save()
        self._stop_if_asked()
        self._failures = 0  # two failures that have an update between them are two of one each

    def _save(self) -> None:
        """A checkpoint within an epoch, of weights whose loss was a number up to now."""
        is_asked = self.loss.is_asked  # put back: the progress line is to show what it would without a checkpoint
        self.loss.ask()
        self.loss.answer()  # raises where it is no number: the last good checkpoint stays
        self.loss.is_asked = is_asked
        self.keeper.save(self.session)

    def _stop_if_asked(self) -> None:
        if name := self.stop.asked():
            self._save()
            done = f"after update {self.session.state.updates}, state saved"
            raise Interrupted(f"stopped by {name} {done}; go on with {self.way_on}")

    def _finish_epoch(self) -> None:
        """Evaluate and record, both or neither: what ends it early is as if it had not begun. Then checkpoint."""
        self.loss.is_asked, self.loss.last, self.loss.text = False, None, ()  # what follows says more
        peers().catch_up()
        row: dict[str, Any] = {}
        # a stop takes the evaluation back too: a resumed run begins it anew and ends with the same bits
        with suppress(Interrupted), Undo(self.session.state, self.device, on_host=True).rolled_back_on_error():
            row, is_best = self._record_epoch()
        if not row:  # stopped in the evaluation
            self._stop_if_asked()
        self.keeper.save(self.session, is_best=is_best)
        self.record.epoch(row, self.session.config.trainer.epochs)
        self._failures = 0

    def _record_epoch(self) -> tuple[dict[str, Any], bool]:
        state = self.session.state
        here = {name: float(value) for name, value in state.meters.items()}
        parts = peers().gathered(here)
        meters = {name: sum(part.get(name, 0.0) for part in parts) for name in here}
        meters["skipped"] = here["skipped"]  # by all ranks together
        peers().take_first(self.session.buffers)  # those of the others were counted on their own samples
        seen = meters["seen"]
        if not seen:
            raise DataError("no image of the training set can be read; repair the files, or name another data.root")
        # a loss may count weights in place of samples; with all of them 0 it is 0
        train_loss = finite("training", meters["loss"] / (meters.get("weight", seen) or 1), self.session)
        loss, accuracy = self.evaluation.run(self.session.model)
        if peers().size > 1:
            self.broken.tell()
        finite("validation", loss, self.session)  # before this epoch's weights take the place of good ones
        is_scored = not math.isnan(accuracy)
        seconds = time.perf_counter() - self.started
        allocated, reserved = self.capacity.peaks()  # since the rung was tried
        state.finished_epochs += 1
        for value in state.meters.values():
            value.zero_()
        row = {
            "epoch": state.finished_epochs,
            "updates": state.updates,
            "rung": self.session.rung,
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
        is_best = self._is_best(accuracy if is_scored else -loss, is_scored=is_scored)
        return self.keeper.figures(row, self.session), is_best  # last, as it is not taken back

    def _is_best(self, score: float, *, is_scored: bool) -> bool:
        best = self.session.state.best
        if not is_scored and best is None:
            self.record.event(
                "accuracy is not known, for the network gives no row of scores for each image: the best is the one "
                "with the least validation loss"
            )
        is_best = best is None or score > best  # of equal ones the first stays
        if is_best:
            self.session.state.best = score
        return is_best
