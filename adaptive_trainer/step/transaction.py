"""An update of your own loop that leaves no trace when memory runs out."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from adaptive_trainer import oom
from adaptive_trainer.data.position import Position
from adaptive_trainer.errors import AdaptiveTrainerError, ConfigError, DeviceUnusable, OutOfMemory
from adaptive_trainer.memory.usage import is_short
from adaptive_trainer.step.undo import Progress, TrainState, Undo
from adaptive_trainer.utils.belongings import walk


class Transaction:
    """An update of your own loop: what is done in the block happens wholly, or leaves no trace.

        transaction = Transaction(model, optimizer, scaler=scaler, ema=ema)
        for images, labels in loader:
            with transaction:
                loss = nn.functional.cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    An error that leaves the block puts everything back, bit for bit: parameters and buffers, the optimizer's state and
    settings, scaler, moving average, the random numbers of torch, CUDA, Python and numpy, and the gradients. Each
    gradient is again what it was before the block: None, or what the blocks before have accumulated. An out-of-memory
    is then raised as `OutOfMemory`, which `descend` answers; any other error is raised as it is.

    What the block held is released, but for what the names in your function still refer to (`loss` above): run the loop
    in a function, which `OutOfMemory` leaves. Not put back are plain attributes of networks (a count of calls), which
    samples a loader gives next, and your own variables.

    The copies take as much memory as parameters, buffers, optimizer state and moving average, and while gradients are
    accumulated that of the gradients. They are made once and used by every block.

    Args:
        model: the network. Its modules are those that it has now.
        optimizer: any optimizer of torch's interface; its parameters need not be the model's. For several, nest one
            block in the other.
        scaler: the GradScaler, where there is one.
        ema: the moving average: a module, or an object with one as `module`.
        also: what else the block changes: a loss or metric that is a module, a learning-rate scheduler, an object,
            dictionary or list that holds numbers, texts or generators of random numbers.
        on_host: keep the copies in the host's memory. They take none of the device's then, and each block takes longer,
            by the time of copying.

    Raises:
        ConfigError: one of these cannot be put back; the message says why.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        scaler: GradScaler | None = None,
        ema: Any = None,
        also: Sequence[Any] = (),
        on_host: bool = False,
    ) -> None:
        _check_kinds(model, optimizer, scaler, ema)
        # One module over all: the undo asks it for every parameter and buffer there is.
        modules = nn.ModuleList([model, *(each for each in also if isinstance(each, nn.Module))])
        # A module's own buffers count too (torch's AveragedModel has one), so the whole of it takes `.module`'s place.
        average: Any = SimpleNamespace(module=ema) if isinstance(ema, nn.Module) else ema
        others = list(_seen_into(each for each in also if not isinstance(each, nn.Module)))
        _refuse_tensors([average, *others], known=[modules, optimizer, getattr(average, "module", None)])
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.device = trained[0].device
        scaler = scaler or GradScaler(self.device.type, enabled=False)
        state = _State(modules, optimizer, scaler, average, Position(0, 0, 0, 1), others=others)
        self._undo = Undo(state, self.device, on_host=on_host)
        known = set(self._undo.parameters)  # others, as a loose temperature, are in no module
        self._undo.parameters += [parameter for parameter in trained if parameter not in known]
        self._gradients = _Gradients(self._undo.parameters, scaler, on_host=on_host)

    def __enter__(self) -> Transaction:
        """Keep copies of all that the block may change.

        Raises:
            OutOfMemory: there is no room for the copies.
            ConfigError: this transaction is at work already.
        """
        if self._undo.progress is not Progress.IDLE:
            raise ConfigError("this transaction is at work already; a block within its own block needs another one")
        kinds = {oom.Kind.DEVICE, oom.Kind.HOST} if self.device.type == "cpu" else {oom.Kind.DEVICE}
        failure = oom.attempt(self._keep, kinds=kinds, pressure=self._is_short)
        if failure is not None:
            self._free()
            raise OutOfMemory(failure.text, phase="the copies before an update")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keep what the block has done; after an error, put back what there was.

        Raises:
            OutOfMemory: the block ran out of memory.
            DeviceUnusable: the device answers nothing any more.
        """
        if error is None:
            self._end()
            return
        failure = oom.describe(error, pressure=self._is_short)
        # Of a device that answers nothing any more, a roll-back would only raise the next error.
        if failure.kind is not oom.Kind.POISONED and not isinstance(error, DeviceUnusable):
            self._undo.roll_back()
            self._gradients.put_back()
        self._end()
        if isinstance(error, AdaptiveTrainerError) or not failure.fills(self.device):
            return  # raised as it is
        # Python keeps the error until this method is left, and with it the frames of the block: only empty ones can go.
        _clear_frames(error)
        del error, trace
        answer = self._answer(failure)
        try:
            raise answer
        finally:
            answer.__context__ = None  # Python has just set it to the error that leaves the block

    def _keep(self) -> None:
        try:
            self._undo.begin()
            self._undo.before_step()  # already: where in the block the step begins is the caller's affair
            self._gradients.keep()
        except BaseException:
            self._end()
            raise

    def _end(self) -> None:
        self._undo.end()
        self._gradients.forget_tensors()

    def _free(self) -> None:
        self._undo.free_copies()
        oom.release(self.device)

    def _answer(self, failure: oom.Failure) -> AdaptiveTrainerError:
        if not oom.probe(self.device):
            return DeviceUnusable(f"{self.device} answers nothing any more after: {failure.text}")
        self._free()
        return OutOfMemory(failure.text, phase="update")

    def _is_short(self) -> bool:
        return is_short(self.device)


@dataclass
class _State(TrainState):
    """What an update of the caller's own changes.

    Attributes:
        others: objects whose plain attributes and random numbers are a part of it.
    """

    others: list[Any] = field(default_factory=list)

    def owners(self) -> dict[str, Any]:
        """The objects whose generators, and all but the networks' plain attributes, a block may change."""
        return {**super().owners(), "also": self.others}


