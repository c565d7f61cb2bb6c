"""When a backend checks, records, replays, times and gives way: with a stand-in for the graph, on a CPU."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from adaptive_trainer.config.overrides import compose_config, typed
from adaptive_trainer.config.validate import check
from adaptive_trainer.errors import ConfigError, OutOfMemory
from adaptive_trainer.memory.limit import Capacity
from adaptive_trainer.step.backends import choose, recorded
from adaptive_trainer.step.backends.cuda_graph import GraphRefused, NoRoom
from adaptive_trainer.step.backends.eager import Eager
from adaptive_trainer.step.backends.ranked import Ranked
from adaptive_trainer.step.backends.recorded import IN_ONE, Recorded
from adaptive_trainer.step.engine import Engine
from adaptive_trainer.step.update import Update
from tests.support import runs
from tests.support.faults import differences, dump
from tests.support.twins import Twins


class Stand:
    """Does what a graph would do, operator by operator."""

    made: ClassVar[list[bool]]  # `with_step` of each
    refuse: ClassVar[Callable[[bool, Update], str]]  # why none is made
    no_room: ClassVar[list[str]]  # for the next ones

    def __init__(
        self, update: Update, images: Tensor, labels: Tensor, accumulate: Any, *, with_step: bool, in_one: float
    ) -> None:
        Stand.made.append(with_step)
        if Stand.no_room:
            update.program.phase = "backward"
            raise NoRoom(Stand.no_room.pop())
        if reason := Stand.refuse(with_step, update):
            raise GraphRefused(reason)
        self.with_step, self.program, self.size = with_step, update.program, len(labels)
        self.lane, self.is_spoiled, self.times_lent = True, False, 0

    @contextmanager
    def lent(self) -> Iterator[None]:
        self.times_lent += 1
        yield

    def shrink(self) -> bool:
        had, self.lane = self.lane, False
        return had

    def suits(self, images: Tensor, labels: Tensor) -> bool:
        return len(labels) == self.size

    def replay(self, images: Tensor, labels: Tensor) -> None:
        if not self.with_step:
            self.program.accumulate(images, labels)
            return
        self.program.run(images, labels)
        for parameter in self.program.state.model.parameters():
            parameter.grad = None


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "Graph", Stand)
    monkeypatch.setattr(recorded, "refusal", lambda program: "")
    monkeypatch.setattr(recorded, "step_refusal", lambda program: "")
    monkeypatch.setattr(recorded, "synchronizing_refused", nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setitem(choose.BACKENDS, "auto", choose.Faster)
    Stand.made, Stand.refuse, Stand.no_room = [], lambda with_step, update: "", []


def trained(name: str, capacity: Capacity, updates: int = 7) -> tuple[Engine, list[str], runs.Run]:
    """An engine after so many whole batches, what it has logged, and its run, which is as a plain one."""
    plain = runs.start(runs.Case("adamw-fused", "fp32", warm=False), capacity)
    update = plain.update()
    for _ in range(updates):
        plain.advance(update)
    expected = dump(plain.state)
    run, events = runs.start(runs.Case("adamw-fused", "fp32", warm=False), capacity), list[str]()
    engine = Engine(run.update(), name, 7, events.append)
    for _ in range(updates):
        advance(engine, run)
    assert differences(dump(run.state), expected) == []
    return engine, events, run


def advance(engine: Engine, run: runs.Run) -> None:
    run.schedule.apply(run.state.position.schedule_step(7))
    at = run.state.position.cursor
    engine.run(run.images[at : at + 7], run.labels[at : at + 7], samples=7)


def test_a_graph_is_recorded_once_the_step_is_known_and_stays(capacity: Capacity) -> None:
    engine, events, _ = trained("graph", capacity)
    assert events == ["engine: the whole update is one CUDA graph from here on, as trainer.engine=graph asks"]
    assert (Stand.made, type(engine.backend.graph)) == ([True], Stand)


def test_where_the_recording_fails_in_the_step_the_rest_is_recorded(capacity: Capacity) -> None:
    def refuse(with_step: bool, update: Update) -> str:
        update.program.phase = "optimizer step" if with_step else "backward"
        return "it prints" if with_step else ""

    Stand.refuse = refuse
    engine, events, _ = trained("graph", capacity)
    first, rest = events[0].split("; ")
    assert first == "engine: forward and backward are one CUDA graph from here on, as trainer.engine=graph asks"
    assert (rest, len(events)) == ("the optimizer's step is not: it prints", 1)
    assert (Stand.made, type(engine.backend.graph)) == ([True, False], Stand)


@pytest.mark.parametrize("failures", [2, len(IN_ONE)])
def test_blocks_that_do_not_fit_are_cut_otherwise(failures: int, capacity: Capacity) -> None:
    Stand.no_room = [f"no memory {n}" for n in range(failures)]
    engine, events, _ = trained("graph", capacity)
    assert len(Stand.made) == min(failures + 1, len(IN_ONE))
    assert (engine.backend.graph is None) is (failures == len(IN_ONE))
    assert ("one CUDA graph" if failures == 2 else "eager, not a CUDA graph: no memory 0") in events[0]


@pytest.mark.parametrize("name", ["graph", "auto"])
def test_where_nothing_can_be_recorded_updates_go_on_eagerly(name: str, capacity: Capacity) -> None:
    def refuse(with_step: bool, update: Update) -> str:
        update.program.phase = "forward"
        return "it prints"

    Stand.refuse = refuse
    engine, events, _ = trained(name, capacity, 9)
    assert events == ["engine: eager, not a CUDA graph: it prints"]
    assert (Stand.made, engine.backend.graph) == ([True], None)


@pytest.mark.parametrize("phase", ["forward", "optimizer step"])
def test_what_the_checked_update_shows(phase: str, capacity: Capacity, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that waits for the device: in the forward pass no graph is tried, in the step one without it."""
    waits = iter([True])

    def run_checked(self: Recorded, *batch: Any) -> Any:
        if next(waits, False):
            self.program.phase = phase
            raise GraphRefused("it waits")
        raise AssertionError("checked once")

    monkeypatch.setattr(Recorded, "_run_checked", run_checked)
    _, events, _ = trained("graph", capacity)
    assert Stand.made == ([False] if phase == "optimizer step" else [])
    said = {"forward": "engine: eager, not a CUDA graph: it waits", "optimizer step": "step is not: it waits"}
    assert events[0].endswith(said[phase])
    assert len(events) == 1


