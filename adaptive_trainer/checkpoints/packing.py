"""The state of a training as plain data, and back, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Iterable
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_trainer.checkpoints.checkpoint import beside_memory
from adaptive_trainer.checkpoints.contents import numpy_state
from adaptive_trainer.checkpoints.optimizer_state import check_alike, load_optimizer
from adaptive_trainer.data.position import Position
from adaptive_trainer.errors import CheckpointError, explained
from adaptive_trainer.models.losses import changing_buffers
from adaptive_trainer.step.copies import layout
from adaptive_trainer.step.undo import TrainState
from adaptive_trainer.utils.belongings import Belongings, walk
from adaptive_trainer.utils.random import made as made_generator
from adaptive_trainer.utils.random import packed
from adaptive_trainer.utils.random import unpack as unpack_generator

MOST_OF_A_MISFIT = 300  # characters: a network of another kind misses hundreds of keys


def pack(state: TrainState, device: torch.device) -> dict[str, Any]:
    """Everything in `state` and the random numbers, as plain data for `save`."""
    average = None if state.ema is None else state.ema.module
    version, words, gauss = random.getstate()  # tuples and arrays become lists and tensors: data for weights_only
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "model": state.model.state_dict(),
        "made_buffers": made_buffers(state),
        "buffers": _not_persistent(state.model),  # an update changes them as well
        "loss_buffers": changing_buffers(state.loss),  # class weights are the settings' own, and may be others now
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
    with explained(beside_memory(_unfit)):  # all that can be wrong here is the checkpoint
        _unpack(content, state, keep_groups=keep_groups, with_optimizer=with_optimizer)
        _restore_random(content["random"], device)
        _restore_loss(content.get("loss_buffers", {}), state, device)
        return _restore_generators(content["random"].get("owned", {}), state, device)


def _unfit(error: Exception) -> CheckpointError:
    problem = f"there is no {misfit(error)}" if isinstance(error, KeyError) else misfit(error)
    return CheckpointError(f"the checkpoint does not fit this run's model or optimizer: {problem}")


def _unpack(content: dict[str, Any], state: TrainState, *, keep_groups: bool, with_optimizer: bool) -> None:
    made = content.get("made_buffers", ())
    _load_network(state.model, content["model"], content["buffers"], made)
    if state.ema is not None:  # one that the run did not have before begins with the weights
        average, rest = ("ema", "ema_buffers") if content["ema"] else ("model", "buffers")
        _load_network(state.ema.module, content[average], content.get(rest, {}), made)
    if with_optimizer:
        load_optimizer(content["optimizer"], state.optimizer, keep_groups=keep_groups, is_trusted=False)
    _refuse_no_numbers(state)  # here, on the device, where looking at each weight is fast
    if content["meters"].keys() - {"weight"} != state.meters.keys() - {"weight"}:  # which only some losses have
        raise ValueError(f"its meters are {', '.join(content['meters'])}, and this run's {', '.join(state.meters)}")
    for name, value in content["meters"].items():
        state.meters.setdefault(name, torch.zeros_like(state.meters["seen"])).copy_(value)
    if state.scaler.is_enabled() and content["scaler"]:
        check_alike(content["scaler"], state.scaler.state_dict(), "scaler")
        state.scaler.load_state_dict(content["scaler"])
    state.position = Position.from_dict(content["position"])
    state.updates, state.finished_epochs, state.best = content["updates"], content["finished_epochs"], content["best"]


def _refuse_no_numbers(state: TrainState) -> None:
    modules = [state.model] if state.ema is None else [state.model, state.ema.module]
    for module in modules:
        for name, weight in module.named_parameters():
            if not bool(weight.isfinite().all()):
                raise ValueError(f"{name} has weights that are no finite numbers")
        for name, buffer in module.named_buffers():
            if bool(buffer.isnan().any()):  # it may be infinite, as a mask is
                raise ValueError(f"{name} has values that are no numbers")


def _load_network(network: nn.Module, saved: dict[str, Any], not_persistent: dict[str, Any], made: list[str]) -> None:
    make_buffers(network, saved, made)  # load_state_dict refuses names that the network has not made yet
    network.load_state_dict(saved)
    make_buffers(network, not_persistent, made, persistent=False)
    buffers = dict(network.named_buffers())
    with torch.no_grad():
        for name, value in not_persistent.items():
            buffers[name].copy_(value)


def _not_persistent(network: nn.Module) -> dict[str, Any]:
    persistent = network.state_dict()  # a module may leave names out by a hook: only the result says which
    return {name: buffer for name, buffer in network.named_buffers() if name not in persistent}


def _restore_loss(saved: dict[str, Tensor], state: TrainState, device: torch.device) -> None:
    if isinstance(state.loss, nn.Module):  # a plain function keeps nothing that an update could change
        own = dict(state.loss.named_buffers())
        made = [name for name, value in saved.items() if name not in own or layout(own[name]) != layout(value)]
        make_buffers(state.loss, {name: value.to(device) for name, value in saved.items()}, made)
        with torch.no_grad():
            for name, value in saved.items():
                state.loss.get_buffer(name).copy_(value)


def _packed_generators(state: TrainState) -> dict[str, Any]:
    found = {path: packed(generator) for path, generator in Belongings(state.owners()).generators.items()}
    return {path: saved for path, saved in found.items() if saved is not None}  # of a kind whose state is plain data


def _restore_generators(saved: dict[str, Any], state: TrainState, device: torch.device) -> list[str]:
    found = {path: value for path, value, _ in walk(state.owners())}
    return [path for path, one in saved.items() if not _restored(path, one, found, device)]


def _restored(path: str, saved: dict[str, Any], found: dict[str, Any], device: torch.device) -> bool:
    if path in found:
        return unpack_generator(found[path], saved)
    above, _, name = path.rpartition(".")
    owner, generator = found.get(above), made_generator(saved, device)
    if generator is None or owner is None:
        return False
    # a forward pass that has not run here had made it: it is put where that pass will look for it
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
    """Make room for those of the saved tensors that `made_buffers` named."""
    for name in set(names) & set(saved):
        path, _, own_name = name.rpartition(".")
        owner = model.get_submodule(path)
        device = next((parameter.device for parameter in model.parameters()), saved[name].device)
        room = torch.zeros_like(saved[name], device=device)
        if own_name in owner._parameters:
            owner.get_parameter(own_name).data = room  # the same object: the optimizer holds it
        else:
            owner.register_buffer(own_name, room, persistent=persistent)


def misfit(error: Exception) -> str:
    """What an error of `load_state_dict` says, and the first of the keys that it names."""
    return shorten(" ".join(str(error).splitlines()[:2]), MOST_OF_A_MISFIT, placeholder=" ...")


def _restore_random(saved: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(saved["torch"])
    if device.type == "cuda" and saved["cuda"] is not None:
        torch.cuda.set_rng_state(saved["cuda"], device)
    version, words, gauss = saved["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(numpy_state(saved["numpy"]))
