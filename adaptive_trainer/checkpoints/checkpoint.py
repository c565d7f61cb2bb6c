"""Atomic checkpoints with everything a run needs to go on, bit for bit.

A file is written under a temporary name, flushed to disk and then renamed, so a reader meets either the old one or the
new one, whole. It is read with `weights_only=True`: it can hold data, never code.
"""

from __future__ import annotations

import copy
import logging
import os
import random
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adaptive_trainer import oom
from adaptive_trainer.checkpoints.contents import numpy_state
from adaptive_trainer.data.position import Position
from adaptive_trainer.errors import CheckpointError, override, remedy
from adaptive_trainer.models.losses import changing_buffers
from adaptive_trainer.models.optimizers import make_momentum
from adaptive_trainer.step.undo import TrainState, layout
from adaptive_trainer.utils.belongings import Belongings, walk
from adaptive_trainer.utils.random import made as made_generator
from adaptive_trainer.utils.random import packed
from adaptive_trainer.utils.random import unpack as unpack_generator

log = logging.getLogger(__name__)

T = TypeVar("T")
FORMAT = "adaptive_trainer checkpoint"
VERSION = 1
DAMAGE = (zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError, KeyError)  # what reading it raises
LARGEST_NUMBER = 2.0**63  # of what a kernel takes
IMPLEMENTATION = ("fused", "foreach")  # of an optimizer's step: this run's own choice


def save(path: Path, content: dict[str, Any]) -> None:
    """Write `content` (tensors, plain values, dicts, lists) to `path`, atomically; once more where memory runs out.

    Raises:
        CheckpointError: it cannot be written; the file that was there before is untouched.
    """
    retried(path, lambda: _write_or_explain(path, content))


def retried(path: Path, work: Callable[[], T]) -> T:
    """What a piece of work for the checkpoint at `path` returns; it is done once more where memory runs out.

    Raises:
        CheckpointError: it ran out again; the file that was there before is untouched.
    """
    for is_last in (False, True):
        try:
            return work()
        except (RuntimeError, MemoryError, OSError) as error:
            failure = oom.describe(error)
            if failure.kind not in (oom.Kind.DEVICE, oom.Kind.HOST):
                raise
        if not is_last:
            log.warning("out of memory while %s was written (%s): once more", path, failure.text)
            oom.release(torch.device("cuda" if torch.cuda.is_initialized() else "cpu"))  # type: ignore[no-untyped-call]
    raise _not_written(path, f"out of memory ({failure.text})", "Free some memory")


def _write_or_explain(path: Path, content: dict[str, Any]) -> None:
    problem, advice = "", "Free some disk space"
    try:
        _write(path, content)
    except (RuntimeError, OSError) as error:
        if oom.describe(error).kind is not oom.Kind.OTHER:
            raise
        # torch's zip writer loses the system's own error
        problem = f"the disk is full, or refuses to take more ({str(error).splitlines()[0]})"
        if isinstance(error, OSError):
            problem, advice = str(error), remedy(error)
    if problem:
        raise _not_written(path, problem, advice)


def _write(path: Path, content: dict[str, Any]) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        _flush_folder(path.parent)
    finally:
        with suppress(OSError):
            part.unlink()


def _not_written(path: Path, problem: str, advice: str) -> CheckpointError:
    kept, last = "there is no earlier one", path.with_name("last.pt")
    if last.exists():
        kept = f"the last good one is kept in {last}"
        advice = f"{advice}; {override('resume', last)} goes on from it"
    return CheckpointError(f"cannot write checkpoint {path}: {problem}; {kept}. {advice}")


def _flush_folder(folder: Path) -> None:
    """Make the rename itself durable (POSIX; Windows has no such call)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def load(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, tensors on the CPU.

    Raises:
        CheckpointError: there is none, or it is damaged, or something else.
    """
    if not path.is_file():
        raise CheckpointError(
            f"there is no checkpoint {path}; give the path of a .pt file, or resume=auto for a run's own"
        )
    content, problem = _read(path)
    if problem:
        raise CheckpointError(f"cannot read checkpoint {path}: {problem}; {_sound_beside(path)}")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of adaptive_trainer; give resume one of its .pt files")
    if content.get("version") != VERSION:
        raise CheckpointError(f"{path} has version {content.get('version')}, this program reads {VERSION}")
    return content


