"""A rung tried: the session is made to match its settings, and is tried by a dry run."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from adaptive_trainer import oom
from adaptive_trainer.checkpoints.packing import made_buffers, make_buffers
from adaptive_trainer.checkpoints.resume import take_up
from adaptive_trainer.config.schema import Config, ModelConfig
from adaptive_trainer.data.images.preprocessing import remark
from adaptive_trainer.data.loader import Loader
from adaptive_trainer.data.pipeline import begun
from adaptive_trainer.distributed.peers import all_are_well, peers, together
from adaptive_trainer.errors import ConfigError
from adaptive_trainer.ladder.descent import Attempt, Found, Outcome, descend
from adaptive_trainer.ladder.resolve import recipe
from adaptive_trainer.ladder.rung import Rung
from adaptive_trainer.models.batch_norm import has_batch_norm
from adaptive_trainer.planning.cache import Measurement
from adaptive_trainer.planning.refusals import single_sample
from adaptive_trainer.recipe import Recipe
from adaptive_trainer.step.dry_run import dry_run
from adaptive_trainer.training.keeper import Keeper
from adaptive_trainer.training.parting import Parting
from adaptive_trainer.training.run import Run
from adaptive_trainer.training.session import Session, draw_apart, enter, settle

log = logging.getLogger(__name__)

Assess = Callable[[Rung[Config]], tuple[str, int | None]]


class Weights(NamedTuple):
    """What the next phase starts from: weights on the host, and the names of buffers that forward passes have made."""

    config: ModelConfig
    content: dict[str, Any]
    made: list[str]

    @classmethod
    def of(cls, session: Session) -> Weights:
        """Copy those of a session."""
        content = session.state.model.state_dict()
        for key, value in content.items():  # in place: the versions of its parts stay with it
            content[key] = value.to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
        return cls(session.config.model, content, made_buffers(session.state))

    def put_into(self, model: nn.Module) -> None:
        """Give them to another network of the same kind."""
        make_buffers(model, self.content, self.made)
        model.load_state_dict(self.content)


class Trial:
    """Tries rungs, with the state of the session before.

    Attributes:
        session: of the last rung that fits.
        saved: a checkpoint to go on from, until its state is in the session or its model is left.
        is_climbing: a try that fails goes back to the session before.
    """

    def __init__(
        self, run: Run, keeper: Keeper, saved: dict[str, Any] | None, weights: Weights | None, parting: Parting
    ) -> None:
        self.session: Session | None = None
        self.saved = saved
        self.is_climbing = False
        self._run, self._keeper, self._weights, self._parting = run, keeper, weights, parting
        self._tried: Rung[Config]
        self._loader: Loader | None = None  # of the rung tried, whose workers read while the dry run runs
        self._is_followed = False
        self._earlier: Measurement | None = None  # of an earlier dry run, which was not made again

    @property
    def opened(self) -> Session:
        """The session, where a rung has been entered."""
        if self.session is None:
            raise RuntimeError("no rung has been entered yet")
        return self.session

    def descend(
        self,
        rungs: Iterable[Rung[Config]],
        assess: Assess,
        on_attempt: Callable[[Attempt], None],
        *,
        is_followed: bool = True,
    ) -> Found[Config, int]:
        """Try one rung after another; remember how it went for later runs.

        Args:
            is_followed: the rung that fits is trained next, so that its data workers may start.
        """
        self._is_followed = is_followed
        # what fails later, in training, is not remembered: that says too little of a rung
        judge, capacity, device = self._run.judge, self._run.parts.capacity, self._run.parts.device

        def noted() -> Iterator[Rung[Config]]:
            for rung in itertools.chain.from_iterable(map(self._planned, rungs)):
                self._tried = rung  # `descend` hands on settings alone, and the session has its rung's name
                yield rung

        def attempted(entry: Attempt) -> None:
            if entry.outcome == Outcome.OOM:
                judge.learn(self._tried.settings, entry)
            elif entry.outcome == Outcome.FITS and self._earlier is not None:  # this time nothing was measured
                entry.reason = "proven on this card before"
                entry.peak_allocated_bytes = self._earlier.peak_allocated
                entry.peak_reserved_bytes = self._earlier.peak_reserved
            on_attempt(entry)

        judge.begin()
        found = descend(noted(), self._tried_by_all, judge=assess, meter=capacity, on_attempt=attempted, device=device)
        is_whole = found.value == self.eval_batch(found.rung.settings)  # evaluation was not halved
        if self._earlier is None and is_whole:
            judge.learn(found.rung.settings, found.attempts[-1])
        return found

    def _tried_by_all(self, config: Config) -> int:
        """A dry run; it fits on every rank, or on none."""
        return together(lambda: self.dry_run(config), self._run.parts.device)

    def _planned(self, rung: Rung[Config]) -> Iterator[Rung[Config]]:
        """The rung with a plan of recomputation, where it asks for one; with another one after a failure."""
        planned = partial(self._parting.planned, rung)
        made = None if rung.passed_over else planned()
        yield made or rung
        while made is not None and made.settings != (again := planned()).settings:
            made = again  # what has failed leaves less room for a plan
            yield made

    def dry_run(self, config: Config) -> int:
        """Make the session match `config` and run it dry; returns the evaluation batch that fits.

        Of what fitted on this card before no dry run is made. Of a session that was built for this attempt nothing is
        left when it fails.
        """
        if self.session is not None and config.model != self.session.config.model:
            self._leave_model(config.model)
        elif self.saved is not None and asdict(config.model) != self.saved["config"]["model"]:
            self._leave_saved(config.model)
        is_new, back = self.session is None, self.session if self.is_climbing else None
        self.is_climbing, self._earlier = False, None
        if back is not None:
            back.update.free_copies()  # both sessions exist for a while, and only one trains
        try:
            log.debug("rung %s is entered", self._tried.name)
            self.session = enter(config, self._run.parts, self.session)
            self.session.rung = self._tried.name
            if is_new:
                self._fill(self.session)
                peers().take_first(self.session.weights)  # what makes a network may draw numbers of its own
            log.debug("the network is built")
            self._begin_loading(self.session)
            update, sizes, odd = self.session.update, self._sizes(config), self._odd(self.session)
            # an earlier dry run, and the session that a climb came from, say nothing of a larger last update
            if back is None and peers().size == 1 and not odd:
                self._earlier = self._run.judge.earlier_dry_run(config)
            eval_batch = sizes.eval_batch_size if self._earlier else dry_run(update, sizes, odd=odd)
            eval_batch = int(min(all_are_well(eval_batch)))
        except BaseException:
            self.close()
            if is_new or back is not None:
                self.session = back
            if back is not None:
                settle(back.config, back.state)  # model, optimizer and average are shared with what was tried
            raise
        self.saved = None  # the session has it now; a rung that failed has left it for the next
        return eval_batch

    def reopen(self, rung: Rung[Config]) -> None:
        """Enter the rung that the checkpoint is of, without a dry run.

        Raises:
            OutOfMemory: the weights alone do not fit.
        """
        self.session = enter(rung.settings, self._run.parts, None)
        self.session.rung = rung.name
        self._fill(self.session)
        self.saved = None

    def take_loader(self) -> Loader | None:
        """Hand over the loader of the rung that fits, where its workers have begun."""
        loader, self._loader = self._loader, None
        return loader

    def close(self) -> None:
        """End the data workers that nobody has taken over."""
        if (loader := self.take_loader()) is not None:
            loader.close()

    def _begin_loading(self, session: Session) -> None:
        state, config = session.state, session.config
        is_due = state.position.epoch == state.finished_epochs < config.trainer.epochs  # else evaluation comes first
        if self._is_followed and is_due:
            self._loader = begun(self._run.data, config, self._run.parts.device, state.position)

    def _sizes(self, config: Config) -> Recipe:
        stored = 0 if self._run.data.stored is None else self._run.data.stored[0].size
        return replace(
            recipe(config),
            eval_batch_size=self.eval_batch(config),
            num_classes=self._run.parts.num_classes,
            stored_size=stored,
        )

    @staticmethod
    def _odd(session: Session) -> int:
        # the last update of an epoch may have a larger micro-batch than the others, with more ranks on any of them
        here, batch_size = session.state.position, session.config.trainer.batch_size
        sizes = here.sizes(batch_size) | replace(here, cursor=0).sizes(batch_size)
        return session.update.outgrowing(batch_size, sizes)

    def eval_batch(self, config: Config) -> int:
        """Samples of an evaluation batch, as asked for."""
        return recipe(config).eval_batch(len(self._run.data.val))

    def _fill(self, session: Session) -> None:
        problem = single_sample(session.config)
        if problem and has_batch_norm(session.state.model):
            raise ConfigError(problem)
        text = remark(session.config, self._run.parts.make_model)
        if text and text not in self._run.record.events:  # every rung with the model would say it again
            self._run.record.event(text)
        own = self._run.parts.weights
        if own is not None and own.model != session.config.model:
            self._run.record.event(f"{session.config.model.name} does not start from model.weights={own.model.weights}")
        if self.saved is not None:
            self._resume(session, self.saved)
        elif self._weights is not None and self._weights.config == session.config.model:
            self._weights.put_into(session.state.model)
        elif self._weights is not None:
            before = self._weights.config.name
            self._run.record.event(f"model {before} -> {session.config.model.name}: no weights are carried on")

    def _resume(self, session: Session, saved: dict[str, Any]) -> None:
        decided = take_up(saved, session.config, session.state, self._run.parts.device)
        self._run.accept()  # the checkpoint fits: what is refused before leaves the earlier record as it is
        for text in decided:
            self._run.record.event(text)
        draw_apart(session.state.position.seed, session.state.updates)
        self._keeper.metrics = saved["metrics"]  # a run with no epoch left to train ends with these
        model = self._run.parts.recipe(session.config).model
        self._run.record.forget_after(self._keeper.number, model, session.state.finished_epochs)

    def _leave_model(self, model: ModelConfig) -> None:
        old = self.opened
        learned = self._keeper.content(old) if old.state.updates and old.is_sound else None  # else it is worth nothing
        self._keeper.start_anew(old.config.model.name, model.name, learned)
        del old, learned  # or they would be alive while their memory is released
        self.session = None
        oom.release(self._run.parts.device)  # a network may hold itself in a circle of references

    def _leave_saved(self, model: ModelConfig) -> None:
        saved, self.saved = self.saved, None
        if saved is not None:
            self._run.accept()  # now: from here on files of the run are written
            self._keeper.start_anew(saved["config"]["model"]["name"], model.name, saved)
