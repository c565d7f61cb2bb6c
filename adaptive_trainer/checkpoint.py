"""Atomic checkpoints with everything a run needs to go on, bit for bit.

A file is written under a temporary name, flushed to disk and then renamed, so a reader meets either the old one or the
new one, whole. It is read with `weights_only=True`: it can hold data, never code.
"""

from __future__ import annotations

import logging
import os
import random
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adaptive_trainer import oom
from adaptive_trainer.errors import CheckpointError, override, remedy
from adaptive_trainer.optimizers import make_momentum
from adaptive_trainer.position import Position
from adaptive_trainer.transaction import TrainState, layout

__all__ = ["load", "made_buffers", "make_buffers", "misfit", "pack", "save", "unpack"]

log = logging.getLogger(__name__)

FORMAT = "adaptive_trainer checkpoint"
VERSION = 1
DAMAGE = (zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError, KeyError)  # what reading it raises
IMPLEMENTATION = ("fused", "foreach")  # of an optimizer's step: this run's own choice


def save(path: Path, content: dict[str, Any]) -> None:
    """Write `content` (tensors, plain values, dicts, lists) to `path`, atomically; once more where memory runs out.

    Raises:
        CheckpointError: it cannot be written; the file that was there before is untouched.
    """
    failure = _failure_of(path, content)
    if failure is not None:
        log.warning("out of memory while %s was written (%s): once more", path, failure.text)
        oom.release(torch.device("cuda" if torch.cuda.is_initialized() else "cpu"))  # type: ignore[no-untyped-call]
        failure = _failure_of(path, content)
    if failure is not None:
        raise _not_written(path, f"out of memory ({failure.text})", "Free some memory")


def _failure_of(path: Path, content: dict[str, Any]) -> oom.Failure | None:
    """Why there was not enough memory to write it; None where it is written."""
    problem, advice = "", "Free some disk space"
    try:
        _write(path, content)
    except OSError as error:
        problem, advice = str(error), remedy(error)
    except (RuntimeError, MemoryError) as error:
        failure = oom.describe(error)
        if failure.kind in (oom.Kind.DEVICE, oom.Kind.HOST):
            return failure
        if failure.kind is not oom.Kind.OTHER:
            raise
        # torch's zip writer loses the system's own error
        problem = f"the disk is full, or refuses to take more ({str(error).splitlines()[0]})"
    if problem:
        raise _not_written(path, problem, advice)
    return None


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
    problem = ""
    content: Any = None
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is None:
            content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            problem = f"its part {damaged} is damaged"
    except Exception as error:  # the unpickler's own error type is private
        if oom.describe(error).kind is not oom.Kind.OTHER:
            raise
        problem = f"it holds something that is not plain data ({type(error).__name__})"
        if isinstance(error, DAMAGE):
            problem = (str(error) or type(error).__name__).splitlines()[0]
    if problem:
        raise CheckpointError(f"cannot read checkpoint {path}: {problem}; use another one")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of adaptive_trainer; give resume one of its .pt files")
    if content.get("version") != VERSION:
        raise CheckpointError(f"{path} has version {content.get('version')}, this program reads {VERSION}")
    return content


def pack(state: TrainState, device: torch.device) -> dict[str, Any]:
    """Everything in `state` and the random numbers, as plain data for `save`."""
    persistent = state.model.state_dict()
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "model": persistent,
        "made_buffers": made_buffers(state),
        "buffers": {k: v for k, v in state.model.named_buffers() if k not in persistent},
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "ema": None if state.ema is None else state.ema.module.state_dict(),
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
        },
    }


def unpack(
    content: dict[str, Any], state: TrainState, device: torch.device, *, keep_groups: bool, with_optimizer: bool
) -> None:
    """Put what `pack` gave into `state`, in place.

    Args:
        keep_groups: keep the optimizer's own settings (the run asks for others than the checkpoint has).
        with_optimizer: take over the optimizer's state; it is another kind's where False.

    Raises:
        CheckpointError: the checkpoint belongs to another model or optimizer.
    """
    problem = ""
    try:
        made = content.get("made_buffers", ())
        make_buffers(state.model, content["model"], made)
        state.model.load_state_dict(content["model"])
        if state.ema is not None:
            average = content["ema"] or content["model"]  # one that the run did not have before begins with the weights
            make_buffers(state.ema.module, average, made)
            state.ema.module.load_state_dict(average)
        if with_optimizer:
            _load_optimizer(content["optimizer"], state, keep_groups=keep_groups)
        make_buffers(state.model, content["buffers"], made, persistent=False)
        buffers = dict(state.model.named_buffers())
        with torch.no_grad():
            for name, value in content["buffers"].items():
                buffers[name].copy_(value)
    except (RuntimeError, ValueError, KeyError, AttributeError) as error:
        if oom.describe(error).kind is not oom.Kind.OTHER:
            raise
        problem = misfit(error)
        if isinstance(error, KeyError):
            problem = f"there is no {problem}"
    if problem:
        raise CheckpointError(f"the checkpoint does not fit this run's model or optimizer: {problem}")
    for name, value in content["meters"].items():
        state.meters[name].copy_(value)
    if state.scaler.is_enabled() and content["scaler"]:
        state.scaler.load_state_dict(content["scaler"])
    state.position = Position.from_dict(content["position"])
    state.updates, state.finished_epochs, state.best = content["updates"], content["finished_epochs"], content["best"]
    _restore_random(content["random"], device)


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


def _load_optimizer(saved: dict[str, Any], state: TrainState, *, keep_groups: bool) -> None:
    own = [{k: v for k, v in group.items() if k != "params"} for group in state.optimizer.param_groups]
    state.optimizer.load_state_dict(saved)
    for group, values in zip(state.optimizer.param_groups, own, strict=True):
        group.update(values if keep_groups else {key: values[key] for key in IMPLEMENTATION if key in values})
    _lay_out_as_weights(state.optimizer)
    make_momentum(state.optimizer)


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
    name, keys, *rest = saved["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