def _read(path: Path) -> tuple[Any, str]:
    """What a file holds, and why that cannot be read."""
    problem = ""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is None:
            return torch.load(path, map_location="cpu", weights_only=True), ""
        problem = f"its part {damaged} is damaged"
    except Exception as error:  # the unpickler's own error type is private
        if oom.describe(error).kind is not oom.Kind.OTHER:
            raise
        problem = f"it holds something that is not plain data ({type(error).__name__})"
        if isinstance(error, DAMAGE):
            problem = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, zipfile.BadZipFile):
            problem = "it is cut short, or no checkpoint"
    return None, problem


def _sound_beside(path: Path) -> str:
    """What can be used instead, of the checkpoints in the same folder."""
    found = []
    for other in sorted(path.parent.glob("*.pt")):
        content, _ = (None, "") if other == path else _read(other)
        if isinstance(content, dict) and content.get("format") == FORMAT:
            is_whole = "optimizer" in content
            found.append(override("resume", other) if is_whole else f"load_model reads {other}, which is sound")
    return "; ".join(found) or "use another one"


def pack(state: TrainState, device: torch.device) -> dict[str, Any]:
    """Everything in `state` and the random numbers, as plain data for `save`."""
    average = None if state.ema is None else state.ema.module
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "model": state.model.state_dict(),
        "made_buffers": made_buffers(state),
        "buffers": _not_persistent(state.model),
        "loss_buffers": changing_buffers(state.loss),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "ema": None if average is None else average.state_dict(),
        "ema_buffers": {} if average is None else _not_persistent(average),
        "position": state.position.to_dict(),
        "updates": state.updates,
        "finished_epochs": state.finished_epochs,
        "best": state.best,
        "meters": dict(state.meters),
        "random": {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "python": [version, list(words), gauss],
            "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
            "owned": _packed_generators(state),
        },
    }


def unpack(
    content: dict[str, Any], state: TrainState, device: torch.device, *, keep_groups: bool, with_optimizer: bool
) -> list[str]:
    """Put what `pack` gave into `state`, in place.

    Returns:
        The paths of generators whose state the checkpoint has, and which the network, loss or optimizer has not.

    Args:
        keep_groups: keep the optimizer's own settings (the run asks for others than the checkpoint has).
        with_optimizer: take over the optimizer's state; it is another kind's where False.

    Raises:
        CheckpointError: the checkpoint belongs to another model or optimizer.
    """
    problem = ""
    try:
        _unpack(content, state, keep_groups=keep_groups, with_optimizer=with_optimizer)
        _restore_random(content["random"], device)
        _restore_loss(content.get("loss_buffers", {}), state, device)
        lost = _restore_generators(content["random"].get("owned", {}), state, device)
    except Exception as error:  # all that can be wrong here is the checkpoint
        if oom.describe(error).kind is not oom.Kind.OTHER:
            raise
        problem = misfit(error)
        if isinstance(error, KeyError):
            problem = f"there is no {problem}"
    if problem:
        raise CheckpointError(f"the checkpoint does not fit this run's model or optimizer: {problem}")
    return lost


def _unpack(content: dict[str, Any], state: TrainState, *, keep_groups: bool, with_optimizer: bool) -> None:
    made = content.get("made_buffers", ())
    _load_network(state.model, content["model"], content["buffers"], made)
    if state.ema is not None:  # one that the run did not have before begins with the weights
        average, rest = ("ema", "ema_buffers") if content["ema"] else ("model", "buffers")
        _load_network(state.ema.module, content[average], content.get(rest, {}), made)
    if with_optimizer:
        _load_optimizer(content["optimizer"], state.optimizer, keep_groups=keep_groups)
    _refuse_no_numbers(state)
    if content["meters"].keys() - {"weight"} != state.meters.keys() - {"weight"}:  # which only some losses have
        raise ValueError(f"its meters are {', '.join(content['meters'])}, and this run's {', '.join(state.meters)}")
    for name, value in content["meters"].items():
        state.meters.setdefault(name, torch.zeros_like(state.meters["seen"])).copy_(value)
    if state.scaler.is_enabled() and content["scaler"]:
        _check_alike(content["scaler"], state.scaler.state_dict(), "scaler")
        state.scaler.load_state_dict(content["scaler"])
    state.position = Position.from_dict(content["position"])
    state.updates, state.finished_epochs, state.best = content["updates"], content["finished_epochs"], content["best"]