class _Gradients:
    """The gradients that are there before a block, and what the scaler knows of them (whether they are unscaled).

    Args:
        parameters: whose gradients they are.
        scaler: the GradScaler.
        on_host: keep the copies in host memory.
    """

    def __init__(self, parameters: list[nn.Parameter], scaler: GradScaler, *, on_host: bool) -> None:
        self.parameters = parameters
        self.scaler = scaler
        self.on_host = on_host
        self.forget_tensors()

    def forget_tensors(self) -> None:
        """Keep no gradient alive."""
        self._kept: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        self._stages: dict[int, dict[str, Any]] = {}

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the gradients that there are: a backward pass adds to them in place."""
        host = torch.device("cpu")
        with _disable_current_modes():  # it is no work of the block's
            for parameter in self.parameters:
                if (grad := parameter.grad) is not None:
                    copy = grad.to(host if self.on_host else grad.device, copy=True)
                    self._kept.append((parameter, grad, copy))
        # Gradients that were unscaled before the block must not be unscaled again.
        for key, stage in self._states_of_scaler().items():
            self._stages[key] = {**stage, "found_inf_per_device": dict(stage["found_inf_per_device"])}

    @torch.no_grad()
    def put_back(self) -> None:
        """Set the gradients that there were; the others have been dropped."""
        with _disable_current_modes():
            for parameter, grad, copy in self._kept:
                grad.copy_(copy)
                parameter.grad = grad  # the same tensor: the caller may hold it
        self._states_of_scaler().clear()
        self._states_of_scaler().update(self._stages)

    def _states_of_scaler(self) -> dict[int, dict[str, Any]]:
        """By optimizer; a disabled scaler has none."""
        return self.scaler._per_optimizer_states if self.scaler.is_enabled() else {}


def _check_kinds(model: Any, optimizer: Any, scaler: Any, ema: Any) -> None:
    """Refuse what is of another kind, in words that say what was given."""
    given = f"not {type(model).__name__}"
    if not isinstance(model, nn.Module):
        raise ConfigError(f"a Transaction's model is a torch.nn.Module, {given}")
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"a Transaction's optimizer is a torch.optim.Optimizer, not {type(optimizer).__name__}; for several, use a "
            "Transaction for each and nest the blocks"
        )
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise ConfigError(f"a Transaction's scaler is a torch.amp.GradScaler, not {type(scaler).__name__}")
    if ema is not None and not isinstance(ema, nn.Module) and not isinstance(getattr(ema, "module", None), nn.Module):
        raise ConfigError(
            f"a Transaction's ema is a torch.nn.Module or has one as its attribute `module`, and {type(ema).__name__} "
            "has none"
        )


def _seen_into(values: Iterable[Any]) -> Iterator[Any]:
    """Objects; in place of torch's schedulers, which are not looked into, their attributes."""
    for value in values:
        if isinstance(value, LRScheduler):
            yield vars(value)
            yield from _seen_into(each for each in tree_leaves(vars(value)) if isinstance(each, LRScheduler))
        else:
            yield value


def _refuse_tensors(values: list[Any], known: list[Any]) -> None:
    """Refuse objects with tensors that nothing would put back, as they are in no module and no optimizer.

    Raises:
        ConfigError: there is such a tensor.
    """
    kept = {id(value) for _, value, _ in walk({"known": known})}
    for _, value, _ in walk({str(number): value for number, value in enumerate(values)}):
        content = value if isinstance(value, dict) else getattr(value, "__dict__", value)
        is_module = isinstance(value, nn.Module)
        if id(value) not in kept and (is_module or any(isinstance(leaf, Tensor) for leaf in tree_leaves(content))):
            raise ConfigError(
                f"a Transaction cannot put back the tensors of {type(value).__name__}; make them buffers of a "
                "torch.nn.Module, and name that in `also`"
            )


def _clear_frames(error: BaseException | None) -> None:
    """Drop the variables of all frames that an error and those before it came through, but for running ones."""
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
