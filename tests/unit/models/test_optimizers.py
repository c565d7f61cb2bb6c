"""Optimizers and schedules by name; a schedule remembers nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from timm.optim import get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn

from adaptive_trainer.config.schema import PRECISIONS, OptimizerConfig, ScheduleConfig
from adaptive_trainer.errors import ConfigError
from adaptive_trainer.models.optimizers import SCHEDULES, build_ema, build_optimizer, build_scaler, build_schedule
from adaptive_trainer.utils.device import AUTOCAST

CPU = torch.device("cpu")


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "momentum", "lion"])
def test_an_overflow_in_the_first_step_is_survived(name: str) -> None:
    model, images = network(), torch.randn(4, 3, 8, 8)
    optimizer = build_optimizer(model, OptimizerConfig(name, lr=0.1), CPU)
    scaler = build_scaler("fp16", CPU)
    for factor in (float("inf"), 1.0, 1.0):
        optimizer.zero_grad()
        torch.autograd.backward(scaler.scale(model(images).square().mean() * factor))
        scaler.step(optimizer)
        scaler.update()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "momentum"])
def test_fused_by_default(name: str) -> None:
    assert build_optimizer(network(), OptimizerConfig(name, lr=0.1), CPU).defaults["fused"] is True


@pytest.mark.parametrize("kwargs", [{}, {"dampening": 0.5}, {"nesterov": False}, {"fused": False}])
def test_sgd_steps_as_torch_does(kwargs: dict[str, Any]) -> None:
    """Its momentum is made before the first step, where torch makes it in the step."""
    models = []
    for reference in (False, True):
        torch.manual_seed(0)
        model, images = network(), torch.randn(4, 3, 8, 8)
        config = OptimizerConfig("momentum", lr=0.1, kwargs=kwargs, weight_decay=0.1)
        optimizer = build_optimizer(model, config, CPU)
        if reference:
            groups = [{**group, "fused": False, "foreach": False} for group in optimizer.param_groups]
            optimizer = torch.optim.SGD(groups, momentum=0.9)
        for _ in range(4):
            optimizer.zero_grad()
            torch.autograd.backward(model(images).square().mean())
            optimizer.step()
        models.append(model)
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kwargs", [{"fused": False}, {"foreach": True}, {"capturable": False}])
def test_a_chosen_implementation_is_kept(kwargs: dict[str, Any]) -> None:
    defaults = build_optimizer(network(), OptimizerConfig("adamw", lr=0.1, kwargs=kwargs), CPU).defaults
    assert not defaults["fused"]
    assert {key: defaults[key] for key in kwargs} == kwargs


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "lamb", "rmsprop", "adan"])
def test_built_optimizer_learns(name: str) -> None:
    torch.manual_seed(0)
    model, images, labels = network(), torch.randn(8, 3, 8, 8), torch.arange(8) % 3
    optimizer = build_optimizer(model, OptimizerConfig(name, lr=1e-3, weight_decay=0.1), CPU)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OptimizerConfig("adamv"), "unknown optimizer.name=adamv: did you mean .*adam"),
        (OptimizerConfig("adamw", kwargs={"beta": 1}), "adamw with optimizer.kwargs=.* cannot be built: .*beta"),
        (OptimizerConfig("adamw", kwargs={"betas": [2.0, 0.9]}), "cannot be built: Invalid beta"),
        (OptimizerConfig("sgd", kwargs={"eps": 1e-8}), "sgd does not take optimizer.kwargs eps"),
        (OptimizerConfig("sgd", kwargs={"dampening": 0.5}), "cannot be built: Nesterov momentum requires"),
        (
            OptimizerConfig("sgd", momentum=0.0, kwargs={"nesterov": True}),
            "cannot be built: Nesterov momentum requires",
        ),
        (OptimizerConfig("adamw", kwargs={"fused": True, "foreach": True}), "cannot be built: .*exclude each other"),
        (OptimizerConfig("adamw", kwargs={"capturable": True}), "cannot be built: capturable=True is for a CUDA card"),
        (OptimizerConfig("sgd", kwargs={"differentiable": True}), "cannot be built: differentiable=True is for"),
        (OptimizerConfig("adahessian"), "second derivatives"),
        (OptimizerConfig("bnbadam"), "bnbadam cannot be built: "),
        (OptimizerConfig("fusedadam"), "fusedadam cannot be built: "),
    ],
)
def test_what_cannot_be_built_is_explained(config: OptimizerConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_optimizer(network(), config, CPU)


def sgd(lr: float = 0.1) -> torch.optim.SGD:
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups: list[dict[str, Any]] = [{"params": weights[:1]}, {"params": weights[1:], "lr_scale": 0.5}]
    return torch.optim.SGD(groups, lr=lr)


DECAYING = ("cosine", "tanh", "poly", "wsd", "rsqrt")  # down to min_lr
Schedules = st.tuples(st.sampled_from(SCHEDULES), st.integers(1, 12), st.integers(1, 40), st.floats(0, 1))


@given(case=Schedules, min_lr=st.sampled_from([0.0, 1e-3]), cycles=st.integers(1, 3))
@example(case=("cosine", 10, 8, 0.5), min_lr=0.0, cycles=1)
@example(case=("wsd", 1, 1, 0.0), min_lr=0.0, cycles=1)
@example(case=("poly", 2, 5, 0.0), min_lr=0.0, cycles=3)
@example(case=("none", 9, 10, 0.35), min_lr=0.0, cycles=1)
def test_a_schedule_reaches_the_rate_and_then_the_end_of_its_curve(
    case: tuple[str, int, int, float], min_lr: float, cycles: int
) -> None:
    """Up to the rate, whole cycles down to `min_lr` at the last update, whatever the lengths."""
    name, epochs, updates_per_epoch, share = case
    kwargs = {"cycle_limit": cycles} if name in ("cosine", "poly") else {}
    if name == "rsqrt":
        kwargs["stable_timescale"] = 1
    config = ScheduleConfig(name, warmup_epochs=epochs * share, min_lr=min_lr, kwargs=kwargs)
    schedule = build_schedule(sgd(), config, lr=0.1, epochs=epochs, updates_per_epoch=updates_per_epoch)
    total = epochs * updates_per_epoch
    rates = [schedule.lr_at(update) for update in range(total)]
    first = min(
        round(epochs * share * updates_per_epoch), total - 1
    )  # in the order of the settings: halves round alike
    assert rates[first] == pytest.approx(0.1, rel=1e-5)
    assert rates[:first] == sorted(rates[:first])
    assert max(rates, default=0.0) <= 0.1 + 1e-12
    if cycles == 1 or not kwargs:
        assert rates[first:] == sorted(rates[first:], reverse=True)
    if name in DECAYING and first < total - 1:
        assert rates[-1] == pytest.approx(min_lr, abs=1e-12)
    assert schedule.lr_at(total + 3) == rates[-1]


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "none"])
def test_a_schedule_has_timms_curve(name: str) -> None:
    lengths: dict[str, Any] = {"rsqrt": {"stable_timescale": 1, "decay_epochs": 4}, "wsd": {"decay_epochs": 4}}
    kwargs: dict[str, Any] = lengths.get(name, {})
    reference = sgd()
    theirs, _ = create_scheduler_v2(
        reference,
        name,
        num_epochs=19,
        min_lr=1e-3,
        step_on_epochs=False,
        updates_per_epoch=1,
        **kwargs,
    )
    ours = sgd()
    schedule = build_schedule(
        ours, ScheduleConfig(name, min_lr=1e-3, kwargs=kwargs), lr=0.1, epochs=20, updates_per_epoch=1
    )
    for update in range(20):
        theirs.step_update(update)
        schedule.apply(update)
        rates = [g["lr"] for g in reference.param_groups]
        assert [g["lr"] for g in ours.param_groups] == pytest.approx(rates, rel=1e-2, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "key", "value"), [("step", "decay_epochs", 2), ("multistep", "decay_milestones", [2])]
)
def test_lengths_count_from_the_end_of_the_warmup(name: str, key: str, value: Any) -> None:
    config = ScheduleConfig(name, warmup_epochs=3, kwargs={key: value, "decay_rate": 0.1}, min_lr=0.002)
    schedule = build_schedule(sgd(), config, lr=0.1, epochs=9, updates_per_epoch=4)
    assert schedule.lr_at(12) == schedule.lr_at(19) == pytest.approx(0.1)
    assert schedule.lr_at(20) == pytest.approx(0.01)
    assert schedule.lr_at(35) >= 0.002, "no schedule goes below it"


@given(updates=st.lists(st.integers(0, 40), min_size=2), name=st.sampled_from(SCHEDULES))
def test_schedule_remembers_nothing(updates: list[int], name: str) -> None:
    config = ScheduleConfig(name, warmup_epochs=0.5)
    used = build_schedule(sgd(), config, lr=0.1, epochs=4, updates_per_epoch=10)
    walked = [used.lr_at(update) for update in updates]
    for update, lr in zip(updates, walked, strict=True):
        assert build_schedule(sgd(), config, lr=0.1, epochs=4, updates_per_epoch=10).lr_at(update) == lr


def test_building_a_schedule_changes_nothing() -> None:
    optimizer = sgd()
    before = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    schedule = build_schedule(optimizer, ScheduleConfig("cosine", 1), lr=0.7, epochs=2, updates_per_epoch=3)
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == before
    schedule.apply(3)
    assert [set(g) for g in optimizer.param_groups] == [{*b, "params"} for b in before]


def test_schedule_goes_on_at_the_same_share_of_the_run_after_a_change_of_the_batch() -> None:
    optimizer, config = sgd(), ScheduleConfig("cosine")
    large = build_schedule(optimizer, config, lr=0.1, epochs=4, updates_per_epoch=10)
    small = build_schedule(optimizer, config, lr=0.05, epochs=4, updates_per_epoch=20)
    for update in range(0, 40, 5):
        assert small.lr_at(2 * update) == pytest.approx(large.lr_at(update) / 2, abs=0.1 / 40)
    assert large.lr_at(39) == small.lr_at(79) == 0


def test_warmup_never_starts_above_the_learning_rate() -> None:
    schedule = build_schedule(sgd(), ScheduleConfig("cosine", 1), lr=1e-6, epochs=3, updates_per_epoch=10)
    assert max(schedule.lr_at(update) for update in range(30)) == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ScheduleConfig("plateau"), "plateau follows a metric.*use one of none, constant, cosine"),
        (ScheduleConfig("cosin"), "schedule.name=cosin cannot be built: .*the names are none, constant, cosine"),
        (ScheduleConfig("cosine", kwargs={"speed": 1}), "cosine with schedule.kwargs=.* cannot be built: .*speed"),
        (ScheduleConfig("cosine", kwargs={"num_epochs": 1}), "cannot be built: .*num_epochs"),
    ],
)
def test_schedules_that_cannot_be_built_are_explained(config: ScheduleConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_schedule(sgd(), config, lr=0.1, epochs=2, updates_per_epoch=5)


def test_moving_average_follows_weights_and_buffers() -> None:
    model = network()
    assert build_ema(model, None) is None
    ema = build_ema(model, 0.75)
    assert ema is not None
    start = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    ema.update(model, step=2)  # the first one copies
    for name, value in ema.module.state_dict().items():
        moved = 0.25 if name in dict(model.named_parameters()) else 0.0
        assert torch.allclose(value.float(), start[name].float() + moved, atol=1e-6), name


@pytest.mark.parametrize(("precision", "enabled"), [("fp32", False), ("bf16", False), ("fp16", True)])
def test_only_fp16_scales_the_loss(precision: str, enabled: bool) -> None:
    assert build_scaler(precision, CPU).is_enabled() is enabled


ELSEWHERE = ("bnb", "fused", "kron")  # on CUDA, or with a library of their own
WITH_MOMENTUM = [name for name in map(str, list_optimizers()) if get_optimizer_info(name).has_momentum]


@pytest.mark.parametrize("name", [name for name in WITH_MOMENTUM if not name.startswith(ELSEWHERE)])
def test_an_optimizer_works_without_momentum(name: str) -> None:
    """Also those that ask for Nesterov's by default: without momentum it is the plain step."""
    torch.manual_seed(0)
    model, images = network(), torch.randn(4, 3, 8, 8)
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = build_optimizer(model, OptimizerConfig(name, lr=0.1, momentum=0.0, weight_decay=0.0), CPU)
    model(images).square().mean().backward()
    optimizer.step()
    if name == "sgd":
        assert optimizer.defaults["fused"] is True
        assert not optimizer.state
        for old, new in zip(before, model.parameters(), strict=True):
            assert new.grad is not None
            torch.testing.assert_close(new, old - 0.1 * new.grad)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_every_precision_of_the_settings_has_its_dtype() -> None:
    """One without would train in fp32 and be recorded as something else."""
    assert tuple(AUTOCAST) == PRECISIONS
