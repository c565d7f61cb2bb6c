"""Predict what a recipe needs, as training would train it; known at once where it was predicted before."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace

import torch

from adaptive_trainer.config.schema import Config
from adaptive_trainer.data.position import micro_batches, shares
from adaptive_trainer.distributed.peers import peers
from adaptive_trainer.ladder.resolve import recipe, stored_size
from adaptive_trainer.models.losses import Criterion, Loss, build_loss
from adaptive_trainer.models.optimizers import build_optimizer
from adaptive_trainer.models.savers import saver_settings
from adaptive_trainer.planning.cache import Key, PlanCache, versions
from adaptive_trainer.planning.device_spec import DeviceSpec
from adaptive_trainer.planning.networks import ModelFactory, Networks
from adaptive_trainer.prediction.derivation import Tracer
from adaptive_trainer.prediction.estimator import Prediction, predict, workspaces_of
from adaptive_trainer.prediction.tracer import TraceSpec
from adaptive_trainer.prediction.workspaces import Workspaces
from adaptive_trainer.recipe import Recipe

# Variables that change how memory is taken, so that they are part of each key.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
ENVIRONMENT = (*ALLOCATOR, "CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "TIMM_FUSED_ATTN")
# Switches of PyTorch that decide whether attention keeps its matrix.
ATTENTION: tuple[Callable[[], bool], ...] = (
    torch.backends.cuda.flash_sdp_enabled,
    torch.backends.cuda.mem_efficient_sdp_enabled,
    torch.backends.cuda.cudnn_sdp_enabled,
)

LossFactory = Callable[[Config, int], Loss | Criterion]


class Predictor:
    """Predicts recipes with the factories that training uses; one for all rungs of a run.

    Args:
        num_classes: width of the model's head; `ASSUMED_CLASSES` where neither this nor the settings say.
        make_model, make_loss: as the Trainer was given them; its own where None.
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
        self.networks = Networks(make_model, num_classes)
        self.make_loss = make_loss or build_loss
        # A factory has no name that would tell its networks or losses from those of another run.
        is_named = make_loss is None and not self.networks.is_own
        self.cache = cache if cache is not None and is_named else PlanCache(None)
        self.stored_size = stored_size
        self.val_size = val_size
        self._tracer = Tracer()
        self._known: dict[str, Prediction] = {}

    def predict(self, config: Config) -> Prediction:
        """Predict what the recipe of these settings will need. Never raises for one that cannot be predicted."""
        start = time.perf_counter()
        found = self.recalled(config)
        if found is None:
            try:
                found = self._predict(self.spec_of(config), self._tracer)
            except Exception as error:  # factories of the user's own may raise anything
                found = Prediction(reason=(str(error) or type(error).__name__).splitlines()[0])
            found = replace(found, seconds=time.perf_counter() - start)
            key = self.key(config)
            self.cache.keep(key, found)
            self._known[_text(key)] = found
        return replace(found, seconds=time.perf_counter() - start)

    def limit(self, config: Config) -> int | None:
        """The smallest limit of these settings in bytes, not remembered; None where it is not known."""
        update = replace(self.spec_of(config), eval_batch_size=None)  # which has no part in it
        return self._predict(update, Tracer()).min_capacity_bytes

    @property
    def workspaces(self) -> Workspaces:
        """What kernels take on the device."""
        return workspaces_of(self.spec.capability, self.spec.multiprocessors)

    def _predict(self, spec: TraceSpec, tracer: Tracer) -> Prediction:
        device = self.spec
        return predict(
            spec,
            capability=device.capability,
            multiprocessors=device.multiprocessors,
            tracer=tracer,
        )

    def recalled(self, config: Config) -> Prediction | None:
        """The prediction for this recipe, if it was made before."""
        key = self.key(config)
        # Within a run failures are remembered too, which the cache leaves out, and no file is read twice.
        found = self._known.get(_text(key)) or self.cache.get(Prediction, key)
        if found is not None:
            self._known[_text(key)] = found
        return found

    def key(self, config: Config) -> Key:
        """Everything that the need for memory depends on, as plain data."""
        return {
            "versions": versions(),
            "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
            "attention": [switch() for switch in ATTENTION],
            "recipe": asdict(self._recipe(config)),
            "model": self.networks.key(config),
            # Whether there is decay divides the parameters into groups; how much of it takes no memory.
            "optimizer": {**asdict(config.optimizer), "lr": 0, "weight_decay": config.optimizer.weight_decay > 0},
            **saver_settings(config.trainer),
            "label_smoothing": config.trainer.label_smoothing > 0,
            "class_weights": config.trainer.class_weights is not None,
            "ema": config.trainer.ema_decay is not None,
            "deterministic": config.trainer.deterministic,
            "cuda": self.spec.cuda,
            "capability": list(self.spec.capability),
            "multiprocessors": self.spec.multiprocessors,
            "summed": peers().size > 1,
        }

    def _recipe(self, config: Config) -> Recipe:
        used = recipe(config)
        stored = stored_size([config]) if self.stored_size is None else self.stored_size
        return replace(
            used,
            batch_size=max(1, shares(used.batch_size, used.weights(peers().size))[peers().rank]),
            shares=(),  # they are in the batch size, which is that of this rank
            eval_batch_size=used.eval_batch(self.val_size),
            stored_size=stored if self.spec.cuda else 0,  # what waits on a CPU is not counted
            num_classes=self.networks.classes(config),
            # Only whether gradients are clipped decides; of the rest, nothing does.
            clip_grad=None if used.clip_grad is None else 1.0,
            lr=0.0,
            num_workers=0,
        )

    def spec_of(self, config: Config) -> TraceSpec:
        """The update of these settings, as it is traced."""
        used, cuda = self._recipe(config), self.spec.cuda
        device = torch.device("cuda" if cuda else "cpu")
        key, savers = self.key(config), saver_settings(config.trainer)
        loss = Criterion.of(self.make_loss(config, used.num_classes))
        parts = micro_batches(used.batch_size, used.micro_batch_size, False)
        # The network is looked at only where a single sample is left, which BatchNorm joins to another part.
        if 1 in parts and self.networks.has_batch_norm(config):
            parts = micro_batches(used.batch_size, used.micro_batch_size, True)
        return TraceSpec(
            lambda: self.networks.build(config),
            lambda model: build_optimizer(model, config.optimizer, device),
            (3, used.image_size, used.image_size),
            tuple(parts),
            used.eval_batch_size,
            loss=loss,
            precision=used.precision,
            channels_last=used.channels_last,
            ema=key["ema"],
            clip_grad=used.clip_grad is not None,
            undo=cuda,  # a simulated card does not count the copies
            cuda=cuda,
            stored_size=used.stored_size,
            summed=peers().size > 1,
            same_kernels=cuda and config.trainer.deterministic,
            key=repr((*(key[name] for name in ("model", "optimizer", "label_smoothing")), savers, loss.kind)),
        )


def other_allocator() -> bool:
    """Whether the environment asks for another allocator than the one that is modelled: expandable segments, say."""
    return any(os.environ.get(name) for name in ALLOCATOR)


def _text(key: Key) -> str:
    return repr(sorted(key.items()))
