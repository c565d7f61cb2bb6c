"""The undo of one update: everything that training changes, kept so that a failed update leaves no trace.

`TrainState` names what training changes; `Undo` copies it into buffers that are allocated once, and puts it back in
place. Nothing here allocates on the device once the buffers exist, neither taking nor restoring: that is when memory is
short. What did not exist before the update (lazily made optimizer state, a fresh GradScaler's scale) is recorded as
absent and is absent again after a roll-back.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler, _refresh_per_optimizer_state
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from adaptive_trainer import oom
from adaptive_trainer.data.position import Position
from adaptive_trainer.errors import ConfigError, DeviceUnusable
from adaptive_trainer.step.copies import Bindings, Layout, Shadow
from adaptive_trainer.utils.belongings import Belongings
from adaptive_trainer.utils.modes import unseen
from adaptive_trainer.utils.random import RandomStates

SCALER_TENSORS = ("_scale", "_growth_tracker")  # made at the first update; a disabled scaler has none
COUNTS = ("position", "updates", "finished_epochs", "best")
PLAIN = (Tensor, int, float, bool, str, type(None))  # values of an optimizer's state that are no containers


@dataclass
class TrainState:
    """All that one update changes, together or not at all.

    Attributes:
        ema: the moving average: its `module` is a copy of the model, which `update(model, step=...)` changes; or None.
        position: which samples are done.
        loss: what the network is trained with; the buffers and random numbers that it owns are a part of the state.
        also: what else an update changes: parameters and buffers of modules, plain attributes and random numbers.
        updates: committed updates since the model was built.
        finished_epochs: epochs that are trained, evaluated and recorded.
        best: the highest validation accuracy so far, or less the least loss where accuracy is not known.
        factory: layout of the model's parameters and buffers as they were made, by name; others come of forward passes.
        meters: running sums over this epoch: `loss` (over samples), `correct`, `seen` (samples), `skipped` (updates
            whose step the GradScaler left out because of an overflow), and `weight`, the denominator of the loss, where
            that is not the samples. Scalars on the device.
    """

    model: nn.Module
    optimizer: Optimizer
    scaler: GradScaler
    ema: Any
    position: Position
    loss: Any = None
    also: Sequence[Any] = ()
    updates: int = 0
    finished_epochs: int = 0
    best: float | None = None
    factory: dict[str, Layout] = field(default_factory=dict)
    meters: dict[str, Tensor] = field(default_factory=dict)

    def owners(self) -> dict[str, Any]:
        """The objects whose generators of random numbers an update may change."""
        found = {"model": self.model, "loss": self.loss, "optimizer": self.optimizer, "average": self.ema}
        return found | {"also": self.also}  # last: what it leads to may be the model's


def refuse_lazy(model: nn.Module) -> None:
    """Refuse a network that cannot be trained yet.

    Raises:
        ConfigError: it has lazy parameters or buffers.
    """
    if any(map(is_lazy, chain(model.parameters(), model.buffers()))):
        raise ConfigError(
            f"{type(model).__name__} has lazy parameters, whose sizes are not known; run it once on an image where it "
            "is made"
        )


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


def _with_wrapped(optimizer: Optimizer) -> Iterator[Optimizer]:
    """The optimizer, and those within it that it hands its work to."""
    yield optimizer
    for value in vars(optimizer).values():
        if isinstance(value, Optimizer):
            yield from _with_wrapped(value)


class Progress(IntEnum):
    """How far the work has come that an `Undo` can take back."""

    IDLE = 0  # nothing is kept
    BEGUN = 1  # what forward, backward and clipping change is kept
    STEPPING = 2  # what the optimizer step changes is kept too


class Undo:
    """Takes and restores one state. `begin` before the update, `before_step` before the optimizer, `roll_back` after a
    failure, `end` when what is kept is no longer to be restored.

    Attributes:
        progress: what `roll_back` restores; nothing while it is IDLE. It is set last by what keeps, and taken back
            first, so that what failed half-way is never restored.
        can_move: an update may give a tensor another place or layout.

    Args:
        state: what is watched; its model, optimizer, scaler and EMA objects must stay the same ones.
        device: where training runs; its random numbers are part of the state.
        on_host: keep all copies in host memory, not beside the tensors.
        can_move: where it is known; else any code but torch's, timm's and torchvision's may.
    """

    def __init__(
        self, state: TrainState, device: torch.device, *, on_host: bool = False, can_move: bool | None = None
    ) -> None:
        self.state = state
        self.device = device
        also = [module for each in state.also if isinstance(each, nn.Module) for module in each.modules()]
        modules = [*state.model.modules(), *(state.loss.modules() if isinstance(state.loss, nn.Module) else ()), *also]
        averaged = [] if state.ema is None else list(state.ema.module.modules())
        self.bindings = Bindings([owner for m in (*modules, *averaged) for owner in (m._parameters, m._buffers)])
        self.buffers = [m._buffers for m in (*modules, *averaged)]  # of the average too: an evaluation may change them
        self._bound_buffers: list[Tensor] = []
        trained = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
        of_also = [parameter for module in also for parameter in module.parameters(recurse=False)]
        # Those of the optimizer too: others, as a loose temperature, are in no module.
        self.parameters = list(dict.fromkeys([*state.model.parameters(), *of_also, *trained]))
        self.average = [] if state.ema is None else list(state.ema.module.parameters())
        self.random_states = RandomStates(*dict.fromkeys([device, *(each.device for each in self.parameters)]))
        self.belongings = Belongings(state.owners(), whole=("optimizer", "average", "also"), strict=("also",))
        self.can_move = self.belongings.has_own_code if can_move is None else can_move
        self.on_host = on_host
        self.optimizers = list(_with_wrapped(state.optimizer))
        self.optimizer_state: list[tuple[dict[Any, Any], dict[Any, dict[str, Any]]]] = []  # each with what it held
        self.free_copies()

    def free_copies(self) -> None:
        """Forget the copies and give back their memory."""
        host = torch.device("cpu")
        make = functools.partial(Shadow, can_move=self.can_move)
        self.small = make(host if self.on_host else None)
        self.beside, self.host = make(None), make(host)
        self.large = self.host
        self.end()

    def end(self) -> None:
        """What is kept is out of date: it is not restored any more."""
        self.progress = Progress.IDLE

    def forget_tensors(self) -> None:
        """Keep no weight and no optimizer state alive that is gone since the last update; the copies' memory stays."""
        self.end()
        self.optimizer_state = []
        for kept in (self.small, self.beside, self.host, self.bindings):
            kept.forget_tensors()
        self._bound_buffers = []

    def tensors(self) -> list[Tensor]:
        """What is watched, and the copies of it."""
        state = self.state
        scaler = [getattr(state.scaler, name, None) for name in SCALER_TENSORS]
        made = [tree_leaves(list(optimizer.state.values())) for optimizer in self.optimizers]
        bound = chain.from_iterable(buffers.values() for buffers in self.buffers)
        copies = chain.from_iterable(kept.copies for kept in (self.small, self.beside))
        others = _tensors((*bound, *scaler, *state.meters.values(), *chain.from_iterable(made)))
        return [*self.parameters, *self.average, *others, *copies]

    def begin(self) -> None:
        """Keep what forward, backward, clipping and evaluation change: buffers, of the average as well, scaler, meters,
        random numbers, plain values.
        """
        self.progress = Progress.IDLE
        self._keep()
        self.progress = Progress.BEGUN

    @unseen
    def _keep(self) -> None:
        state = self.state
        if not self.bindings.keep():
            self._bound_buffers = _tensors(chain.from_iterable(map(dict.values, self.buffers)))
        self.scaler_tensors = {name: getattr(state.scaler, name, None) for name in SCALER_TENSORS}
        self.meters = dict(state.meters)
        others = _tensors((*self.scaler_tensors.values(), *self.meters.values()))
        self.small.save([*self._bound_buffers, *others], self.parameters)
        self.groups = [{k: v for k, v in group.items() if k != "params"} for group in state.optimizer.param_groups]
        self.belongings.keep()
        self.random = self.random_states.read(self.belongings.generators.values())
        self.counts = {name: getattr(state, name) for name in COUNTS}

    def before_step(self, *, on_host: bool = False, copies: bool = True) -> None:
        """Keep what the optimizer step and the moving average change: both's parameters, optimizer state.

        Args:
            on_host: keep the copies in host memory.
            copies: keep what the tensors hold; otherwise only which of them are the optimizer's state.

        Raises:
            RuntimeError: `begin` has not kept the rest.
        """
        if self.progress is Progress.IDLE:
            raise RuntimeError("a step cannot be undone before what comes before it: call begin first")
        self.progress = Progress.BEGUN
        self._keep_for_step(on_host=on_host, copies=copies)
        self.progress = Progress.STEPPING

    @unseen
    def _keep_for_step(self, *, on_host: bool, copies: bool) -> None:
        self.large = self.host if on_host or self.on_host else self.beside
        if not copies:
            self.large = Shadow(None, can_move=False)
        self.optimizer_state = [(o.state, {p: dict(values) for p, values in o.state.items()}) for o in self.optimizers]
        leaves = list(chain.from_iterable(values.values() for values in self._kept_values()))
        kinds = set(map(type, leaves))
        if not all(issubclass(kind, PLAIN) for kind in kinds):
            leaves = self._copy_containers()
        if copies:
            changing = leaves if kinds == {Tensor} else _tensors(leaves)  # often hundreds
            settings = _tensors(value for group in self.groups for value in group.values())
            self.large.save([*self.parameters, *changing, *settings, *self.average])

    def _copy_containers(self) -> list[Any]:
        """Keep lists and the like of the optimizer's state as they are filled now; returns what is in them and beside
        them."""
        for kept in self._kept_values():
            for key in [key for key, value in kept.items() if not isinstance(value, PLAIN)]:
                kept[key] = tree_map(lambda leaf: leaf, kept[key])
        return tree_leaves(list(self._kept_values()))

    def _kept_values(self) -> Iterator[dict[str, Any]]:
        return chain.from_iterable(kept.values() for _, kept in self.optimizer_state)

    @contextmanager
    def rolled_back_on_error(self) -> Iterator[None]:
        """An error inside is rolled back (optimizer steps only after `before_step`).

        A device that answers nothing any more is left alone.
        """
        self.begin()
        try:
            yield
        except BaseException as error:
            if not (isinstance(error, DeviceUnusable) or oom.describe(error).kind is oom.Kind.POISONED):
                self.roll_back()
            raise
        finally:
            self.end()

    def roll_back(self) -> None:
        """Put everything back as it was at `begin`, and drop the gradients. Allocates nothing on the device.

        It may be called again, until `end`. Where nothing is kept it does nothing.
        """
        if self.progress is not Progress.IDLE:
            self._restore()

    @unseen
    def _restore(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        if self.progress is Progress.STEPPING:
            self.large.restore()
        self.small.restore()
        self.bindings.put_back()
        self.belongings.put_back()
        if self.progress is Progress.STEPPING:
            self._restore_optimizer_state()
        self._restore_plain()
        torch.clear_autocast_cache()

    def _restore_optimizer_state(self) -> None:
        for state, kept in self.optimizer_state:
            state.clear()
            state.update(kept)

    def _restore_plain(self) -> None:
        state = self.state
        groups = state.optimizer.param_groups
        del groups[len(self.groups) :]  # those that `add_param_group` has added since
        for group, kept in zip(groups, self.groups, strict=True):
            for key in [key for key in group if key != "params" and key not in kept]:
                del group[key]
            group.update(kept)
        if state.scaler.is_enabled():
            vars(state.scaler).update(self.scaler_tensors)
            state.scaler._per_optimizer_states = defaultdict(_refresh_per_optimizer_state)
        state.meters = dict(self.meters)
        vars(state).update(self.counts)
        self.random_states.write(self.random)
