"""A `Transaction` of the caller's own loop: an error at any operator of the block leaves no trace."""

from __future__ import annotations

import copy
import gc
import itertools
import logging
import math
import random
import re
import weakref
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, SequentialLR
from torch.optim.swa_utils import AveragedModel

from adaptive_trainer import ConfigError, DeviceUnusable, OutOfMemory, Transaction, descend, limit_memory, make_ladder
from adaptive_trainer.data.position import Position
from adaptive_trainer.ladder.descent import Found
from adaptive_trainer.step import transaction as transactions
from adaptive_trainer.step.undo import TrainState, Undo
from tests.support.faults import Fault, Net, differences, dump, storages

pytestmark = pytest.mark.usefixtures("capacity")  # no limit, one thread, and garbage that is collected fast


class Sign(Optimizer):
    """A user's own: lazily made state, a list in it, and counts beside it."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-3})
        self.calls, self.history = 0, list[float]()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.calls += 1
        for group in self.param_groups:
            self.history.append(group["lr"])
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["mean"] = state["mean"] * 0.9 + parameter.grad if state else parameter.grad.clone()
                    state["seen"] = [*state.get("seen", []), self.calls]
                    parameter -= group["lr"] * state["mean"].sign()


class OwnAverage:
    """A user's own moving average, whose decay follows a count."""

    def __init__(self, model: nn.Module) -> None:
        self.module, self.updates = copy.deepcopy(model), 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        for mean, value in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            if mean.is_floating_point():
                mean.lerp_(value, 1 / (1 + self.updates))


