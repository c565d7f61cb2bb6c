"""Traces of an update without data: against what a CPU run really allocates, and against each other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, AdamW, Optimizer

from adaptive_trainer.config.schema import ModelConfig, OptimizerConfig
from adaptive_trainer.data.position import Position, micro_batches
from adaptive_trainer.distributed.peers import Peers, as_current
from adaptive_trainer.errors import OutOfMemory
from adaptive_trainer.memory.limit import limited
from adaptive_trainer.models.batch_norm import has_batch_norm
from adaptive_trainer.models.optimizers import build_ema, build_optimizer, build_scaler
from adaptive_trainer.models.recomputing.offloading import moves_noted
from adaptive_trainer.models.savers.offload import apply as offload
from adaptive_trainer.models.savers.recompute import apply as recompute
from adaptive_trainer.models.zoo import build_model
from adaptive_trainer.prediction.derivation import Tracer
from adaptive_trainer.prediction.estimator import Prediction, predict
from adaptive_trainer.prediction.recorder import Kind, Recorder, fake_device
from adaptive_trainer.prediction.tracer import Trace, TraceError, TraceSpec, trace
from adaptive_trainer.recipe import Recipe
from adaptive_trainer.step.dry_run import DRY_RUN_UPDATES, dry_run
from adaptive_trainer.step.undo import TrainState
from adaptive_trainer.step.update import Update
from tests.support.twins import Twins

CPU = torch.device("cpu")
MiB = 2**20
METERS = ("loss", "correct", "seen", "skipped")


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters())


def spec(model: Callable[[], nn.Module], *micro: int, size: int = 64, **settings: Any) -> TraceSpec:
    return TraceSpec(model, settings.pop("make_optimizer", adamw), (3, size, size), micro, **settings)


class Conv(nn.Sequential):
    """Two convolutions and a head, with BatchNorm between."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(16, 10),
        )  # fmt: skip


# -- against a real update on a CPU, counted by the simulated card


class Case:
    """One recipe, predicted and really run."""

    def __init__(
        self, name: str, batch: int, micro: int, size: int = 64, precision: str = "fp32", optimizer: str = "adamw",
        checkpoint: bool = False, ema: float | None = None, offloads: bool = False, ranks: Peers | None = None,
    ) -> None:  # fmt: skip
        self.name, self.batch, self.micro, self.size = name, batch, micro, size
        self.precision, self.optimizer, self.checkpoint, self.ema = precision, optimizer, checkpoint, ema
        self.offloads, self.ranks = offloads, ranks or Peers()

    def model(self) -> nn.Module:
        model = build_model(ModelConfig(name=self.name), 10)
        recompute(model, "blocks" if self.checkpoint else "none")
        offload(model, self.offloads)
        return model

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        return build_optimizer(model, OptimizerConfig(name=self.optimizer), CPU)

    def predicted(self) -> Prediction:
        parts = tuple(micro_batches(self.batch, self.micro, has_batch_norm(self.model())))
        return predict(
            TraceSpec(
                self.model, self.make_optimizer, (3, self.size, self.size), parts, self.micro,
                precision=self.precision, clip_grad=True, ema=self.ema is not None, cuda=False,
                summed=self.ranks.size > 1,
            )
        )  # fmt: skip

    def measured(self, limit: int) -> tuple[int, int]:
        with limited(CPU, limit) as capacity, as_current(self.ranks):
            with capacity.device_work():
                model = self.model()
                state = TrainState(
                    model, self.make_optimizer(model), build_scaler(self.precision, CPU), build_ema(model, self.ema),
                    Position(0, 0, 0, 100), meters={name: torch.zeros(()) for name in METERS},
                )  # fmt: skip
            recipe = Recipe(
                batch_size=self.ranks.size * self.batch, micro_batch_size=self.micro, eval_batch_size=self.micro,
                image_size=self.size, num_classes=10, precision=self.precision, clip_grad=1.0,
            )  # fmt: skip
            dry_run(Update(state, nn.CrossEntropyLoss(), recipe, device=CPU, capacity=capacity), recipe)
            counted = capacity.usage()
            return counted.peak_allocated, counted.peak_reserved


