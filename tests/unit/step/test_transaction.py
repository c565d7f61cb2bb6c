"""An out-of-memory at any operator of an update leaves no trace, in the manner of SQLite's tests.

For N = 1, 2, 3, ... the N-th operator of an update runs out of memory, until one update passes whole. It fails once:
the update's own retry must end in the state of an undisturbed update. Or it keeps failing: the state must be the one
before, and the update at the next rung must end as if that rung had been used from the beginning.
"""

from __future__ import annotations

import random
import time
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_trainer import oom
from adaptive_trainer.errors import OutOfMemory
from adaptive_trainer.memory.limit import Capacity
from adaptive_trainer.step.copies import Shadow
from adaptive_trainer.step.undo import Undo
from adaptive_trainer.utils.belongings import Belongings
from adaptive_trainer.utils.random import RandomStates
from tests.support.faults import Fault, Faults, differences, dump, storages
from tests.support.runs import OPTIMIZERS, Case, Run, start

NEXT_RUNG = 3  # its micro-batch size
IN_STEP = ("clipping", "optimizer step")


@dataclass
class Tally:
    """What a series of injections has shown."""

    injections: Counter[str] = field(default_factory=Counter)
    compared: int = 0
    differing: list[str] = field(default_factory=list)
    left_over: int = 0

    def compare(self, run: Run, expected: dict[str, Any]) -> None:
        found = dump(run.state)
        self.compared += len(expected)
        self.differing += differences(found, expected)

    def __str__(self) -> str:
        phases = ", ".join(f"{count} in {phase}" for phase, count in self.injections.items())
        return (
            f"{self.injections.total():,} injections ({phases}), {self.compared:,} comparisons, "
            f"{len(self.differing)} differ, {self.left_over} storages left over"
        )


def fail_once(case: Case, capacity: Capacity, at: int, expected: dict[str, Any], tally: Tally) -> bool:
    """Whether operator `at` exists: it fails, and the retry must succeed."""
    run = start(case, capacity)
    update = run.update()
    fault = Fault(at, phase=lambda: update.phase)
    run.advance(update, fault)
    if fault.raised:
        tally.injections[fault.phases[at]] += 1
        tally.compare(run, expected)
        tally.left_over += fault.left_over(storages(run.state))
    return bool(fault.raised)


def keep_failing(case: Case, capacity: Capacity, at: int, expected: tuple[Any, Any], tally: Tally) -> bool:
    """Whether operator `at` exists: it and all after it fail, then the next rung takes over."""
    run = start(case, capacity)
    update = run.update()
    before, after = expected
    fault = Fault(at, keeps_failing=True, phase=lambda: update.phase)
    with suppress(OutOfMemory):
        run.advance(update, fault)
    if fault.raised:
        assert fault.raised >= 2  # a profiler's mark on the way out may fail as well
        tally.injections[fault.phases[at]] += 1
        tally.compare(run, before)
        tally.left_over += fault.left_over(storages(run.state))
        run.advance(run.update(NEXT_RUNG))
        tally.compare(run, after)
    return bool(fault.raised)


def undisturbed(case: Case, capacity: Capacity, micro_batch_size: int | None = None) -> dict[str, Any]:
    run = start(case, capacity)
    run.advance(run.update(micro_batch_size))
    return dump(run.state)


def inject(case: Case, capacity: Capacity, first: int, every: int) -> Tally:
    """Fail operators of one update from number `first` on, in two modes, each in a run of its own."""
    tally = Tally()
    once = undisturbed(case, capacity)
    keeps = dump(start(case, capacity).state), undisturbed(case, capacity, NEXT_RUNG)
    assert differences(once, keeps[0])
    count = len(operators(case, capacity))
    for at in range(first, count, every):
        assert fail_once(case, capacity, at, once, tally)
        assert keep_failing(case, capacity, at, keeps, tally)
    assert not fail_once(case, capacity, count, once, tally)
    return tally