class Margin(nn.Module):
    """A loss with a parameter, a buffer and a generator of its own."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.generator = nn.Parameter(torch.ones(())), torch.Generator()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, output: Tensor, labels: Tensor) -> Tensor:
        self.seen += len(labels)
        noise = 0.01 * torch.rand(output.shape, generator=self.generator)
        return nn.functional.cross_entropy(self.scale * output + noise, labels)


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "lion": lambda model: create_optimizer_v2(model, "lion", lr=1e-3, weight_decay=0.1),
    "muon": lambda model: create_optimizer_v2(model, "muon", lr=1e-3),
    "own": lambda model: Sign(model.parameters()),
}
AVERAGES: dict[str, Callable[[nn.Module], Any]] = {
    "no": lambda model: None,
    "timm": lambda model: ModelEmaV3(model, decay=0.9),
    "torch": lambda model: AveragedModel(model, use_buffers=True),
    "own": OwnAverage,
}


@dataclass(frozen=True)
class Case:
    """What a loop is made of; `accumulate`: one block for each of two parts of the batch."""

    optimizer: str
    average: str = "no"
    scaled: bool = False
    warm: bool = False
    accumulate: bool = False
    scheduled: bool = False
    own_loss: bool = False

    def __str__(self) -> str:
        on = [name for name in ("scaled", "warm", "accumulate", "scheduled", "own_loss") if getattr(self, name)]
        return " ".join([self.optimizer, f"{self.average}-average", *on])


@dataclass
class Loop:
    """A training loop as anyone would write it, at the beginning of an update."""

    case: Case
    on_host: bool = False
    counts: dict[str, Any] = field(default_factory=lambda: {"updates": 0, "losses": []})

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        case = self.case
        self.model, self.loss = Net(), Margin() if case.own_loss else nn.CrossEntropyLoss()
        self.optimizer = OPTIMIZERS[case.optimizer](nn.ModuleList([self.model, self.loss]))
        self.scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=2, enabled=case.scaled)
        self.average = AVERAGES[case.average](self.model)
        self.scheduler = self.schedule() if case.scheduled else None
        self.images, self.labels = torch.rand(7, 3, 8, 8), torch.randint(5, (7,))
        also = [self.loss, self.counts, *([self.scheduler] if self.scheduler else [])]
        scaler = self.scaler if case.scaled else None
        self.transaction = Transaction(
            self.model, self.optimizer, scaler=scaler, ema=self.average, also=also, on_host=self.on_host
        )
        if case.warm:
            for number in range(len(self.blocks())):
                self.run(number)

    def schedule(self) -> LRScheduler:
        constant, cosine = ConstantLR(self.optimizer, total_iters=1), CosineAnnealingLR(self.optimizer, T_max=9)
        return SequentialLR(self.optimizer, [constant, cosine], milestones=[1])

    def blocks(self) -> list[Callable[[], None]]:
        if not self.case.accumulate:
            return [self.whole]
        return [lambda: self.backward(slice(0, 4)), lambda: self.whole(slice(4, 7))]

    def whole(self, part: slice = slice(0, 7)) -> None:
        self.backward(part)
        self.step()

    def backward(self, part: slice) -> None:
        loss = self.loss(self.model(self.images[part]), self.labels[part])
        self.scaler.scale(loss).backward()
        self.counts["losses"].append(len(self.counts["losses"]))

    def step(self) -> None:
        if self.case.scaled:
            self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if isinstance(self.average, AveragedModel):
            self.average.update_parameters(self.model)
        elif self.average is not None:
            self.average.update(self.model)
        if self.scheduler is not None:
            self.scheduler.step()
        self.counts["updates"] += 1

    def run(self, number: int, fault: AbstractContextManager[Any] | None = None) -> None:
        with fault or nullcontext(), self.transaction:
            self.blocks()[number]()

    def state(self) -> TrainState:
        is_module = isinstance(self.average, nn.Module)
        average: Any = SimpleNamespace(module=self.average) if is_module else self.average
        model: Any = nn.ModuleList([self.model, self.loss])
        return TrainState(model, self.optimizer, self.scaler, average, Position(0, 0, 0, 1))

    def facts(self) -> dict[str, Any]:
        """All that must be the same bits."""
        gradients = {
            f"grad/{k}": p.grad.clone() for k, p in self.state().model.named_parameters() if p.grad is not None
        }
        optimizer = {k: repr(v) for k, v in vars(self.optimizer).items() if k in ("calls", "history", "_opt_called")}
        random_numbers = self.loss.generator.get_state() if isinstance(self.loss, Margin) else None
        return {
            **dump(self.state()),
            **gradients,
            **optimizer,
            "schedule": "" if self.scheduler is None else repr(self.scheduler.state_dict()),
            "counts": repr(self.counts),
            "averaged": getattr(self.average, "updates", None),
            "generator": random_numbers,
        }

    def known(self) -> set[int]:
        gradients = [p.grad for p in self.state().model.parameters() if p.grad is not None]
        given = [self.images, self.labels]  # of which the parts are views
        return storages(self.state()) | {tensor.untyped_storage()._cdata for tensor in (*gradients, *given)}


CASES = [
    Case("sgd", "timm"),
    Case("sgd", "torch", scaled=True, warm=True, scheduled=True),
    Case("adamw", "own", scaled=True, accumulate=True),
    Case("adamw", "timm", warm=True, accumulate=True, own_loss=True),
    Case("adamw", scheduled=True, own_loss=True),
    Case("lion", "own", warm=True, scheduled=True),
    Case("lion", "timm", scaled=True),
    Case("muon", "torch", accumulate=True, scheduled=True),
    Case("own", "own", warm=True, accumulate=True),
    Case("own", "timm", scaled=True, scheduled=True, own_loss=True),
]


def at_block(case: Case, number: int, **options: Any) -> Loop:
    loop = Loop(case, **options)
    for earlier in range(number):
        loop.run(earlier)
    return loop


def finish(loop: Loop, number: int) -> dict[str, Any]:
    """How the update ends, from this block on."""
    for each in range(number, len(loop.blocks())):
        loop.run(each)
    return loop.facts()


def fails(loop: Loop, number: int, at: int, before: dict[str, Any]) -> bool:
    """Whether the block has an operator `at`: it runs out of memory, once or for good, and leaves no trace."""
    fault = Fault(at, keeps_failing=at % 2 == 1)
    text = ""
    try:
        loop.run(number, fault)
    except OutOfMemory as error:
        text = f"{error} {error.__context__}"
    if fault.raised:
        assert "out of memory in update: CUDA out of memory. Injected at operator" in text
        assert text.endswith("None")
        assert differences(loop.facts(), before) == []
        assert fault.left_over(loop.known()) == 0
    return bool(fault.raised)


@pytest.mark.long
@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_operator_of_every_block(case: Case, every: int, record_property: Callable[[str, object], None]) -> None:
    """Each (or a third) fails in turn, in one run, until the block runs whole: the end is as if nothing had been."""
    injections = 0
    for number in range(len(Loop(case).blocks())):
        expected = finish(at_block(case, number), number)
        loop = at_block(case, number)
        before, at = loop.facts(), 0
        assert differences(expected, before)
        while fails(loop, number, at, before):
            at += every
            injections += 1
        assert differences(finish(loop, number + 1), expected) == []
    record_property("summary", f"Transaction, {case}: {injections} injections")
    assert injections * every > 100


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_block_after_a_failure(case: Case) -> None:
    """Every 23rd operator fails in a run of its own, with the copies on the host, and the block then runs whole."""
    for number in range(len(Loop(case).blocks())):
        expected = finish(at_block(case, number), number)
        at, more = 0, True
        while more:
            loop = at_block(case, number, on_host=True)
            more = fails(loop, number, at, loop.facts())
            assert differences(finish(loop, number if more else number + 1), expected) == []
            at += 23


FULL = torch.OutOfMemoryError("CUDA out of memory.")


def run_and_raise(transaction: Transaction, error: BaseException, *work: Callable[[], Any]) -> None:
    with transaction:
        for each in work:
            each()
        raise error


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, MemoryError])
def test_any_other_error_leaves_no_trace_and_is_raised_as_it_is(kind: type[BaseException]) -> None:
    loop = Loop(Case("adamw", "own", scaled=True, scheduled=True))
    before, raised = loop.facts(), kind("after the step")
    with pytest.raises(OutOfMemory if kind is MemoryError else kind) as caught:
        run_and_raise(loop.transaction, raised, loop.whole)
    assert (caught.value is raised) == (kind is not MemoryError)  # on a CPU, the host's memory is the device's
    assert differences(loop.facts(), before) == []


def test_gradients_of_the_block_before_stay() -> None:
    """The same tensors with the same values; those that were None are None."""
    loop = at_block(Case("sgd", accumulate=True), 1)
    weight, bias = loop.model.head.weight, loop.model.head.bias
    bias.grad = None
    kept = weight.grad
    assert kept is not None
    values = kept.clone()
    changed: list[bool] = []
    with pytest.raises(ValueError, match="mine"):
        run_and_raise(
            loop.transaction,
            ValueError("mine"),
            lambda: loop.backward(slice(4, 7)),
            lambda: changed.append(not torch.equal(kept, values) and bias.grad is not None),
        )
    assert changed == [True]
    assert weight.grad is kept
    assert torch.equal(kept, values)
    assert bias.grad is None


def test_what_was_unscaled_before_the_block_is_so_after_a_roll_back() -> None:
    loop = Loop(Case("sgd", scaled=True))
    with loop.transaction:
        loop.backward(slice(0, 7))
        loop.scaler.unscale_(loop.optimizer)
    before = loop.facts()
    for _ in range(2):
        with pytest.raises(OutOfMemory):
            run_and_raise(loop.transaction, FULL, lambda: loop.scaler.step(loop.optimizer), loop.scaler.update)
        assert differences(loop.facts(), before) == []
    loop.scaler.step(loop.optimizer)  # would say that unscale_ was called twice
    assert differences(loop.facts(), before)


def test_blocks_within_blocks_are_for_several_optimizers() -> None:
    first, second = Loop(Case("sgd", warm=True)), Loop(Case("own", warm=True))
    before = first.facts(), second.facts()

    def both() -> None:
        with first.transaction:
            run_and_raise(second.transaction, FULL, first.whole, second.whole)

    with pytest.raises(OutOfMemory, match="out of memory in update: CUDA out of memory"):
        both()
    assert differences(first.facts(), before[0]) == []
    assert differences(second.facts(), before[1]) == []


def test_it_is_at_work_once_at_a_time() -> None:
    loop = Loop(Case("sgd"))
    before = loop.facts()
    with pytest.raises(ConfigError, match="in use; nest a second one"):
        run_and_raise(loop.transaction, FULL, loop.whole, lambda: loop.run(0))
    assert differences(loop.facts(), before) == []
    loop.run(0)


def test_no_room_for_the_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(Case("adamw", "own", warm=True))
    before = loop.facts()

    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. No copies.")

    places: list[tuple[Any, str]] = [(Undo, "before_step"), (transactions._Gradients, "keep")]
    for owner, name in places:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuse)
            with pytest.raises(OutOfMemory, match="copies before an update"):
                loop.run(0)
        assert differences(loop.facts(), before) == []
    loop.run(0)


def test_a_device_that_answers_nothing_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(Case("sgd"))
    monkeypatch.setattr("adaptive_trainer.oom.probe", lambda device: False)
    with pytest.raises(DeviceUnusable, match="answers nothing any more"):
        loop.run(0, Fault(9))


def test_a_forgotten_part_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of `test_every_operator_of_every_block` sees gradients, scaler and schedules."""
    loop = at_block(Case("adamw", scaled=True, accumulate=True, scheduled=True), 1)
    before = loop.facts()
    monkeypatch.setattr(transactions._Gradients, "put_back", lambda self: None)
    with pytest.raises(OutOfMemory):
        loop.run(1, Fault(9))
    assert {name.partition("/")[0] for name in differences(loop.facts(), before)} >= {"grad", "gradients"}


