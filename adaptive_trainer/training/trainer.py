"""The Trainer: settings in, result out. It opens device, data and record, and runs the stages one after another."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torch.utils.data import Dataset

from adaptive_trainer import oom
from adaptive_trainer.checkpoints import checkpoint, resume
from adaptive_trainer.checkpoints.contents import OF_A_MODEL, checked
from adaptive_trainer.checkpoints.resume import Start
from adaptive_trainer.checkpoints.trust import LOADS, check_model, frozen
from adaptive_trainer.config.overrides import apply_overrides, typed
from adaptive_trainer.config.schema import BALANCED, LARGEST, USUAL, Config, ModelConfig, TrainerConfig
from adaptive_trainer.config.validate import check_no_card
from adaptive_trainer.data.cached.build import with_cache
from adaptive_trainer.data.datasets import DataSets, build_datasets, check_batch_size, described, labels_of
from adaptive_trainer.data.pipeline import worker_deaths_deferred
from adaptive_trainer.data.preprocessing import settled
from adaptive_trainer.errors import AdaptiveTrainerError, CheckpointError, Interrupted, LadderExhausted, UserError
from adaptive_trainer.ladder.resolve import changed, resolve, stages, stored_size
from adaptive_trainer.ladder.rung import Rung
from adaptive_trainer.memory.limit import Capacity, limit_for, limited
from adaptive_trainer.memory.usage import describe_users
from adaptive_trainer.models.losses import Criterion, Loss, balanced, build_loss
from adaptive_trainer.models.memory_format import channels_last_pays
from adaptive_trainer.models.zoo import build_model
from adaptive_trainer.planning.image_size import check_image_size
from adaptive_trainer.planning.judge import Judge
from adaptive_trainer.planning.refusals import check_names
from adaptive_trainer.report.earlier import is_within, left_by_earlier, set_aside, way_on
from adaptive_trainer.report.record import Record, Result
from adaptive_trainer.report.summary import rung_table, summary
from adaptive_trainer.training.arguments import check_arguments, noting
from adaptive_trainer.training.loop import StopSignal
from adaptive_trainer.training.session import ModelFactory, Parts
from adaptive_trainer.training.stage import Stage
from adaptive_trainer.utils.device import capability_of, device_of, tf32_refusal
from adaptive_trainer.utils.global_state import alone_in_process, private_process_state, seed_everything
from adaptive_trainer.utils.screen import showing

log = logging.getLogger(__name__)

Ladder = tuple[Rung[Config], ...]
Ladders = list[tuple[str, DictConfig, Ladder]]  # name, settings and ladder of each stage


class Trainer:
    """Trains an image classifier on whatever memory there is.

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
        self._make_model = build_model if model in (None, build_model) else noting(model, self._made)
        self._data = (train_data, val_data)
        self._loss = None if loss is None else Criterion(loss)
        self._weights: list[float] = []  # of the classes, where trainer.class_weights=balanced
        chosen = output_dir or cfg.output_dir or Path("outputs") / datetime.now().strftime("%Y-%m-%d/%H-%M-%S-%f")
        self.output_dir = Path(chosen).expanduser().absolute()  # the caller's own code may change folders
        self.model: nn.Module | None = None

    def fit(self) -> Result:
        """Train to the last epoch on the first rung that fits; write the record; return it.

        Raises:
            UserError: something the user can mend: settings, data, model, checkpoint, a diverging loss.
            LadderExhausted: no rung fits.
            DeviceUnusable: the device answers nothing any more after an out-of-memory.
            Interrupted: a signal came; the state is saved.
            Exception: whatever is not about memory, unchanged.
        """
        self.model = None  # one of an earlier call would take its memory from this one
        shortage = ""
        try:
            return self._fit()
        except Exception as error:
            shortage = _shortage(error, way_on(self.output_dir))
            if not shortage:
                raise
        raise UserError(shortage)

    def _fit(self) -> Result:
        start = resume.start(self.cfg, self.output_dir)
        device = device_of(start.cfg.device)
        ladders = [(name, settings, resolve(settings)) for name, settings in stages(start.cfg)]
        check_no_card(typed(start.cfg).card)
        record = Record(self.output_dir)
        with showing(), alone_in_process(), record.held():
            return self._recorded(start, ladders, device, record)

    def _recorded(self, start: Start, ladders: Ladders, device: torch.device, record: Record) -> Result:
        """Train, and record how it ends; the folder is this run's alone."""
        asked = ladders[0][2][0].settings
        if not left_by_earlier(self.output_dir):
            record.begin(frozen(start.cfg))
        try:
            process = private_process_state(deterministic=asked.trainer.deterministic, tf32=asked.trainer.tf32)
            with process, _current(device):
                seed_everything(asked.seed)
                limit = limit_for(asked, device, is_own_data=self._data[0] is not None)
                with limited(device, limit) as capacity:
                    log.info("%s", capacity.description)
                    return self._run(start, ladders, device, capacity, record)
        except (Exception, KeyboardInterrupt) as error:
            record.failure(_outcome(error), _shortage(error, way_on(self.output_dir)) or str(error))
            raise

    def _run(self, start: Start, ladders: Ladders, device: torch.device, capacity: Capacity, record: Record) -> Result:
        """Train the stages one after another."""
        saved, start.saved = start.saved, None  # it is large, and the first stage lets it go
        data, parts = self._opened(start, ladders, device, capacity, saved)
        counts, not_used = described(data)
        log.info("%s", counts)
        if self._make_model is build_model:
            ladders = _with_layout(start.cfg, ladders, len(data.train), device, record, saved)
        data, ladders = _with_cache(data, ladders, record)
        ladders = [(name, settings, parts.prepare(ladder)) for name, settings, ladder in ladders]

        def accepted() -> None:  # nothing is refused any more
            if record.has_begun:
                return
            if not is_within(start.path, self.output_dir):
                record.event(set_aside(self.output_dir))
            record.begin(frozen(start.cfg))

        if saved is None:
            accepted()
        loss = None if self._loss is None else self._loss.loss
        for text in (*not_used, *_remarks(start, device, loss, is_own_model=self._make_model is not build_model)):
            record.event(text)
        self._weigh_classes([rung.settings.trainer for _, _, ladder in ladders for rung in ladder], data, record)
        judge = Judge(
            capacity,
            parts.num_classes,
            None if self._make_model is build_model else self._make_model,
            None if self._loss is None else self._build_loss,
            0 if data.stored is None else data.stored[0].size,
            len(data.val),
        )
        done, weights = [], None
        with StopSignal().listening() as stop:
            for number, (name, settings, ladder) in enumerate(ladders):
                if saved is not None and number < saved["stage"]:
                    continue
                if len(ladders) > 1:
                    record.event(f"stage {name}: {_differences(start.cfg, typed(settings))}")
                after = ladders[number - 1][0] if number and saved is None else ""
                stage = Stage(
                    ladder, settings, parts, data, record, stop, judge, number, saved, weights, after, accepted
                )
                rung = _train(stage, name, settings, capacity, record)
                saved, weights = None, stage.weights_learned() if number + 1 < len(ladders) else None
                done.append({"name": name, "rung": rung.name, "metrics": stage.metrics})
        self.model = stage.model
        return self._result(typed(settings), rung, stage, done, record)

    def _opened(
        self,
        start: Start,
        ladders: Ladders,
        device: torch.device,
        capacity: Capacity,
        saved: dict[str, Any] | None,
    ) -> tuple[DataSets, Parts]:
        """The data, and what all stages share; what does not suit them is refused."""
        requests = [typed(settings) for _, settings, _ in ladders]
        is_own_model = self._make_model is not build_model
        for _, _, ladder in ladders:
            check_names(ladder, own_model=is_own_model)
        data = build_datasets(requests[0], *self._data, split=resume.split_before(saved))
        num_classes = requests[0].model.num_classes or data.num_classes
        for request in requests:
            check_batch_size(request, len(data.train))
            if not is_own_model:
                check_image_size(request.model, request.data.image_size, num_classes)
            self._build_loss(request, num_classes)  # another number of class weights is refused now
        if saved is not None:
            resume.check_stages(saved, [name for name, _, _ in ladders])
            resume.check_data(saved, data)
        return data, Parts(
            make_model=self._make_model,
            make_loss=self._build_loss,
            request=frozen(start.cfg),
            num_classes=num_classes,
            train_size=len(data.train),
            device=device,
            capacity=capacity,
            made=self._made,
            prepare=partial(settled, make_model=self._make_model, saved=None if saved is None else saved["config"]),
        )

    def _weigh_classes(self, asked: list[TrainerConfig], data: DataSets, record: Record) -> None:
        """Count the training labels for `trainer.class_weights=balanced`; record what the caller's loss ignores."""
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
        self._loss.num_classes = num_classes
        return self._loss

    def _result(
        self, asked: Config, rung: Rung[Config], stage: Stage, stages: list[dict[str, Any]], record: Record
    ) -> Result:
        result = Result(
            outcome="trained",
            rung=rung.name,
            requested=stage.parts.recipe(stage.ladder[0].settings),
            used=stage.parts.recipe(rung.settings),
            changes=stage.changes(rung, replace(asked, data=stage.ladder[0].settings.data)),
            events=record.events,
            images={key: getattr(rung.settings.data, key) for key in USUAL},
            metrics={key: value for key, value in stage.metrics.items() if isinstance(value, int | float)},
            attempts=record.attempts,
            output_dir=str(self.output_dir),
            stages=stages if len(stages) > 1 else [],
        )
        record.result(result)
        log.info("%s", self._summary(result, asked.trainer.epochs, stage))
        return result

    def _summary(self, result: Result, epochs: int, stage: Stage) -> str:
        is_own_model = self._make_model is not build_model
        is_typed = not is_own_model and self._loss is None and self._data == (None, None) and not result.stages
        more = f"{way_on(self.output_dir)} trainer.epochs={2 * epochs}" if is_typed else ""
        best = None if stage.session is None else stage.session.state.best
        return summary(result, best=best, way_on=more, is_own_model=is_own_model)


