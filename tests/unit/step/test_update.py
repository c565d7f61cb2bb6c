"""An update without an out-of-memory is a plain loop, bit for bit; with one it is retried once, then refused."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.data import TensorDataset

from adaptive_trainer.config.overrides import compose_config
from adaptive_trainer.config.schema import ModelConfig
from adaptive_trainer.data.cached.gpu_transforms import DeviceBatch
from adaptive_trainer.data.position import Position
from adaptive_trainer.distributed.peers import Peers, Site, Status
from adaptive_trainer.errors import DeviceUnusable, OutOfMemory, PeerLost
from adaptive_trainer.memory.limit import Capacity, limited
from adaptive_trainer.memory.simulated import COUNTED_EVERY, SimulatedDevice
from adaptive_trainer.models.loss_kinds import Found, LossKind
from adaptive_trainer.models.losses import Criterion, Loss
from adaptive_trainer.models.stepping import _storages
from adaptive_trainer.recipe import Recipe
from adaptive_trainer.step.copies import Shadow
from adaptive_trainer.step.dry_run import DRY_RUN_UPDATES, dry_run
from adaptive_trainer.step.program import Change
from adaptive_trainer.step.undo import Progress, Undo
from adaptive_trainer.step.update import Update
from adaptive_trainer.training.trainer import Trainer
from tests.support.faults import Fault, differences, dump
from tests.support.runs import CPU, OPTIMIZERS, Case, Run, start

SHAPES = Recipe(batch_size=7, micro_batch_size=7, eval_batch_size=5, image_size=8, num_classes=5)
AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def known(loss: Loss) -> Criterion:
    """The mean loss that a function gives, without finding out that it is one."""
    criterion = Criterion(loss)
    criterion._declared = Found(LossKind.MEAN)
    return criterion


# -- the golden check


def plain_training(run: Run, updates: int) -> None:
    """A loop as anyone would write it."""
    case, state = run.case, run.state
    model, optimizer, scaler = state.model, state.optimizer, state.scaler
    model.train()
    for number in range(updates):
        warm_up = 1e-5 + number * (0.01 - 1e-5) / 5
        lr = warm_up if number < 5 else 0.5 * 0.01 * (1 + math.cos(math.pi * (number - 5) / 14))
        for group in optimizer.param_groups:
            group["lr"] = lr
        images, labels = run.images[7 * number : 7 * number + 7], run.labels[7 * number : 7 * number + 7]
        for part in [slice(0, 4), slice(4, 7)] if case.accumulate else [slice(0, 7)]:
            x, y = images[part], labels[part]
            with torch.autocast("cpu", AUTOCAST[case.precision], enabled=case.precision != "fp32"):
                output = model(x)
                loss = nn.functional.cross_entropy(output, y)
            scaler.scale(loss * (len(y) / 7)).backward()  # type: ignore[no-untyped-call]
            state.meters["loss"].add_(loss.detach(), alpha=len(y))
            state.meters["correct"] += (output.argmax(1) == y).sum()
            state.meters["seen"] += len(y)
        if scaler.is_enabled():
            scaler.unscale_(optimizer)
            overflow = not all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
            state.meters["skipped"] += overflow
        if case.clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if state.ema is not None:
            average(state.ema.module, model, 0.9 if number else 0.0)
        state.position, state.updates = state.position.advance(7), state.updates + 1


@torch.no_grad()
def average(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """The first average is a copy, as timm has it."""
    for mean, value in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("precision", list(AUTOCAST))
@pytest.mark.parametrize("everything", [True, False])
def test_updates_are_a_plain_loop(optimizer: str, precision: str, everything: bool, capacity: Capacity) -> None:
    case = Case(optimizer, precision, warm=False, ema=everything, clip=everything, accumulate=everything)
    plain = start(case, capacity)
    plain_training(plain, 8)
    expected = dump(plain.state)
    run = start(case, capacity)
    update = run.update()
    for _ in range(8):
        run.advance(update)
    assert differences(dump(run.state), expected) == []


def test_an_overflow_skips_the_step_as_in_a_plain_loop(capacity: Capacity) -> None:
    case = Case("adamw-fused", "fp16", warm=False, scale=2.0**40)
    plain = start(case, capacity)
    plain_training(plain, 3)
    expected = dump(plain.state)
    run = start(case, capacity)
    update = run.update()
    for _ in range(3):
        run.advance(update)
    assert float(run.state.meters["skipped"]) == 3
    assert differences(dump(run.state), expected) == []


def tiny(config: ModelConfig, num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(36, num_classes)
    )


def pictures(count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(torch.rand(count, 3, 8, 8, generator=generator), torch.arange(count) % 3)


@pytest.mark.parametrize(("precision", "inside"), [("fp32", False), ("fp32", True), ("bf16", False), ("bf16", True)])
def test_the_trainer_is_a_plain_loop(precision: str, inside: bool, tmp_path: Path) -> None:
    """Also inside the caller's autocast, which keeps weights that it has cast until it ends."""
    overrides = ["trainer.epochs=2", "trainer.batch_size=8", "trainer.micro_batch_size=5", "data.image_size=8"]
    overrides += ["data.transforms=none", "data.num_workers=0", "optimizer=sgd", "optimizer.lr=0.05", "ladder=none"]
    overrides += [f"trainer.precision={precision}", "seed=3", "device=cpu", "optimizer.weight_decay=0"]
    overrides += ["+optimizer.kwargs.foreach=false"]
    trainer = Trainer(
        compose_config(overrides), model=tiny, train_data=pictures(21), val_data=pictures(6), output_dir=tmp_path
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        result = trainer.fit()
    torch.manual_seed(3)
    model = tiny(ModelConfig(), 3).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, foreach=False)
    images, labels = pictures(21).tensors
    for epoch in range(2):
        order = Position(3, epoch, 0, 21).permutation()
        for number, keys in enumerate([order[:8], order[8:16], order[16:]]):
            optimizer.param_groups[0]["lr"] = 0.5 * 0.05 * (1 + math.cos(math.pi * (3 * epoch + number) / 5))
            for part in [keys[:4], keys[4:]] if len(keys) == 8 else [keys]:
                with torch.autocast("cpu", AUTOCAST[precision], enabled=precision != "fp32"):
                    loss = nn.functional.cross_entropy(model(images[part]), labels[part])
                (loss * (len(part) / len(keys))).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
    assert trainer.model is not None
    trained = trainer.model.state_dict()
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, trained[name])] == []
    images, labels = pictures(6).tensors
    with torch.no_grad(), torch.autocast("cpu", AUTOCAST[precision], enabled=precision != "fp32"):
        output = model.eval()(images)
        assert result.metrics["val_loss"] == pytest.approx(float(nn.functional.cross_entropy(output, labels)))


