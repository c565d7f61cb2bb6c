"""The Trainer: settings in, result out. It opens device, data and record, and trains the phases of the run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any
from zlib import crc32

import torch
from omegaconf import DictConfig
from torch import nn
from torch.utils.data import Dataset

from adaptive_trainer import oom
from adaptive_trainer.checkpoints import resume
from adaptive_trainer.checkpoints.resume import Start
from adaptive_trainer.checkpoints.trust import frozen
from adaptive_trainer.config.overrides import typed
from adaptive_trainer.config.schema import BALANCED, USUAL, Config
from adaptive_trainer.config.validate import check_no_card
from adaptive_trainer.data.cached.build import with_cache
from adaptive_trainer.data.datasets import (
    DataSets,
    build_datasets,
    check_batch_size,
    described,
    labels_of,
)
from adaptive_trainer.data.images.preprocessing import settled
from adaptive_trainer.data.pipeline import worker_deaths_deferred
from adaptive_trainer.distributed.peers import Peers, alone, joined, peers
from adaptive_trainer.errors import (
    AdaptiveTrainerError,
    ConfigError,
    DataError,
    Interrupted,
    LadderExhausted,
    Stopped,
    UserError,
    explained,
    when_stopped,
)
from adaptive_trainer.ladder.resolve import resolve, stages, stored_size
from adaptive_trainer.memory.leases import shared
from adaptive_trainer.memory.limit import Capacity, limit_for, limited
from adaptive_trainer.memory.usage import describe_users
from adaptive_trainer.models.losses import Criterion, Loss, balanced, build_loss
from adaptive_trainer.models.memory_format import channels_last_pays
from adaptive_trainer.models.zoo import build_model
from adaptive_trainer.planning.image_size import check_image_size
from adaptive_trainer.planning.judge import Judge
from adaptive_trainer.planning.networks import ModelFactory
from adaptive_trainer.planning.refusals import check_names
from adaptive_trainer.report.earlier import LAST, left_by_earlier, to_type, way_on
from adaptive_trainer.report.history import History
from adaptive_trainer.report.lines import Lines
from adaptive_trainer.report.listeners import trackers
from adaptive_trainer.report.page import Report
from adaptive_trainer.report.record import Record
from adaptive_trainer.report.result import Result
from adaptive_trainer.report.summary import summary
from adaptive_trainer.training.arguments import check_arguments, noting
from adaptive_trainer.training.epochs.stopping import StopSignal
from adaptive_trainer.training.finished import finished_by
from adaptive_trainer.training.own_weights import own_weights
from adaptive_trainer.training.phases import Done, train
from adaptive_trainer.training.run import Phase, Run
from adaptive_trainer.training.session import Parts
from adaptive_trainer.training.uses import Uses
from adaptive_trainer.utils.device import capability_of, device_of, tf32_refusal
from adaptive_trainer.utils.global_state import alone_in_process, private_process_state, seed_everything
from adaptive_trainer.utils.screen import is_shown, showing

log = logging.getLogger(__name__)
PEAKS = ("peak_allocated_bytes", "peak_reserved_bytes")


class Trainer(Uses):
    """Trains an image classifier on whatever memory there is; then evaluates it, or predicts by it.

    Args:
        cfg: settings from `compose_config`, or Hydra's own.
        model: builds the network from (model settings, number of classes); by name from timm or torchvision if None.
        train_data, val_data: map-style data sets of (image, label), instead of the configured ones.
        loss: of (output, labels), a mean, a sum, or a pair of its sum and its denominator; if None, cross entropy with
            `trainer.label_smoothing` and `trainer.class_weights`. One that is a module is in evaluation mode for the
            validation loss.
        output_dir: where the record and the checkpoints go; by default `output_dir` of the settings, else
            `outputs/DATE/TIME`.

    Raises:
        ConfigError: the settings, the model or the loss is something else.
    """

    def __init__(
        self,
        cfg: DictConfig,
        *,
        model: ModelFactory | None = None,
        train_data: Dataset[Any] | None = None,
        val_data: Dataset[Any] | None = None,
        loss: Loss | None = None,
        output_dir: str | Path | None = None,
    ) -> None:
        check_arguments(cfg, model, loss)
        self.cfg = cfg
        self._made: dict[str, str] = {}
        self._own_model = None if model in (None, build_model) else noting(model, self._made)
        self._make_model = self._own_model or build_model
        self._data = (train_data, val_data)
        self._loss = None if loss is None else Criterion(loss)
        self._weights: list[float] = []  # of the classes, where trainer.class_weights=balanced
        chosen = output_dir or cfg.output_dir or Path("outputs") / datetime.now().strftime("%Y-%m-%d/%H-%M-%S-%f")
        self.output_dir = Path(chosen).expanduser().absolute()  # the caller's own code may change folders
        self.model: nn.Module | None = None  # what was trained, once fit() has returned

    def fit(self) -> Result:
        """Train to the last epoch on the first rung that fits; write the record; return it.

        Raises:
            UserError: something the user can mend: settings, data, model, checkpoint, a diverging loss.
            LadderExhausted: no rung fits.
            DeviceUnusable: the device answers nothing any more after an out-of-memory.
            Interrupted: a signal came; the state is saved.
            Stopped: a signal came before there was a state to save, or Ctrl-C a second time.
            Exception: whatever is not about memory, unchanged.
        """
        log.debug("the packages are imported")
        self.model = None  # one of an earlier call would take its memory from this one
        with when_stopped(self._left), explained(self._shortage):
            return self._fit()

    def _fit(self) -> Result:
        with joined(device_of(self.cfg.device)) as here:
            self.output_dir = here.decided(lambda: self.output_dir)
            return self._begun(here)

    def _begun(self, here: Peers) -> Result:
        start = resume.start(self.cfg, self.output_dir, has_data=self._data[0] is not None)
        device = device_of(start.cfg.device)
        phases = [Phase(name, settings, resolve(settings)) for name, settings in stages(start.cfg)]
        check_no_card(typed(start.cfg).card)  # `card=` plans for a card that is not here
        self._history = Report(self.output_dir) if start.cfg.report and here.is_first else History()
        heard = [Lines(), self._history, *(trackers(typed(start.cfg).trackers) if here.is_first else ())]
        folder = self.output_dir if here.is_first else self.output_dir / "ranks" / str(here.rank)
        record = Record(folder, heard, self.output_dir)
        with showing(start.cfg.verbosity if here.is_first else "silent"), alone_in_process(), record.held():
            if not left_by_earlier(folder):  # else the folder is taken only once nothing is refused
                record.begin(frozen(start.cfg), start.path)
            try:
                return self._limited(start, phases, device, record)
            except (Exception, KeyboardInterrupt) as error:
                record.failure(_outcome(error), str(self._shortage(error) or error))
                raise

    def _limited(self, start: Start, phases: list[Phase], device: torch.device, record: Record) -> Result:
        asked = phases[0].asked
        if asked.memory.shared and peers().size > 1:
            raise ConfigError(
                "memory.shared=true lets one training after another choose its memory, and the ranks of one choose "
                "together; leave it out, or start one process"
            )
        process = private_process_state(deterministic=asked.trainer.deterministic, tf32=asked.trainer.tf32)
        # the card is the current one, so that nothing is made on another
        with process, torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            seed_everything(asked.seed)  # a data set of the caller's own may draw numbers when it is opened
            limit = limit_for(asked, device, is_own_data=self._data[0] is not None)
            with (
                limited(device, limit) as capacity,
                shared(capacity, record.event) if asked.memory.shared else nullcontext(),
            ):
                capacity.same_kernels = asked.trainer.deterministic
                log.info("device: %s", capacity.description)
                if device.type == "cuda":
                    log.info("others: %s", describe_users(device))
                return self._run(start, phases, capacity, record)

    def _run(self, start: Start, phases: list[Phase], capacity: Capacity, record: Record) -> Result:
        saved, start.saved = start.saved, None  # it is large, and the first phase lets it go
        data = self._opened(phases, saved)
        parts = self._parts(start, phases, data, capacity, saved)
        counts, not_used = described(data)
        log.info("data: %s", counts)
        if self._own_model is None:
            phases = _in_channels_last(phases, typed(start.cfg), len(data.train), capacity.device, record, saved)
        data, phases = _with_cache(data, phases, record)
        phases = [replace(phase, ladder=parts.prepare(phase.ladder)) for phase in phases]
        accept = partial(record.accept, frozen(start.cfg), start.path)
        if saved is None:  # else the checkpoint may still be refused, by the network that it is put into
            accept()
        start_text = [] if parts.weights is None else [parts.weights.text]
        for text in (*not_used, *self._remarks(start, capacity.device), *start_text):
            record.event(text)
        self._weigh_classes(phases, data, record)
        judge = Judge(
            capacity,
            parts.num_classes,
            self._own_model,
            None if self._loss is None else self._build_loss,
            0 if data.stored is None else data.stored[0].size,
            len(data.val),
        )
        with StopSignal().listening() as stop:
            done = train(phases, Run(parts, data, record, stop, judge, accept), start.cfg, saved)
            self.model = done.stage.trial.opened.model
            result = self._result(done, record)
            record.result(result)  # now: the test may be stopped, or killed for its memory
            if data.test is not None and peers().is_first:
                with alone():
                    tested = self._test(data.test, done.stage.trial.opened, record, stop)
                result = replace(result, metrics={**result.metrics, **tested})
                record.result(result)
        if peers().is_first:
            self._end(done, record, result)
        return result

    def _opened(self, phases: list[Phase], saved: dict[str, Any] | None) -> DataSets:
        for phase in phases:
            check_names(phase.ladder, own_model=self._own_model is not None)  # first: opening the data may take minutes
        requests = [typed(phase.settings) for phase in phases]
        data = build_datasets(requests[0], *self._data, split=resume.split_before(saved))
        log.debug("the data is listed")
        _check_alike(data)
        num_classes = requests[0].model.num_classes or data.num_classes
        for request in requests:
            check_batch_size(request, len(data.train))
            if self._own_model is None:
                check_image_size(request.model, request.data.image_size, num_classes)
            self._build_loss(request, num_classes)  # another number of class weights is refused now
        if saved is not None:
            resume.check_stages(saved, [phase.name for phase in phases])
            resume.check_data(saved, data)
        return data

    def _parts(
        self, start: Start, phases: list[Phase], data: DataSets, capacity: Capacity, saved: dict[str, Any] | None
    ) -> Parts:
        model = phases[0].asked.model
        num_classes, before, weights = model.num_classes or data.num_classes, None, None
        if saved is not None:  # which has the weights
            before = saved["config"]
        elif weights := own_weights(model, data.classes, self._make_model):
            before = weights.before
        return Parts(
            make_model=self._make_model,
            make_loss=self._build_loss,
            request=frozen(start.cfg),
            num_classes=num_classes,
            train_size=len(data.train),
            device=capacity.device,
            capacity=capacity,
            weights=weights,
            made=self._made,
            prepare=partial(settled, make_model=self._make_model, saved=before),
        )

    def _remarks(self, start: Start, device: torch.device) -> Iterator[str]:
        if start.path is not None:
            log.info("going on from %s", start.path)
        yield from start.events
        if at := start.cfg.ladder.start:
            of_all = ", the highest that is predicted to fit for all jobs of the sweep" * start.cfg.ladder.same_rung
            yield f"training begins at rung {at} (ladder.start){of_all}"
        if self._own_model is not None:
            name = start.cfg.model.name
            yield f"your own network is used; model.name={name} is only handed to the function that makes it"
        loss = None if self._loss is None else self._loss.loss
        if isinstance(loss, nn.Module) and any(p.requires_grad for p in loss.parameters()):
            yield "the loss has parameters, which nothing trains: the optimizer is given the network's alone"
        if start.cfg.trainer.tf32 and (refusal := tf32_refusal(device)):
            yield f"trainer.tf32=true changes nothing: {refusal}"

    def _weigh_classes(self, phases: list[Phase], data: DataSets, record: Record) -> None:
        asked = [rung.settings.trainer for phase in phases for rung in phase.ladder]
        if self._loss is None and any(trainer.class_weights == BALANCED for trainer in asked):
            self._weights = balanced(labels_of(data.train), data.num_classes)
            each = shorten(", ".join(f"{weight:.3g}" for weight in self._weights), 200, placeholder="...")
            record.event(f"trainer.class_weights={BALANCED}: by the training labels the classes weigh {each}")
        ignored = [key for key in ("label_smoothing", "class_weights") if any(getattr(each, key) for each in asked)]
        if self._loss is not None and ignored:
            names = " and ".join(f"trainer.{key}" for key in ignored)
            record.event(f"{names} is not used: it belongs to the trainer's own cross entropy, and the loss is yours")

    def _build_loss(self, config: Config, num_classes: int) -> Criterion | nn.Module:
        if self._loss is None:
            return build_loss(config, num_classes, self._weights)
        self._loss.num_classes = num_classes  # the caller's function knows nothing of it
        return self._loss

    def _result(self, done: Done, record: Record) -> Result:
        stage, used = done.stage, done.rung.settings
        asked, requested = typed(stage.phase.settings), stage.rungs.ladder[0].settings
        parts, here = stage.run.parts, stage.trial.opened.update.agreement
        return Result(
            outcome="trained",
            rung=done.rung.name,
            requested=parts.recipe(requested),
            used=parts.recipe(used),
            changes=stage.rungs.changes(done.rung, replace(asked, data=requested.data)),
            events=record.events,
            images={key: getattr(used.data, key) for key in USUAL},
            metrics={key: value for key, value in stage.keeper.metrics.items() if isinstance(value, int | float)},
            attempts=record.attempts,
            output_dir=str(self.output_dir),
            stages=done.phases if len(done.phases) > 1 else [],
            ranks=peers().gathered(
                {
                    "device": str(parts.device),
                    "part": here.part(used.trainer.batch_size),
                    **{key: stage.keeper.metrics.get(key) for key in PEAKS},
                }
            ),
        )

    def _end(self, done: Done, record: Record, result: Result) -> None:
        stage, is_own = done.stage, self._own_model is not None
        own = {"is_own_model": is_own, "is_own_loss": self._loss is not None}
        finished = finished_by(stage, done.rung.settings, result.requested, self._history, **own)
        record.finish(result, finished)
        # a line to type goes on with what settings can say: neither code of the caller's own nor stages
        is_typed = not is_own and self._loss is None and self._data == (None, None) and not result.stages
        epochs = 2 * stage.trial.opened.state.finished_epochs
        more = f"{way_on(self.output_dir)} trainer.epochs={epochs}" if is_typed else ""
        kept = ""
        if is_shown(logging.INFO):  # for it plans a whole ladder, which takes seconds
            kept = stage.run.judge.kept_by_exact(stage.phase.settings, done.rung.settings)
        log.info("%s", summary(result, finished, way_on=more, kept=kept))

    def _left(self) -> str:
        """What there is to go on with after a stop at once, in words."""
        if (self.output_dir / LAST).exists():
            return f"go on from the last checkpoint with {to_type(self.output_dir)}"
        return f"nothing is saved; {to_type(self.output_dir)} begins again with the same settings"

    def _shortage(self, error: BaseException) -> UserError | None:
        """What to say of memory that ran out where no rung can answer it; None for other errors."""
        failure = oom.describe(error)
        if isinstance(error, AdaptiveTrainerError) or failure.kind not in oom.OF_MEMORY:
            return None
        return UserError(
            f"out of memory beside training ({failure.type_name}: {failure.text}). Close other programs or lower "
            f"data.num_workers; a run that has left a checkpoint goes on with {to_type(self.output_dir)}"
        )


def _check_alike(data: DataSets) -> None:
    """Refuse other data than that of the other ranks, which may be on other machines: they would lose each other.

    Raises:
        DataError: it is not the same.
    """
    found = peers().gathered((len(data.train), len(data.val), crc32(repr(data.classes).encode())))
    if len(set(found)) > 1:
        each = ", ".join(f"rank {rank} has {train} and {val}" for rank, (train, val, _) in enumerate(found))
        raise DataError(
            f"the ranks do not have the same training and validation images, or other classes: {shorten(each, 200)}. "
            "Give all of them the same data.root, with the same files on every machine"
        )


def _in_channels_last(
    phases: list[Phase],
    config: Config,
    samples: int,
    device: torch.device,
    record: Record,
    saved: dict[str, Any] | None,
) -> list[Phase]:
    """The phases in channels_last where that is left open and makes the run faster: the same at all rungs."""
    major, minor = capability_of(device)
    images = samples * sum(typed(phase.settings).trainer.epochs for phase in phases)
    pays = channels_last_pays(config, (major, minor), images=images)
    if saved is not None:  # a resumed run keeps its own
        pays = bool(saved["config"]["trainer"]["channels_last"])
    if config.trainer.channels_last is not None or not pays:
        return phases
    record.event(
        f"trainer.channels_last=true: at {config.trainer.precision} on a card of compute capability {major}.{minor} "
        "convolutions are expected to be faster so; false keeps the contiguous memory format"
    )
    return [
        phase.overridden("trainer.channels_last=true") if phase.settings.trainer.channels_last is None else phase
        for phase in phases
    ]


def _with_cache(data: DataSets, phases: list[Phase], record: Record) -> tuple[DataSets, list[Phase]]:
    """The data decoded and stored, where `data.cache` asks for it; where it cannot be, the phases say `none`."""
    size = stored_size(phase.asked for phase in phases)
    if not size:
        return data, phases

    def poll() -> None:
        if stop.name:
            raise Stopped("images were being decoded for data.cache, and nothing is saved", is_term=stop.is_term)

    with StopSignal().listening() as stop, worker_deaths_deferred():
        data = with_cache(data, size, event=record.event, poll=poll)
        poll()
    return data, phases if data.stored is not None else [phase.overridden("data.cache=none") for phase in phases]


def _outcome(error: BaseException) -> str:
    if isinstance(error, LadderExhausted):
        return "exhausted"
    return "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