def _remarks(start: Start, device: torch.device, loss: Loss | None, *, is_own_model: bool) -> Iterator[str]:
    """What was decided before anything runs, in words."""
    if start.path is not None:
        log.info("going on from %s", start.path)
    yield from start.events
    if is_own_model:
        yield f"the network is made by the caller; model.name={start.cfg.model.name} is handed to what makes it"
    if isinstance(loss, nn.Module) and any(p.requires_grad for p in loss.parameters()):
        yield "the loss has parameters, which nothing trains: the optimizer is given the network's alone"
    if start.cfg.trainer.tf32 and (refusal := tf32_refusal(device)):
        yield f"trainer.tf32=true changes nothing: {refusal}"


def _train(stage: Stage, name: str, settings: DictConfig, capacity: Capacity, record: Record) -> Rung[Config]:
    """One stage; what an exhausted ladder leaves to be said is added to its message."""
    message, earlier = "", len(record.attempts)
    if settings.trainer.batch_size == LARGEST:
        stage.find_batch_size()
    try:
        rung = stage.run()
    except LadderExhausted as error:
        message = str(error)
    if message:
        stage.accepted()  # it is the memory that is short, and to be recorded
        raise LadderExhausted(f"{message}\n{stage.leak or _advice(capacity)}")
    log.info("stage %s: rung %s succeeded\n%s", name, rung.name, rung_table(record.attempts[earlier:]))
    return rung


