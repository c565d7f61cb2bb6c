"""What one rung trains with, built from its settings, and carried over to the next rung.

Batch, image size, precision and accumulation keep the weights, the optimizer and the moving average; so do other values
of their settings (weight decay, betas, the average's decay), which are used from there on. Another model starts anew;
another optimizer, or one whose state is of another kind, starts anew on the same weights.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_trainer import oom
from adaptive_trainer.checkpoints.optimizer_state import load_optimizer
from adaptive_trainer.config.schema import Config, ModelConfig
from adaptive_trainer.data.position import Position, key_seed, updates_per_epoch
from adaptive_trainer.distributed.peers import peers
from adaptive_trainer.errors import ModelError, OutOfMemory
from adaptive_trainer.ladder.resolve import recipe
from adaptive_trainer.ladder.rung import Rung
from adaptive_trainer.memory.limit import Capacity
from adaptive_trainer.models.losses import Criterion, Loss
from adaptive_trainer.models.memory_format import to_channels_last
from adaptive_trainer.models.optimizers import (
    Schedule,
    build_ema,
    build_optimizer,
    build_scaler,
    build_schedule,
    kind_of_state,
)
from adaptive_trainer.models.savers import apply_savers
from adaptive_trainer.planning.networks import ModelFactory
from adaptive_trainer.recipe import Recipe
from adaptive_trainer.step.copies import layout
from adaptive_trainer.step.undo import TrainState, refuse_lazy
from adaptive_trainer.step.update import Update
from adaptive_trainer.training.own_weights import OwnWeights

METERS = ("loss", "correct", "seen", "skipped")
_SHARDED = "Give the network before it is sharded; trainer.recompute=auto saves memory too"
COLLECTIVE = {  # networks whose passes wait for other ranks, and what to do
    "SyncBatchNorm": "Use BatchNorm, for which each rank takes the statistics of its own samples",
    "DistributedDataParallel": "Give the network that is in it: the trainer sums the gradients itself",
    "FullyShardedDataParallel": _SHARDED,
    "FSDPModule": _SHARDED,
}


@dataclass(frozen=True)
class Parts:
    """What stays the same on every rung.

    Attributes:
        make_model: builds a network from the model settings and the number of classes.
        make_loss: builds the loss of (output, labels) from (settings, number of classes).
        request: what was asked for, as YAML.
        num_classes: width of the model's head.
        train_size: samples in the training set.
        prepare: fills in, for each rung of a ladder, how its network is given images.
        weights: what the networks start from, where `model.weights` names it.
        made: by `model.name`, the class of the network that the caller's own `make_model` has made for it.
    """

    make_model: ModelFactory
    make_loss: Callable[[Config, int], Loss | Criterion]
    request: str
    num_classes: int
    train_size: int
    device: torch.device
    capacity: Capacity
    weights: OwnWeights | None = None
    made: dict[str, str] = field(default_factory=dict)
    prepare: Callable[[Sequence[Rung[Config]]], tuple[Rung[Config], ...]] = tuple

    def recipe(self, config: Config) -> Recipe:
        """The recipe of complete settings for people: a network of the caller's own goes by the name of its class."""
        used, name = recipe(config), config.model.name
        if not self.made:
            return used
        kind = self.made.get(name) or next(iter(self.made.values()))  # a resumed run may not make this one
        return replace(used, model=kind if name == ModelConfig.name else f"{kind} ({name})")


@dataclass
class Session:
    """A rung's settings and the objects that train under them."""

    config: Config
    state: TrainState
    update: Update
    schedule: Schedule
    capacity: Capacity
    rung: str = ""

    @property
    def model(self) -> nn.Module:
        """The network to evaluate and keep: the moving average where there is one."""
        return self.state.model if self.state.ema is None else self.state.ema.module  # timm's wrapper, not it

    @property
    def buffers(self) -> list[Tensor]:
        """Those of the network and of its average."""
        return [buffer for network in self._networks for buffer in network.buffers()]

    @property
    def weights(self) -> list[Tensor]:
        """The parameters and buffers of both."""
        return [*self.buffers, *(weight.data for network in self._networks for weight in network.parameters())]

    @property
    def _networks(self) -> list[nn.Module]:
        return [self.state.model, *([] if self.state.ema is None else [self.state.ema.module])]

    @property
    def is_sound(self) -> bool:
        """Whether the training loss is a number."""
        return math.isfinite(float(self.state.meters["loss"]))


