"""An update of your own loop that leaves no trace when memory runs out."""

from __future__ import annotations

import operator
import sys
import traceback
from collections.abc import Sequence
from types import SimpleNamespace, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes

from adaptive_trainer import oom
from adaptive_trainer.data.position import Position
from adaptive_trainer.errors import AdaptiveTrainerError, ConfigError, DeviceUnusable, OutOfMemory
from adaptive_trainer.memory.usage import is_short
from adaptive_trainer.step.undo import Progress, TrainState, Undo, refuse_lazy


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
    in a function, which `OutOfMemory` leaves. Not put back are plain attributes of the model (a count of calls),
    requires_grad, train() and eval(), the growth settings of a scaler (set_growth_factor), which samples a loader gives
    next, and your own variables.

    End the block with `optimizer.zero_grad()`: gradients that are there where it begins are copied, and held until it
    ends.

    The copies take as much memory as parameters, buffers, optimizer state and moving average, and while gradients are
    accumulated that of the gradients. They are made once and used by every block.

    Args:
        model: the network.
        optimizer: any optimizer of torch's interface; its parameters need not be the model's. For several, nest one
            block in the other.
        scaler: the GradScaler, where there is one.
        ema: the moving average: a module, or an object with one as `module`.
        also: what else the block changes: a loss or metric that is a module, a learning-rate scheduler, an object,
            dictionary, list or the like that holds numbers, texts or generators of random numbers.
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
        self._on_host = on_host
        others = list(also)
        # A module's own buffers count too (torch's AveragedModel has one), so the whole of it takes `.module`'s place.
        average: Any = ema if isinstance(ema, nn.Module) or ema is None else ema.module
        if average is not ema:
            others.append(ema)  # a count of updates, which decides its decay
        scaler = scaler or GradScaler("cpu", enabled=False)
        space = None if ema is None else SimpleNamespace(module=average)
        self._state = TrainState(model, optimizer, scaler, space, Position(0, 0, 0, 1), also=others)
        self._handled: BaseException | None = None
        self._found: list[Any] = []
        self._devices: list[torch.device] = []
        self._watch()
        self._refuse_unkept()

    def _watch(self) -> None:
        """Look at what there is, anew where the caller has added, replaced or moved some of it since the last block."""
        state = self._state
        average = [] if state.ema is None else [state.ema.module]
        roots = [each for each in (state.model, *state.also, *average) if isinstance(each, nn.Module)]
        modules = [module for root in roots for module in root.modules()]
        trained = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
        parameters = [p for module in modules for p in module._parameters.values() if p is not None] + trained
        found, seen = [*modules, *parameters], self._found
        devices = list(dict.fromkeys(p.device for p in parameters)) or [torch.device("cpu")]
        if len(found) == len(seen) and all(map(operator.is_, found, seen)) and devices == self._devices:
            return
        for root in roots:
            refuse_lazy(root)
        self._found, self._devices = found, devices
        # The loop is the caller's, which may move a tensor (`.data`) without any code of its own in the network.
        self._undo = Undo(state, devices[0], on_host=self._on_host, can_move=True)
        self._gradients = _Gradients(self._undo.parameters, state.scaler, on_host=self._on_host)

    def __enter__(self) -> Transaction:
        """Keep copies of all that the block may change.

        Raises:
            OutOfMemory: there is no room for the copies.
            ConfigError: this Transaction is in use, or what it was given has come to hold what cannot be put back.
        """
        if self._undo.progress is not Progress.IDLE:
            raise ConfigError("this Transaction is in use; nest a second one")
        self._watch()
        failure = oom.attempt(self._keep, kinds=oom.kinds_of(self._devices[0]), pressure=self._is_short)
        if failure is not None:
            self._free()
            raise OutOfMemory(failure.text, phase="the copies before an update")
        # A block in a handler shares its frame: only this tells the handled error from those of the block.
        self._handled = sys.exc_info()[1]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keep what the block has done; after an error, put back what there was.

        Raises:
            OutOfMemory: the block ran out of memory.
            DeviceUnusable: the device answers nothing any more.
        """
        handled, self._handled = self._handled, None
        if error is None:
            self._end()
            return
        failure = oom.describe(error, pressure=self._is_short, handled=handled)
        try:
            # Of a device that answers nothing any more, a roll-back would only raise the next error.
            if failure.kind is not oom.Kind.POISONED and not isinstance(error, DeviceUnusable):
                self._roll_back()
        finally:
            self._end()
        is_of_inner = isinstance(error, OutOfMemory)  # a block within this one has answered for it
        if not failure.fills(self._devices[0]) or (isinstance(error, AdaptiveTrainerError) and not is_of_inner):
            return  # raised as it is
        # Python keeps the error until this method is left, and with it the frames of the block, so empty the frames:
        # they cannot be freed yet.
        _clear_frames(error, handled)
        del error, trace, handled
        if is_of_inner:
            self._free()
            return
        answer = self._answer(failure)
        try:
            raise answer
        finally:
            answer.__context__ = None  # Python has just set it to the error that leaves the block
            del answer  # else it and this frame, which its traceback holds, keep each other alive

    def _keep(self) -> None:
        try:
            self._undo.begin()
            self._undo.before_step()  # already: where in the block the step begins is the caller's affair
            self._gradients.keep()
            self._refuse_unkept()  # a None may have become a tensor since
        except BaseException:
            self._end()
            raise

    def _refuse_unkept(self) -> None:
        for text in self._undo.belongings.unkept:
            raise ConfigError(f"a Transaction cannot put back {text}")

    def _roll_back(self) -> None:
        for device in self._devices:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)  # kernels on other streams may still write
        self._undo.roll_back()
        self._gradients.put_back()

    def _end(self) -> None:
        self._undo.end()
        self._gradients.forget_tensors()

    def _free(self) -> None:
        self._undo.free_copies()
        for device in self._devices:
            oom.release(device)

    def _answer(self, failure: oom.Failure) -> AdaptiveTrainerError:
        for device in self._devices:
            if not oom.probe(device):
                return DeviceUnusable(f"{device} answers nothing any more after: {failure.text}")
        self._free()
        return OutOfMemory(failure.text, phase="update")

    def _is_short(self) -> bool:
        return any(map(is_short, self._devices))


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
                    # One by one, unlike what `Undo` copies: a sparse gradient has no strides, and no place to note.
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
    if not isinstance(model, nn.Module):
        raise ConfigError(f"a Transaction's model is a torch.nn.Module, not {type(model).__name__}")
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


def _clear_frames(error: BaseException | None, handled: BaseException | None) -> None:
    """Drop the variables of all frames that an error and those before it came through, but for running ones.

    Args:
        handled: what was being handled where the block began: it and its frames are the caller's.
    """
    seen = {id(handled)}
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