def _with_layout(
    cfg: DictConfig,
    ladders: Ladders,
    samples: int,
    device: torch.device,
    record: Record,
    saved: dict[str, Any] | None,
) -> Ladders:
    """The ladders in channels_last where that is left open and makes the run faster: the same at all rungs.

    A run that is resumed, from `saved`, keeps its own.
    """
    config, (major, minor) = typed(cfg), capability_of(device)
    images = samples * sum(typed(settings).trainer.epochs for _, settings, _ in ladders)
    pays = channels_last_pays(config, (major, minor), images=images)
    if saved is not None:
        pays = bool(saved["config"]["trainer"]["channels_last"])
    if config.trainer.channels_last is not None or not pays:
        return ladders
    record.event(
        f"trainer.channels_last=true: at {config.trainer.precision} on a card of compute capability {major}.{minor} "
        "convolutions are expected to be faster so; false keeps the contiguous memory format"
    )
    chosen = "trainer.channels_last=true"
    return [entry if entry[1].trainer.channels_last is not None else _overridden(entry, chosen) for entry in ladders]


def _overridden(entry: tuple[str, DictConfig, Ladder], override: str) -> tuple[str, DictConfig, Ladder]:
    settings = apply_overrides(entry[1], [override])
    return entry[0], settings, resolve(settings)