def test_what_the_block_held_goes() -> None:
    """Frames below the loop's are emptied at once; what the loop's own function names goes when that is left."""
    gone: list[weakref.ref[Any]] = []
    loop = Loop(Case("sgd"))

    def forward() -> Tensor:
        large = torch.zeros(1000)
        gone.append(weakref.ref(large))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    gc.disable()
    try:
        with pytest.raises(OutOfMemory):
            run_and_raise(loop.transaction, FULL, forward)
        assert [ref() for ref in gone] == [None]
    finally:
        gc.enable()


def test_descend_answers_it() -> None:
    def train(width: int) -> int:
        model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 1))
        optimizer = torch.optim.AdamW(model.parameters())
        transaction = Transaction(model, optimizer)
        for _ in range(2):
            with transaction:
                loss: Any = model(torch.rand(16, 64)).sum()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return width

    ladder = make_ladder({"width": 60_000}, {"half": {"width": 30_000}, "tiny": {"width": 64}})
    with limit_memory("24MiB", device="cpu") as capacity:
        found: Found[Any, int] = descend(ladder, lambda settings: train(**settings), meter=capacity)
    assert found.value == 64
    assert [(each.outcome, each.phase) for each in found.attempts[:2]] == [("oom", "update"), ("oom", "update")]
    assert found.attempts[-1].peak_allocated_bytes


