"""Offloaded activations: the same bits, host memory that is used again, and what leaves the device and what stays."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptive_trainer.errors import OutOfMemory
from adaptive_trainer.memory.limit import Capacity
from adaptive_trainer.memory.simulated import SimulatedDevice
from adaptive_trainer.models.memory_format import to_channels_last
from adaptive_trainer.models.recomputing import keeper, offloading
from adaptive_trainer.models.recomputing.following import host_memory_of
from adaptive_trainer.models.recomputing.offloading import AHEAD, STASH, moves_noted
from adaptive_trainer.models.recomputing.values import Changed
from adaptive_trainer.models.savers.offload import apply as offload
from adaptive_trainer.models.savers.recompute import apply as recompute
from adaptive_trainer.prediction.transfer import PCIE_3, added_seconds
from tests.support.faults import Fault, differences, dump
from tests.support.runs import Case, start

MiB = 2**20


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offload what is small as well, as these networks are."""
    monkeypatch.setattr(keeper, "SMALL", 0)


def moved_by(model: nn.Module, images: Tensor, **named: Any) -> list[int]:
    """Bytes of each storage that a forward pass sends to the host."""
    moved: list[int] = []
    with moves_noted(moved.append):
        model.train()(images, **named)
    return moved


# ---- the same bits ---------------------------------------------------------------------------------------------------

TRAININGS = (
    Case("sgd", "fp32", warm=False, model="test_vit", image_size=160),
    Case("adamw-foreach", "bf16", warm=False, model="test_vit", image_size=160),
    Case("adamw-fused", "fp16", warm=False, model="test_efficientnet", image_size=64),
    Case("lion", "bf16", warm=True, model="test_resnet", image_size=64),
    Case("sgd", "fp32", warm=False),
    Case("adamw-single", "fp16", warm=False, scale=2.0**30),
)


