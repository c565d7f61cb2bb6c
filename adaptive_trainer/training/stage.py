"""One ladder, descended and trained to the end: descent and loop take turns until the last epoch is finished."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from adaptive_trainer import oom
from adaptive_trainer.config.schema import LARGEST, Config
from adaptive_trainer.distributed.peers import peers, together
from adaptive_trainer.errors import ConfigError, LadderExhausted, OutOfMemory, Stopped
from adaptive_trainer.ladder import batch_size
from adaptive_trainer.ladder.descent import Attempt, Found, Outcome, exhausted_message
from adaptive_trainer.ladder.resolve import with_batch_size, with_plan
from adaptive_trainer.ladder.rung import Rung
from adaptive_trainer.memory.leak import Growth
from adaptive_trainer.memory.usage import format_bytes
from adaptive_trainer.models.optimizers import kind_of_state
from adaptive_trainer.report.earlier import to_type
from adaptive_trainer.report.lines import figures
from adaptive_trainer.report.listeners import Candidate
from adaptive_trainer.training.epochs.loop import Loop
from adaptive_trainer.training.keeper import Keeper
from adaptive_trainer.training.parting import Parting
from adaptive_trainer.training.run import Phase, Run
from adaptive_trainer.training.rungs import Climbing, Rungs
from adaptive_trainer.training.trial import Trial, Weights
from adaptive_trainer.utils.device import name_of
from adaptive_trainer.utils.tables import table

log = logging.getLogger(__name__)


class Stage:
    """Trains one phase of a run.

    Args:
        number: which it is, from 0.
        saved: a checkpoint to go on from, or None.
        weights: what the phase before has learned, or None.
        after: name of the phase that has just ended; empty where none has.

    Attributes:
        leak: what was seen to grow from update to update, in words; empty where nothing was.
    """

    def __init__(
        self,
        phase: Phase,
        run: Run,
        number: int = 0,
        saved: dict[str, Any] | None = None,
        weights: Weights | None = None,
        after: str = "",
    ) -> None:
        self.phase, self.run, self.after = phase, run, after
        self.rungs = Rungs(phase, run, Parting(run.judge, run.parts.train_size, saved))
        self.climbing = Climbing(self.rungs, run)
        self.keeper = Keeper(run, number)
        self.trial = Trial(run, self.keeper, saved, weights, self.rungs.parting)
        self.leak = ""
        self._planned_at = -1  # updates, when memory last ran out in training

    def train(self) -> Rung[Config]:
        """Descend, train, descend again where memory runs out; return the rung that fits at the end.

        Raises:
            LadderExhausted: no rung fits.
            ConfigError: the largest batch size is asked for, and cannot be looked for.
        """
        if self.phase.settings.trainer.batch_size == LARGEST:
            self._find_batch_size()
        self.keeper.requested = self.rungs.requested()  # after the batch size is known
        saved = self.trial.saved
        is_finished = saved is not None and saved["finished_epochs"] >= self.phase.asked.trainer.epochs
        start = self.rungs.first(saved, is_finished=is_finished)
        if saved is not None and is_finished:
            return self._reopened(self.rungs.ladder[start], saved)
        del saved  # it is large, and the trial lets it go
        if self.after:
            self.keeper.keep_best(self.after)
        while True:
            rung, eval_batch = self._descend(start)
            # the ladder may have been resolved anew on the way down
            start = self.rungs.index(rung)
            loop = self._loop(rung, eval_batch)
            loop.pipeline.take_over(self.trial.take_loader())  # from here on the loop closes it
            failure, growth = None, loop.growth
            try:
                if together(loop.run, self.run.parts.device):
                    return rung
            except OutOfMemory as error:  # its words alone are kept: the error's frames hold the batch and more
                failure = (error.phase, error.reason)
            del loop  # and with it a graph's memory
            if failure is None:
                start = self._climb(rung)
            else:
                self._fail(rung, *failure, growth)
                start += 0 if self._plans_anew(rung) else 1

    def _reopened(self, rung: Rung[Config], saved: dict[str, Any]) -> Rung[Config]:
        """Enter the rung of a checkpoint with no epoch left to train, for which nothing has to be proven."""
        done, asked = saved["finished_epochs"], self.phase.asked.trainer.epochs
        self.run.record.event(f"{done} epochs are trained, and trainer.epochs={asked} asks for no more")
        rung = self.rungs.parting.parted(rung)
        # the plan of recomputation that it was trained with
        rung = replace(rung, settings=with_plan(rung.settings, saved["config"]["trainer"]["recompute"]))
        too_large = ""
        try:
            self.trial.reopen(rung)
        except OutOfMemory as error:
            too_large = str(error)
        if too_large:
            raise LadderExhausted(f"the network of the checkpoint does not fit: {too_large}")
        self.keeper.save(self.trial.opened)
        return rung

    def _climb(self, rung: Rung[Config]) -> int:
        target = self.climbing.target
        name = self.rungs.ladder[target].name
        what = "planning it anew" if name == rung.name else f"trying rung {name} above {rung.name}"
        self.run.record.event(f"there is room again: {what}")
        self.climbing.wait(self.trial.opened.state.finished_epochs)
        self.trial.is_climbing = True
        return target

    def _plans_anew(self, rung: Rung[Config]) -> bool:
        """Whether a rung that ran out of memory in training has another plan of recomputation for what is left.

        Where it ran out in the very update that the plan before was made for, the next rung is the answer.
        """
        updates = self.trial.opened.state.updates
        was, self._planned_at = self._planned_at, updates
        asked = self.rungs.ladder[self.rungs.index(rung)]
        if was == updates or self.rungs.parting.planned(asked).settings == rung.settings:
            return False
        self.run.record.event(f"rung {rung.name} is planned anew for the memory that is left, from this update on")
        return True

    def _find_batch_size(self) -> None:
        """Take the ladder of the largest batch size that fits; a resumed phase keeps the one that was found."""
        saved, capacity, most = self.trial.saved, self.run.parts.capacity, self.run.parts.train_size
        if saved is not None:
            found = batch_size.kept(saved.get("largest_batch"), saved["requested"]["batch_size"])
        elif (room := capacity.room()) is None:
            raise ConfigError(
                f"trainer.batch_size={LARGEST} needs a limit on memory, and there is none here "
                f"({capacity.description}); set memory.limit=2GiB, or give trainer.batch_size a number"
            )
        else:
            predicted = self.rungs.parting.largest_batch(self.phase.asked)
            found = batch_size.find(self._fits, predicted=predicted, most=most, room=room)
        self.rungs.settle(*found)  # it is rung 0 now, below which the ladder goes on as ever
        self.keeper.largest = found[0]

    def _fits(self, size: int) -> bool:
        """Whether a dry run of the request succeeds with this batch size. The attempt is recorded."""
        if self.run.stop.name:
            raise Stopped("no training has begun, and nothing is saved", is_term=self.run.stop.is_term)
        judge, config = self.run.judge, with_batch_size(self.phase.asked, size)
        if peers().decided(lambda: judge.refusal(config, config)):
            return False
        self.run.parts.capacity.empty_cache()  # what another size has left must not decide
        tried = Rung(f"{LARGEST}-{size}", config)  # a ladder of one: the failure of a size is an answer
        try:
            # what is predicted is recorded, and skips no size: a wrong prediction would end the search
            self.trial.descend(
                [tried], lambda rung: ("", judge.assess(rung.settings)[1]), self._attempted, is_followed=False
            )
        except LadderExhausted:
            return False
        return True

    def _descend(self, start: int) -> tuple[Rung[Config], int]:
        if start == len(self.rungs.ladder):
            raise LadderExhausted(exhausted_message(self.run.record.attempts))
        before = None if self.trial.session is None else self.trial.session.config
        found = self.trial.descend(self.rungs.down_from(start), self._assess, self._attempted)
        self.run.parts.capacity.settle()
        if self.trial.opened.is_sound:  # else the loop will end the run, and the last good state stays
            self.keeper.save(self.trial.opened)
        self._announce(found, before)
        return found.rung, found.value

    def _assess(self, rung: Rung[Config]) -> tuple[str, int | None]:
        """As `Rungs.assess`; the listeners hear of a rung that is to be tried."""
        hopeless, need = self.rungs.assess(rung)
        if not hopeless:
            session, parts = self.trial.session, self.run.parts
            before = self.rungs.ladder[0].settings if session is None else session.config
            self.run.record.candidate(
                Candidate(
                    rung.name,
                    parts.recipe(rung.settings),
                    parts.recipe(before),
                    need,
                    parts.capacity.room(),
                    self.run.judge.added_time(rung.settings),
                    0 if session is None else session.state.updates,
                    self.rungs.is_last_resort(rung),
                )
            )
        return hopeless, need

    def _announce(self, found: Found[Config, int], before: Config | None) -> None:
        rung, event = found.rung, self.run.record.event
        is_carried = before is not None and before.model == rung.settings.model
        if before and is_carried and kind_of_state(before.optimizer) != kind_of_state(rung.settings.optimizer):
            event(f"the optimizer starts anew: rung {rung.name} has one whose state is of another kind")
        whys = [change.why for change in self.rungs.changes(rung)]
        for note in rung.notes:
            if note not in whys and note not in self.run.record.events:
                log.info("rung %s: %s", rung.name, note)
        asked = self.trial.eval_batch(rung.settings)
        if found.value < asked:
            event(f"evaluation takes batches of {found.value}: {asked} at a time do not fit; training keeps its own")
        recipe = self.run.parts.recipe(rung.settings)
        log.info("rung %s fits: %s, %s", rung.name, recipe, figures(found.attempts[-1]))
        self._announce_ranks(found.attempts[-1].predicted_bytes)

    def _announce_ranks(self, predicted: int | None) -> None:
        """A table of the ranks, where there are several: part of a batch, predicted need, limit."""
        session = self.trial.opened
        part, limit = session.update.agreement.part(session.config.trainer.batch_size), session.capacity.size
        sizes = ("" if size is None else format_bytes(size) for size in (predicted, limit))
        rows = peers().gathered((str(peers().rank), str(part), *sizes, name_of(session.capacity.device)))
        if len(rows) > 1:
            log.info("%s", table([("rank", "samples", "predicted", "limit", "device"), *rows]))
        if idle := [row[0] for row in rows if row[1] == "0"]:
            size = session.config.trainer.batch_size
            self.run.record.event(
                f"of a batch of {size} no sample is left for rank {', '.join(idle)}, which does nothing: ask for a "
                "larger trainer.batch_size, fewer ranks, or other trainer.shares"
            )

    def _loop(self, rung: Rung[Config], eval_batch: int) -> Loop:
        session, run = self.trial.opened, self.run
        return Loop(
            session,
            run.data,
            eval_batch,
            run.record,
            self.keeper,
            run.stop,
            leave=lambda: self.climbing.is_due(rung, session.state.finished_epochs),
            way_on=to_type(run.record.home),
            leaves_thrashing=rung.settings.ladder.avoid_thrashing and not self.rungs.is_last(rung),
        )

    def _attempted(self, entry: Attempt) -> None:
        self.run.record.attempt(entry)
        self.climbing.note(entry)

    def _fail(self, rung: Rung[Config], phase: str, reason: str, growth: Growth) -> None:
        """Record that memory ran out in training, and look for a leak, which no rung helps against."""
        capacity = self.run.parts.capacity
        where = f"{phase}, after update {self.trial.opened.state.updates}"
        self._attempted(Attempt(rung.name, Outcome.OOM, where, reason, None, *capacity.peaks()))
        self.run.judge.forget(rung.settings)  # a dry run that passed has promised too much
        oom.release(self.run.parts.device)  # what is garbage is no leak
        text = growth.text(capacity.usage().allocated)
        if text and not self.leak:
            self.leak = text
            self.run.record.event(text)