class Holds:
    """A user's object with a tensor of its own."""

    def __init__(self, value: Any) -> None:
        self.count, self.value = 0, value


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"model": "resnet50"}, "model is a torch.nn.Module, not str"),
        ({"optimizer": [1]}, "optimizer is a torch.optim.Optimizer, not list; for several"),
        ({"scaler": True}, "scaler is a torch.amp.GradScaler, not bool"),
        ({"ema": 0.999}, "has one as its attribute `module`, and float has none"),
        ({"ema": Holds(torch.zeros(1))}, "has one as its attribute `module`, and Holds has none"),
        ({"also": [Holds(torch.zeros(1))]}, "tensors of Holds; make them buffers"),
        ({"also": [Holds([torch.zeros(1)])]}, "make them buffers"),
        ({"also": [Holds(nn.Linear(2, 2))]}, "tensors of Linear; make them buffers"),
        ({"also": [{"total": torch.zeros(1)}]}, "tensors of dict; make them buffers"),
    ],
)
def test_what_cannot_be_put_back_is_refused(arguments: dict[str, Any], text: str) -> None:
    model = Net()
    given = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=1), **arguments}
    with pytest.raises(ConfigError, match=text):
        Transaction(given.pop("model"), given.pop("optimizer"), **given)


def test_objects_that_lead_to_the_model_are_no_matter() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    holder = Holds([model, optimizer])
    with pytest.raises(ValueError, match="mine"):
        run_and_raise(
            Transaction(model, optimizer, also=[holder]), ValueError("mine"), lambda: setattr(holder, "count", 1)
        )
    assert holder.count == 0


def test_parameters_of_no_module_are_put_back() -> None:
    model, extra = Net(), torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([*model.parameters(), extra], lr=1)
    loss: Any = (extra * 2).sum()
    with pytest.raises(ValueError, match="mine"):
        run_and_raise(Transaction(model, optimizer), ValueError("mine"), loss.backward, optimizer.step)
    assert extra.tolist() == [1, 1]
    assert extra.grad is None


# -- what the caller does between blocks, around them and in them


def channels_last(loop: Loop) -> None:
    loop.model.to(memory_format=torch.channels_last)