def inject_in_one_run(case: Case, capacity: Capacity, stride: int, stride_in_step: int) -> Tally:
    """In one run, fail every `stride_in_step`-th operator of clipping and step, and every `stride`-th of the others.

    After each the state must be the one before, so the next failure meets it again; the next rung ends the run. Every
    tenth of these operators also fails once, in a run of its own.
    """
    tally = Tally()
    once, after = undisturbed(case, capacity), undisturbed(case, capacity, NEXT_RUNG)
    phases = operators(case, capacity)
    numbers = [at for at, phase in enumerate(phases) if at % (stride_in_step if phase in IN_STEP else stride) == 0]
    for at in numbers[::10]:
        assert fail_once(case, capacity, at, once, tally)
    run = start(case, capacity)
    update, before = run.update(), dump(run.state)
    for at in numbers:
        fault = Fault(at, keeps_failing=True)
        with suppress(OutOfMemory):
            run.advance(update, fault)
        assert fault.raised >= 2
        tally.injections[phases[at]] += 1
        tally.compare(run, before)
        tally.left_over += fault.left_over(storages(run.state))
    run.advance(run.update(NEXT_RUNG))
    tally.compare(run, after)
    return tally


def operators(case: Case, capacity: Capacity) -> list[str]:
    """The phase of each operator of an undisturbed update."""
    run = start(case, capacity)
    update = run.update()
    fault = Fault(phase=lambda: update.phase)
    run.advance(update, fault)
    return fault.phases


def covering() -> list[Case]:
    """Every optimizer with every precision, the rest spread so that every pair of settings occurs."""
    cases = []
    for row, optimizer in enumerate(OPTIMIZERS):
        for column, precision in enumerate(("fp32", "bf16", "fp16")):
            number = row + column
            cases.append(
                Case(
                    optimizer,
                    precision,
                    warm=number % 2 == 1,
                    ema=(row + 2 * column) % 3 != 0,
                    clip=(row * 2 + column) % 3 != 1,
                    accumulate=number % 3 == 0,
                )
            )
    overflow = [
        Case(name, "fp16", warm, accumulate=False, scale=2.0**40)
        for name, warm in (("adamw-fused", False), ("sgd", True))
    ]
    return [*cases, *overflow]


def record(
    case: Case,
    tally: Tally,
    seconds: float,
    record_property: Callable[[str, object], None],
    note: str = "",
    least: int = 100,
) -> None:
    record_property("summary", f"{case}{note}: {tally}, {seconds:.1f} s")
    assert tally.injections.total() > least
    assert sorted(set(tally.differing)) == []
    assert tally.left_over == 0


@pytest.mark.parametrize("number", range(len(covering())), ids=lambda number: str(covering()[number]))
def test_every_operator(
    number: int, every: int, capacity: Capacity, record_property: Callable[[str, object], None]
) -> None:
    """Each case begins at another operator, so that they do not leave out the same ones."""
    started, case = time.perf_counter(), covering()[number]
    tally = inject(case, capacity, number % every, every)
    record(case, tally, time.perf_counter() - started, record_property, f" (1 of {every})", least=100 // every)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["efficientnet_b0", "mobilenetv3_large_100"])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_every_operator_of_a_real_network(
    optimizer: str, model: str, capacity: Capacity, record_property: Callable[[str, object], None]
) -> None:
    """Every 20th operator of forward and backward, every 7th of the step; every one of the two shortest steps.

    All operators of all ten would take an hour and a half. 7 divides no optimizer's number of operators a parameter.
    """
    number = list(OPTIMIZERS).index(optimizer)
    precision = ("fp32", "bf16", "fp16")[number % 3]
    case = Case(optimizer, precision, warm=number % 2 == 0, accumulate=number == 0, model=model, image_size=32)
    strides = 20, 1 if optimizer in ("adamw-foreach", "adamw-fused") and model == "efficientnet_b0" else 7
    started = time.perf_counter()
    tally = inject_in_one_run(case, capacity, *strides)
    record(
        case,
        tally,
        time.perf_counter() - started,
        record_property,
        f" (every {strides[0]}th, in the step {strides[1]})",
    )


def nothing(*_: Any) -> None:
    """Stands for an undo that has been forgotten."""