@pytest.mark.long
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case("mobilenetv3_small_100", 4, 4), marks=pytest.mark.slow),
        Case("mobilenetv3_small_100", 8, 4, precision="bf16", optimizer="sgd"),
        Case("mobilenetv3_small_100", 2, 2, precision="fp16"),
        Case("resnet18", 4, 4, optimizer="lion", checkpoint=True),
        Case("resnet18", 5, 2, ema=0.9),
        Case("resnet18", 4, 4, precision="fp16", ranks=Twins()),
        pytest.param(Case("efficientnet_b0", 5, 2, 128, offloads=True), marks=pytest.mark.slow),
        Case("mobilenetv3_small_100", 8, 4, 128, precision="bf16", checkpoint=True, offloads=True),
        Case("vit_tiny_patch16_224", 2, 2, 224, offloads=True),
        pytest.param(Case("torchvision/squeezenet1_1", 6, 2, optimizer="sgd"), marks=pytest.mark.slow),
        pytest.param(Case("vit_tiny_patch16_224", 2, 2, 224), marks=pytest.mark.slow),
    ],
    ids=lambda case: f"{case.name}-{case.precision}-{case.optimizer}{'-offload' * case.offloads}-{case.ranks.size}",
)
def test_what_a_real_update_allocates(case: Case) -> None:
    predicted = case.predicted()
    assert predicted.reason == ""
    assert predicted.allocated_bytes is not None
    assert predicted.reserved_bytes is not None
    assert predicted.min_capacity_bytes is not None
    moved: list[int] = []
    with moves_noted(moved.append):
        allocated, reserved = case.measured(4 * 2**30)
    assert DRY_RUN_UPDATES * predicted.offloaded_bytes == sum(moved)
    assert (predicted.offloaded_bytes > 0) is case.offloads
    assert predicted.allocated_bytes == pytest.approx(allocated, rel=0.002)
    assert predicted.reserved_bytes == pytest.approx(reserved, abs=4 * MiB)
    case.measured(predicted.min_capacity_bytes + 4 * MiB)
    with pytest.raises(OutOfMemory):
        case.measured(int(0.97 * predicted.min_capacity_bytes))


# -- derived traces


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["mobilenetv3_small_100", "resnet18", "convnext_atto"])
def test_three_traces_give_the_others(name: str, precision: str) -> None:
    def at(batch: int, size: int) -> TraceSpec:
        make = functools.partial(timm.create_model, name, num_classes=10)
        return spec(make, batch, size=size, precision=precision, eval_batch_size=batch, key=name)

    tracer = Tracer()
    for batch, size in ((2, 96), (4, 96), (2, 128)):
        tracer.trace(at(batch, size))
    known = sum(len(traces) for traces in tracer.known.values())
    derived, direct = tracer.trace(at(25, 224)), trace(at(25, 224))
    # autocast's cache of weights dies in no fixed order
    assert replace(derived, numbers=()) == replace(direct, numbers=())
    assert sorted(derived.numbers) == sorted(direct.numbers)
    assert sum(len(traces) for traces in tracer.known.values()) == known


def test_an_uneven_split_and_accumulation_are_derived_too() -> None:
    tracer = Tracer()
    for parts in ((3, 2), (4, 4), (2, 2)):
        tracer.trace(spec(Conv, *parts, key="conv"))
    wanted = spec(Conv, 6, 5, 5, 5, key="conv")
    assert tracer.trace(wanted) == trace(wanted)
    assert len(next(iter(tracer.known.values()))) < 4


def test_sizes_off_the_stride_are_traced_themselves() -> None:
    tracer = Tracer()
    for batch, size in ((2, 96), (4, 96), (2, 128)):
        tracer.trace(spec(Conv, batch, size=size, key="conv"))
    wanted = spec(Conv, 3, size=100, key="conv")
    assert tracer.trace(wanted) == trace(wanted)
    assert len(next(iter(tracer.known.values()))) == 4


def test_sizes_that_grow_faster_than_the_area_are_traced_themselves() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 8, 16, 16)
            self.head = nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.embed(x).flatten(2).transpose(1, 2)
            mixed: Tensor = (tokens @ tokens.transpose(1, 2)).softmax(-1) @ tokens
            scores: Tensor = self.head(mixed.mean(1))
            return scores

    tracer = Tracer()
    for batch, size in ((2, 64), (4, 64), (2, 96), (2, 128)):
        tracer.trace(spec(Attention, batch, size=size, key="attention"))
    wanted = spec(Attention, 3, size=224, key="attention")
    assert tracer.trace(wanted) == trace(wanted)


