"""Which way updates run, on a machine without a card; with one, see `tests/gpu`."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from adaptive_trainer import Trainer, compose_config
from adaptive_trainer.config.schema import ModelConfig, OptimizerConfig, RungConfig
from adaptive_trainer.data.position import Position
from adaptive_trainer.errors import ConfigError, OutOfMemory
from adaptive_trainer.memory.limit import Capacity, limited
from adaptive_trainer.models.optimizers import build_optimizer
from adaptive_trainer.models.zoo import build_model
from adaptive_trainer.recipe import Recipe
from adaptive_trainer.step.backends import cuda_graph
from adaptive_trainer.step.backends.cuda_graph import Graph, GraphRefused, _Holders, _unchanged_host, step_refusal
from adaptive_trainer.step.backends.recorded import IN_STEP
from adaptive_trainer.step.engine import Engine
from adaptive_trainer.step.undo import TrainState, Undo
from adaptive_trainer.step.update import Update
from tests.support import runs
from tests.support.faults import Fault, Net, differences, dump, storages
from tests.support.forking import ROOT

POSITION = Position(0, 0, 0, 4)
SMALL = [
    "model.name=mobilenetv3_small_050", "data=fakedata", "data.train.size=16", "data.val.size=4", "data.num_workers=0",
    "data.image_size=32", "trainer.batch_size=4", "device=cpu", "memory.limit=none", "ladder=none",
]  # fmt: skip


def train(folder: Path, engine: str) -> tuple[list[str], torch.Tensor]:
    trainer = Trainer(compose_config([*SMALL, f"trainer.engine={engine}"]), output_dir=folder)
    result = trainer.fit()
    assert trainer.model is not None
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return [event for event in result.events if event.startswith("engine")], weights


@pytest.mark.long
def test_a_graph_without_a_card_is_refused_with_the_reason_and_changes_nothing(tmp_path: Path) -> None:
    said, weights = train(tmp_path / "graph", "graph")
    assert said == ["engine: eager, not a CUDA graph: graphs need a CUDA card, and this is cpu"]
    for engine in ("auto", "eager"):
        quiet, same = train(tmp_path / engine, engine)
        assert quiet == []
        assert torch.equal(weights, same)


def test_an_unknown_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.engine=warp is none of auto, eager, graph, compile"):
        train(tmp_path, "warp")


class Changes(nn.Module):
    """Changes something on the host in every forward pass; `what` is the name of the method that does."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.body, self.what = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), what
        self.generator, self.torch_generator = random.Random(0), torch.Generator()
        self.count, self.history, self.counts, self.mean = 0, [1.0], {"n": 0}, torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        match self.what:
            case "count":
                self.count += 1
            case "history":
                self.history.append(2.0)
            case "counts":
                self.counts["n"] += 1
            case "mean":
                self.mean = 0.9 * self.mean + x.mean()
            case "generator":
                self.generator.random()
            case "torch_generator":
                torch.rand(1, generator=self.torch_generator)
            case "torch":
                torch.rand(1)
            case "python":
                random.random()
            case "numpy":
                np.random.rand()
        output: Tensor = self.body(x)
        return output


@pytest.mark.parametrize(
    "what",
    ["count", "history", "counts", "mean", "generator", "torch_generator", "torch", "python", "numpy", "nothing"],
)
@pytest.mark.parametrize("in_loss", [False, True])
def test_what_a_replay_would_not_repeat_is_seen(what: str, in_loss: bool) -> None:
    model = Changes("nothing" if in_loss else what)
    odd = Changes(what if in_loss else "nothing")
    state = TrainState(model, torch.optim.SGD(model.parameters()), GradScaler("cpu", enabled=False), None, POSITION)
    with limited(torch.device("cpu"), "none") as capacity:
        update = Update(
            state, odd, Recipe(batch_size=2, micro_batch_size=2), device=torch.device("cpu"), capacity=capacity
        )

        def attempt() -> None:
            with _unchanged_host(update.program):
                model(torch.zeros(2, 3, 2, 2))
                odd(torch.zeros(2, 3, 2, 2))

        if what == "nothing":
            attempt()
        else:
            with pytest.raises(GraphRefused, match="on the host"):
                attempt()


@pytest.mark.parametrize("owner", ["closure", "optimizer", "layout"])
def test_what_else_a_replay_would_not_repeat_is_seen(owner: str, capacity: Capacity) -> None:
    """Draws from what only a function holds, or the optimizer; and a weight that moves."""
    run, own = runs.start(runs.Case("sgd", "fp32", warm=True), capacity), random.Random(0)
    model, update = run.state.model, run.update()
    if owner == "closure":
        model.draw = lambda: own.random()  # type: ignore[assignment]
    elif owner == "optimizer":
        run.state.optimizer.own = own  # type: ignore[attr-defined]

    def attempt() -> None:
        with _unchanged_host(update.program):
            if owner == "layout":
                model.head.weight.data = model.head.weight.data.clone()  # type: ignore[union-attr, operator]
            else:
                own.random()

    with pytest.raises(GraphRefused, match="tensor" if owner == "layout" else "on the host"):
        attempt()


