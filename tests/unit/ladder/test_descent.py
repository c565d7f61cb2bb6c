"""The descent by itself: rungs and a function that tries one."""

from __future__ import annotations

import copy
import re
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from adaptive_trainer import descend, make_ladder
from adaptive_trainer.errors import ConfigError, LadderExhausted
from adaptive_trainer.ladder.rung import own
from adaptive_trainer.memory.limit import limited

CPU = torch.device("cpu")
MiB = 2**20
AMBIGUOUS = [
    "GET was unable to find an engine to execute this computation",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
]


def full() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("text", AMBIGUOUS)
@pytest.mark.parametrize(("held", "is_memory"), [(60, True), (8, False)])
def test_an_ambiguous_text_is_judged_by_the_memory_that_is_free(text: str, held: int, is_memory: bool) -> None:
    def attempt(settings: dict[str, int]) -> int:
        kept = torch.empty(held * MiB * settings["batch"] // 8, dtype=torch.uint8).add_(1)
        if settings["batch"] == 8:
            raise RuntimeError(text)
        return len(kept)

    with limited(CPU, "64MiB") as capacity, capacity.device_work():
        ladder = make_ladder({"batch": 8}, {"less": {"batch": 1}})
        if is_memory:
            assert descend(ladder, attempt, device=CPU).rung.name == "less"
        else:
            with pytest.raises(RuntimeError, match=re.escape(text)):
                descend(ladder, attempt, device=CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("is_memory", [True, False])
def test_an_ambiguous_text_on_a_cuda_device(is_memory: bool) -> None:
    device = torch.device("cuda", 0)

    def attempt(settings: dict[str, int]) -> int:
        free, _ = torch.cuda.mem_get_info(device)
        size = int(free * 0.9) if is_memory and settings["batch"] == 8 else 1
        kept = torch.empty(size, device=device, dtype=torch.uint8)
        if settings["batch"] == 8:
            raise RuntimeError(AMBIGUOUS[0])
        return len(kept)

    ladder = make_ladder({"batch": 8}, {"less": {"batch": 1}})
    if is_memory:
        assert descend(ladder, attempt).rung.name == "less"
    else:
        with pytest.raises(RuntimeError, match="engine"):
            descend(ladder, attempt)


def direct() -> None:
    descend(make_ladder({"a": 1}, {"less": {"a": 0}}), lambda _: full(), device=CPU)


def grouped() -> None:
    try:
        direct()
    except LadderExhausted as error:
        raise ExceptionGroup("tasks", [error]) from None


def wrapped() -> None:
    try:
        direct()
    except LadderExhausted as error:
        raise RuntimeError("the inner search failed") from error


@pytest.mark.long
@pytest.mark.parametrize("inner", [direct, grouped, wrapped])
def test_an_inner_descent_that_is_used_up_lets_the_outer_step_down(inner: Callable[[], None]) -> None:
    def attempt(settings: dict[str, int]) -> str:
        if settings["batch"] > 1:
            inner()
        return "done"

    found = descend(make_ladder({"batch": 4}, {"two": {"batch": 2}, "one": {"batch": 1}}), attempt, device=CPU)
    assert (found.rung.name, found.value) == ("one", "done")
    assert [entry.outcome for entry in found.attempts] == ["oom", "oom", "fits"]
    assert "no rung of the ladder fits: requested: oom" in found.attempts[0].reason
    with pytest.raises(LadderExhausted, match="two: oom"):
        descend(make_ladder({"batch": 4}, {"two": {"batch": 2}}), attempt, device=CPU)


def test_what_an_inner_descent_raises_on_purpose_goes_through() -> None:
    def attempt(_: dict[str, int]) -> None:
        try:
            full()
        except torch.OutOfMemoryError:
            raise ConfigError("a mistake") from None

    with pytest.raises(ConfigError, match="a mistake"):
        descend(make_ladder({"batch": 4}, {"two": {"batch": 2}}), attempt, device=CPU)


def spoils(settings: Any) -> None:
    """Change whatever can be changed, at any depth."""
    if isinstance(settings, dict):
        for value in settings.values():
            spoils(value)
        settings["spoiled"] = True
        settings.pop("batch", None)
    elif isinstance(settings, list | deque):
        for value in settings:
            spoils(value)
        settings.append("spoiled")
    elif isinstance(settings, tuple):
        for value in settings:
            spoils(value)
    elif isinstance(settings, set):
        settings.add("spoiled")


SETTINGS: dict[str, Any] = {
    "batch": 8,
    "optimizer": {"name": "sgd", "groups": [{"lr": 0.1, "betas": [0.9, 0.99]}]},
    "kinds": ({"deep": {1, 2}}, deque([1])),
    "ordered": OrderedDict(a={"b": 1}),
    "counted": defaultdict(list, a=[1]),
}


def test_an_attempt_that_changes_its_settings_changes_no_rung() -> None:
    requested = copy.deepcopy(SETTINGS)
    ladder = make_ladder(requested, {"half": {"batch": 4}, "list": {"kinds": [[1]], "batch": 2}})
    seen = []

    def attempt(settings: dict[str, Any]) -> None:
        seen.append(copy.deepcopy(settings))
        spoils(settings)
        full()

    spoils(requested)
    for _ in range(2):
        with pytest.raises(LadderExhausted):
            descend(ladder, attempt, device=CPU)
    assert seen[:3] == seen[3:]
    assert seen[0] == SETTINGS
    assert seen[1] == {**SETTINGS, "batch": 4}
    assert seen[2] == {**SETTINGS, "batch": 2, "kinds": [[1]]}
    assert ladder[0].settings == SETTINGS


def test_what_settings_hold_is_not_copied() -> None:
    network, key, lock = nn.Linear(2, 2), object(), iter([1])  # an iterator cannot be copied
    settings = {"network": network, key: [lock, network], "me": {}}
    settings["me"] = settings
    mine = own(settings)
    assert mine is not settings
    assert mine["me"] is mine
    assert mine["network"] is network
    assert mine[key] is not settings[key]
    assert mine[key] == [lock, network]
    plain = object()
    assert own(plain) is plain