def _with_cache(data: DataSets, ladders: Ladders, record: Record) -> tuple[DataSets, Ladders]:
    """The data decoded and stored, where `data.cache` asks for it; where it cannot be, the ladders say `none`.

    Raises:
        ConfigError: the data set does not go with it.
        Interrupted: a signal came.
    """
    size = stored_size(ladder[0].settings for _, _, ladder in ladders)
    if not size:
        return data, ladders

    def poll() -> None:
        if stop.name:
            raise Interrupted(f"stopped by {stop.name} while images were decoded for data.cache; nothing was trained")

    with StopSignal().listening() as stop, worker_deaths_deferred():
        data = with_cache(data, size, event=record.event, poll=poll)
        poll()
    if data.stored is not None:
        return data, ladders
    return data, [_overridden(entry, "data.cache=none") for entry in ladders]


def _differences(cfg: DictConfig, stage: Config) -> str:
    """What a stage sets otherwise than the settings."""
    asked = typed(cfg)
    asked.phases = stage.phases
    if asked.trainer.channels_last is None and stage.trainer.channels_last:  # as decided for the run
        asked.trainer.channels_last = True
    return ", ".join(f"{key}={value}" for key, value in changed(asked, stage).items()) or "the settings as they are"


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a CUDA card the current one, so that nothing is made on another."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _outcome(error: BaseException) -> str:
    if isinstance(error, LadderExhausted):
        return "exhausted"
    return "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"


def _shortage(error: BaseException, advice: str) -> str:
    """What to say of memory that ran out where no rung can answer it; "" for other errors."""
    failure = oom.describe(error)
    if isinstance(error, AdaptiveTrainerError) or failure.kind in (oom.Kind.OTHER, oom.Kind.POISONED):
        return ""
    return (
        f"out of memory beside training ({failure.type_name}: {failure.text}). Close other programs or lower "
        f"data.num_workers; a run that has left a checkpoint goes on with {advice}"
    )


def _advice(capacity: Capacity) -> str:
    return (
        f"capacity: {capacity.description}\n{describe_users(capacity.device)}\n"
        "what to try: a larger memory.limit, closing other programs on the card, ladder=faithful, "
        "a smaller model.name, data.image_size or trainer.micro_batch_size"
    )


def load_model(path: str | Path, model: ModelFactory | None = None) -> nn.Module:
    """The trained network of a checkpoint (`checkpoints/best.pt`), on the CPU, ready to be used.

    Args:
        model: the factory that the Trainer was given, if any.

    Raises:
        CheckpointError: there is none, or it is damaged, or something else.
    """
    content = checked(checkpoint.load(Path(path)), Path(path), OF_A_MODEL)
    settings = ModelConfig(**{**content["config"]["model"], "pretrained": False})
    settings.kwargs = {key: value for key, value in settings.kwargs.items() if key not in LOADS}
    if model is None:
        check_model(asdict(settings), Path(path))
    network = (model or build_model)(settings, content["num_classes"])
    problem = ""
    try:
        weights = content["ema"] or content["model"]
        checkpoint.make_buffers(network, weights, content.get("made_buffers", ()))
        network.load_state_dict(weights)
    except (RuntimeError, AttributeError) as error:
        problem = checkpoint.misfit(error)
    if problem:
        name, advice = settings.name, "give load_model the factory that the Trainer was given"
        if model is not None:
            name, advice = f"what {getattr(model, '__name__', 'the factory')} makes", "is it the one that was trained?"
        raise CheckpointError(f"{path} does not fit {name} ({problem}); {advice}")
    return network.eval()