def test_fp32_is_fp32_inside_the_callers_autocast(capacity: Capacity) -> None:
    run, seen = start(Case("sgd", "fp32", warm=False), capacity), list[torch.dtype]()
    update = run.update()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        seen.append((output @ output.T).dtype)
        return nn.functional.cross_entropy(output, target)

    update.program.criterion = known(loss)
    with torch.autocast("cpu", torch.bfloat16):
        run.advance(update)
    assert seen == [torch.float32] * 2


# -- micro-batches


@given(samples=st.integers(2, 23), micro=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_accumulated_gradients_are_those_of_the_whole_batch(samples: int, micro: int) -> None:
    """In float64 without BatchNorm, where order of summation is all that can differ."""
    generator = torch.Generator().manual_seed(samples)
    images = torch.rand(samples, 3, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (samples,), generator=generator)
    with limited(CPU, "none") as capacity:
        run = start(Case("sgd", "fp32", warm=False, ema=False, clip=False), capacity)
        whole, parts = linear(), linear()
        nn.functional.cross_entropy(whole(images), labels).backward()  # type: ignore[no-untyped-call]
        expected = [p.grad for p in whole.parameters()]
        run.state.model = parts
        update = run.update(micro)
        update.program.accumulate(images, labels)
    for parameter, gradient in zip(parts.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert gradient is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-14)


def linear() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 5, dtype=torch.float64))


@pytest.mark.parametrize(("micro", "parts"), [(7, [7]), (6, [4, 3]), (3, [3, 2, 2]), (2, [3, 2, 2]), (1, [3, 2, 2])])
def test_no_single_sample_under_batch_norm(micro: int, parts: list[int], capacity: Capacity) -> None:
    run, seen = start(Case("sgd", "fp32", warm=False), capacity), list[int]()
    run.state.model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    run.advance(run.update(micro))
    assert seen == parts


def test_single_samples_without_batch_norm(capacity: Capacity) -> None:
    run = start(Case("sgd", "fp32", warm=False, ema=False), capacity)
    run.state.model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    seen = list[int]()
    run.state.model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    run.advance(run.update(1))
    assert seen == [1] * 7


# -- failures


def test_one_failure_is_retried_and_two_are_refused(capacity: Capacity, caplog: pytest.LogCaptureFixture) -> None:
    run = start(Case("sgd", "fp32", warm=False), capacity)
    update = run.update()
    run.advance(update, Fault(30))
    assert run.state.updates == 1
    assert "the same samples once more" in caplog.text
    before = dump(run.state)
    with pytest.raises(OutOfMemory, match=r"^out of memory in forward: CUDA out of memory\. Injected") as caught:
        run.advance(update, Fault(30, keeps_failing=True))
    assert caught.value.__context__ is None
    assert run.state.updates == 1
    assert set(differences(dump(run.state), before)) <= {"groups"}  # the schedule was applied before the update