def take(eager: float, replay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have updates of each kind take so many seconds."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(choose, "TIMED", 2)

    def timed(method: Callable[..., Any], took: float) -> Callable[..., Any]:
        def run(self: Any, *batch: Any) -> Any:
            clock[0] += took
            return method(self, *batch)

        return run

    monkeypatch.setattr(Recorded, "_run_kernels", timed(Recorded._run_kernels, eager))
    monkeypatch.setattr(Recorded, "replay", timed(Recorded.replay, replay))


@pytest.mark.parametrize(
    ("seconds", "word"), [((2.0, 1.0), "the whole update is one CUDA graph"), ((1.0, 2.0), "eager,")]
)
def test_the_faster_of_the_two_stays(
    seconds: tuple[float, float], word: str, capacity: Capacity, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(*seconds, monkeypatch)
    engine, events, run = trained("auto", capacity)
    assert len(events) == 1
    assert events[0].startswith(f"engine: {word}")
    assert "2000.0 ms" in events[0]
    assert (engine.backend.graph is None) is (word == "eager,")
    advance(engine, run)
    assert len(events) == 1


def test_a_batch_of_another_shape_is_not_timed_as_a_replay(capacity: Capacity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "TIMED", 2)
    engine, events, run = trained("auto", capacity, 2)
    backend = engine.backend
    assert isinstance(backend, choose.Faster)
    while not backend._timed_replays:
        advance(engine, run)
    with monkeypatch.context() as patch:
        patch.setattr(Stand, "suits", lambda self, images, labels: False)
        advance(engine, run)
    assert (len(backend._eager), len(backend._timed_replays), events) == (2, 1, [])
    advance(engine, run)
    assert len(events) == 1


class Wanting:
    """Work that finds no memory so many times."""

    def __init__(self, failures: int) -> None:
        self.failures, self.calls = failures, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise OutOfMemory("CUDA out of memory", phase="evaluation")
        return "done"


GOES = "engine: the CUDA graph goes when its memory is wanted in evaluation, and is recorded again"


def stand_of(engine: Engine) -> Stand:
    assert isinstance(engine.backend.graph, Stand)
    return engine.backend.graph


def test_a_graph_lends_its_memory_once_there_is_no_other(capacity: Capacity) -> None:
    """And never to what leaves something there."""
    engine, events, _ = trained("graph", capacity)
    graph = stand_of(engine)
    for failures, stays, times in ((0, False, 0), (1, False, 1), (0, False, 2), (0, True, 2)):
        assert engine.beside(Wanting(failures), stays=stays) == "done"
        assert (engine.backend.graph, graph.times_lent, len(events)) == (graph, times, 1)


@pytest.mark.parametrize("stays", [True, False])
@pytest.mark.parametrize("name", ["graph", "auto"])
def test_a_graph_that_went_for_other_work_is_recorded_again(
    name: str, stays: bool, capacity: Capacity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First it lends its memory, then it shrinks, then it goes; said once, and chosen once."""
    take(2.0, 1.0, monkeypatch)
    engine, events, run = trained(name, capacity)
    assert engine.beside(Wanting(1 - stays), stays=stays) == "done"
    for _ in range(4):
        first, made = stand_of(engine), len(Stand.made)
        assert engine.beside(Wanting(1), stays=stays) == "done"
        assert stand_of(engine) is first
        assert not first.lane
        assert engine.beside(Wanting(1), stays=stays) == "done"
        assert not isinstance(engine.backend.graph, Stand)
        assert events[1:] == [GOES]
        for _ in range(recorded.PAYS):
            advance(engine, run)
        assert stand_of(engine) is not first
        assert len(Stand.made) == made + 1
    assert events[1:] == [GOES]


def test_work_that_does_not_fit_without_a_graph_fails(capacity: Capacity) -> None:
    engine, events, run = trained("graph", capacity)
    work = Wanting(9)
    with pytest.raises(OutOfMemory):
        engine.beside(work, stays=False)
    assert (work.calls, engine.backend.graph) == (4, None)
    advance(engine, run)
    assert isinstance(engine.backend.graph, Stand)
    assert events[1:] == [GOES]


def test_a_graph_that_never_lasts_is_given_up(capacity: Capacity) -> None:
    engine, events, run = trained("graph", capacity)
    for number in range(recorded.VAIN):
        assert engine.backend.graph is not None, number
        engine.beside(Wanting(2 + (number == 0)), stays=False)
        advance(engine, run)
    assert engine.backend.graph is None
    given_up = (
        "eager, not a CUDA graph: its memory was wanted in evaluation as soon as it was recorded, 3 times in a row"
    )
    assert events[1:] == [GOES, f"engine: {given_up}"]


def test_a_graph_that_cannot_be_recorded_again_is_given_up(capacity: Capacity) -> None:
    engine, events, run = trained("graph", capacity)
    engine.beside(Wanting(3), stays=False)
    engine.update.program.phase = "forward"
    Stand.refuse = lambda with_step, update: "CUDA out of memory"
    for _ in range(3):
        advance(engine, run)
    assert (engine.backend.graph, Stand.made) == (None, [True, True])
    assert events[2:] == ["engine: eager, not a CUDA graph: CUDA out of memory"]


def test_a_graph_goes_before_it_writes_over_what_was_left_in_its_memory(capacity: Capacity) -> None:
    engine, events, run = trained("graph", capacity)

    def work() -> None:
        engine.update.program.phase = "evaluation"
        stand_of(engine).is_spoiled = True

    engine.beside(Wanting(1), stays=False)
    engine.beside(work, stays=False)
    assert not isinstance(engine.backend.graph, Stand)
    assert "evaluation, which leaves tensors there" in events[1]
    advance(engine, run)
    graph = stand_of(engine)
    engine.beside(Wanting(1), stays=False)
    assert (graph.times_lent, graph.lane) == (0, False), "never again"


def test_every_backend_can_be_asked_for() -> None:
    """The schema and the registry name the same."""
    with pytest.raises(ConfigError) as caught:
        check(typed(compose_config(["trainer.engine=warp"])))
    named = re.search(r"trainer\.engine=warp is none of ([\w, ]+)", str(caught.value))
    assert named is not None
    assert set(named[1].split(", ")) == choose.BACKENDS.keys()
    for name in choose.BACKENDS:
        check(typed(compose_config([f"trainer.engine={name}"])))


def test_one_rank_tells_the_others_before_it_goes_on_without_a_graph(
    capacity: Capacity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay that is refused is made kernel by kernel; that there is no graph any more is voted before the next."""
    monkeypatch.setattr("adaptive_trainer.step.agreement.peers", Twins)
    monkeypatch.setattr(recorded, "step_refusal", lambda program: "it keeps a part of its state on the host")
    run, events = runs.start(runs.Case("adamw-fused", "fp32", warm=True), capacity), list[str]()
    engine = Engine(run.update(), "graph", 14, events.append)

    def advance_both() -> None:
        engine.run(run.images[:7], run.labels[:7], samples=0)

    while engine.backend.graph is None:
        advance_both()

    def refused(stand: Stand, images: Tensor, labels: Tensor) -> None:
        raise GraphRefused("the optimizer keeps gradients")

    monkeypatch.setattr(Stand, "replay", refused)
    updates = run.state.updates
    advance_both()
    assert (run.state.updates, isinstance(engine.backend, Ranked)) == (updates + 1, True)
    advance_both()
    assert (run.state.updates, type(engine.backend)) == (updates + 2, Eager)
    assert any("the optimizer keeps gradients" in event for event in events)