def _refuse_no_numbers(state: TrainState) -> None:
    """Refuse weights that are not finite. A buffer may be infinite (a mask), and hold no NaN."""
    modules = [state.model] if state.ema is None else [state.model, state.ema.module]
    for module in modules:
        for name, weight in module.named_parameters():
            if not bool(weight.isfinite().all()):
                raise ValueError(f"{name} has weights that are no finite numbers")
        for name, buffer in module.named_buffers():
            if bool(buffer.isnan().any()):
                raise ValueError(f"{name} has values that are no numbers")


def _load_network(network: nn.Module, saved: dict[str, Any], not_persistent: dict[str, Any], made: list[str]) -> None:
    make_buffers(network, saved, made)
    network.load_state_dict(saved)
    make_buffers(network, not_persistent, made, persistent=False)
    buffers = dict(network.named_buffers())
    with torch.no_grad():
        for name, value in not_persistent.items():
            buffers[name].copy_(value)


def _not_persistent(network: nn.Module) -> dict[str, Any]:
    """The buffers that its `state_dict` leaves out."""
    persistent = network.state_dict()
    return {name: buffer for name, buffer in network.named_buffers() if name not in persistent}


def _restore_loss(saved: dict[str, Tensor], state: TrainState, device: torch.device) -> None:
    if isinstance(state.loss, nn.Module):
        own = dict(state.loss.named_buffers())
        made = [name for name, value in saved.items() if name not in own or layout(own[name]) != layout(value)]
        make_buffers(state.loss, {name: value.to(device) for name, value in saved.items()}, made)
        with torch.no_grad():
            for name, value in saved.items():
                state.loss.get_buffer(name).copy_(value)


def _packed_generators(state: TrainState) -> dict[str, Any]:
    """The generators that network, loss and optimizer own, by the path that leads to each."""
    found = {path: packed(generator) for path, generator in Belongings(state.owners()).generators.items()}
    return {path: saved for path, saved in found.items() if saved is not None}


def _restore_generators(saved: dict[str, Any], state: TrainState, device: torch.device) -> list[str]:
    """Put them back, and make those that a forward pass had made; returns what cannot be."""
    found = {path: value for path, value, _ in walk(state.owners())}
    return [path for path, one in saved.items() if not _restored(path, one, found, device)]


def _restored(path: str, saved: dict[str, Any], found: dict[str, Any], device: torch.device) -> bool:
    if path in found:
        return unpack_generator(found[path], saved)
    above, _, name = path.rpartition(".")
    owner, generator = found.get(above), made_generator(saved, device)
    if generator is None or owner is None:
        return False
    if isinstance(owner, list) and name == str(len(owner)):
        owner.append(generator)
    elif isinstance(owner, dict) or hasattr(owner, "__dict__"):
        (owner if isinstance(owner, dict) else vars(owner))[name] = generator
    else:
        return False
    return True


def made_buffers(state: TrainState) -> list[str]:
    """The names of buffers, and of parameters, that a forward pass has made, or has given another layout."""
    named = (*state.model.named_buffers(), *state.model.named_parameters())
    return [name for name, tensor in named if state.factory.get(name) != layout(tensor)]


def make_buffers(model: nn.Module, saved: dict[str, Any], names: Iterable[str], *, persistent: bool = True) -> None:
    """Room for those of the saved tensors that `made_buffers` named."""
    for name in set(names) & set(saved):
        path, _, own_name = name.rpartition(".")
        owner = model.get_submodule(path)
        device = next((parameter.device for parameter in model.parameters()), saved[name].device)
        room = torch.zeros_like(saved[name], device=device)
        if own_name in owner._parameters:
            owner.get_parameter(own_name).data = room
        else:
            owner.register_buffer(own_name, room, persistent=persistent)


