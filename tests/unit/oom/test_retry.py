"""One loop of tries, and one way to raise our own error in place of another's."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch

from adaptive_trainer import oom
from adaptive_trainer.errors import AdaptiveTrainerError, ConfigError, explained
from adaptive_trainer.oom.classify import SimulatedOutOfMemory

CPU = torch.device("cpu")


class Held:
    """What a failed piece of work must not keep alive."""


def failing(times: int, error: Exception, alive: list[weakref.ref[Held]]) -> Callable[[], str]:
    left = [times]

    def work() -> str:
        held = Held()
        alive.append(weakref.ref(held))
        if left[0]:
            left[0] -= 1
            raise error
        return "done"

    return work


@pytest.mark.parametrize(("times", "error", "expected"), [
    (0, torch.OutOfMemoryError("CUDA out of memory"), "done"),
    (1, torch.OutOfMemoryError("CUDA out of memory"), "done"),
    (2, torch.OutOfMemoryError("CUDA out of memory"), oom.Failure),
    (1, SimulatedOutOfMemory("CUDA out of memory"), oom.Failure),  # exact: the same work would fail again
])  # fmt: skip
def test_work_is_tried_twice(times: int, error: Exception, expected: object, caplog: pytest.LogCaptureFixture) -> None:
    alive: list[weakref.ref[Held]] = []
    with caplog.at_level(logging.WARNING):
        done = oom.retry(failing(times, error, alive), CPU, "a test")
    assert done == expected if isinstance(expected, str) else isinstance(done, oom.Failure)
    assert ("out of memory in a test" in caplog.text) == (times > 0 and type(error) is torch.OutOfMemoryError)
    error.__traceback__ = None
    gc.collect()
    assert all(held() is None for held in alive)


def test_other_errors_pass_unchanged() -> None:
    error = ValueError("CUDA out of memory")  # a ValueError may quote any text
    with pytest.raises(ValueError) as caught:
        oom.retry(failing(1, error, []), CPU)
    assert caught.value is error
    with pytest.raises(MemoryError):
        oom.attempt(failing(1, MemoryError(), []))
    assert isinstance(oom.attempt(failing(1, MemoryError(), []), kinds=oom.OF_MEMORY), oom.Failure)


def test_an_explained_error_keeps_nothing_of_the_other() -> None:
    def explain(error: Exception) -> AdaptiveTrainerError | None:
        return ConfigError(f"it is {error}") if str(error) == "bad" else None

    with pytest.raises(ConfigError, match="it is bad") as caught, explained(explain, (KeyError, RuntimeError)):
        raise RuntimeError("bad")
    assert caught.value.__context__ is None
    assert caught.value.__cause__ is None
    for error in (RuntimeError("good"), ValueError("bad")):
        with pytest.raises(type(error)) as other, explained(explain, (KeyError, RuntimeError)):
            raise error
        assert other.value is error


def test_an_explained_error_goes_with_its_frames_and_without_a_collection() -> None:
    gone: list[weakref.ref[torch.Tensor]] = []

    def work() -> None:
        large = torch.zeros(1000)
        gone.append(weakref.ref(large))
        with explained(lambda error: ConfigError(str(error)), (KeyError,)):
            raise KeyError(large.shape)

    gc.disable()
    try:
        with suppress(ConfigError):
            work()
        assert [ref() for ref in gone] == [None]
    finally:
        gc.enable()