class Lost(Peers):
    """Two ranks, one of which is gone once the other has failed."""

    size = 2

    def vote(self, site: Site, status: Status = Status.WELL, *numbers: float) -> Status:
        if status:
            raise PeerLost("the other one is gone")
        return super().vote(site, status, *numbers)


def test_a_failure_after_which_a_peer_is_lost_leaves_no_trace(
    capacity: Capacity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left is saved then."""
    monkeypatch.setattr("adaptive_trainer.step.agreement.peers", Lost)
    run = start(Case("sgd", "fp32", warm=True), capacity)
    update, before = run.update(), dump(run.state)
    with pytest.raises(PeerLost):
        run.advance(update, Fault(30))
    assert set(differences(dump(run.state), before)) <= {"groups"}


def test_an_evaluation_is_retried_as_an_update_is(capacity: Capacity, caplog: pytest.LogCaptureFixture) -> None:
    run = start(Case("sgd", "fp32", warm=True), capacity)
    update, images, labels = run.update(), run.images[:3], run.labels[:3]
    expected = update.evaluate(run.state.model, images, labels)
    with Fault(5):
        assert update.evaluate(run.state.model, images, labels) == expected
    assert "out of memory in evaluation" in caplog.text
    with (
        Fault(5, keeps_failing=True),
        pytest.raises(OutOfMemory, match=r"^out of memory in evaluation: CUDA out of memory\."),
    ):
        update.evaluate(run.state.model, images, labels)


class Compiling(torch.optim.SGD):
    """Its step runs compiled code."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {"gradient": torch.compile(torch.abs, backend="eager")(parameter.grad)}
        super().step(closure)


def test_an_optimizer_may_compile_its_step(capacity: Capacity) -> None:
    run = start(Case("sgd", "fp32", warm=False), capacity)
    run.state.optimizer = Compiling(run.state.model.parameters(), lr=0.1)
    update = run.update()
    for _ in range(3):
        run.advance(update)
    assert update.step_memory.may_allocate is True


class Broken(nn.Module):
    """A loss that raises once the second micro-batch comes, when the first has left its gradients and statistics."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error, self.calls = error, 0

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            raise self.error
        return nn.functional.cross_entropy(output, target)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shape '[3, 4]' is invalid for input of size 7"),
        IndexError("Target 9 is out of bounds."),
        RuntimeError("CUDNN_STATUS_NOT_SUPPORTED"),  # memory only where memory is short
        KeyError("label"),
        KeyboardInterrupt(),
        RuntimeError("DataLoader worker (pid(s) 1) exited unexpectedly"),
    ],
    ids=repr,
)
def test_what_is_not_memory_goes_through(error: BaseException, capacity: Capacity) -> None:
    run = start(Case("adamw-single", "fp16", warm=True), capacity)
    update, before = run.update(), dump(run.state)
    broken = Broken(error)
    update.program.criterion = known(broken)
    with pytest.raises(type(error)) as caught:
        run.advance(update)
    assert caught.value is error
    assert broken.calls == 2
    assert differences(dump(run.state), before) == []


def test_a_bad_label_goes_through(capacity: Capacity) -> None:
    run = start(Case("sgd", "fp32", warm=True), capacity)
    update, before = run.update(), dump(run.state)
    with pytest.raises(IndexError, match=r"Target 9 is out of bounds"):
        update.run(run.images[:7], torch.full((7,), 9), samples=7)
    with pytest.raises(RuntimeError, match="expected input"):
        update.run(torch.zeros(7, 4, 8, 8), run.labels[:7], samples=7)
    assert differences(dump(run.state), before) == []


def test_a_dead_device_is_not_touched_again(capacity: Capacity, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(Case("sgd", "fp32", warm=True), capacity)
    update, rolled_back = run.update(), list[Undo]()
    monkeypatch.setattr(Undo, "roll_back", rolled_back.append)
    error = RuntimeError("CUDA error: device-side assert triggered")
    update.program.criterion = known(Broken(error))
    with pytest.raises(RuntimeError) as caught:
        run.advance(update)
    assert caught.value is error
    assert rolled_back == []


def test_an_unexpected_failure_of_a_step_without_copies_is_final(capacity: Capacity) -> None:
    run = start(Case("adamw-fused", "fp32", warm=True), capacity)
    update = run.update()
    phases = Fault(phase=lambda: update.phase)
    run.advance(update, phases)
    with pytest.raises(DeviceUnusable, match=r"weights may be half updated; go on from the last checkpoint"):
        run.advance(update, Fault(phases.phases.index("optimizer step")))


def test_a_simulated_card_is_not_tried_twice(caplog: pytest.LogCaptureFixture) -> None:
    with limited(CPU, "3MiB") as small:
        run = start(Case("adamw-foreach", "fp32", warm=False, image_size=96), small)
        update, before = run.update(7), dump(run.state)
        with pytest.raises(OutOfMemory, match="Simulated card out of memory"):
            run.advance(update)
        assert "once more" not in caplog.text
        assert differences(dump(run.state), before) == []
        run.advance(run.update(2))
        after = dump(run.state)
    with limited(CPU, "none") as capacity:
        plain = start(run.case, capacity)
        plain.advance(plain.update(2))
        assert differences(dump(plain.state), after) == []


# -- what a simulated card counts


def watched(run: Run) -> list[bool]:
    """Grows by an entry a forward pass in training: whether the simulated card counts it."""
    counted: list[bool] = []

    def look(model: nn.Module, inputs: tuple[Tensor]) -> None:
        if model.training:
            counted.append(_get_current_dispatch_mode() is run.capacity.simulated)

    run.state.model.register_forward_pre_hook(look)
    return counted


def an_update(run: Run, update: Update, samples: int = 7) -> None:
    update.run(run.images[:samples].clone(), run.labels[:samples].clone(), samples=0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.usefixtures("soon_known")
def test_a_counted_update_is_not_counted_again(optimizer: str) -> None:
    with limited(CPU, "64MiB") as card:
        run = start(Case(optimizer, "fp32", warm=False, accumulate=False), card)
        update, counted = run.update(), watched(run)
        for _ in range(2 * COUNTED_EVERY):
            an_update(run, update)
        assert counted[:2] == [True, True], "the first makes the optimizer's state, the second meets it"
        assert counted.count(True) <= 6, "until nothing changes, and one in so many"
        assert counted[10:].count(True) == 1, "one in so many"
        counted.clear()
        for samples in (5, 7):
            an_update(run, update, samples)
        assert counted == [True, False], "another shape, and the one that is known"
        rung = run.update()
        for other in (rung, rung, update):
            an_update(run, other)
        assert counted[2:] == [True, True, False], "another rung, and the one that is known"
        run.state.optimizer.state.clear()
        for _ in range(2):
            an_update(run, update)
        assert counted[5:] == [True, True], "state that is made anew"


@pytest.mark.usefixtures("soon_known")
def test_the_update_that_makes_the_optimizers_state_is_counted_whenever_it_comes() -> None:
    """An overflow leaves the step out, again and again."""
    with limited(CPU, "64MiB") as card:
        run = start(Case("adamw-single", "fp16", warm=False, accumulate=False, scale=2.0**40), card)
        update, counted = run.update(), watched(run)
        while not run.state.optimizer.state:
            an_update(run, update)
        assert len(counted) > 10, "the scale was halved as often"
        assert counted[-1]


@pytest.mark.usefixtures("soon_known")
def test_a_proof_is_always_counted_and_so_is_what_makes_the_state_again() -> None:
    with limited(CPU, "64MiB") as card:
        run = start(Case("adamw-fused", "fp32", warm=False, accumulate=False), card)
        update, counted = run.update(), watched(run)
        evaluated: list[bool] = []
        assert run.state.ema is not None
        run.state.ema.module.register_forward_pre_hook(
            lambda *_: evaluated.append(_get_current_dispatch_mode() is card.simulated)
        )
        for _ in range(9):
            an_update(run, update)
            update.evaluate(run.state.ema.module, run.images[:5], run.labels[:5])
        assert not counted[-1]
        assert not evaluated[-1]
        counted.clear()
        evaluated.clear()
        for _ in range(3):
            dry_run(update, SHAPES)
        assert counted == [True] * 3 * DRY_RUN_UPDATES
        assert evaluated == [True] * 3
        an_update(run, update)
        assert counted[-1]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_proof_meets_what_training_meets_and_leaves_nothing_of_it(optimizer: str) -> None:
    """Each update has a batch of its own, and what the optimizer has made is gone, so that both lie in memory alike."""
    with limited(CPU, "64MiB") as card:
        run = start(Case(optimizer, "fp32", warm=False, accumulate=False), card)
        update, before = run.update(), list[int]()
        batches: list[weakref.ref[Any]] = []
        made: list[weakref.ref[Any]] = []

        def look(model: nn.Module, inputs: tuple[Tensor]) -> None:
            before.append(sum(batch() is not None for batch in batches))
            batches.append(weakref.ref(inputs[0].untyped_storage()))

        def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            values = [value for each in optimizer.state.values() for value in each.values()]
            made.extend(weakref.ref(value) for value in values if isinstance(value, Tensor))

        run.state.model.register_forward_pre_hook(look)
        run.state.optimizer.register_step_post_hook(note)
        dry_run(update, SHAPES)
    assert before[:DRY_RUN_UPDATES] == [0] * DRY_RUN_UPDATES
    assert made
    assert [value for value in made if value() is not None] == []


def sizes_of(card: Capacity, optimizer: str, precision: str) -> Iterator[Any]:
    """What the card says after every update and evaluation batch of three epochs; one update is too large."""
    run = start(Case(optimizer, precision, warm=False, accumulate=False, image_size=96), card)
    update, ema = run.update(), run.state.ema
    assert ema is not None
    for epoch in range(3):
        card.reset_peaks()
        for samples in (2, 2, 2, 2, 2, 2, 60 if epoch == 1 else 2, 2, 2, 2, 1 + epoch, 2, 2):
            try:
                an_update(run, update, samples)
            except OutOfMemory as error:
                yield str(error)
            yield samples, card.peaks(), card.usage().reserved, card.usage().num_alloc_retries
        for samples in (3, 3, 3, 1, 4 if epoch == 2 else 3):
            update.evaluate(ema.module, run.images[:samples].clone(), run.labels[:samples].clone())
            yield samples, card.peaks(), card.usage().reserved


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.usefixtures("soon_known")
def test_peaks_and_failures_are_those_of_a_card_that_counts_all(
    optimizer: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    operators = [0, 0]
    dispatch = SimulatedDevice.__torch_dispatch__
    found: list[list[Any]] = []
    for number, every in enumerate((COUNTED_EVERY, 1)):

        def counting(*args: Any, number: int = number) -> Any:
            operators[number] += 1
            return dispatch(*args)

        monkeypatch.setattr("adaptive_trainer.memory.simulated.COUNTED_EVERY", every)
        monkeypatch.setattr(SimulatedDevice, "__torch_dispatch__", counting)
        with limited(CPU, "5MiB") as card:
            found.append(list(sizes_of(card, optimizer, precision)))
    assert found[0] == found[1]
    assert sum(isinstance(entry, str) and "Simulated card out of memory" in entry for entry in found[0]) == 1
    assert operators[0] < operators[1]


# -- dry run


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(("optimizer", "precision"), [("adamw-single", "fp16"), ("lion", "bf16"), ("sgd", "fp32")])
def test_a_proof_leaves_no_trace(optimizer: str, precision: str, warm: bool, capacity: Capacity) -> None:
    run = start(Case(optimizer, precision, warm), capacity)
    before, update = dump(run.state), run.update()
    assert dry_run(update, SHAPES) == SHAPES.eval_batch_size
    assert differences(dump(run.state), before) == []
    run.advance(update)
    after = dump(run.state)
    undisturbed = start(run.case, capacity)
    undisturbed.advance(undisturbed.update())
    assert differences(dump(undisturbed.state), after) == []


def test_a_proof_that_fails_leaves_no_trace(capacity: Capacity) -> None:
    case, whole = Case("adamw-foreach", "fp16", warm=False), Fault()
    update = start(case, capacity).update()
    with whole:
        dry_run(update, SHAPES)
    assert whole.count > 500
    for at in range(0, whole.count, 37):
        run = start(case, capacity)
        before, update = dump(run.state), run.update()
        with Fault(at, keeps_failing=True), pytest.raises((OutOfMemory, torch.OutOfMemoryError)):
            dry_run(update, SHAPES)
        assert differences(dump(run.state), before) == []


@pytest.mark.long
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_proof_goes_on_after_one_failure_in_its_first_step(
    optimizer: str, precision: str, capacity: Capacity
) -> None:
    """Wherever memory runs out for once, the dry run shows and teaches the same as without."""
    case, whole = Case(optimizer, precision, warm=False, accumulate=False), Fault()
    update = start(case, capacity).update()
    whole.phase = lambda: f"{update.phase} {update.state.updates}"
    with whole:
        dry_run(update, SHAPES)
    first = [at for at, phase in enumerate(whole.phases) if phase == f"optimizer step {update.state.updates}"]
    learned = update.step_memory.may_allocate
    assert first
    for at in first[:: 1 + len(first) // 12]:
        run = start(case, capacity)
        before, update = dump(run.state), run.update()
        with Fault(at) as fault:
            assert dry_run(update, SHAPES) == SHAPES.eval_batch_size
        assert fault.raised == 1
        assert update.step_memory.may_allocate == learned, at
        assert differences(dump(run.state), before) == []


def test_a_proof_keeps_weights_once_and_training_in_each_update(
    capacity: Capacity, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, before_step = list[bool](), Undo.before_step

    def watched(undo: Undo, *, on_host: bool = False, copies: bool = True) -> None:
        kept.append(copies)
        before_step(undo, on_host=on_host, copies=copies)

    monkeypatch.setattr(Undo, "before_step", watched)
    run = start(Case("adamw-fused", "fp32", warm=False, accumulate=False), capacity)
    update = run.update()
    dry_run(update, SHAPES)
    assert kept == [True] + [False] * DRY_RUN_UPDATES
    run.advance(update)
    assert kept[-1], "nobody else has copies"


def test_a_dry_run_that_ran_nothing_is_none(capacity: Capacity, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(Case("sgd", "fp32", warm=False), capacity)
    monkeypatch.setattr(Update, "run", lambda *args, **kwargs: None)
    with pytest.raises(RuntimeError, match=f"a dry run of {DRY_RUN_UPDATES} updates made only 0"):
        dry_run(run.update(), SHAPES)


def test_evaluation_is_halved_until_it_fits() -> None:
    with limited(CPU, "4MiB") as small:
        run = start(Case("sgd", "fp32", warm=False, ema=False), small)
        shapes = Recipe(batch_size=2, micro_batch_size=2, eval_batch_size=64, image_size=128, num_classes=5)
        assert dry_run(run.update(2), shapes) in (4, 8)


def test_an_overflow_in_the_first_step_of_a_warm_rung(capacity: Capacity, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is left out, so nothing is learned of what it allocates."""
    counts = iter(range(1, 1000))
    monkeypatch.setattr("adaptive_trainer.models.stepping._Allocations.total", lambda _: next(counts))
    run = start(Case("sgd", "fp16", warm=True), capacity)
    update, original = run.update(), Update._guard

    def on_a_card(self: Update, change: Change) -> None:
        self.step_memory.device = torch.device("cuda", 0)
        try:
            original(self, change)
        finally:
            self.step_memory.device = CPU

    monkeypatch.setattr(Update, "_guard", on_a_card)
    assert run.state.scaler._scale is not None
    run.state.scaler._scale.fill_(2.0**40)
    run.advance(update)
    assert update.step_memory.may_allocate is None
    run.state.scaler._scale.fill_(1.0)
    run.advance(update)
    assert update.step_memory.may_allocate is True


@pytest.mark.parametrize(
    ("optimizer", "allocates"),
    [("adamw-fused", False), ("adamw-single", True), ("adamw-foreach", True), ("lion", True)],
)
def test_a_step_that_allocates_nothing_is_known_and_not_copied(
    optimizer: str, allocates: bool, capacity: Capacity, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, copied = start(Case(optimizer, "fp32", warm=True, ema=False), capacity), list[bool]()
    update = run.update()
    before_step = Undo.before_step

    def watched(undo: Undo, **how: bool) -> None:
        copied.append(True)
        before_step(undo, **how)

    monkeypatch.setattr(Undo, "before_step", watched)
    run.advance(update)
    assert (update.step_memory.may_allocate, len(copied)) == (allocates, 1)
    run.advance(update)
    assert len(copied) == 1 + allocates


def test_a_proof_meets_a_last_update_with_larger_parts(capacity: Capacity) -> None:
    run = start(Case("sgd", "fp32", warm=False, ema=False), capacity)
    update, seen = run.update(2), list[int]()
    run.state.model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    sizes = Recipe(batch_size=4, micro_batch_size=2, eval_batch_size=1, image_size=8, num_classes=5)
    dry_run(update, sizes, odd=3)
    assert seen == [2, 2] * DRY_RUN_UPDATES + [3, 1]


class Lazy(nn.Module):
    """Makes buffers in its first forward pass, from the images that it is given, as some initialisations do."""

    mean: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))

    def forward(self, x: Tensor) -> Tensor:
        if "mean" not in self._buffers:
            self.register_buffer("mean", x.detach().mean(), persistent=False)
            self.register_buffer("scale", x.detach().std())
        output: Tensor = self.body((x - self.mean) / self.scale)
        return output