def test_without_a_key_nothing_is_shared() -> None:
    tracer = Tracer()
    tracer.trace(spec(Conv, 2))
    assert tracer.known == {}


@pytest.mark.parametrize(
    "other",
    [
        {"precision": "bf16"},
        {"ema": True},
        {"clip_grad": True},
        {"undo": True},
        {"summed": True},
        {"cuda": False},
        {"eval_batch_size": 2},
    ],
)
def test_whatever_changes_the_events_has_traces_of_its_own(other: dict[str, Any]) -> None:
    plain = spec(Conv, 2, key="conv")
    assert replace(plain, **other).signature != plain.signature
    assert replace(plain, micro_batches=(3,), input_shape=(3, 96, 96)).signature == plain.signature


# -- what is held


def born(found: Trace) -> int:
    return sum(
        found.sizes[n] for k, n in zip(found.kinds[: found.update_start], found.numbers, strict=False) if k == Kind.BORN
    )


def test_the_undo_keeps_buffers_and_what_an_allocating_step_changes() -> None:
    buffers = sum(t.numel() * t.element_size() for t in Conv().buffers())
    weights = sum(t.numel() * t.element_size() for t in Conv().parameters())

    def left(optimizer: Callable[[nn.Module], Optimizer], undo: bool) -> int:
        found = trace(spec(Conv, 2, make_optimizer=optimizer, undo=undo))
        live = {n for k, n in zip(found.kinds, found.numbers, strict=True) if k == Kind.BORN}
        live -= {n for k, n in zip(found.kinds, found.numbers, strict=True) if k == Kind.DIED}
        return sum(found.sizes[n] for n in live)

    def extra(optimizer: Callable[[nn.Module], Optimizer]) -> int:
        return left(optimizer, True) - left(optimizer, False)

    small = buffers + 4 * len(METERS)
    assert extra(lambda m: SGD(m.parameters(), 0.1, momentum=0.9, fused=True)) == small
    assert extra(lambda m: AdamW(m.parameters(), fused=True)) == small
    assert extra(lambda m: AdamW(m.parameters(), foreach=True)) == small + 3 * weights


def test_copies_that_an_allocating_step_needs_are_made_beside_the_gradients() -> None:
    found = trace(spec(Conv, 2, make_optimizer=lambda m: AdamW(m.parameters(), foreach=True), undo=True))
    last_born = max(n for k, n in zip(found.kinds, found.numbers, strict=True) if k == Kind.BORN)
    events = list(zip(found.kinds, found.numbers, strict=True))[found.update_start : found.evaluation_start]
    at = events.index((Kind.BORN, last_born))
    assert sum(k == Kind.DIED for k, _ in events[at:]) > len(list(Conv().parameters())), "gradients die after it"


def test_copies_are_told_from_what_the_update_itself_makes() -> None:
    weights = sum(t.numel() * t.element_size() for t in Conv().parameters())

    def copied(optimizer: Callable[[nn.Module], Optimizer], undo: bool) -> int:
        found = trace(spec(Conv, 2, make_optimizer=optimizer, undo=undo))
        return sum(found.sizes[n] for n in range(*found.copies))

    assert copied(lambda m: AdamW(m.parameters(), foreach=True), True) == 3 * weights, "weights, two kinds of state"
    assert copied(lambda m: AdamW(m.parameters(), foreach=True), False) == 0
    assert copied(lambda m: AdamW(m.parameters(), fused=True), True) == 0, "it allocates nothing"


def test_the_moving_average_is_kept() -> None:
    plain, averaged = trace(spec(Conv, 2)), trace(spec(Conv, 2, ema=True))
    assert born(averaged) - born(plain) == sum(t.numel() * t.element_size() for t in Conv().state_dict().values())