def enter(config: Config, parts: Parts, session: Session | None = None) -> Session:
    """A session under `config`: a new one, or one that carries the given session's state as far as the settings allow.

    Raises:
        OutOfMemory: the weights alone do not fit.
    """

    def built() -> Session:
        with parts.capacity.device_work():
            fresh = session is None or config.model != session.config.model  # weights of another shape
            state = _new_state(config, parts) if fresh or session is None else _carried(config, session, parts)
            return _around(state, config, parts)

    made = oom.attempt(built, pressure=parts.capacity.pressure)
    if isinstance(made, oom.Failure):
        oom.release(parts.device)  # of the half that was built; here its frames are gone
        raise OutOfMemory(made.text, phase="building the model")
    return made


def _new_state(config: Config, parts: Parts) -> TrainState:
    torch.manual_seed(config.seed)  # the same weights at whatever rung the model begins
    model = parts.make_model(config.model, parts.num_classes)
    refuse_lazy(model)
    if peers().size > 1:
        refuse_collectives(model)
    if parts.weights is not None:
        parts.weights.put_into(model, config.model)
    model = model.to(parts.device)  # before the optimizer and the average, which keep tensors of their own
    if config.trainer.channels_last:
        to_channels_last(model)
    _own_memory(model)
    apply_savers(model, config.trainer)
    draw_apart(config.seed)
    return TrainState(
        model,
        build_optimizer(model, config.optimizer, parts.device),
        build_scaler(config.trainer.precision, parts.device),
        build_ema(model, config.trainer.ema_decay),
        Position(config.seed, 0, 0, parts.train_size),
        factory={name: layout(tensor) for name, tensor in (*model.named_buffers(), *model.named_parameters())},
        meters={name: torch.zeros((), dtype=torch.float64, device=parts.device) for name in METERS},
    )


def refuse_collectives(model: nn.Module) -> None:
    """Refuse a network whose passes wait for other ranks.

    Raises:
        ModelError: one out of memory would leave the others waiting there.
    """
    # bases too: what fully_shard makes has a name of its own
    kinds = {base.__name__ for module in model.modules() for base in type(module).__mro__}
    for kind, remedy in COLLECTIVE.items():
        if kind in kinds:
            raise ModelError(
                f"the network has {kind}, whose passes wait for other ranks: one that is out of memory would leave "
                f"them waiting. {remedy}"
            )


def draw_apart(*seeds: int) -> None:
    """Let this rank draw other random numbers than the first one; the weights are made, and are the same."""
    if not peers().is_first:
        seed = key_seed(peers().rank, *seeds)
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)


def _own_memory(model: nn.Module) -> None:
    # nothing can be copied into an expanded view, so that an undo could not put such a buffer back in place
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and any(n > 1 and s == 0 for n, s in zip(buffer.shape, buffer.stride(), strict=True)):
                module._buffers[name] = buffer.contiguous()


def _carried(config: Config, session: Session, parts: Parts) -> TrainState:
    """The session's state, with only those parts made anew whose settings `config` changes."""
    # the session keeps its own, so that a climb which fails can go back to it: see `settle` for what both share
    old, state = session.config, replace(session.state)
    if config.trainer.precision != old.trainer.precision:
        state.scaler = build_scaler(config.trainer.precision, parts.device)
    if (config.trainer.ema_decay is None) != (old.trainer.ema_decay is None):
        state.ema = build_ema(state.model, config.trainer.ema_decay)
    if {**vars(config.optimizer), "lr": None} != {**vars(old.optimizer), "lr": None}:  # the schedule sets the rate
        state.optimizer = build_optimizer(state.model, config.optimizer, parts.device)
        if kind_of_state(config.optimizer) == kind_of_state(old.optimizer):
            learned = session.state.optimizer.state_dict()
            load_optimizer(learned, state.optimizer, keep_groups=True)
    settle(config, state)
    return state


def settle(config: Config, state: TrainState) -> None:
    """Set in model, optimizer and average what `config` asks of them: a session may share each with the one before."""
    apply_savers(state.model, config.trainer)
    if state.ema is not None and config.trainer.ema_decay is not None:
        state.ema.decay = config.trainer.ema_decay
    # timm relates a corrected weight decay to the rate that the optimizer was made with, kept here or there
    state.optimizer.defaults["lr"] = config.optimizer.lr
    for group in state.optimizer.param_groups:
        if "max_lr_snapshot" in group:
            group["max_lr_snapshot"] = config.optimizer.lr


def _around(state: TrainState, config: Config, parts: Parts) -> Session:
    used = recipe(config)
    loss = Criterion.of(parts.make_loss(config, parts.num_classes), parts.device)
    update = Update(state, loss, used, device=parts.device, capacity=parts.capacity)
    schedule = build_schedule(
        state.optimizer,
        config.schedule,
        lr=used.lr,
        epochs=config.trainer.epochs,
        updates_per_epoch=updates_per_epoch(parts.train_size, used.batch_size),
    )
    return Session(config, state, update, schedule, parts.capacity)
