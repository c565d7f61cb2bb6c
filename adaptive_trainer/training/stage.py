"""One ladder, descended and trained to the end: descent and loop take turns until the last epoch is finished."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor, nn

from adaptive_trainer import oom
from adaptive_trainer.checkpoints import checkpoint
from adaptive_trainer.checkpoints.resume import take_up
from adaptive_trainer.config.schema import LARGEST, Config
from adaptive_trainer.data.datasets import DataSets
from adaptive_trainer.data.preprocessing import remark
from adaptive_trainer.errors import CheckpointError, ConfigError, Interrupted, LadderExhausted, OutOfMemory
from adaptive_trainer.ladder import batch_size
from adaptive_trainer.ladder.descent import Attempt, Found, Outcome, descend, exhausted_message, outcomes
from adaptive_trainer.ladder.resolve import DEFAULT_BATCH, changes, recipe, resolve, with_batch_size
from adaptive_trainer.ladder.rung import Change, Rung
from adaptive_trainer.memory.leak import Growth
from adaptive_trainer.models.batch_norm import has_batch_norm
from adaptive_trainer.models.optimizers import kind_of_state
from adaptive_trainer.planning.cache import Measurement
from adaptive_trainer.planning.judge import Judge
from adaptive_trainer.planning.refusals import single_sample
from adaptive_trainer.recipe import Recipe
from adaptive_trainer.report.earlier import way_on
from adaptive_trainer.report.record import Record
from adaptive_trainer.report.summary import brief, change_text
from adaptive_trainer.step.dry_run import prove
from adaptive_trainer.training.loop import Hooks, Loop, StopSignal
from adaptive_trainer.training.session import Parts, Session, enter, settle

log = logging.getLogger(__name__)

KEPT_WITH_THE_BEST = ("config", "rung", "stage", "num_classes", "classes", "best", "made_buffers")
Assess = Callable[[Rung[Config]], tuple[str, int | None]]


@dataclass
class Stage:
    """Trains under a ladder.

    Attributes:
        ladder: the rungs that the settings stand for. What a network refuses is left out when a descent comes to it.
        number: which stage of the run it is, from 0.
        saved: a checkpoint to go on from, or None.
        largest: the batch size that `max` has come to, or None where a number was asked for.
        why: the reason for that size.
        leak: what was seen to grow from update to update, in words; empty where nothing was.
        weights: what `weights_learned` of the stage before gave, or None.
        after: name of the stage that has just ended; empty where none has.
        accepted: called once the checkpoint is known to fit, or to be left: then the record of an earlier run may go.
    """

    ladder: Sequence[Rung[Config]]
    settings: DictConfig
    parts: Parts
    data: DataSets
    record: Record
    stop: StopSignal
    judge: Judge
    number: int = 0
    saved: dict[str, Any] | None = None
    weights: tuple[Any, dict[str, Any], list[str]] | None = None
    after: str = ""
    accepted: Callable[[], Any] = lambda: None
    largest: int | None = None
    why: str = ""
    leak: str = ""
    session: Session | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    _room: dict[str, int | None] = field(default_factory=dict)
    _looked_at: int = 0  # the lowest rung whose overrides were offered to the network
    _refused: dict[str, dict[str, str]] = field(default_factory=dict)  # by rung and settings, with the reason
    _wait: int = 1
    _climb_at: int = 0
    _is_climbing: bool = False
    _earlier: Measurement | None = None  # of an earlier proof, which was not made again
    _since: int = field(init=False)  # attempts of earlier stages

    def __post_init__(self) -> None:
        """Remember where its own attempts begin."""
        self._since = len(self.record.attempts)

    def run(self) -> Rung[Config]:
        """Descend, train, descend again where memory runs out; returns the rung that fits at the end.

        Raises:
            LadderExhausted: no rung fits.
        """
        start = self._first()
        if self.after:
            self._keep_best(self.after)
        while True:
            rung, eval_batch = self._descend(start)
            start = self.ladder.index(rung)
            failure, loop = None, self._loop(rung, eval_batch)
            growth = loop.growth
            try:
                if loop.run():
                    return rung
                start = self._above(start)
                self.record.event(f"there is room again: trying rung {self.ladder[start].name} above {rung.name}")
                self._climb_at = self._opened.state.finished_epochs + 2 * self._wait
                self._wait *= 2
                self._is_climbing = True
            except OutOfMemory as error:
                failure = (error.phase, error.reason)
            del loop  # and with it a graph's memory
            if failure is not None:
                self._failed_in_training(rung, *failure)
                self.judge.forget(rung.settings)
                self._look_for_leak(growth)
                start += 1

    def find_batch_size(self) -> None:
        """Give the stage the ladder of the largest batch size; a resumed stage keeps the one that was found.

        Raises:
            ConfigError: nothing limits the memory, or the run that is resumed has a batch size already.
        """
        config, most, room = self.ladder[0].settings, self.parts.train_size, self.parts.capacity.room()
        if self.saved is not None:
            found = batch_size.kept(self.saved.get("largest_batch"), self.saved["requested"]["batch_size"])
        elif room is None:
            raise ConfigError(
                f"trainer.batch_size={LARGEST} needs a limit on memory, and there is none here "
                f"({self.parts.capacity.description}); set memory.limit=2GiB, or give trainer.batch_size a number"
            )
        else:
            predicted = self.judge.largest_batch(config, most)
            found = batch_size.find(self._fits, predicted=predicted, most=most, room=room)
        self.largest, self.why = found
        self.ladder = self.parts.prepare(resolve(self.settings, *found))
        for note in self.ladder[0].notes:
            self.record.event(note)

    def _fits(self, size: int) -> bool:
        """Whether the request is proven with this batch size. The attempt is recorded.

        Raises:
            Interrupted: a signal has come.
        """
        if self.stop.name:
            raise Interrupted(f"stopped by {self.stop.name} before training began; start again")
        config = with_batch_size(self.ladder[0].settings, size)
        if self.judge.refusal(config, config):
            return False
        self.parts.capacity.empty_cache()  # what another size has left must not decide
        try:
            tried = Rung(f"{LARGEST}-{size}", config)
            self._go_down([tried], lambda rung: ("", self.judge.assess(rung.settings)[1]))
        except LadderExhausted:
            return False
        return True

    def _first(self) -> int:
        """The rung to begin with: the saved one; one further up when more is asked for, or there is more memory.

        Raises:
            CheckpointError: the ladder has no rung with the saved model.
        """
        saved = self.saved
        if saved is None:
            return 0
        possible = [i for i, rung in enumerate(self.ladder) if asdict(rung.settings.model) == saved["config"]["model"]]
        if not possible:
            raise CheckpointError(
                f"the checkpoint holds the model {saved['config']['model']} and no rung of the ladder trains it; "
                "ask for that model, or start anew with resume=null"
            )
        grown = (self.parts.capacity.size or 0) > (saved["capacity"] or 0)
        if saved["requested"] == self._asked() and not grown:
            return next((i for i in possible if self.ladder[i].name == saved["rung"]), possible[0])
        return possible[0]

    def _asked(self) -> dict[str, Any]:
        """What decides the memory that the request needs."""
        asked = recipe(self.ladder[0].settings).reported()
        return {key: asked[key] for key in asked if key not in ("lr", "num_workers", "tf32")}

    def _descend(self, start: int) -> tuple[Rung[Config], int]:
        if start == len(self.ladder):
            raise LadderExhausted(exhausted_message(self.record.attempts))
        before = None if self.session is None else self.session.config
        found = self._go_down(map(self._rung, range(start, len(self.ladder))), self._assess)
        if self._is_sound:
            self._checkpoint(False)
        self._tell_new_optimizer(before, found.rung)
        changed = self.changes(found.rung)
        for change in changed:
            log.info("changed: %s", change_text(change))
        for note in found.rung.notes:
            if note not in [change.why for change in changed] and note not in self.record.events:
                log.info("rung %s: %s", found.rung.name, note)
        asked = self._eval_batch(found.rung.settings)
        if found.value < asked:
            self.record.event(
                f"evaluation takes batches of {found.value}: {asked} at a time do not fit; training keeps its own"
            )
        log.info("rung %s fits: %s", found.rung.name, self.parts.recipe(found.rung.settings))
        return found.rung, found.value

    def changes(self, rung: Rung[Config], asked: Config | None = None) -> list[Change]:
        """What `rung` sets otherwise than was asked for, by default than the first rung, and why."""
        above = outcomes(self.ladder[: self.ladder.index(rung)], self.record.attempts[self._since :])
        return changes(asked or self.ladder[0].settings, rung, above)

    def _tell_new_optimizer(self, before: Config | None, rung: Rung[Config]) -> None:
        asked = rung.settings
        is_kept = before is None or kind_of_state(before.optimizer) == kind_of_state(asked.optimizer)
        if before is not None and before.model == asked.model and not is_kept:
            self.record.event(f"the optimizer starts anew: rung {rung.name} has one whose state is of another kind")

    def _rung(self, number: int) -> Rung[Config]:
        """A rung of the ladder, without the overrides that its network refuses, there and above."""
        while self._looked_at < number:
            self._looked_at += 1
            above, rung = self.ladder[self._looked_at - 1 : self._looked_at + 1]
            if rung.passed_over or not self.judge.refusal(above.settings, rung.settings):
                continue
            self._refused[rung.name] = {}
            rungs = self.parts.prepare(resolve(self.settings, self.largest or DEFAULT_BATCH, self.why, self._refuse))
            self.ladder = (*self.ladder[: self._looked_at], *rungs[self._looked_at :])
            rung = self.ladder[self._looked_at]
            reasons = tuple(filter(None, self._refused[rung.name].values()))
            for note in () if rung.passed_over else rung.notes:
                if note.endswith(reasons):
                    self.record.event(f"rung {rung.name}: {note}")
        return self.ladder[number]

    def _refuse(self, name: str, above: Config, config: Config) -> str:
        """As `Judge.refusal`, of rungs that were found to be refused; the answer stays what it was."""
        known = self._refused.get(name)
        if known is None:
            return ""
        key = repr(config)
        if key not in known:
            known[key] = self.judge.refusal(above, config)
        return known[key]

    def _go_down(self, rungs: Iterable[Rung[Config]], assess: Assess) -> Found[Config, int]:
        """Descend, and remember how it went, but for what fails later, in training: that says too little of a rung."""
        settings: dict[str, Config] = {}

        def noted() -> Iterator[Rung[Config]]:
            for rung in rungs:
                settings[rung.name] = rung.settings
                yield rung

        def attempted(entry: Attempt) -> None:
            if entry.outcome == "oom":
                self.judge.learn(settings[entry.rung], entry)
            elif entry.outcome == "fits" and self._earlier is not None:
                entry.reason = "proven on this card before"
                entry.peak_allocated_bytes = self._earlier.peak_allocated
                entry.peak_reserved_bytes = self._earlier.peak_reserved
            self._attempted(entry)

        self.judge.begin()
        capacity, device = self.parts.capacity, self.parts.device
        found = descend(noted(), self._prove, judge=assess, meter=capacity, on_attempt=attempted, device=device)
        is_whole = found.value == self._eval_batch(found.rung.settings)  # evaluation was not halved
        if self._earlier is None and is_whole:
            self.judge.learn(found.rung.settings, found.attempts[-1])
        return found

    def _assess(self, rung: Rung[Config]) -> tuple[str, int | None]:
        """Why a rung need not be tried, and the bytes it is expected to need. The last one is tried in any case."""
        hopeless, need = self.judge.assess(rung.settings)
        is_known = rung is self.ladder[0] and self._was_proven(f"{LARGEST}-{self.largest}")
        return "" if hopeless and (is_known or self._is_last(rung)) else hopeless, need

    def _was_proven(self, name: str) -> bool:
        return any(entry.rung == name and entry.outcome == "fits" for entry in self.record.attempts)

    def _is_last(self, rung: Rung[Config]) -> bool:
        """Whether no rung below it can be tried."""
        below = range(self.ladder.index(rung) + 1, len(self.ladder))
        return all(self._rung(number).passed_over for number in below)

    def _attempted(self, entry: Attempt) -> None:
        self.record.attempt(entry)
        if entry.outcome == "failed":
            return  # the error itself is on its way to the user
        peak = f", peak {entry.peak_allocated_bytes / 2**20:.0f} MiB" if entry.peak_allocated_bytes else ""
        where = f" in {entry.phase}" if entry.phase else ""
        reason = brief(entry.reason) if entry.outcome == "oom" else entry.reason
        why = f": {reason}" if reason else ""
        took = f", {entry.seconds:.2f} s" if entry.outcome != "skipped" else ""
        log.info("rung %s: %s%s%s%s%s", entry.rung, entry.outcome, where, peak, took, why)
        if entry.outcome == "oom" or (entry.outcome == "skipped" and entry.predicted_bytes is not None):
            self._room[entry.rung] = self.parts.capacity.room()

    def _prove(self, config: Config) -> int:
        """Make the session match `config` and prove it; returns the evaluation batch that fits.

        What this card has proven before is not proven again. A session that was built for this attempt goes with it
        when it fails: nothing is left of it. A climb that fails goes back to the session it came from.
        """
        if self.session is not None and config.model != self.session.config.model:
            self._leave_model(config)
        elif self.saved is not None and asdict(config.model) != self.saved["config"]["model"]:
            self._leave_saved(config)
        is_new, back = self.session is None, self.session if self._is_climbing else None
        self._is_climbing, self._earlier = False, None
        if back is not None:
            back.update.free_copies()
        try:
            self.session = enter(config, self.parts, self.session)
            if is_new:
                self._fill(self.session)
            update, sizes, odd = self.session.update, self._sizes(config), self._odd(config)
            is_usual = update.largest_part(odd) <= update.largest_part(sizes.batch_size)
            if back is None and is_usual:
                self._earlier = self.judge.proven(config)
            eval_batch = sizes.eval_batch_size if self._earlier else prove(update, sizes, odd=odd)
        except BaseException:
            if is_new or back is not None:
                self.session = back
            if back is not None:
                settle(back.config, back.state)
            raise
        self.saved = None
        return eval_batch

    def _sizes(self, config: Config) -> Recipe:
        stored = 0 if self.data.stored is None else self.data.stored[0].size
        return replace(
            recipe(config),
            eval_batch_size=self._eval_batch(config),
            num_classes=self.parts.num_classes,
            stored_size=stored,
        )

    def _odd(self, config: Config) -> int:
        """Size of the update with the largest micro-batch."""
        here, batch_size = self._opened.state.position, config.trainer.batch_size
        sizes = here.sizes(batch_size) | replace(here, cursor=0).sizes(batch_size)
        return max(sorted(sizes), key=self._opened.update.largest_part)

    def _eval_batch(self, config: Config) -> int:
        return recipe(config).eval_batch(len(self.data.val))

    def _fill(self, session: Session) -> None:
        """Put what was learned earlier into a new session."""
        problem = single_sample(session.config)
        if problem and has_batch_norm(session.state.model):
            raise ConfigError(problem)
        if (text := remark(session.config, self.parts.make_model)) and text not in self.record.events:
            self.record.event(text)
        if self.saved is not None:
            self._resume(session, self.saved)
        elif self.weights is not None and self.weights[0] == session.config.model:
            checkpoint.make_buffers(session.state.model, *self.weights[1:])
            session.state.model.load_state_dict(self.weights[1])
        elif self.weights is not None:
            self.record.event(f"model {self.weights[0].name} -> {session.config.model.name}: no weights are carried on")

    def _leave_model(self, config: Config) -> None:
        """Keep what the larger model has learned, and let it go."""
        old = self._opened
        learned = self._content(self._rung_name(old.config)) if old.state.updates and self._is_sound else None
        self._start_anew(old.config.model.name, config.model.name, learned)
        del old, learned
        self.session = None
        oom.release(self.parts.device)  # a network may hold itself in a circle of references

    def _leave_saved(self, config: Config) -> None:
        """The same for a checkpoint whose model does not fit any more."""
        saved, self.saved = self.saved, None
        if saved is not None:
            self.accepted()
            self._start_anew(saved["config"]["model"]["name"], config.model.name, saved)

    def _start_anew(self, larger: str, smaller: str, learned: dict[str, Any] | None) -> None:
        self.record.event(f"model {larger} -> {smaller}: the new model starts from epoch 1")
        if learned is not None:
            name = f"before-{smaller.replace('/', '-')}.pt"
            checkpoint.save(self.folder / name, learned)
            self.record.event(f"what {larger} has learned is kept in checkpoints/{name}")
        self._keep_best(larger)
        self.metrics = {}

    def _keep_best(self, owner: str) -> None:
        """Under a name of its own, before what is to come has a best."""
        best, name = self.folder / "best.pt", f"best-{owner.replace('/', '-')}.pt"
        if best.exists():
            best.replace(self.folder / name)
            self.record.event(f"the best of {owner} is kept in checkpoints/{name}")

    def _resume(self, session: Session, saved: dict[str, Any]) -> None:
        told = take_up(saved, session.config, session.state, self.parts.device)
        self.accepted()
        for text in told:
            self.record.event(text)
        self.metrics, epochs = saved["metrics"], session.state.finished_epochs
        self.record.forget_after(self.number, self.parts.recipe(session.config).model, epochs)

    def _loop(self, rung: Rung[Config], eval_batch: int) -> Loop:
        hooks = Hooks(
            checkpoint=self._checkpoint,
            metrics=self._measured,
            event=self.record.event,
            leave=lambda: self._may_climb(rung),
            way_on=way_on(self.record.folder),
        )
        may_step_down = rung.settings.ladder.avoid_thrashing and not self._is_last(rung)
        return Loop(self._opened, self.data, self.parts.device, rung.name, eval_batch, hooks, self.stop, may_step_down)

    def _failed_in_training(self, rung: Rung[Config], phase: str, reason: str) -> None:
        allocated, reserved = self.parts.capacity.peaks()
        where = f"{phase}, after update {self._opened.state.updates}"
        self._attempted(Attempt(rung.name, Outcome.OOM, where, reason, None, allocated, reserved))

    def _look_for_leak(self, growth: Growth) -> None:
        oom.release(self.parts.device)  # what is garbage is no leak
        text = growth.text(self.parts.capacity.usage().allocated)
        if text and not self.leak:
            self.leak = text
            self.record.event(text)

    def _may_climb(self, rung: Rung[Config]) -> bool:
        """Whether to try the rung above: only when more memory is free than when it failed, and not too often."""
        above = self._above(self.ladder.index(rung))
        if not rung.settings.ladder.climb or above < 0 or self._opened.state.finished_epochs < self._climb_at:
            return False
        if self.ladder[above].settings.model != rung.settings.model:
            return False
        then, now = self._room.get(self.ladder[above].name), self.parts.capacity.room()
        return then is not None and now is not None and now > then

    def _above(self, index: int) -> int:
        """The nearest rung above that is not passed over; -1 where there is none."""
        return next((i for i in range(index - 1, -1, -1) if not self.ladder[i].passed_over), -1)

    def _measured(self, row: dict[str, Any]) -> None:
        self.record.metrics({"stage": self.number, **row, "model": self.parts.recipe(self._opened.config).model})
        self.metrics = row

    @property
    def _is_sound(self) -> bool:
        """Whether the training loss is a number; else the loop will end the run, and the last good state stays."""
        return math.isfinite(float(self._opened.state.meters["loss"]))

    def _checkpoint(self, is_best: bool) -> None:
        content = self._content(self._rung_name(self._opened.config))
        if is_best:  # first: once last.pt is there, a resumed run takes this one for saved
            about = {key: content[key] for key in KEPT_WITH_THE_BEST}
            best = {**about, "model": content["ema"] or content["model"], "ema": None}
            checkpoint.save(self.folder / "best.pt", best)
        checkpoint.save(self.folder / "last.pt", content)

    def _content(self, rung: str) -> dict[str, Any]:
        """Of a checkpoint.

        Raises:
            CheckpointError: there is no memory to put it together.
        """
        session = self._opened
        return checkpoint.retried(self.folder / "last.pt", lambda: {
            **checkpoint.pack(session.state, self.parts.device),
            "rung": rung,
            "stage": self.number,
            "config": asdict(session.config),
            "request": self.parts.request,
            "requested": self._asked(),
            "largest_batch": self.largest,
            "capacity": self.parts.capacity.size,
            "metrics": self.metrics,
            "num_classes": self.parts.num_classes,
            "classes": list(self.data.classes),
            "split": None if self.data.split is None else asdict(self.data.split),
        })  # fmt: skip

    @property
    def model(self) -> nn.Module:
        """The trained network: the moving average where there is one."""
        state = self._opened.state
        return state.model if state.ema is None else state.ema.module

    def weights_learned(self) -> tuple[Any, dict[str, Any], list[str]]:
        """What the next stage starts from: the model settings, the model's `state_dict`, copied to the host, and the
        names of the buffers that forward passes have made.
        """
        weights = self._opened.state.model.state_dict()
        for key, value in weights.items():  # in place: the versions of its parts stay with it
            weights[key] = value.to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
        return self._opened.config.model, weights, checkpoint.made_buffers(self._opened.state)

    @property
    def folder(self) -> Path:
        """Where the checkpoints are."""
        return self.record.folder / "checkpoints"

    @property
    def _opened(self) -> Session:
        if self.session is None:
            raise RuntimeError("no rung has been entered yet")
        return self.session

    def _rung_name(self, config: Config) -> str:
        return next(rung.name for rung in self.ladder if rung.settings is config)