class Straight:
    """In place of a pool: no kernel goes into a graph."""

    def __init__(self, device: torch.device) -> None:
        pass

    def capture(self, graphs: Any, work: Callable[[Callable[[], None]], None], size: int) -> None:
        work(lambda: None)


class Refused(nn.Sequential):
    """Does what no graph holds: gives a buffer another shape, or counts on the host under a name that is long."""

    seen: Tensor

    def __init__(self, name: str) -> None:
        super().__init__(nn.Flatten(), nn.Linear(192, 5))
        self.name = name
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.name == "seen":
            self.seen.resize_(len(self.seen) + 1).zero_()
        else:
            setattr(self, self.name, getattr(self, self.name, 0) + 1)
        output: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return output


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("seen", "it puts a tensor of its state elsewhere, or gives it another shape, and a graph does not"),
        ("a" * 600, f"its forward pass changes Refused.{'a' * 600} on the host, which a graph does not repeat"),
    ],
    ids=["reshapes", "counts"],
)
def test_why_a_recording_is_refused(
    name: str, reason: str, capacity: Capacity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason is whole, and is no operator's error where a buffer has another shape than its average."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(cuda_graph, "_make_room", lambda *_: (0, 0))
    monkeypatch.setattr(cuda_graph, "Pool", Straight)
    run = runs.start(runs.Case("sgd", "fp32", warm=True), capacity, partial(Refused, name))
    update = run.update()
    with pytest.raises(GraphRefused) as caught:
        Graph(update, run.images[:7], run.labels[:7], update.program.accumulate)
    assert str(caught.value) == reason


def test_the_mode_that_an_evaluation_leaves_is_no_change(capacity: Capacity) -> None:
    run = runs.start(runs.Case("lion", "fp32", warm=True), capacity)
    run.state.model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    update = run.update()
    run.state.model.eval()
    with _unchanged_host(update.program):
        update.program.accumulate(run.images[:7], run.labels[:7])
    assert run.state.model.training


# ---- gradients from somewhere else: what a graph of forward and backward does, but for the graph ---------------------


class Static:
    """Forward and backward operator by operator, into tensors for inputs and gradients that are always the same."""

    with_step = is_spoiled = False

    def __init__(self, run: runs.Run, update: Update) -> None:
        self.accumulate = update.program.accumulate
        self.images, self.labels = torch.zeros_like(run.images[:7]), torch.zeros_like(run.labels[:7])
        self.gradients = [(p, torch.full_like(p, torch.nan).detach()) for p in run.state.model.parameters()]
        self.holders = _Holders()

    def lent(self) -> AbstractContextManager[None]:
        return nullcontext()

    def shrink(self) -> bool:
        return False

    def suits(self, images: Tensor, labels: Tensor) -> bool:
        return len(labels) == len(self.labels)

    def replay(self, images: Tensor, labels: Tensor) -> None:
        if self.holders.have_grown([gradient for _, gradient in self.gradients]):
            raise GraphRefused("the optimizer keeps gradients")
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.accumulate(self.images, self.labels)
        for parameter, gradient in self.gradients:
            if parameter.grad is not None:
                parameter.grad = gradient.copy_(parameter.grad)


class Partly(Net):
    """Has a parameter that gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3))


@pytest.fixture
def start(capacity: Capacity, monkeypatch: pytest.MonkeyPatch) -> Callable[..., runs.Run]:
    monkeypatch.setattr(runs, "Net", Partly)

    def started(name: str, precision: str = "fp32") -> runs.Run:
        monkeypatch.setitem(
            runs.OPTIMIZERS, name, lambda model: build_optimizer(model, OptimizerConfig(name, lr=0.01), runs.CPU)
        )
        return runs.start(runs.Case(name, precision, warm=True), capacity)

    return started


NAMES = ["sgd", "adamw", "lion", "rmsprop", "lamb", "adafactor", "adan", "muon", "nadamw", "radam", "mars"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_on_gradients_in_fixed_tensors_has_the_bits_of_any_other(
    name: str, precision: str, start: Callable[..., runs.Run]
) -> None:
    plain = start(name, precision)
    update = plain.update()
    for _ in range(5):
        plain.advance(update)
    run = start(name, precision)
    update = run.update()
    static = Static(run, update)
    for _ in range(5):
        try:
            run.advance(update, accumulate=static.replay)
        except GraphRefused:
            assert name == "mars", "and its older versions at that"
            run.advance(update)
    assert differences(dump(run.state), dump(plain.state)) == []
    assert all(parameter.grad is None for parameter in run.state.model.parameters())


@pytest.mark.long
@pytest.mark.parametrize(("name", "precision"), [("lion", "fp32"), ("nadamw", "fp16")])
def test_an_out_of_memory_beside_fixed_tensors_leaves_no_trace(
    name: str, precision: str, start: Callable[..., runs.Run]
) -> None:
    """Every fifth operator fails: once, and until the update is given up."""
    run = start(name, precision)
    update = run.update()
    static, back = Static(run, update), Undo(run.state, runs.CPU, on_host=True)
    back.begin()
    back.before_step()
    before = dump(run.state)
    fixed = [static.images, static.labels, *(gradient for _, gradient in static.gradients)]
    own = {tensor.untyped_storage()._cdata for tensor in fixed}
    whole = Fault(phase=lambda: update.phase)
    run.advance(update, whole, static.replay)
    after = dump(run.state)
    back.roll_back()
    for at in range(0, whole.count, 5):
        for keeps_failing in (False, True):
            fault = Fault(at, keeps_failing=keeps_failing)
            try:
                run.advance(update, fault, static.replay)
            except OutOfMemory:
                assert keeps_failing
            assert fault.raised, at
            assert differences(dump(run.state), before if keeps_failing else after) == [], (at, whole.phases[at])
            assert fault.left_over(storages(run.state) | own) == 0
            back.roll_back()
    assert set(whole.phases) >= {"forward", "backward", *IN_STEP}


class FullInStep(Fault):  # type: ignore[no-untyped-call]
    """The step finds no memory as long as the engine has its graph."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(0)
        self.engine = engine

    def _hits(self, number: int) -> bool:
        return self.engine.backend.graph is not None and self.engine.update.phase == "optimizer step"


def test_what_is_recorded_makes_room_for_the_step_and_the_update_is_made(start: Callable[..., runs.Run]) -> None:
    plain = start("lion")
    update = plain.update()
    for _ in range(3):
        plain.advance(update)
    run, events = start("lion"), list[str]()
    update = run.update()
    engine = Engine(update, "graph", 7, events.append)
    static: Any = Static(run, update)
    engine.backend.graph = static
    for number in range(3):
        run.schedule.apply(run.state.position.schedule_step(7))
        at = run.state.position.cursor
        images, labels = run.images[at : at + 7], run.labels[at : at + 7]
        with FullInStep(engine) if number == 1 else Fault() as fault:
            engine.run(images, labels, samples=7)
        assert (fault.raised >= 2) is (number == 1), "and the same samples once more"
        assert (engine.backend.graph is None) is (number > 0)
    goes = "engine: the CUDA graph goes when its memory is wanted in optimizer step, and is recorded again"
    refused = "engine: eager, not a CUDA graph: graphs need a CUDA card, and this is cpu"
    assert events == [goes, refused]
    assert differences(dump(run.state), dump(plain.state)) == []


def keeping(how: Callable[[Tensor], Tensor], since: int) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Moves weights by the gradients of the step before, which it keeps from its step number `since` on."""

    class Keeping(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step(closure)
            for parameter in self.param_groups[0]["params"]:
                if parameter.grad is None:
                    continue
                values = self.state[parameter]
                if "last" in values:
                    parameter.data.sub_(values["last"].view_as(parameter), alpha=0.01)
                values["steps"] = values.get("steps", 0) + 1
                if values["steps"] >= since:
                    values["last"] = how(parameter.grad)

    return lambda model: Keeping(model.parameters(), 0.1, momentum=0.9)


@pytest.mark.parametrize("since", [1, 4])
@pytest.mark.parametrize("how", [Tensor.contiguous, Tensor.detach, Tensor.flatten], ids=["itself", "detached", "view"])
def test_gradients_that_an_optimizer_keeps_are_not_written_over(
    how: Callable[[Tensor], Tensor], since: int, capacity: Capacity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From whichever step on: the graph goes before the next replay."""
    monkeypatch.setitem(runs.OPTIMIZERS, "keeps", keeping(how, since))
    plain = runs.start(runs.Case("keeps", "fp32", warm=False), capacity)
    update, events = plain.update(), list[str]()
    for _ in range(7):
        plain.advance(update)
    expected = dump(plain.state)
    run = runs.start(runs.Case("keeps", "fp32", warm=False), capacity)
    update = run.update()
    engine = Engine(update, "graph", 7, events.append)
    static: Any = Static(run, update)
    engine.backend.graph = static
    for _ in range(7):
        run.schedule.apply(run.state.position.schedule_step(7))
        at = run.state.position.cursor
        engine.run(run.images[at : at + 7], run.labels[at : at + 7], samples=7)
    assert events == ["engine: eager, not a CUDA graph: the optimizer keeps gradients"]
    assert differences(dump(run.state), expected) == []


def test_why_a_step_is_not_recorded(start: Callable[..., runs.Run]) -> None:
    for name, reason in {"adamw": "", "momentum": "", "lion": "no implementation", "rmsproptf": "no implem"}.items():
        found = step_refusal(start(name).update().program)
        assert reason in found
        assert bool(reason) is bool(found)
    run = start("adan")
    for group in run.state.optimizer.param_groups:
        group["capturable"] = False
    for values in run.state.optimizer.state.values():
        values["count"] = 1
    assert step_refusal(run.update().program) == "Adan keeps a part of its state on the host"


@pytest.mark.long
def test_channels_last_reaches_weights_images_and_nothing_else(tmp_path: Path) -> None:
    seen: list[bool] = []

    def watched(settings: ModelConfig, classes: int) -> nn.Module:
        model = build_model(settings, classes)
        model.register_forward_pre_hook(lambda _, inputs: seen.append(is_channels_last(inputs[0])))
        return model

    losses = {}
    for wanted in (True, False):
        seen.clear()
        trainer = Trainer(
            compose_config([*SMALL, f"trainer.channels_last={wanted}"]),
            model=watched,
            output_dir=tmp_path / str(wanted),
        )
        losses[wanted] = trainer.fit().metrics["train_loss"]
        assert trainer.model is not None
        assert any(is_channels_last(p) for p in trainer.model.parameters()) is wanted
        assert seen, "training and evaluation"
        assert set(seen) == {wanted}
    assert losses[True] == pytest.approx(losses[False], rel=0.02)  # the same, added up in another order


def is_channels_last(tensor: Tensor) -> bool:
    dense = tensor.is_contiguous()
    return tensor.ndim == 4 and not dense and tensor.is_contiguous(memory_format=torch.channels_last)


# ---- TF32 ------------------------------------------------------------------------------------------------------------


def precisions() -> tuple[str, ...]:
    on: Any = torch.backends
    newer = on.cuda.matmul.fp32_precision, on.cudnn.conv.fp32_precision, on.mkldnn.matmul.fp32_precision
    return (*newer, str(on.cuda.matmul.allow_tf32), str(on.cudnn.allow_tf32), torch.get_float32_matmul_precision())


@pytest.mark.long
@pytest.mark.parametrize("before", ["highest", "high", "medium"])
@pytest.mark.parametrize(("wanted", "inside"), [("true", "tf32"), ("false", "ieee"), ("null", None)])
def test_tf32_is_as_asked_in_the_run_and_as_before_after_it(
    before: str, wanted: str, inside: str | None, tmp_path: Path
) -> None:
    seen: set[tuple[str, ...]] = set()

    def watched(*_: object) -> nn.Module:
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
        model.register_forward_pre_hook(lambda *_: seen.add(precisions()))
        return model

    default = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(before)
    try:
        outside = precisions()
        trainer = Trainer(compose_config([*SMALL, f"trainer.tf32={wanted}"]), model=watched, output_dir=tmp_path)
        result = trainer.fit()
        assert precisions() == outside
    finally:
        torch.set_float32_matmul_precision(default)
    assert result.used.tf32 is {"true": True, "false": False, "null": None}[wanted]
    said = [event for event in result.events if "tf32" in event]
    needs = "TF32 needs a CUDA card of compute capability 8.0 (Ampere) or newer, and this is cpu"
    assert said == ([f"trainer.tf32=true changes nothing: {needs}"] if wanted == "true" else [])
    [found] = seen
    assert found[:2] == ((inside, inside) if inside else outside[:2])


@pytest.mark.long
@pytest.mark.parametrize(("every", "runs"), [(9, 49), pytest.param(1, 146, marks=pytest.mark.slow)])
def test_whatever_the_host_had_chosen_is_chosen_after_a_run(every: int, runs: int) -> None:
    command = [sys.executable, "-m", "tests.support.precisions", str(every)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"{runs} runs\n", "")


def test_no_rung_changes_tf32(tmp_path: Path) -> None:
    config = compose_config(SMALL)
    config.ladder.rungs = [RungConfig("fast", ["trainer.tf32=true"])]
    with pytest.raises(ConfigError, match=r"trainer\.tf32"):
        Trainer(config, output_dir=tmp_path).fit()