def test_buffers_made_in_a_proof_or_a_failed_update_are_gone_again(capacity: Capacity) -> None:
    run = start(Case("sgd", "fp32", warm=False, ema=False), capacity)
    model = run.state.model = Lazy()
    run.state.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    update = run.update(4)
    dry_run(update, SHAPES)
    assert not model._buffers
    images, labels = 5 + torch.randn(4, 3, 8, 8), torch.arange(4)
    with Fault(at=20, keeps_failing=True), pytest.raises(OutOfMemory):
        update.run(images, labels, samples=4)
    assert not model._buffers
    update.run(images, labels, samples=4)
    assert torch.equal(model.mean, images.mean())


@pytest.mark.parametrize("last", [0, 3])
def test_a_proof_holds_what_stored_images_take(last: int, capacity: Capacity, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(Case("sgd", "fp32", warm=False, ema=False), capacity)
    made: list[weakref.ref[DeviceBatch]] = []
    seen: list[tuple[int, int, int]] = []
    real = DeviceBatch.__init__

    def noted(buffers: DeviceBatch, *args: Any, **kwargs: Any) -> None:
        real(buffers, *args, **kwargs)
        made.append(weakref.ref(buffers))

    def look(_: nn.Module, inputs: tuple[Tensor]) -> None:
        alive = [buffers for ref in made if (buffers := ref()) is not None]
        assert len(alive) == 1
        assert inputs[0].untyped_storage().data_ptr() == alive[0].images.data_ptr(), "no copy of a part"
        seen.append((len(inputs[0]), len(alive[0].images), len(alive[0].stored)))

    monkeypatch.setattr(DeviceBatch, "__init__", noted)
    run.state.model.register_forward_pre_hook(look)
    before = dump(run.state)
    update = run.update(2)
    sizes = replace(SHAPES, batch_size=4, eval_batch_size=1, stored_size=9)
    dry_run(update, sizes, odd=last)
    assert seen == [(2, 4, 4), (2, 4, 4)] * DRY_RUN_UPDATES + [(3, 4, 4)] * (last == 3) + [(1, 1, 1)]
    assert differences(dump(run.state), before) == []
    assert [ref() for ref in made] == [None] * 2


def test_a_dry_run_finds_no_memory_for_stored_images(capacity: Capacity, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(Case("sgd", "fp32", warm=False, ema=False), capacity)
    before, real, refused = dump(run.state), DeviceBatch.__init__, [7]

    def full(buffers: DeviceBatch, most: int, *args: Any, **kwargs: Any) -> None:
        if most >= refused[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        real(buffers, most, *args, **kwargs)

    monkeypatch.setattr(DeviceBatch, "__init__", full)
    shapes = replace(SHAPES, batch_size=4, eval_batch_size=16, stored_size=9)
    assert dry_run(run.update(), shapes) == 4, "a smaller evaluation batch"
    refused[0] = 4
    update = run.update()
    assert update._undo.bindings._values, "as it begins"
    with pytest.raises(OutOfMemory) as caught:
        dry_run(update, shapes)
    assert caught.value.phase == "loading data"
    assert differences(dump(run.state), before) == []
    assert update._undo.bindings._values == [], "and what never began is forgotten too"


def test_a_buffer_that_is_an_expanded_view_is_put_back(tmp_path: Path) -> None:
    class Expanded(nn.Module):
        scale: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(192, 3)
            self.register_buffer("scale", torch.ones(1).expand(192))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x.flatten(1) * self.scale)
            return out

    data = TensorDataset(torch.rand(8, 3, 8, 8), torch.arange(8) % 3)
    options = ["trainer.batch_size=4", "data.image_size=8", "data.transforms=none", "data.num_workers=0"]
    trainer = Trainer(
        compose_config(options), model=lambda _, __: Expanded(), train_data=data, val_data=data, output_dir=tmp_path
    )
    assert trainer.fit().rung == "requested"


# -- a step that allocates nothing today


class Late(torch.optim.SGD):
    """Needs memory from its step number `first` on, and is half done when it asks for it."""

    first = 4

    def is_due(self, steps: int) -> bool:
        return steps >= self.first

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            values = self.state[parameter]
            values["steps"] = values.get("steps", 0) + 1
            parameter.data.add_(parameter.grad, alpha=-self.param_groups[0]["lr"])
            if self.is_due(values["steps"]):
                parameter.data.sub_(parameter * 0.01)


class AtSmallRates(Late):
    """Needs memory while the learning rate is small, as it is after the warm-up."""

    def is_due(self, steps: int) -> bool:
        return bool(self.param_groups[0]["lr"] < 0.0098)


def hooked(model: nn.Module) -> torch.optim.Optimizer:
    """A known one with a hook of somebody's that needs memory from its fourth step on."""
    optimizer = OPTIMIZERS["adamw-fused"](model)

    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parameter, values in optimizer.state.items():
            if values["step"] >= 4:
                parameter.data.copy_(parameter * 0.99)

    optimizer.register_step_post_hook(hook)
    return optimizer


def thawing(model: nn.Module) -> torch.optim.Optimizer:
    """One kind of parameters is moved without memory, and the other, which comes later, is not."""
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [{"params": parameters[2:], "weight_decay": 0.0}]
    groups.append({"params": parameters[:2], "weight_decay": 0.1})
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, foreach=False)


LATE: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "radamlegacy": lambda model: create_optimizer_v2(model, "radamlegacy", lr=1e-2),
    "lookahead": lambda model: create_optimizer_v2(model, "lookahead_adamw", lr=1e-2),
    "late": lambda model: Late(model.parameters(), lr=0.1),
    "small rates": lambda model: AtSmallRates(model.parameters(), lr=0.1),
    "hooked": hooked,
    "thawing": thawing,
}