@pytest.mark.parametrize(("cuda", "contiguous"), [(True, True), (True, False), (False, False)])
def test_layer_norm_on_cuda_copies_what_is_not_contiguous(cuda: bool, contiguous: bool) -> None:
    """Its kernels want their inputs, and backward the gradient too, in one piece: copies that last as long as they do.

    All tensors of 4 * 8 * 16 float32 are 2048 bytes. Else, forward brings the output, and backward two gradients: that
    of the output, made here, and that of the input.
    """
    recorder = Recorder(cuda=cuda)
    with fake_device(cuda=cuda), recorder:
        x = torch.empty((4, 8, 16) if contiguous else (4, 16, 8), requires_grad=True)
        x = x if contiguous else x.transpose(1, 2)
        start = len(recorder.kinds)
        y = functional.layer_norm(x, (16,))
        backward = len(recorder.kinds)
        y.backward(torch.empty_like(x))  # type: ignore[no-untyped-call]

    def copies(first: int, last: int) -> list[bool]:
        """Of the large ones that are born in a stretch, whether they die in it."""
        events = list(zip(recorder.kinds, recorder.numbers, strict=True))[first:last]
        return [(Kind.DIED, n) in events for k, n in events if k == Kind.BORN and recorder.sizes[n] == 2048]

    hidden = cuda and not contiguous
    assert copies(start, backward) == [True] * hidden + [False]
    assert len(copies(backward, len(recorder.kinds))) == 2 + 2 * hidden


def test_half_precision_saves_activations() -> None:
    for precision in ("fp16", "bf16"):
        half, single = (predict(spec(Conv, 64, size=224, precision=p)).live_bytes for p in (precision, "fp32"))
        assert half is not None
        assert single is not None
        assert 0.4 * single < half < 0.8 * single


def test_a_bias_gradient_leaves_the_mark_of_a_sum() -> None:
    """Of rows of values side by side; in a convolution only with channels last."""

    def sums(network: Callable[[], nn.Module], **settings: Any) -> list[tuple[int, int]]:
        found = trace(spec(network, 4, size=32, **settings))
        marks = [
            found.sizes[n] for k, n in zip(found.kinds, found.numbers, strict=True) if k in (Kind.SUM, Kind.SUMMED)
        ]
        return list(zip(marks[::2], marks[1::2], strict=True))

    assert sums(lambda: nn.Sequential(nn.Flatten(2), nn.Linear(1024, 10), nn.Flatten())) == [(12, 10)]

    def convolutions() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1, bias=False), nn.Flatten())

    assert sums(convolutions) == []
    assert sums(convolutions, channels_last=True) == [(4096, 8)]


# -- what cannot be traced


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Conv()

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.net(x)
        return scores[x.flatten(1).amax(1) > 0.5]


class Breaks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("no such mode")


class LooksAtValuesWhenBuilt(Conv):
    def __init__(self) -> None:
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]


def test_a_network_that_cannot_be_traced_is_told_with_the_reason() -> None:
    with pytest.raises(TraceError, match=r"DataDependentOutput|DynamicOutput|Unsupported"):
        trace(spec(DataDependent, 4))
    with pytest.raises(TraceError, match="no such mode"):
        trace(spec(Breaks, 4, make_optimizer=lambda m: SGD([nn.Parameter(torch.zeros(1))], 0.1)))


def test_a_network_that_looks_at_values_while_it_is_built() -> None:
    found = trace(spec(LooksAtValuesWhenBuilt, 2))
    assert found.sizes == trace(spec(Conv, 2)).sizes


def test_tracing_leaves_no_trace() -> None:
    before = torch.get_rng_state()
    trace(spec(Conv, 2, precision="fp16"))
    assert torch.equal(before, torch.get_rng_state())
    x = torch.rand(2, 3, 8, 8)
    assert Conv()(x).sum().isfinite()
    with torch.autocast("cpu", torch.bfloat16):  # the rules of CUDA are gone: the CPU's layer_norm keeps its type
        assert nn.functional.layer_norm(x.bfloat16(), (8, 8)).dtype == torch.bfloat16


def test_stretches() -> None:
    found = trace(spec(Conv, 2, eval_batch_size=2))
    assert 0 < found.update_start < found.evaluation_start < len(found.kinds)
    assert trace(spec(Conv, 2)).evaluation_start == len(trace(spec(Conv, 2)).kinds)
