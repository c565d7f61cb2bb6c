"""Know before you run: what every rung of a ladder will need, and which one will fit, on a card that need not be here.

`Planner.predict` answers for one recipe and serves the descent too; `plan` answers for a ladder.
"""

from __future__ import annotations

import copy
import itertools
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from adaptive_trainer.config.schema import Config, ModelConfig
from adaptive_trainer.data.position import micro_batches
from adaptive_trainer.errors import ConfigError, ModelError, UserError
from adaptive_trainer.ladder.batch_size import largest
from adaptive_trainer.ladder.resolve import recipe, stored_size, with_batch_size
from adaptive_trainer.ladder.rung import Rung
from adaptive_trainer.memory.usage import format_bytes
from adaptive_trainer.models.batch_norm import has_batch_norm
from adaptive_trainer.models.losses import Criterion, Loss, build_loss
from adaptive_trainer.models.optimizers import build_optimizer, check_optimizer
from adaptive_trainer.models.savers import apply_savers, saver_settings
from adaptive_trainer.models.zoo import (
    build_model,
    check_name,
    outline,
    without_memory,
    without_weights,
)
from adaptive_trainer.planning.cache import Key, PlanCache, versions
from adaptive_trainer.planning.device_spec import DeviceSpec
from adaptive_trainer.planning.image_size import check_image_size, failure_at
from adaptive_trainer.prediction.estimator import Prediction, predict, verdict
from adaptive_trainer.prediction.tracer import Tracer, TraceSpec
from adaptive_trainer.utils.random import same_random_numbers

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
ENVIRONMENT = (*ALLOCATOR, "CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "TIMM_FUSED_ATTN")
SAMPLED = (8, 16)  # batch sizes whose needs show where to look for the largest
ASSUMED_CLASSES = 10  # where model.num_classes is left to the data, which a plan does not open
# What decides whether attention keeps its matrix.
ATTENTION: tuple[Callable[[], bool], ...] = (
    torch.backends.cuda.flash_sdp_enabled,
    torch.backends.cuda.mem_efficient_sdp_enabled,
    torch.backends.cuda.cudnn_sdp_enabled,
)

ModelFactory = Callable[[ModelConfig, int], nn.Module]
LossFactory = Callable[[Config, int], Loss | Criterion]


def other_allocator() -> bool:
    """Whether the environment asks for another allocator than the one that is modelled: expandable segments, say."""
    return any(os.environ.get(name) for name in ALLOCATOR)


class Planner:
    """Predicts recipes with the factories that training uses; one for all rungs of a run.

    Args:
        spec: what is predicted for.
        num_classes: width of the model's head; the assumed one where neither this nor the settings say.
        make_model, make_loss: as the Trainer was given them; its own where None. What others make is not kept on disk.
        cache: keeps predictions from one run to the next.
        stored_size: height and width at which `data.cache` stores images; None: as if each recipe were the request.
        val_size: samples of the validation set, above which no evaluation batch is; None where that is not known.
    """

    def __init__(
        self,
        spec: DeviceSpec,
        *,
        num_classes: int | None = None,
        make_model: ModelFactory | None = None,
        make_loss: LossFactory | None = None,
        cache: PlanCache | None = None,
        stored_size: int | None = None,
        val_size: int | None = None,
    ) -> None:
        self.spec = spec
        self.val_size = val_size
        self.num_classes = num_classes
        self.stored_size = stored_size
        self.make_model = make_model or build_model
        self.make_loss = make_loss or build_loss
        own_factories = make_model in (None, build_model) and make_loss is None
        self.cache = cache if cache is not None and own_factories else PlanCache(None)
        self._tracer = Tracer()
        self._norms: dict[str, bool] = {}
        self._weights: dict[str, int] = {}
        self._known: dict[str, Prediction] = {}

    def predict(self, config: Config) -> Prediction:
        """What the recipe of these settings will need. Never raises for a recipe that cannot be predicted."""
        start = time.perf_counter()
        found = self.recalled(config)
        if found is not None:
            return replace(found, seconds=time.perf_counter() - start)
        try:
            found = predict(
                self._spec(config),
                capability=self.spec.capability,
                multiprocessors=self.spec.multiprocessors,
                tracer=self._tracer,
            )
        except Exception as error:  # factories of the user's own may raise anything
            reason = (str(error) or type(error).__name__).splitlines()[0]
            found = Prediction(None, None, None, None, 0.0, reason)
        found = replace(found, seconds=time.perf_counter() - start)
        key = self.key(config)
        self.cache.keep_prediction(key, found)
        self._known[_text(key)] = found
        return found

    def recalled(self, config: Config) -> Prediction | None:
        """The prediction for this recipe, if it was made before."""
        key = self.key(config)
        found = self._known.get(_text(key)) or self.cache.prediction(key)
        if found is not None:
            self._known[_text(key)] = found
        return found

    def refusal(self, above: Config, config: Config) -> str:
        """Why these settings, one step below those, cannot be trained with; empty where they may."""
        reason = ""
        if config.data.image_size != above.data.image_size or config.model != above.model:
            reason = self._size_refusal(above, config)
        if not reason and replace(config.optimizer, lr=0.0) != replace(above.optimizer, lr=0.0):
            reason = _optimizer_refusal(self._outline(config), config)
        alone = "" if reason else single_sample(config)
        return alone if alone and self._has_batch_norm(config) else reason

    def _size_refusal(self, above: Config, config: Config) -> str:
        if self.make_model is build_model:
            return image_refusal(config, self.classes(config))
        model, size = self._outline(config), config.data.image_size
        failure = "" if model is None else failure_at(model.eval(), size)
        if model is None or not failure or failure_at(model, above.data.image_size):
            return ""
        return f"{type(model).__name__} refuses data.image_size={size}: {failure}"

    def no_step(self, above: Config, config: Config) -> str:
        """Why another network than the one above is no step down; empty where it may be one."""
        if config.model == above.model:
            return ""
        was, need = (self.predict(each).min_capacity_bytes for each in (above, config))
        if need is None or was is None or need < was:
            return ""
        more = f"it is predicted to need {format_bytes(need)}, no less than the rung above ({format_bytes(was)})"
        return f"{config.model.name} is no step down from {above.model.name}: {more}"

    def weights_bytes(self, config: Config) -> int:
        """What the network's weights alone take, known at once; 0 where they cannot be counted without memory."""
        key = repr(self.key(config)["model"])
        if key not in self._weights:
            self._weights[key] = 0
            with suppress(Exception):
                model = self._outline(config)
                self._weights[key] = 0 if model is None else sum(p.nbytes for p in model.parameters())
        return self._weights[key]

    def largest_batch(self, config: Config, capacity: int, most: int) -> tuple[int | None, str]:
        """The largest batch size up to `most` that is predicted to need no more than `capacity` bytes.

        Returns:
            The size, 0 where none fits, or None and the reason where it cannot be predicted.
        """

        def found(size: int) -> Prediction:
            return self.predict(with_batch_size(config, size))

        small, large = (found(size) for size in SAMPLED)
        if small.min_capacity_bytes is None or large.min_capacity_bytes is None:
            return None, small.reason or large.reason
        a_sample = max(1, (large.min_capacity_bytes - small.min_capacity_bytes) // (SAMPLED[1] - SAMPLED[0]))
        guess = SAMPLED[0] + (capacity - small.min_capacity_bytes) // a_sample

        def holds(size: int) -> bool:
            need = found(size).min_capacity_bytes
            return need is not None and need <= capacity

        return largest(holds, guess=guess, step=max(1, guess // 100), least=1, most=most) or 0, ""

    def key(self, config: Config) -> Key:
        """Everything that the need for memory depends on, as plain data."""
        used = recipe(config)
        return {
            "versions": versions(),
            "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
            "attention": [switch() for switch in ATTENTION],
            "model": {**asdict(config.model), "pretrained": False, "num_classes": self.classes(config)},
            "optimizer": {**asdict(config.optimizer), "lr": 0, "weight_decay": config.optimizer.weight_decay > 0},
            "sizes": [used.batch_size, used.micro_batch_size, used.eval_batch(self.val_size), used.image_size],
            "precision": used.precision,
            **saver_settings(config.trainer),
            "label_smoothing": config.trainer.label_smoothing > 0,
            "class_weights": config.trainer.class_weights is not None,
            "ema": config.trainer.ema_decay is not None,
            "clip_grad": config.trainer.clip_grad is not None,
            "channels_last": bool(config.trainer.channels_last),
            "deterministic": config.trainer.deterministic,
            "tf32": config.trainer.tf32,
            "stored_size": self._stored_size(config),
            "cuda": self.spec.cuda,
            "capability": list(self.spec.capability),
            "multiprocessors": self.spec.multiprocessors,
        }

    def classes(self, config: Config) -> int:
        """Width of the model's head under these settings."""
        weights = config.trainer.class_weights
        known = len(weights) if isinstance(weights, list) else ASSUMED_CLASSES
        return config.model.num_classes or self.num_classes or known

    def _stored_size(self, config: Config) -> int:
        """As `ladder.stored_size`; what waits on a CPU is not counted."""
        if not self.spec.cuda:
            return 0
        return stored_size([config]) if self.stored_size is None else self.stored_size

    def _model(self, config: Config) -> nn.Module:
        on_meta = torch.get_default_device().type == "meta"
        outlined = outline(config.model, self.classes(config)) if on_meta and self.make_model is build_model else None
        if outlined is not None:
            model = copy.deepcopy(outlined)  # faster than making it
        else:
            model = self.make_model(without_weights(config.model), self.classes(config))
        apply_savers(model, config.trainer)
        return model

    def _spec(self, config: Config) -> TraceSpec:
        used, cuda = recipe(config), self.spec.cuda
        device = torch.device("cuda" if cuda else "cpu")
        key = self.key(config)
        model_key = repr((key["model"], saver_settings(config.trainer)))
        loss = Criterion.of(self.make_loss(config, self.classes(config)))
        parts = micro_batches(used.batch_size, used.micro_batch_size, False)
        if 1 in parts and self._has_batch_norm(config):
            parts = micro_batches(used.batch_size, used.micro_batch_size, True)
        return TraceSpec(
            lambda: self._model(config),
            lambda model: build_optimizer(model, config.optimizer, device),
            (3, used.image_size, used.image_size),
            tuple(parts),
            used.eval_batch(self.val_size),
            loss=loss,
            precision=used.precision,
            channels_last=bool(config.trainer.channels_last),
            ema=config.trainer.ema_decay is not None,
            clip_grad=config.trainer.clip_grad is not None,
            undo=cuda,
            cuda=cuda,
            stored_size=self._stored_size(config),
            key=repr((model_key, key["optimizer"], key["label_smoothing"], loss.kind)),
        )

    def _outline(self, config: Config) -> nn.Module | None:
        """The network without memory; None where it cannot be made so."""
        if self.make_model is build_model:
            return outline(config.model, self.classes(config))
        return without_memory(lambda: self._model(config))

    def _has_batch_norm(self, config: Config) -> bool:
        model_key = repr(self.key(config)["model"])
        if model_key not in self._norms:
            model = self._outline(config)
            if model is None:
                with same_random_numbers():
                    model = self._model(config)
            self._norms[model_key] = has_batch_norm(model)
        return self._norms[model_key]


@dataclass(frozen=True, slots=True)
class Row:
    """One rung of a plan. Sizes in bytes, None where they are not known.

    Attributes:
        verdict: `fits`, `unsure`, `hopeless`, `unknown`, or `skipped` for a rung that is not to be tried.
        reason: why it is unknown or skipped.
        min_capacity_bytes: the smallest limit on the allocator under which it still trains.
        min_card_bytes: the same with what a CUDA process takes outside the allocator.
        seconds: what predicting it took.
    """

    rung: str
    verdict: str
    recipe: str
    live_bytes: int | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    min_capacity_bytes: int | None = None
    min_card_bytes: int | None = None
    seconds: float = 0.0
    reason: str = ""


def _text(key: Key) -> str:
    return repr(sorted(key.items()))


@dataclass(frozen=True, slots=True)
class Plan:
    """What a ladder will need.

    Attributes:
        lands_on: name of the first rung that fits; None where none is known to.
        perhaps: names of the rungs above it that may hold as well.
    """

    spec: DeviceSpec
    rows: tuple[Row, ...]
    lands_on: str | None
    perhaps: tuple[str, ...]


def plan(ladder: Sequence[Rung[Config]], planner: Planner, *, is_found: bool = False) -> Plan:
    """Predict every rung and say where a descent will land.

    Args:
        is_found: rung 0 has the largest batch size that is predicted to fit. It is too near the limit to be sure of,
            but training looks for the one that holds: it lands there, whatever the number turns out to be.
    """
    held, found = ladder[0], []
    for rung in ladder:
        found.append(_row(rung, planner, held))
        held = held if found[-1].verdict == "skipped" else rung
    rows = tuple(found)
    landed = 0 if is_found else next((i for i, row in enumerate(rows) if row.verdict == "fits"), None)
    above = rows if landed is None else rows[:landed]
    perhaps = tuple(row.rung for row in above if row.verdict in ("unsure", "unknown"))
    return Plan(planner.spec, rows, None if landed is None else rows[landed].rung, perhaps)


def _row(rung: Rung[Config], planner: Planner, above: Rung[Config]) -> Row:
    used = str(recipe(rung.settings))
    if passed_over := rung.passed_over or planner.no_step(above.settings, rung.settings):
        return Row(rung.name, "skipped", used, reason=passed_over)
    found = planner.predict(rung.settings)
    if found.reason:
        refusal = image_refusal(rung.settings, planner.classes(rung.settings))
        answer = "skipped" if refusal else "unknown"
        return Row(rung.name, answer, used, seconds=found.seconds, reason=refusal or found.reason)
    capacity, least = planner.spec.capacity, found.min_capacity_bytes
    sizes: dict[str, Any] = {name: getattr(found, name) for name in ("live_bytes", "allocated_bytes", "reserved_bytes")}
    return Row(
        rung.name,
        "unknown" if capacity is None else verdict(found, capacity),
        used,
        **sizes,
        min_capacity_bytes=least,
        min_card_bytes=None if least is None else least + planner.spec.context,
        seconds=found.seconds,
        reason="" if capacity is not None else "no card and no memory.limit to judge by",
    )


def check_names(ladder: Sequence[Rung[Config]], *, own_model: bool = False) -> None:
    """Refuse networks, unless the caller makes his own, and optimizers that nobody knows, on any rung.

    Raises:
        ConfigError: there are some; all problems of the rungs at once.
        ModelError: it is the network that was asked for.
    """
    checks: list[Callable[[Config], None]] = [lambda config: check_optimizer(config.optimizer)]
    if not own_model:
        checks.insert(0, lambda config: check_name(config.model.name))
    problems: dict[str, str] = {}  # what is wrong, and the first rung of which it is: those below inherit it
    for rung, check in itertools.product(ladder, checks):
        try:
            check(rung.settings)
        except UserError as error:
            if rung is ladder[0]:
                raise
            problems.setdefault(str(error), rung.name)
    if problems:
        raise ConfigError("; ".join(f"rung {name!r}: {text}" for text, name in problems.items()))


def single_sample(config: Config) -> str:
    """Why a network with BatchNorm is not trained with a batch or micro-batch of one; empty for larger ones."""
    used = recipe(config)
    if used.micro_batch_size > 1:
        return ""
    key = "batch_size" if used.batch_size == 1 else "micro_batch_size"
    return (
        f"trainer.{key}=1 leaves BatchNorm a single sample, which has no variance; "
        "use 2 or more, or a model without BatchNorm"
    )


def _optimizer_refusal(model: nn.Module | None, config: Config) -> str:
    on_meta = {key: value for key, value in config.optimizer.kwargs.items() if key != "fused"}  # which meta has not
    try:
        if model is not None:
            build_optimizer(model, replace(config.optimizer, kwargs=on_meta), torch.device("meta"))
    except ConfigError as error:
        return str(error)
    return ""


def image_refusal(config: Config, num_classes: int) -> str:
    """Why the network refuses the image size; empty where it does not."""
    try:
        check_image_size(config.model, config.data.image_size, num_classes)
    except ModelError as error:
        return str(error)
    return ""