@pytest.mark.long
@pytest.mark.parametrize(
    ("forgotten", "name", "seen"),
    [
        (Shadow, "restore", {"buffer/norm1.running_mean", "buffer/seen", "ema/stem.weight", "meter/loss", "model/"}),
        (Undo, "_restore_optimizer_state", {"optimizer state", "optimizer states"}),
        (Undo, "_restore_plain", {"stages", "rng torch", "rng python", "rng numpy"}),
        (Belongings, "put_back", {"optimizer attributes"}),
        (RandomStates, "write", {"rng torch", "rng python", "rng numpy"}),
    ],
)
def test_a_forgotten_undo_is_noticed(
    forgotten: type, name: str, seen: set[str], capacity: Capacity, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("adamw-fused", "fp16", warm=False)
    expected = dump(start(case, capacity).state), undisturbed(case, capacity, NEXT_RUNG)
    phases = operators(case, capacity)
    monkeypatch.setattr(forgotten, name, nothing)
    tally = Tally()
    for at in range(phases.index("optimizer step"), len(phases)):
        with suppress(RuntimeError, KeyError):  # what the next rung can meet; the comparison was before it
            keep_failing(case, capacity, at, expected, tally)
    assert {part for part in seen if not any(found.startswith(part) for found in tally.differing)} == set()


def test_a_kept_error_is_noticed(capacity: Capacity, monkeypatch: pytest.MonkeyPatch) -> None:
    case, kept = Case("sgd", "fp32", warm=False), list[BaseException]()
    describe = oom.describe

    def keeping(error: BaseException, **options: Any) -> oom.Failure:
        kept.append(error)
        return describe(error, **options)

    monkeypatch.setattr(oom, "describe", keeping)
    expected = dump(start(case, capacity).state), undisturbed(case, capacity, NEXT_RUNG)
    tally = Tally()
    assert keep_failing(case, capacity, operators(case, capacity).index("backward"), expected, tally)
    assert tally.differing == []
    assert tally.left_over > 0


class Refusing:
    """`torch.empty_like` with no memory for call number `at`: the copies' buffers are refused."""

    def __init__(self, at: int) -> None:
        self.at, self.count, self.allocate = at, 0, torch.empty_like

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.count += 1
        if self.count == self.at + 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Injected into the making of a copy.")
        return self.allocate(*args, **kwargs)


@pytest.mark.parametrize("warm", [False, True])
def test_no_room_for_the_copies(warm: bool, capacity: Capacity, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("adamw-single", "fp16", warm)
    expected, tally = undisturbed(case, capacity), Tally()
    at, more = 0, True
    while more:
        run, refusing = start(case, capacity), Refusing(at)
        update = run.update()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty_like", refusing)
            run.advance(update)
        tally.compare(run, expected)
        at, more = at + 1, refusing.count > at
    assert at > 15
    assert sorted(set(tally.differing)) == []


@pytest.mark.parametrize("seed", range(6))
def test_a_whole_run_with_random_failures(seed: int, capacity: Capacity) -> None:
    """Failures at random operators, of the retry as well, and rung changes: it ends as its rungs do undisturbed."""
    draw = random.Random(seed)
    case = Case(draw.choice(list(OPTIMIZERS)), draw.choice(["fp32", "bf16", "fp16"]), warm=False)
    disturbed = start(case, capacity)
    rungs, rung, failures = [], 7, 0
    while disturbed.state.updates < 10:
        update = disturbed.update(rung)
        fault = Faults([draw.randrange(150) for _ in range(draw.choice([0, 1, 2]))])
        try:
            disturbed.advance(update, fault)
            rungs.append(rung)
        except OutOfMemory:
            rung = max(2, rung - 1)
        failures += fault.raised
    replay = start(case, capacity)
    for each in rungs:
        replay.advance(replay.update(each))
    assert failures > 5
    assert differences(dump(disturbed.state), dump(replay.state)) == []


def test_the_copies_of_a_rung_go_with_it(capacity: Capacity) -> None:
    run = start(Case("adamw-single", "fp32", warm=True), capacity)
    first = run.update()
    run.advance(first)
    gone = weakref.ref(first._undo)
    run.advance(first := run.update(NEXT_RUNG))
    assert first._undo is not gone()
    assert gone() is None