def from_a_vector(loop: Loop) -> None:
    vector = nn.utils.parameters_to_vector(loop.model.parameters())
    nn.utils.vector_to_parameters(vector * 2, loop.model.parameters())


def another_data(loop: Loop) -> None:
    for parameter in loop.model.parameters():
        parameter.data = parameter.data.clone() + 1


def assigned(loop: Loop) -> None:
    state = {name: value.clone() + 1 for name, value in loop.model.state_dict().items()}
    loop.model.load_state_dict(state, assign=True)
    loop.optimizer.param_groups[0]["params"] = list(loop.model.parameters())


def another_head(loop: Loop) -> None:
    loop.model.head = nn.Linear(4, 5)
    loop.optimizer.add_param_group({"params": list(loop.model.head.parameters())})


@pytest.mark.parametrize("move", [channels_last, from_a_vector, another_data, assigned, another_head])
def test_what_was_moved_or_replaced_between_blocks_is_put_back(move: Callable[[Loop], None]) -> None:
    layers = {"stem": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4), "pool": nn.AdaptiveAvgPool2d(1)}
    model = nn.Sequential(OrderedDict({**layers, "flat": nn.Flatten(), "head": nn.Linear(4, 5)}))
    for plain in (False, True):  # only torch's modules, whose own code never moves a tensor
        loop = Loop(Case("sgd"))
        if plain:
            loop.model = model  # type: ignore[assignment]
            loop.optimizer = OPTIMIZERS["sgd"](model)
            loop.transaction = Transaction(model, loop.optimizer, also=[loop.counts])
        loop.run(0)
        move(loop)
        before = loop.facts()
        with pytest.raises(OutOfMemory):
            run_and_raise(loop.transaction, FULL, loop.whole)
        assert differences(loop.facts(), before) == []
        loop.run(0)
        assert differences(loop.facts(), before)


def test_an_added_group_is_taken_away_again() -> None:
    loop = Loop(Case("adamw"))
    extra, before = nn.Parameter(torch.ones(2)), loop.facts()
    add: list[Callable[[], Any]] = [lambda: loop.optimizer.add_param_group({"params": [extra]}), loop.whole]
    with pytest.raises(ValueError, match="mine"):
        run_and_raise(loop.transaction, ValueError("mine"), *add)
    assert differences(loop.facts(), before) == []
    loop.run(0)
    for each in add:
        each()
    before = loop.facts()
    with pytest.raises(ValueError, match="mine"):
        run_and_raise(loop.transaction, ValueError("mine"), loop.whole, lambda: extra.data.zero_())
    assert differences(loop.facts(), before) == []


def test_a_roll_back_that_fails_leaves_the_transaction_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(Case("sgd"))

    def fail(_: Any) -> None:
        raise RuntimeError("no roll-back")

    with monkeypatch.context() as patch:
        patch.setattr(Undo, "roll_back", fail)
        with pytest.raises(RuntimeError, match="no roll-back"):
            run_and_raise(loop.transaction, ValueError("mine"), loop.whole)
    loop.run(0)


def test_a_mistake_in_a_block_in_a_handler_is_no_out_of_memory() -> None:
    loop = Loop(Case("sgd"))
    large = torch.zeros(1000)

    def call_with(value: Tensor) -> None:
        raise torch.OutOfMemoryError(f"CUDA out of memory. {value.shape}")

    for work, kind in (
        (lambda: loop.model(torch.rand(2, 7, 8, 8)), RuntimeError),
        (lambda: call_with(large), OutOfMemory),
    ):
        try:
            call_with(large)
        except torch.OutOfMemoryError as handled:
            with pytest.raises(kind) as caught, loop.transaction:
                work()
            assert isinstance(caught.value, OutOfMemory) == (kind is OutOfMemory)
            trace: Any = handled.__traceback__
            assert "value" in trace.tb_next.tb_frame.f_locals  # the frames of the caller's error are the caller's


def test_an_out_of_memory_goes_with_its_frames_and_without_a_collection() -> None:
    gone: list[weakref.ref[Any]] = []
    loop = Loop(Case("sgd"))

    def train() -> None:
        large = torch.zeros(1000)
        gone.append(weakref.ref(large))
        with loop.transaction:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    gc.disable()
    try:
        with suppress(OutOfMemory):
            train()
        assert [ref() for ref in gone] == [None]
    finally:
        gc.enable()


