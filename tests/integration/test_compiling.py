"""trainer.engine=compile with a real compiler on a CPU; on a card, see `tests/gpu`."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from adaptive_trainer import Trainer, compose_config, load_model, oom
from adaptive_trainer.checkpoints import checkpoint
from adaptive_trainer.errors import OutOfMemory
from adaptive_trainer.memory.limit import Capacity
from adaptive_trainer.step.backends import compiled
from adaptive_trainer.step.backends.compiled import Compiled, _Kernels
from adaptive_trainer.step.backends.compiler import fitting, kept
from adaptive_trainer.step.backends.compiling import Compiling
from adaptive_trainer.step.backends.passes import Captured, configured
from adaptive_trainer.step.backends.timing import Timed
from adaptive_trainer.step.engine import Engine
from adaptive_trainer.step.undo import Undo
from tests.support import runs
from tests.support.faults import Fault, Faults, differences, dump, storages
from tests.support.forking import ROOT

SETTINGS = [
    "data=fakedata", "data.train.size=22", "data.val.size=4", "data.num_workers=0", "data.image_size=16",
    "trainer.batch_size=4", "trainer.epochs=2", "optimizer=sgd", "device=cpu", "memory.limit=none", "ladder=none",
]  # fmt: skip


CASE = runs.Case("adamw-foreach", "fp32", warm=True, accumulate=False)


class Block(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.SiLU())


class Net(nn.Sequential):
    """What compiled code and training state share: BatchNorm's buffers, dropout's random numbers."""

    def __init__(self, dropout: float = 0.3, classes: int = 5) -> None:
        layers = (nn.Conv2d(3, 4, 3, 2, 1), nn.Sequential(Block(), Block()), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        super().__init__(*layers, nn.Dropout(dropout), nn.Linear(16, classes))


class Chain(Net):
    """Goes on with many small operators, which compiled code makes one of: it is many times faster."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)  # type: ignore[no-untyped-call]
        for _ in range(250):
            x = torch.sin(x) * 1.01
        return x