class Allocating(Fault):  # type: ignore[no-untyped-call]
    """Every operator that makes new memory in a step fails, from the first or another one on."""

    def __init__(self, update: Update, spared: int) -> None:
        super().__init__()
        self.update, self.spared = update, spared

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        in_step = self.update._undo.progress and self.update.phase in ("clipping", "optimizer step")
        if in_step and _storages(out) - _storages((args, kwargs)):
            self.count += 1
            if self.count > self.spared:
                self._refuse(func)
        return out


@pytest.mark.long
@pytest.mark.parametrize("spared", [0, 3])
@pytest.mark.parametrize("name", LATE)
def test_a_step_that_comes_to_need_memory_is_undone(
    name: str, spared: int, capacity: Capacity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever that is, whatever was seen of the steps before: memory is refused to each of nine updates."""
    monkeypatch.setitem(OPTIMIZERS, name, LATE[name])
    case, refused = Case(name, "fp32", warm=False, clip=False, accumulate=False), list[int]()
    run = start(case, capacity)
    update = run.update()
    for number in range(9):
        freeze(run, name == "thawing" and number < 5)
        run.schedule.apply(run.state.position.schedule_step(7))
        before = dump(run.state)
        with Allocating(update, spared) as full, suppress(OutOfMemory):
            run.advance(update)
        if full.raised:
            refused.append(number)
            assert differences(dump(run.state), before) == [], number
            run.advance(update)
        assert run.state.updates == number + 1
    assert set(refused) & {4, 5, 6, 7}, "the step has come to need memory"
    after = dump(run.state)
    plain = start(case, capacity)
    update = plain.update()
    for number in range(9):
        freeze(plain, name == "thawing" and number < 5)
        plain.advance(update)
    assert differences(dump(plain.state), after) == []


def freeze(run: Run, is_frozen: bool) -> None:
    for parameter in list(run.state.model.parameters())[:2]:
        parameter.requires_grad_(not is_frozen)


def test_what_was_not_begun_is_not_rolled_back(capacity: Capacity, monkeypatch: pytest.MonkeyPatch) -> None:
    """A beginning that fails, before its first line or anywhere in it, leaves the last update as it is."""
    run = start(Case("adamw-single", "fp32", warm=True), capacity)
    update = run.update()
    for refused in ("adaptive_trainer.utils.modes._get_current_dispatch_mode", "torch._foreach_copy_"):
        run.advance(update)
        before = dump(run.state)
        with monkeypatch.context() as patch:
            patch.setattr(refused, Refusing())
            with pytest.raises(OutOfMemory, match="out of memory in begin"):
                update.run(run.images[:7], run.labels[:7], samples=7)
        assert differences(dump(run.state), before) == []
    assert update._undo.progress is Progress.IDLE
    update._undo.roll_back()
    assert differences(dump(run.state), before) == []
    with pytest.raises(RuntimeError, match="call begin first"):
        update._undo.before_step()


class Refusing:
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Injected into the beginning of an update.")


def test_a_step_whose_copies_fail_is_not_restored_from_them(
    capacity: Capacity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where those of an earlier update are there."""
    run = start(Case("adamw-single", "fp32", warm=True), capacity)
    update = run.update()
    run.advance(update)
    before, save = dump(run.state), Shadow.save

    def refused(shadow: Shadow, tensors: list[Tensor], placed: Sequence[Tensor] = ()) -> None:
        if len(tensors) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Injected into the copies for a step.")
        save(shadow, tensors, placed)

    monkeypatch.setattr(Shadow, "save", refused)
    with pytest.raises(OutOfMemory, match="in clipping"):
        update.run(run.images[:7], run.labels[:7], samples=7)
    assert differences(dump(run.state), before) == []


def test_after_a_proof_nothing_is_known_of_a_step_whose_state_is_still_to_be_made(capacity: Capacity) -> None:
    """Only a step that finds all of its state shows whether a graph can record it."""
    run = start(Case("adamw-fused", "fp32", warm=False, accumulate=False), capacity)
    update, known = run.update(), list[bool | None]()
    dry_run(update, SHAPES)
    for _ in range(3):
        known.append(update.step_memory.may_allocate)
        run.advance(update)
    assert known == [None, None, False]


def test_a_step_that_is_only_recorded_leaves_the_optimizers_own_tensors(capacity: Capacity) -> None:
    """What a recorded step binds is memory of the graph, and no kernel has filled it."""
    run = start(Case("adamw-single", "fp32", warm=True), capacity)
    update, before = run.update(), dump(run.state)
    with update.rolled_back():
        for values in run.state.optimizer.state.values():
            values.update({key: torch.full_like(value, torch.nan) for key, value in values.items()})
        run.state.optimizer.state[nn.Parameter(torch.zeros(1))] = {"step": torch.zeros(())}
    assert differences(dump(run.state), before) == []
