"""What a checkpoint has to hold: each key, and what can be known of its value without the network."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from adaptive_trainer import oom
from adaptive_trainer.config.overrides import typed
from adaptive_trainer.config.schema import Config
from adaptive_trainer.data.position import Position
from adaptive_trainer.data.splitting import RANDOM, STRATIFIED, Split
from adaptive_trainer.errors import CheckpointError, explained

WORDS = 624  # of the state of the Mersenne Twister
Check = Callable[[Any], Any]  # gives the value, or raises


def checked(content: dict[str, Any], path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """The content of a checkpoint, of which these keys are needed, with its settings completed.

    Raises:
        CheckpointError: a key is missing, or its value cannot be what was saved.
    """

    def refused(problem: str) -> CheckpointError:
        return CheckpointError(f"{path} is no checkpoint to go on with: {problem}; use another one")

    def altered(key: str, error: Exception) -> CheckpointError | None:
        is_of_memory = oom.describe(error).kind is not oom.Kind.OTHER
        return None if is_of_memory else refused(f"{key!r} is not what was saved: {_first_line(error)}")

    found = dict(content)
    for key in keys:  # all of them, before anything is built from one
        if key in content:
            with explained(partial(altered, key)):  # an altered value is refused with every kind of error
                found[key] = CHECKS[key](content[key])
        elif key not in SINCE_LATER:
            raise refused(f"it lacks {key!r}")
    if "position" in keys and not _agree(found):
        raise refused("'position' and 'finished_epochs' do not agree")
    return found


def _first_line(error: Exception) -> str:
    text = str(error).partition("\n")[0]  # OmegaConf adds the full key and the type, a line each
    return f"there is no {text}" if isinstance(error, KeyError) else text or type(error).__name__


def _agree(content: dict[str, Any]) -> bool:
    ahead, cursor = content["position"]["epoch"] - content["finished_epochs"], content["position"]["cursor"]
    return bool(ahead == 0 or (ahead == 1 and cursor == 0))  # a run may be stopped in the evaluation of an epoch


def _need(fits: bool, value: Any, wanted: str) -> Any:
    if not fits:
        raise ValueError(f"{shortened(value)} is not {wanted}")
    return value


def _that(fits: Callable[[Any], bool], wanted: str) -> Check:
    return lambda value: _need(fits(value), value, wanted)


def _are_texts(values: Any) -> bool:
    return all(isinstance(each, str) for each in values)


def _from(least: int) -> Check:
    # `type`, as True is an int too; torch's integers end at 2**63
    return _that(lambda value: type(value) is int and least <= value < 2**63, f"a whole number from {least} on")


def _or_none(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


_count = _from(0)
_text = _that(lambda value: isinstance(value, str), "a text")
_texts = _that(lambda value: isinstance(value, list) and _are_texts(value), "a list of texts")
_named = _that(lambda value: isinstance(value, dict) and _are_texts(value), "a dict by names")
_number = _that(lambda value: type(value) in (int, float) and math.isfinite(value), "a finite number")


def _plain(value: Any) -> Any:
    for each in _named(value).values():
        _need(isinstance(each, str | int | float | bool | None), each, "a number or a text")
    return value


def _meters(value: Any) -> Any:
    for name, meter in _named(value).items():
        is_scalar = isinstance(meter, Tensor) and meter.ndim == 0 and meter.is_floating_point()
        # sums: one NaN would end the resumed run as diverged, an epoch later
        _need(is_scalar and bool(meter.isfinite()), meter, f"a finite scalar, as {name} is")
    return value


def _optimizer(value: Any) -> Any:
    # the shape of it alone: what an optimizer keeps is compared with its own, once there is one (optimizer_state.py)
    states, groups = _named(value)["state"], value["param_groups"]
    _need(isinstance(states, dict) and all(isinstance(each, dict) for each in states.values()), states, "its state")
    are_groups = isinstance(groups, list) and all(isinstance(_named(each)["params"], list) for each in groups)
    _need(are_groups, groups, "its groups")
    return value


def _config(value: Any) -> Any:
    _need("${" not in str(value), value, "settings without references")  # which may call what they name
    settings = OmegaConf.merge(OmegaConf.structured(Config), _named(value))  # what an older version lacks is added
    return asdict(typed(settings)) if isinstance(settings, DictConfig) else None


def _position(value: Any) -> Any:
    for name in ("seed", "epoch", "cursor", "size"):  # their range is for Position to refuse
        _need(type(_named(value)[name]) is int, value[name], "a whole number")
    return Position.from_dict(value).to_dict()


def _requested(value: Any) -> Any:
    _from(1)(_named(value)["batch_size"])  # the one that is calculated with; the others are compared
    return value


def _split(value: Any) -> Any:
    is_one = set(_named(value)) == {field.name for field in fields(Split)} and type(value["seed"]) is int
    _text(value["digest"])
    return _need(is_one and value["kind"] in (STRATIFIED, RANDOM), value, "a way to hold samples out")


def _random(value: Any) -> Any:
    # on generators made for it: what is refused must not change the process's own
    torch.Generator().set_state(_named(value)["torch"])
    cuda = value["cuda"]
    _need(cuda is None or (isinstance(cuda, Tensor) and cuda.dtype == torch.uint8), cuda, "the state of a generator")
    version, words, gauss = value["python"]
    random.Random().setstate((version, tuple(words), gauss))
    state = numpy_state(value["numpy"])
    np.random.RandomState().set_state(state)
    _need(0 <= state[2] <= WORDS, state[2], "a place in the state")  # which numpy does not look at
    return value


def numpy_state(saved: Any) -> Any:
    """The state that `np.random.set_state` takes, from plain data."""
    name, keys, *rest = saved
    return name, keys.numpy().astype(np.uint32), *rest  # saved as int64: uint32 is no type of old torch


CHECKS: dict[str, Check] = {
    "model": _named,
    "made_buffers": _texts,
    "ema": _or_none(_named),
    "config": _config,
    "num_classes": _from(1),
    "classes": _texts,
    "stage": _count,
    "rung": _text,
    "request": _text,
    "requested": _requested,
    "largest_batch": _or_none(_from(1)),
    "capacity": _or_none(_count),
    "cards": _texts,
    "metrics": _plain,
    "buffers": _named,
    "optimizer": _optimizer,
    "scaler": _named,
    "position": _position,
    "updates": _count,
    "finished_epochs": _count,
    "best": _or_none(_number),
    "meters": _meters,
    "random": _random,
    "split": _or_none(_split),
}
SINCE_LATER = ("made_buffers", "largest_batch", "split", "cards")  # older checkpoints do without
OF_A_RUN = tuple(CHECKS)
OF_A_MODEL = ("model", "made_buffers", "ema", "config", "num_classes")