class Reads(Net):
    """Reads a value back, which no compiled code of the whole network can hold."""

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return output if float(output.detach().mean()) > -1e9 else -output


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling is worth its time for any rest of a run, and training waits for it: the tests are to take no longer.

    Compiled code counts as the faster: which one is depends on what else this machine does.
    """
    answer = Compiling.answer
    monkeypatch.setattr(Compiling, "answer", lambda self: answer(self, None))
    monkeypatch.setattr(compiled, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(compiled, "GAIN", 1e9)
    monkeypatch.setattr(Timed, "is_faster", lambda *_: True)


def train(
    folder: Path, *settings: str, make: Callable[..., nn.Module] = lambda *_: Net(0.0, 10)
) -> tuple[list[str], Tensor]:
    trainer = Trainer(compose_config([*SETTINGS, *settings]), model=make, output_dir=folder)
    events = [event for event in trainer.fit().events if event.startswith("engine")]
    assert trainer.model is not None
    return events, torch.cat([value.flatten() for value in trainer.model.state_dict().values()])


def test_training_changes_over_and_the_checkpoint_is_of_the_plain_network(tmp_path: Path, soon: None) -> None:
    long = "trainer.epochs=5"
    said, found = train(tmp_path / "compile", "trainer.engine=compile", long, make=lambda *_: Chain(0.0, 10))
    assert said[0].startswith("engine: another process compiles for batches of 4, as trainer.engine=compile asks")
    assert re.match(
        r"engine: compiled in \d+ s; [\d.]+ ms an update from here on, against [\d.]+ ms; chang", said[1]
    ), said
    assert len(said) == 2
    _, eager = train(tmp_path / "eager", "trainer.engine=eager", long, make=lambda *_: Chain(0.0, 10))
    torch.testing.assert_close(found, eager, rtol=1e-3, atol=1e-4)
    best = tmp_path / "compile" / "checkpoints" / "best.pt"
    assert list(checkpoint.load(best)["model"]) == list(Net().state_dict())
    load_model(best, lambda *_: Chain(0.0, 10))


@pytest.mark.parametrize(
    ("make", "setting", "reason"),
    [
        (lambda *_: Reads(0.0, 10), "trainer.micro_batch_size=4", "data-dependent"),
        (lambda *_: Net(0.0, 10), "memory.limit=64MiB", "simulated card counts operators"),
    ],
    ids=["reads a value", "simulated card"],
)
def test_what_is_not_compiled_trains_eagerly_and_says_why(
    make: Callable[..., nn.Module], setting: str, reason: str, tmp_path: Path, soon: None
) -> None:
    said, weights = train(tmp_path / "compile", "trainer.engine=compile", setting, make=make)
    _, eager = train(tmp_path / "eager", "trainer.engine=eager", setting, make=make)
    assert said[-1].startswith("engine: eager, not compiled: ")
    assert reason in said[-1]
    assert torch.equal(weights, eager)


def test_what_recomputes_is_compiled_without_and_recomputes_by_the_compilers_means(tmp_path: Path, soon: None) -> None:
    settings = "trainer.epochs=5", "trainer.recompute=blocks"
    said, found = train(tmp_path / "compile", "trainer.engine=compile", *settings, make=lambda *_: Chain(0.0, 10))
    assert said[1].startswith("engine: compiled in "), said
    _, eager = train(tmp_path / "eager", "trainer.engine=eager", *settings, make=lambda *_: Chain(0.0, 10))
    torch.testing.assert_close(found, eager, rtol=1e-3, atol=1e-4)


def test_a_short_rest_of_a_run_is_not_compiled_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is a process started, nor changed over to what it has made, where too little is left to gain by it."""
    said, _ = train(tmp_path / "one", "trainer.engine=compile")
    assert re.fullmatch(
        r"engine: eager, not compiled: 11 updates are left, [\d.]+ s in all, and compiling takes longer", said[0]
    ), said
    monkeypatch.setattr(compiled, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(compiled, "GAIN", 1e-9)
    answer = Compiling.answer
    monkeypatch.setattr(Compiling, "answer", lambda self: answer(self, None))
    said, _ = train(tmp_path / "two", "trainer.engine=compile", "trainer.epochs=3")
    assert "not compiled: it was ready after" in said[-1]
    assert re.search(r"and \d+ updates are left, [\d.]+ s in all; changing over would take about", said[-1]), said


class Warns(Reads):
    """Warns in each forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        warnings.warn("look at me", stacklevel=1)
        return super().forward(x)


def test_the_repeat_without_compiled_code_may_warn(capacity: Capacity) -> None:
    run, events = runs.start(replace(CASE, warm=False), capacity, Warns), list[str]()
    engine = Engine(run.update(), "compile", 7, events.append)
    for _ in range(2):
        with pytest.warns(UserWarning, match="look at me"):
            engine.run(run.images[:7], run.labels[:7], samples=7)
    assert events[-1].startswith("engine: eager, not compiled: ")


FAILING = """
import sys
from pathlib import Path
import pytest
from tests.integration.test_compiling import soon, train
with pytest.MonkeyPatch.context() as patch:
    soon.__wrapped__(patch)
    print(train(Path(sys.argv[1]), "trainer.engine=compile")[0][-1])
"""


def test_without_a_compiler_it_trains_eagerly_and_says_why(tmp_path: Path) -> None:
    nowhere = {"CC": f"{tmp_path}/none", "CXX": f"{tmp_path}/none", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", FAILING, str(tmp_path)],
        env={**os.environ, **nowhere, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "engine: eager, not compiled: " in ended.stdout
    assert "compiler" in ended.stdout


@torch.library.custom_op("test_compiling::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    """An operator of the caller's, which the other process does not know."""
    return 2 * x


doubled.register_fake(lambda x: torch.empty_like(x))
doubled.register_autograd(lambda ctx, grad: 2 * grad)


class Doubles(Net):
    """Uses that operator."""

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = doubled(super().forward(x))  # type: ignore[no-untyped-call]
        return output


def test_what_the_other_process_cannot_know_is_a_reason(tmp_path: Path, soon: None) -> None:
    said, weights = train(tmp_path / "compile", "trainer.engine=compile", make=lambda *_: Doubles(0.0, 10))
    _, eager = train(tmp_path / "eager", "trainer.engine=eager", make=lambda *_: Doubles(0.0, 10))
    assert said[-1].startswith("engine: eager, not compiled: ")
    assert "test_compiling" in said[-1]
    assert torch.equal(weights, eager)


# ---- the process that compiles ---------------------------------------------------------------------------------------


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def started_engine(capacity: Capacity, events: list[str]) -> tuple[Engine, runs.Run, Callable[[], None]]:
    """An engine for which a process has just begun to compile, and what makes its next update."""
    run = runs.start(CASE, capacity, Chain)
    engine = Engine(run.update(), "compile", 7, events.append)

    def advance() -> None:
        engine.run(run.images[:7], run.labels[:7], samples=0)

    for _ in range(2):
        advance()
    assert "another process compiles" in events[-1], events
    return engine, run, advance


def compiling(engine: Engine) -> Compiling:
    assert isinstance(engine.backend, Compiled)
    assert engine.backend._compiling is not None
    return engine.backend._compiling


def test_updates_before_the_change_have_the_bits_of_eager_ones(capacity: Capacity) -> None:
    events = list[str]()
    engine, run, advance = started_engine(capacity, events)
    for _ in range(20):
        advance()
    other = runs.start(CASE, capacity, Chain)
    plain = Engine(other.update(), "eager", 7, events.append)
    for _ in range(22):
        plain.run(other.images[:7], other.labels[:7], samples=0)
    assert len(events) == 1, "it still compiles"
    assert differences(dump(run.state), dump(other.state)) == []
    engine.close()


def test_a_compiler_that_is_killed_is_a_reason(capacity: Capacity) -> None:
    events = list[str]()
    engine, _, advance = started_engine(capacity, events)
    os.kill(compiling(engine).pid, signal.SIGKILL)
    while len(events) == 1:
        advance()
    assert events[1].startswith("engine: eager, not compiled: the process that compiles has ended with -9")


def test_where_no_process_can_be_started_the_update_is_made_once(
    capacity: Capacity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    run, events = runs.start(CASE, capacity, Chain), list[str]()
    engine = Engine(run.update(), "compile", 7, events.append)
    before = run.state.position.cursor
    for _ in range(3):
        engine.run(run.images[:7], run.labels[:7], samples=7)
    assert run.state.position.cursor == before + 21
    assert events[0].startswith("engine: eager, not compiled: ")
    assert "/nowhere/python" in events[0]


def test_a_compiler_ends_with_the_engine(capacity: Capacity) -> None:
    engine, _, _ = started_engine(capacity, [])
    pid = compiling(engine).pid
    assert is_running(pid)
    engine.close()
    assert not is_running(pid)


def test_memory_that_is_wanted_ends_the_compiler_first(capacity: Capacity) -> None:
    events = list[str]()
    engine, run, advance = started_engine(capacity, events)
    pid, before = compiling(engine).pid, run.state.updates
    with Faults([2, 0]):  # and once more; the first two take the batch
        advance()
    assert not is_running(pid)
    assert run.state.updates == before + 1
    assert "the memory of the process that compiles was wanted in" in events[-1]


PARENT = """
import time, torch
from adaptive_trainer.memory.limit import limited
from tests.integration.test_compiling import compiling, started_engine
with limited(torch.device("cpu"), "none") as capacity:
    engine, _, _ = started_engine(capacity, [])
    time.sleep(3)  # it is at work
    print(compiling(engine).pid, flush=True)
    time.sleep(600)
"""


def test_a_compiler_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        family = [pid, *map(int, children)]
        parent.kill()
    ends = time.monotonic() + 60
    while any(map(is_running, family)) and time.monotonic() < ends:
        time.sleep(0.1)
    assert not [each for each in family if is_running(each)]


def test_code_that_was_compiled_under_other_settings_is_not_taken(capacity: Capacity, soon: None) -> None:
    events = list[str]()
    engine, _, advance = started_engine(capacity, events)
    compiling(engine).answer()
    torch.use_deterministic_algorithms(True)
    try:
        while len(events) == 1:
            advance()
    finally:
        torch.use_deterministic_algorithms(False)
    assert events[1] == (
        "engine: eager, not compiled: the other process has compiled something else than is asked for here"
    )


def test_with_less_room_a_forward_pass_keeps_less() -> None:
    captured = Captured(Net())
    captured.forward(torch.rand(7, 3, 16, 16))
    sizes = [kept(captured.passes[0], budget) for budget in (1.0, 0.5, 0.0)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1] > 0
    assert fitting(captured.passes, sizes[0]) == 1.0
    assert fitting(captured.passes, sizes[0] - 1) < 1.0
    assert fitting(captured.passes, 0) == 0.0


# ---- out of memory in compiled code ----------------------------------------------------------------------------------


class CompiledFault(Fault):
    """Sees compiled code too: the operators that it calls, and the buffers that it allocates past all operators."""

    current: CompiledFault | None = None

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Whether compiled code may run under it."""
        return True

    def __enter__(self) -> Any:
        CompiledFault.current = self
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        CompiledFault.current = None
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def allocate(self, make: Callable[..., Tensor], *args: Any) -> Tensor:
        number, self.count = self.count, self.count + 1
        self.phases.append(f"{self.phase()}, allocating")
        if self._hits(number):
            self._refuse("a buffer")
        tensor = make(*args)
        self.made.append(StorageWeakRef(tensor.untyped_storage()))  # type: ignore[no-untyped-call]
        return tensor


@pytest.fixture(scope="module")
def refusable() -> Iterator[None]:
    """The allocation of buffers by code that is compiled from here on goes through the fault that is entered."""
    guards: Any = torch._C._dynamo.guards
    make = guards._empty_strided_cpu

    def allocate(*args: Any) -> Tensor:
        fault = CompiledFault.current
        tensor: Tensor = make(*args) if fault is None else fault.allocate(make, *args)
        return tensor

    guards._empty_strided_cpu = allocate
    yield
    guards._empty_strided_cpu = make


@pytest.fixture
def started(capacity: Capacity, refusable: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[], runs.Run]:
    monkeypatch.setattr(runs, "Net", Chain)
    return lambda: runs.start(CASE, capacity)


def test_an_out_of_memory_anywhere_in_a_compiled_update_leaves_no_trace(
    every: int, started: Callable[[], runs.Run]
) -> None:
    """An operator or a buffer fails: once, and until the update is given up."""
    run = started()
    update, state = run.update(), run.state
    captured, back = Captured(state.model), Undo(state, runs.CPU, on_host=True)
    back.begin()
    back.before_step()
    before = dump(state)
    accumulate = partial(update.program.accumulate, forward=captured.forward)
    run.advance(update, accumulate=accumulate)
    back.roll_back()
    with configured():
        captured.passes[0].compiled()
    captured.compile()
    run.advance(update, accumulate=accumulate)
    whole = CompiledFault(phase=lambda: update.phase)
    back.roll_back()
    assert differences(dump(state), before) == []
    run.advance(update, whole, accumulate)
    after = dump(state)
    back.roll_back()
    for at in range(0, whole.count, every):
        for keeps_failing in (False, True):
            fault = CompiledFault(at, keeps_failing=keeps_failing)
            with suppress(OutOfMemory):
                run.advance(update, fault, accumulate)
            assert fault.raised, at
            assert differences(dump(state), before if keeps_failing else after) == [], (at, whole.phases[at])
            assert fault.left_over(storages(state)) == 0
            back.roll_back()
    seen = {phase: whole.phases.count(phase) for phase in whole.phases}
    assert {"forward, allocating", "backward, allocating", "forward", "backward", "optimizer step"} <= seen.keys(), seen


def change_over(engine: Engine, run: runs.Run, events: list[str]) -> None:
    """Train until compiled code makes the updates."""
    while len(events) < 2:
        engine.run(run.images[:7], run.labels[:7], samples=0)
    assert events[1].startswith("engine: compiled in "), events


class NoBuffers(CompiledFault):  # type: ignore[no-untyped-call]
    """Refuses buffers of compiled code and nothing else."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_where_compiled_code_has_no_memory_the_update_is_made_eagerly(
    started: Callable[[], runs.Run], monkeypatch: pytest.MonkeyPatch, soon: None
) -> None:
    """What was compiled is gone before memory is released for the repeat."""
    run, events = started(), list[str]()
    update, back = run.update(), Undo(run.state, runs.CPU, on_host=True)
    engine = Engine(update, "compile", 7, events.append)
    change_over(engine, run, events)
    assert isinstance(engine.backend, _Kernels)
    forward, alive = weakref.ref(engine.backend._captured), list[bool]()
    monkeypatch.setattr(oom, "release", lambda *_: alive.append(forward() is not None))
    back.begin()
    back.before_step()
    update.run(run.images[7:14], run.labels[7:14], samples=7)
    eager = dump(run.state)
    back.roll_back()
    with NoBuffers(0, keeps_failing=True) as full:
        engine.run(run.images[7:14], run.labels[7:14], samples=7)
    assert full.raised == 2, "and the same samples once more"
    assert alive[-1:] == [False]
    assert events[-1].startswith("engine: eager, not compiled: out of memory in forward")
    assert differences(dump(run.state), eager) == []


def test_what_was_compiled_goes_with_the_engine(started: Callable[[], runs.Run], soon: None) -> None:
    run = started()
    events: list[str] = []
    engine = Engine(run.update(), "compile", 7, events.append)
    change_over(engine, run, events)
    model, weight = weakref.ref(run.state.model), weakref.ref(next(run.state.model.parameters()))
    del run, engine
    gc.collect()
    assert (model(), weight()) == (None, None)