def misfit(error: Exception) -> str:
    """What an error of `load_state_dict` says, and the first of the keys that it names."""
    return " ".join(line.strip() for line in str(error).splitlines()[:2])


def load_optimizer(saved: dict[str, Any], optimizer: Optimizer, *, keep_groups: bool) -> None:
    """Put what `state_dict` gave into an optimizer whose state is of the same kind.

    Args:
        keep_groups: keep the optimizer's own settings; else only its own implementation.
    """
    _fill_optimizer(saved, optimizer, keep_groups=keep_groups)
    _settle_optimizer(optimizer)


def _load_optimizer(saved: dict[str, Any], optimizer: Optimizer, *, keep_groups: bool) -> None:
    """The same, from a file in which anything may be."""
    expected = _first_state(optimizer)
    own = _fill_optimizer(saved, optimizer, keep_groups=keep_groups)
    for group, values in zip(optimizer.param_groups, own, strict=True):
        _check_alike(group, values, "optimizer.param_groups")
    for parameter, values in optimizer.state.items():
        if any(isinstance(value, Tensor) and bool(value.isnan().any()) for value in values.values()):
            raise ValueError("the optimizer's state has values that are no numbers")
        if values:  # a parameter without a gradient has none
            _check_alike(values, expected.get(parameter, {}), "optimizer.state")
    _settle_optimizer(optimizer)


def _fill_optimizer(saved: dict[str, Any], optimizer: Optimizer, *, keep_groups: bool) -> list[dict[str, Any]]:
    """The settings that it had before."""
    own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, values in zip(optimizer.param_groups, own, strict=True):
        group.update(values if keep_groups else {key: values[key] for key in IMPLEMENTATION if key in values})
    return own


def _settle_optimizer(optimizer: Optimizer) -> None:
    _lay_out_as_weights(optimizer)
    make_momentum(optimizer)


def _check_alike(saved: dict[str, Any], own: dict[str, Any], where: str) -> None:
    """Refuse values that cannot stand for this run's own: steps do not look at what they read."""
    for key, value in own.items():
        if key not in saved:
            raise ValueError(f"{where} lacks {key!r}")
        if value is not None and _kind_of(saved[key]) != _kind_of(value):
            raise ValueError(f"{where}: {key!r} is {shortened(saved[key])}, and {shortened(value)} is of another kind")


def _kind_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.is_floating_point()
    if isinstance(value, list | tuple):
        return [_kind_of(each) for each in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number" if abs(value) < LARGEST_NUMBER else "no number"  # nor is NaN
    return type(value)


def _first_state(optimizer: Optimizer) -> dict[Any, dict[str, Any]]:
    """What a first step makes of each parameter, without its data; empty where that step looks at values."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    stand_ins = [nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad) for parameter in parameters]
    memo: dict[int, Any] = dict(zip(map(id, parameters), stand_ins, strict=True))
    memo[id(optimizer.state)] = defaultdict(dict)
    try:
        rehearsal = copy.deepcopy(optimizer, memo)
        for group in rehearsal.param_groups:
            group.update({key: False for key in IMPLEMENTATION if key in group})
        for stand_in in stand_ins:
            stand_in.grad = torch.zeros_like(stand_in)
        rehearsal.step()
    except Exception as error:
        if oom.describe(error).kind is not oom.Kind.OTHER:
            raise
        return {}
    return {parameter: rehearsal.state[stand_in] for parameter, stand_in in zip(parameters, stand_ins, strict=True)}


def _lay_out_as_weights(optimizer: Optimizer) -> None:
    """Fused steps read weights and their state in the order of memory, and do not look whether it is the same."""
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                values[name] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def _restore_random(saved: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(saved["torch"])
    if device.type == "cuda" and saved["cuda"] is not None:
        torch.cuda.set_rng_state(saved["cuda"], device)
    version, words, gauss = saved["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(numpy_state(saved["numpy"]))