@pytest.mark.long
@pytest.mark.parametrize("value", ["none", "cheap"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", TRAININGS, ids=str)
@pytest.mark.usefixtures("small")
def test_training_is_the_same(case: Case, channels_last: bool, value: str, capacity: Capacity) -> None:
    """In micro-batches, with clipping, an average, dropped paths and dropout."""
    found = []
    for saves in (True, False):
        run = start(case, capacity)
        recompute(run.state.model, value if saves else "none")
        offload(run.state.model, saves)
        if channels_last:
            to_channels_last(run.state.model)
        for _ in range(3):
            run.advance(run.update())
        found.append(dump(run.state))
    assert differences(*found) == []


class Writing(nn.Module):
    """Writes into what was kept before: autograd needs what `sin` has seen, and so does the backward of the product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 64), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = x * 2
        z = torch.sin(y.detach() + x)
        with torch.no_grad():
            y.mul_(3)
        out: Tensor = self.last(z + y)
        return out


@pytest.mark.parametrize("value", ["none", "cheap"])
@pytest.mark.usefixtures("small")
def test_what_is_written_after_it_was_kept_is_what_it_was(value: str) -> None:
    found = []
    for offloads in (False, True):
        torch.manual_seed(0)
        model = Writing()
        recompute(model, value)
        offload(model, offloads)
        model(torch.randn(5, 8)).sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *found))


def test_what_is_written_after_the_pass_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(8, 5 * 2**18), nn.Sigmoid())
    offload(model, True)
    out = model(torch.randn(2, 8))
    out.detach().mul_(2)
    with pytest.raises(Changed, match="changed in place"):
        out.sum().backward()


# ---- what leaves the device ------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Keeps three views of one storage, and a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.table = nn.Linear(64, 192, bias=False), nn.Parameter(torch.ones(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        out: Tensor = (q * k * v) @ self.table
        return out


@pytest.mark.usefixtures("small")
def test_a_storage_goes_once_and_weights_buffers_and_the_input_never() -> None:
    model, images = Attention(), torch.randn(4, 10, 64)
    offload(model, True)
    product = 4 * 10 * 64 * 4
    # q, k and v lie in one storage; then q * k; then the whole product. The input and both weights are kept too.
    assert moved_by(model, images) == [3 * product, product, product]


def test_what_is_small_stays() -> None:
    width = keeper.SMALL // 4
    model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width - 1), nn.ReLU())
    offload(model, True)
    assert moved_by(model, torch.randn(3, 8)) == [3 * 4 * width]


def test_without_gradients_nothing_goes() -> None:
    model = nn.Sequential(nn.Linear(8, 2**15), nn.ReLU())
    offload(model, True)
    with torch.no_grad():
        assert moved_by(model, torch.randn(3, 8)) == []
    moved: list[int] = []
    with moves_noted(moved.append):
        model.eval()(torch.randn(3, 8))
    assert moved == []


def test_few_are_on_the_device_at_a_time() -> None:
    """However deep the network is: those on their way, those that are computed with, and gradients."""
    width, peaks = 2**18, []
    for depth in (8, 32):
        model = nn.Sequential(*[nn.Sigmoid() for _ in range(depth)])
        offload(model.train(), True)
        device = SimulatedDevice(2**34)
        with device.work(None):
            model(torch.zeros(1, width, requires_grad=True) * 1).sum().backward()
        peaks.append(device.usage().peak_allocated / (4 * width))
    assert peaks[0] == pytest.approx(peaks[1], abs=0.1)
    assert peaks[0] < STASH + AHEAD + 5


# ---- host memory -----------------------------------------------------------------------------------------------------


def deep(width: int = 2**16) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), *[nn.Sigmoid() for _ in range(6)], nn.Linear(width, 1)).train()


def nbytes_on_host(model: nn.Module) -> int:
    memory = host_memory_of(model)
    assert memory is not None
    return memory.nbytes


def test_host_memory_is_made_once_and_goes_when_it_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offloading, "CHUNK", 2**20)
    model = deep()
    offload(model, True)
    assert host_memory_of(model) is None
    model(torch.randn(4, 8)).sum().backward()
    first = nbytes_on_host(model)
    moved = sum(moved_by(model, torch.randn(4, 8)))
    assert moved <= first < moved + 2 * MiB
    for size in (4, 2, 3, 4):  # smaller batches take no more
        model(torch.randn(size, 8)).sum().backward()
    assert nbytes_on_host(model) == first
    offload(model, False)
    assert host_memory_of(model) is None


def test_passes_that_overlap_have_host_memory_of_their_own() -> None:
    model, plain = deep(), deep()
    plain.load_state_dict(model.state_dict())
    offload(model, True)
    x, y = torch.randn(2, 4, 8)
    for each in (model, plain):
        (each(x) * each(y)).sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))  # type: ignore[arg-type]
    twice = nbytes_on_host(model)
    (model(x) * model(y)).sum().backward()
    assert nbytes_on_host(model) == twice


def test_a_backward_pass_may_run_again() -> None:
    model = deep()
    offload(model, True)
    loss = model(torch.randn(4, 8)).sum()
    once = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    again = torch.autograd.grad(loss, list(model.parameters()))
    assert all(map(torch.equal, once, again))


def test_what_autograd_has_saved_can_be_looked_at() -> None:
    model = deep()
    offload(model, True)
    images = torch.randn(4, 8)
    out = model(images)
    node = out.grad_fn
    while node is not None and "Sigmoid" not in node.name():
        node = next(each for each, _ in node.next_functions if each is not None and "Accumulate" not in each.name())
    assert node is not None
    with torch.no_grad():
        expected = nn.Sequential(*list(model.children())[:-1])(images)
    assert torch.equal(node._saved_result, expected)


def test_nothing_is_left_of_a_pass() -> None:
    model = deep()
    offload(model, True)
    gc.collect()
    gc.disable()
    try:
        fault = Fault()
        with fault:
            model(torch.randn(4, 8)).sum().backward()
            model(torch.randn(4, 8))
        tensors = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
        known = {tensor.untyped_storage()._cdata for tensor in tensors}
        assert fault.left_over(known) == 0, "and no garbage collection was needed"
    finally:
        gc.enable()


def test_host_memory_is_no_part_of_the_network() -> None:
    model = deep()
    offload(model, True)
    model(torch.randn(4, 8)).sum().backward()
    assert nbytes_on_host(model) > 0
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert host_memory_of(twin) is None
        assert moved_by(twin, torch.randn(4, 8)) != []


def short(*_: object) -> Tensor:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: made up")


@pytest.mark.usefixtures("small")
def test_where_host_memory_is_short_the_update_leaves_no_trace(
    capacity: Capacity, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(Case("adamw-foreach", "fp32", warm=True), capacity)
    offload(run.state.model, True)
    update, before = run.update(), dump(run.state)
    with monkeypatch.context() as patch:
        patch.setattr(offloading, "_chunk", short)
        with pytest.raises(OutOfMemory, match="can't allocate memory"):
            run.advance(update)
    assert differences(dump(run.state), before) == []
    run.advance(update)
    assert run.state.updates == 2


# ---- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nbytes", "compute", "expected"),
    [
        (0, 1.0, 0.0),
        (12 * 10**9, 0.0, 2.0),  # a second there and a second back
        (12 * 10**9, 7.5, 0.0),  # both beside the computation
        (12 * 10**9, 1.5, 0.8 + 0.6),
        (12 * 10**9, 3.75, 0.5 + 0.0),
    ],
)
def test_what_the_computation_hides_costs_nothing(nbytes: int, compute: float, expected: float) -> None:
    assert added_seconds(nbytes, PCIE_3[16], compute) == pytest.approx(expected)
    assert added_seconds(nbytes, PCIE_3[4], 0.0) == 4 * added_seconds(nbytes, PCIE_3[16], 0.0)