def test_the_device_is_waited_for_before_a_roll_back(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[Any] = []
    transaction = Loop(Case("sgd")).transaction
    transaction._devices = [torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")]
    monkeypatch.setattr(torch.accelerator, "synchronize", order.append)
    monkeypatch.setattr(Undo, "roll_back", lambda _: order.append("roll back"))
    transaction._roll_back()
    assert order == [torch.device("cuda:0"), torch.device("cuda:1"), "roll back"]


def test_an_optimizer_of_empty_groups() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD([{"params": []}], lr=1)
    transaction = Transaction(model, optimizer)
    optimizer.add_param_group({"params": list(model.parameters())})
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match="mine"):
        run_and_raise(transaction, ValueError("mine"), lambda: model.weight.data.zero_())
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("lazy", [nn.LazyLinear(2), nn.LazyBatchNorm1d(affine=False)])
def test_lazy_parameters_are_refused(lazy: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(2, 2), lazy)
    with pytest.raises(ConfigError, match="Sequential has lazy parameters"):
        Transaction(model, torch.optim.SGD(model[0].parameters(), lr=1))


def test_nested_blocks_free_all_copies() -> None:
    first, second = Loop(Case("sgd", warm=True)), Loop(Case("own", warm=True))
    gone: list[weakref.ref[Any]] = []

    def both() -> None:
        with first.transaction:
            gone.extend(weakref.ref(copy) for copy in first.transaction._undo.beside.copies)
            run_and_raise(second.transaction, FULL, second.whole)

    with pytest.raises(OutOfMemory):
        both()
    assert gone
    assert {ref() for ref in gone} == {None}


def test_a_first_block_in_inference_mode() -> None:
    loop = Loop(Case("adamw", "timm"))
    with torch.inference_mode(), loop.transaction:
        loop.model(loop.images)
    before = loop.facts()
    for _ in range(2):
        with pytest.raises(OutOfMemory):
            run_and_raise(loop.transaction, FULL, loop.whole)
        assert differences(loop.facts(), before) == []
        loop.run(0)
        before = loop.facts()


def test_sparse_gradients_of_the_block_before_stay() -> None:
    model = nn.Embedding(9, 2, sparse=True)
    transaction = Transaction(model, torch.optim.SparseAdam(model.parameters()))

    def backward() -> None:
        loss: Any = model(torch.tensor([1, 3])).sum()
        loss.backward()

    backward()
    gradient: Any = model.weight.grad
    before = gradient.to_dense()
    with pytest.raises(ValueError, match="mine"):
        run_and_raise(transaction, ValueError("mine"), backward)
    gradient = model.weight.grad
    assert torch.equal(gradient.to_dense(), before)


# -- what `also` names


class Metric(nn.Module):
    """A metric with a count, and what is given, as plain attributes; and a buffer."""

    total: Tensor

    def __init__(self, value: Any = None) -> None:
        super().__init__()
        self.count, self.value = 0, value
        self.register_buffer("total", torch.zeros(()))


class Slotted:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Attributes(dict[str, Any]):
    """A user's own kind of dictionary."""


def rolled_back(also: list[Any], change: Callable[[], Any]) -> None:
    model = Net()
    transaction = Transaction(model, torch.optim.SGD(model.parameters(), lr=1), also=also)
    with pytest.raises(ValueError, match="mine"):
        run_and_raise(transaction, ValueError("mine"), change)


def test_plain_attributes_of_modules_are_put_back() -> None:
    metric = Metric({"history": [1.0]})

    def change() -> None:
        metric.count += 1
        metric.total += 1
        metric.value["history"].append(2.0)

    rolled_back([metric], change)
    assert (metric.count, metric.total.item(), metric.value) == (0, 0, {"history": [1.0]})


@pytest.mark.parametrize(
    ("value", "change"),
    [
        (deque([1, 2], maxlen=2), lambda value: value.append(3)),
        ({1, 2}, lambda value: value.add(3)),
        (Counter("aab"), lambda value: value.update("abc")),
        (list(range(5000)), lambda value: value.append(0)),
        ([(n, float(n)) for n in range(2000)], lambda value: value.clear()),
        ({n: n for n in range(2000)}, lambda value: value.update({3: 0, 9999: 1})),
        (defaultdict(deque, a=deque([1.0])), lambda value: value["a"].append(2.0)),
    ],
    ids=["deque", "set", "Counter", "long list", "long list of tuples", "long dictionary", "nested"],
)
def test_containers_are_put_back(value: Any, change: Callable[[Any], Any]) -> None:
    for also, inside in (
        ([value], value),
        ([Holds(value)], value),
        ([{"value": value}], value),
        ([Metric(value)], value),
    ):
        before = copy.deepcopy(inside)
        rolled_back(also, partial(change, inside))
        assert inside == before


def test_a_list_may_grow_past_any_length() -> None:
    losses: list[float] = []
    loop = Loop(Case("sgd"))
    transaction = Transaction(loop.model, loop.optimizer, also=[losses])
    for length in (999, 1001, 5000):
        with transaction:
            losses.extend([0.5] * (length - len(losses)))
        with pytest.raises(ValueError, match="mine"):
            run_and_raise(transaction, ValueError("mine"), lambda: losses.append(1.0))
        assert losses == [0.5] * length


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 3]),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 9),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.1, 0.2),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
        lambda o: torch.optim.lr_scheduler.ChainedScheduler([ConstantLR(o), CosineAnnealingLR(o, 9)]),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    ],
)
@pytest.mark.parametrize("held", [False, True])
def test_schedulers_are_put_back(make: Callable[[Optimizer], Any], held: bool) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = make(optimizer)
    transaction = Transaction(model, optimizer, also=[Holds(scheduler) if held else scheduler])
    is_on_plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)

    def step() -> None:
        for _ in range(2):
            optimizer.step()
            scheduler.step(*([1.0] if is_on_plateau else []))

    with transaction:
        step()
    before = repr(scheduler.state_dict())
    with pytest.raises(ValueError, match="mine"):
        run_and_raise(transaction, ValueError("mine"), step)
    assert repr(scheduler.state_dict()) == before
    step()
    assert repr(scheduler.state_dict()) != before


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Metric(torch.zeros(())), "tensors of Metric; make them buffers"),
        (Metric([torch.zeros(())]), "tensors of list; make them buffers"),
        (Metric([nn.Linear(2, 2)]), "tensors of Linear; make them buffers"),
        (Metric(np.zeros(3)), r"cannot put back also\.0\.value, a ndarray; keep its values in a list"),
        ({"matrix": np.zeros(3)}, r"also\.0\.matrix, a ndarray"),
        (({"pair": (1, np.zeros(3))}), r"also\.0\.pair\.1, a ndarray"),
        (np.zeros(3), r"also\.0, a ndarray"),
        (Holds(bytearray(3)), r"also\.0\.value, a bytearray"),
        (Holds(Slotted()), r"also\.0\.value, a Slotted"),
        (Slotted(), r"also\.0, a Slotted"),
        (Holds(Attributes(a=1)), r"also\.0\.value, a Attributes"),
        (Holds(itertools.count()), r"also\.0\.value, a count"),
        (Holds(UserDict()), r"also\.0\.value, a UserDict"),
    ],
)
def test_what_of_also_cannot_be_put_back_is_refused(value: Any, text: str) -> None:
    model = Net()
    with pytest.raises(ConfigError, match=text):
        Transaction(model, torch.optim.SGD(model.parameters(), lr=1), also=[value])


def test_what_comes_later_and_cannot_be_put_back_is_refused() -> None:
    metric, loop = Metric(), Loop(Case("sgd"))
    transaction = Transaction(loop.model, loop.optimizer, also=[metric])
    with pytest.raises(ValueError, match="mine"):
        run_and_raise(transaction, ValueError("mine"), lambda: setattr(metric, "value", torch.zeros(())))
    assert metric.value is None
    with transaction:
        metric.value = torch.zeros(())
    for _ in range(2):
        with pytest.raises(ConfigError, match="tensors of Metric; make them buffers"):
            transaction.__enter__()


@pytest.mark.parametrize(
    "value",
    [
        Path("a"),
        datetime(2026, 1, 1),
        len,
        math,
        Metric,
        logging.getLogger("a"),
        re.compile("a"),
        frozenset([1]),
        np.float64(1),
    ],
)
def test_what_does_not_change_is_not_refused(value: Any) -> None:
    holder = Holds(value)
    rolled_back([holder], lambda: setattr(holder, "value", 3))
    assert holder.value is value
