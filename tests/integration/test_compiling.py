"""trainer.engine=compile with a real compiler on a CPU; on a card, see `tests/gpu`."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
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
from torch._dynamo.utils import counters
from torch.multiprocessing.reductions import StorageWeakRef

from adaptive_trainer import Trainer, compose_config, load_model, oom
from adaptive_trainer.checkpoints import checkpoint
from adaptive_trainer.errors import OutOfMemory
from adaptive_trainer.memory.limit import Capacity
from adaptive_trainer.step.backends.compiled import Compiled, compile_forward
from adaptive_trainer.step.engine import Engine
from adaptive_trainer.step.undo import Undo
from tests.support import runs
from tests.support.faults import Fault, differences, dump, storages
from tests.support.forking import ROOT

SETTINGS = [
    "data=fakedata", "data.train.size=22", "data.val.size=4", "data.num_workers=0", "data.image_size=16",
    "trainer.batch_size=4", "trainer.epochs=2", "optimizer=sgd", "device=cpu", "memory.limit=none", "ladder=none",
]  # fmt: skip


class Block(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.SiLU())


class Net(nn.Sequential):
    """What compiled code and training state share: BatchNorm's buffers, dropout's random numbers."""

    def __init__(self, dropout: float = 0.3, classes: int = 5) -> None:
        layers = (nn.Conv2d(3, 4, 3, 2, 1), nn.Sequential(Block(), Block()), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        super().__init__(*layers, nn.Dropout(dropout), nn.Linear(16, classes))


class Reads(Net):
    """Reads a value back, which no compiled code of the whole network can hold."""

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return output if float(output.detach().mean()) > -1e9 else -output


def train(
    folder: Path, *settings: str, make: Callable[..., nn.Module] = lambda *_: Net(0.0, 10)
) -> tuple[list[str], Tensor]:
    trainer = Trainer(compose_config([*SETTINGS, *settings]), model=make, output_dir=folder)
    events = [event for event in trainer.fit().events if event.startswith("engine")]
    assert trainer.model is not None
    return events, torch.cat([value.flatten() for value in trainer.model.state_dict().values()])


def test_whole_batches_are_compiled_once_and_the_checkpoint_is_of_the_plain_network(tmp_path: Path) -> None:
    counters.clear()
    said, compiled = train(tmp_path / "compile", "trainer.engine=compile")
    assert counters["stats"]["unique_graphs"] == 1, "not the last batch of an epoch, nor evaluation"
    assert said[0] == "engine: compiling for batches of 4, as trainer.engine=compile asks"
    assert said[1].startswith("engine: compiled, with the first update in ")
    assert len(said) == 2
    _, eager = train(tmp_path / "eager", "trainer.engine=eager")
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    best = tmp_path / "compile" / "checkpoints" / "best.pt"
    assert list(checkpoint.load(best)["model"]) == list(Net().state_dict())
    load_model(best, lambda *_: Net(0.0, 10))


@pytest.mark.parametrize(
    ("make", "setting", "reason"),
    [
        (lambda *_: Reads(0.0, 10), "trainer.micro_batch_size=4", "data-dependent"),
        (lambda *_: Net(0.0, 10), "trainer.recompute=blocks", "recompute"),
        (lambda *_: Net(0.0, 10), "memory.limit=64MiB", "simulated card counts operators"),
    ],
    ids=["reads a value", "recomputes", "simulated card"],
)
def test_what_is_not_compiled_trains_eagerly_and_says_why(
    make: Callable[..., nn.Module], setting: str, reason: str, tmp_path: Path
) -> None:
    said, weights = train(tmp_path / "compile", "trainer.engine=compile", setting, make=make)
    _, eager = train(tmp_path / "eager", "trainer.engine=eager", setting, make=make)
    assert said[-1].startswith("engine: eager, not compiled: ")
    assert reason in said[-1]
    assert torch.equal(weights, eager)


class Warns(Reads):
    """Warns in each forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        warnings.warn("look at me", stacklevel=1)
        return super().forward(x)


def test_the_repeat_without_compiled_code_may_warn(capacity: Capacity) -> None:
    run, events = runs.start(replace(CASE, warm=False), capacity, Warns), list[str]()
    engine = Engine(run.update(), "compile", 7, events.append)
    with pytest.warns(UserWarning, match="look at me"):
        engine.run(run.images[:7], run.labels[:7], samples=7)
    assert events[-1].startswith("engine: eager, not compiled: ")


WITHOUT_COMPILER = """
import sys
from pathlib import Path
from tests.integration.test_compiling import train
print(train(Path(sys.argv[1]), "trainer.engine=compile")[0][-1])
"""


def test_without_a_compiler_it_trains_eagerly_and_says_why(tmp_path: Path) -> None:
    nowhere = {"CC": f"{tmp_path}/none", "CXX": f"{tmp_path}/none", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_COMPILER, str(tmp_path)],
        env={**os.environ, **nowhere, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "engine: eager, not compiled: " in ended.stdout
    assert "compiler" in ended.stdout


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


CASE = runs.Case("adamw-foreach", "fp32", warm=True, accumulate=False)


@pytest.fixture
def started(capacity: Capacity, refusable: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[], runs.Run]:
    monkeypatch.setattr(runs, "Net", Net)
    return lambda: runs.start(CASE, capacity)


def test_an_out_of_memory_anywhere_in_a_compiled_update_leaves_no_trace(started: Callable[[], runs.Run]) -> None:
    """Every operator and every buffer fails: once, and until the update is given up."""
    run = started()
    update, state = run.update(), run.state
    forward, back = compile_forward(state.model), Undo(state, runs.CPU, on_host=True)
    back.begin()
    back.before_step()
    before = dump(state)
    accumulate = partial(update.program.accumulate, forward=forward)
    run.advance(update, accumulate=accumulate)
    whole = CompiledFault(phase=lambda: update.phase)
    back.roll_back()
    assert differences(dump(state), before) == []
    run.advance(update, whole, accumulate)
    after = dump(state)
    back.roll_back()
    for at in range(whole.count):
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


class NoBuffers(CompiledFault):  # type: ignore[no-untyped-call]
    """Refuses buffers of compiled code and nothing else."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_where_compiled_code_has_no_memory_the_update_is_made_eagerly(
    started: Callable[[], runs.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was compiled is gone before memory is released for the repeat."""
    run, events = started(), list[str]()
    update, back = run.update(), Undo(run.state, runs.CPU, on_host=True)
    engine = Engine(update, "compile", 7, events.append)
    engine.run(run.images[:7], run.labels[:7], samples=7)
    assert "compiled, with" in events[-1]
    assert isinstance(engine.backend, Compiled)
    forward, alive = weakref.ref(engine.backend._forward), list[bool]()
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


def test_what_was_compiled_goes_with_the_engine(started: Callable[[], runs.Run]) -> None:
    run = started()
    events: list[str] = []
    engine = Engine(run.update(), "compile", 7, events.append)
    engine.run(run.images[:7], run.labels[:7], samples=7)
    assert "compiled, with" in events[-1]
    model, weight = weakref.ref(run.state.model), weakref.ref(next(run.state.model.parameters()))
    del run, engine
    gc.collect()
    assert (model(), weight()) == (None, None)
