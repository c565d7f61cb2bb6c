"""The evaluation at the end of an epoch: the validation set in order, with a batch of its own."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field

from torch import nn

from adaptive_trainer.data.pipeline import LOADING, Pipeline
from adaptive_trainer.data.position import shares
from adaptive_trainer.distributed.peers import Site, Status, peers
from adaptive_trainer.errors import DataError, Interrupted, OutOfMemory
from adaptive_trainer.report.listeners import Listener
from adaptive_trainer.step.engine import Engine
from adaptive_trainer.training.epochs.answers import Gathered
from adaptive_trainer.training.epochs.stopping import StopSignal
from adaptive_trainer.training.epochs.watch import BrokenImages
from adaptive_trainer.utils.progress import Progress


@dataclass
class Evaluation:
    """Evaluates networks on the validation set.

    Attributes:
        total: samples of the validation set.
        batch_size: samples at a time; it is halved where they do not fit.
    """

    engine: Engine
    pipeline: Pipeline
    broken: BrokenImages
    record: Listener
    stop: StopSignal
    total: int
    batch_size: int
    _done: int = field(init=False, default=0)
    _seen: int = field(init=False, default=0)
    _sums: tuple[float, float, float] = field(init=False, default=(0.0, 0.0, 0.0))
    _gathered: Gathered = field(init=False, default_factory=Gathered)

    def run(self, model: nn.Module) -> tuple[float, float]:
        """Mean loss and share of right answers; the share is NaN where the output is no row of scores for each image.

        Raises:
            OutOfMemory: a single sample does not fit.
            DataError: no sample can be read.
            Interrupted: a signal came; nothing is saved.
        """
        self._done, self._seen, self._sums = 0, 0, (0.0, 0.0, 0.0)
        self._gathered = Gathered()
        with Progress("evaluation:", self.total) as progress:
            while self._done < self.total:
                try:
                    self._go_on(model, progress)
                except OutOfMemory as error:
                    if error.phase == LOADING:  # the other ranks evaluate their part
                        peers().vote(Site.EVALUATION, Status.FAILED_FOR_GOOD)
                    if self._size == 1:  # of a last batch too: halving the usual size would not help it
                        raise
                else:
                    continue
                self._halve()  # after the handler, when what the batch held is free
        parts = peers().gathered((*self._sums, self._seen))
        loss, weight, correct, seen = map(sum, zip(*parts, strict=True))
        if not seen:
            raise DataError("no image of the validation set can be read; repair the files, or name another data.root")
        if not weight:  # class weights of 0, or labels that the loss ignores
            raise DataError("the loss counts no label of the validation set: all have the weight 0")
        if (answers := Gathered.of(peers().gathered(self._gathered)).answers()) is not None:
            self.record.answers(answers)
        return loss / weight, correct / seen

    def _go_on(self, model: nn.Module, progress: Progress) -> None:
        """From the first sample that is not done yet."""
        # a generator: closed, it ends the data workers of the size that did not fit
        with closing(self.pipeline.evaluate(self.batch_size, self._done)) as batches:
            for batch in batches:
                self.broken.name(batch)
                if len(batch.labels) or peers().size > 1:  # else all of its images are broken
                    more = self.engine.evaluate(model, batch.images, batch.labels, self._gathered.see)
                    before = shares(batch.samples, (1,) * peers().size, avoid_single=False)[: peers().rank]
                    self._gathered.keep(batch, self._done + sum(before))
                    self._sums = tuple(a + b for a, b in zip(self._sums, more, strict=True))  # type: ignore[assignment]
                self._done += batch.samples  # only now: a batch that fails is evaluated again, in smaller ones
                self._seen += len(batch.labels)
                progress.advance(batch.samples)
                if name := self.stop.asked():
                    raise Interrupted(f"stopped by {name} in evaluation")

    @property
    def _size(self) -> int:
        return min(self.batch_size, -(-(self.total - self._done) // peers().size))

    def _halve(self) -> None:
        smaller = max(1, self._size // 2)
        self.record.event(
            f"out of memory in evaluation: its batch {self.batch_size} -> {smaller}; training keeps its own"
        )
        self.batch_size = smaller
