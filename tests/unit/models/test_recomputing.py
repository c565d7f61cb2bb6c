"""What networks do in a forward pass, and how it is differentiated: recomputed, the bits are the same."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_modules
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from adaptive_trainer.models.recomputing import keeper
from adaptive_trainer.models.savers.offload import apply as offload
from adaptive_trainer.models.savers.recompute import apply as recompute

Program = Callable[["Block", Tensor], Any]  # a tensor, which mypy does not always see
PLANS = (
    "cheap",
    "whole:rest",
    "least:rest",
    "most:blocks.0|blocks.1+cheap:rest",
    "least:blocks.0+cheap:blocks.1",
    "cheap:blocks.0.conv|blocks.1.norm+most:blocks.0+least:blocks.1",
    "whole:blocks+most:blocks.0+keep:blocks.1",
)


class Block(nn.Module):
    level: Tensor

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.conv, self.norm, self.last = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.linear, self.rnn = nn.Linear(8, 8), nn.LSTM(8, 8, num_layers=2, dropout=0.1, batch_first=True)
        self.scale = nn.Parameter(torch.full((1, 8, 1, 1), 1.3))
        self.register_buffer("level", torch.zeros(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.program(self, x) * self.scale
        return out


class Network(nn.Module):
    def __init__(self, program: Program) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.blocks = nn.ModuleList([Block(program), Block(program)])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x.mean((2, 3)))
        return out


PROGRAMS: dict[str, Program] = {}


def program(function: Program) -> Program:
    PROGRAMS[function.__name__] = function
    return function


@program
def writes_a_view_of_what_was_used(block: Block, x: Tensor) -> Any:
    y = block.conv(x) * 2
    z = (y + 1).exp()
    y[:, 0:3].mul_(3)
    return block.last((y * block.scale) * z.sigmoid())


@program
def writes_after_a_dear_operator(block: Block, x: Tensor) -> Any:
    y = block.conv(x) * 2
    z = block.last((y + 1).sigmoid())
    y.mul_(3)
    return z * (y * block.scale)


@program
def writes_what_lies_in_a_product(block: Block, x: Tensor) -> Any:
    y = block.linear(x.permute(0, 2, 3, 1)).mul_(2)
    return (F.gelu(y) * y.mul(block.scale.view(8))).permute(0, 3, 1, 2)


@program
def writes_lists(block: Block, x: Tensor) -> Any:
    y = block.conv(x) * 1.5
    z = (y + 0.5).sigmoid()
    torch._foreach_mul_([y.detach()], 2.0)
    return y.detach().sin() * x * z


@program
def writes_by_name(block: Block, x: Tensor) -> Any:
    y = (block.conv(x) * 1.5).detach()
    values, places = y + 0, torch.zeros_like(y, dtype=torch.long)
    torch.sort(y, dim=1, out=(values, places))
    return x * values.sin() + block.scale * values


@program
def writes_without_torch(block: Block, x: Tensor) -> Any:
    y = block.conv(x).sigmoid()
    filled = torch.zeros_like(y)
    filled.numpy()[...] = np.sin(y.detach().numpy())
    return y * filled


@program
def reads_running_statistics(block: Block, x: Tensor) -> Any:
    y = (x - block.norm.running_mean.view(1, -1, 1, 1)).exp().clamp(max=3)  # type: ignore[union-attr]
    return block.norm(block.conv(y * block.scale)).relu()


@program
def gives_buffers_other_memory(block: Block, x: Tensor) -> Any:
    y = ((x * block.scale) + block.level).sigmoid()
    block.level.data.add_(1.0)
    z = (y + block.level).tanh()
    block.level.data = block.level.data * 1.1
    return z * y + block.level


@program
def reads_a_buffer_that_the_next_pass_writes(block: Block, x: Tensor) -> Any:
    y = block.conv(x).relu()
    with torch.no_grad():
        block.level.mul_(0.9).add_(y.mean((0, 2, 3), keepdim=True))
        most = (y * 2).max()
    return y * (block.level.clone() * 1.1).sigmoid() * most


@program
def conjugates(block: Block, x: Tensor) -> Any:
    y = torch.complex(block.conv(x), x) * block.scale
    conjugate = y.conj()
    return (conjugate * y.sin()).imag * conjugate.imag.sin()


@program
def counts_memory_from_the_beginning(block: Block, x: Tensor) -> Any:
    y = block.conv(x) * 2
    part = y[:, 2:]
    part.mul_(block.scale[:, 2:])
    few = part.as_strided((2, 3), (3, 1), part.storage_offset() + 7)
    return block.last(x) * (few * few).exp().clamp(max=9).sum().sin()


@program
def draws(block: Block, x: Tensor) -> Any:
    y = F.dropout2d(F.silu(F.dropout(block.conv(x), 0.3, True)), 0.2, True) * torch.rand_like(x)
    y = F.dropout(y * block.scale, 0.1, True, inplace=True)
    return F.rrelu(F.alpha_dropout(y, 0.1, True), training=True) * torch.empty_like(x).normal_()


@program
def uses_other_settings(block: Block, x: Tensor) -> Any:
    with torch.backends.mkldnn.flags(enabled=False):
        y = block.conv(x).relu()
    torch.set_default_dtype(torch.float64)
    try:
        thirds = (y * 10).detach().long() / 3
    finally:
        torch.set_default_dtype(torch.float32)
    return block.last(y).sigmoid() * thirds.sin().float()


@program
def is_sparse_in_part(block: Block, x: Tensor) -> Any:
    places = torch.arange(8)
    matrix = torch.sparse_coo_tensor(torch.stack([places, places.flip(0)]), torch.ones(8), (8, 8))
    y = torch.sparse.mm(matrix, block.conv(x).permute(1, 0, 2, 3).reshape(8, -1)).relu()
    return y.view(8, x.shape[0], *x.shape[2:]).permute(1, 0, 2, 3) * x.detach().to_mkldnn().to_dense().sin()


@program
def is_recurrent(block: Block, x: Tensor) -> Any:
    y: Tensor = block.rnn(x.flatten(2).transpose(1, 2).sin())[0].relu()
    return y.transpose(1, 2).reshape(x.shape)


@program
def maps_and_checkpoints(block: Block, x: Tensor) -> Any:
    y = torch.vmap(lambda each: (each * 2).sin() * each)(block.conv(x))
    y = checkpoint(lambda z: F.silu(F.dropout(block.last(z), 0.2, True)), y * block.scale, use_reentrant=False)
    return checkpoint(lambda z: F.silu(block.last(z) * 1.1), y.sin(), use_reentrant=True).cos()


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        y = (a * b).sin()
        a.mul_(2)
        ctx.mark_dirty(a)
        ctx.save_for_backward(y, b)
        ctx.twice = y * 2
        return a, y

    @staticmethod
    def backward(ctx: Any, of_a: Tensor, of_y: Tensor) -> tuple[Tensor, Tensor]:
        y, b = ctx.saved_tensors
        return of_a * 2 * b + of_y * y * ctx.twice, (of_a * y + of_y).sum((0, 2, 3), keepdim=True)


@program
def has_functions_of_its_own(block: Block, x: Tensor) -> Any:
    a, y = Doubling.apply(block.conv(x) * 1.5, block.scale)
    return a.sigmoid() * y.tanh()


@program
def has_pools_parts_and_no_elements(block: Block, x: Tensor) -> Any:
    y, places = F.max_pool2d(block.conv(x), 2, return_indices=True)
    y = F.max_unpool2d(F.silu(y), places, 2)  # type: ignore[arg-type]
    first, second = y.mul(block.scale).chunk(2, 1)
    a, b, c, d = first.relu().unbind(1)
    none = y[:, :0].sin()
    return torch.cat([torch.stack([a * b, c * d, a.sin(), d.exp()], 1), none.exp(), second.tanh()], 1).add_(x)


@program
def is_autocast(block: Block, x: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        y = F.gelu(block.last(F.silu(block.norm(block.conv(x)))))
        return F.layer_norm(block.linear(y.permute(0, 2, 3, 1)), (8,)).permute(0, 3, 1, 2).float()


def plain(model: nn.Module, x: Tensor) -> None:
    model(x).square().sum().backward()


def twice(model: nn.Module, x: Tensor) -> None:
    loss = model(x).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()


def two_passes(model: nn.Module, x: Tensor) -> None:
    first, second = model(x).square().sum(), model(x * 2).sin().sum()
    first.backward()
    second.backward()


def twofold(model: nn.Module, x: Tensor) -> None:
    loss = model(x).square().sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + gradient.square().sum()).backward()


USES = (plain, twice, two_passes, twofold)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "SMALL", 0)


def facts(model: nn.Module, use: Callable[[nn.Module, Tensor], None]) -> dict[str, bytes]:
    """All bits that a use of the network leaves."""
    torch.manual_seed(3)
    images = torch.randn(2, 3, 6, 6).requires_grad_()
    use(model.train(), images)
    found = {"images": images.grad, "rng": torch.get_rng_state(), **dict(model.named_buffers())}
    found |= {f"{name}.grad": parameter.grad for name, parameter in model.named_parameters()}
    return {name: tensor.numpy().tobytes() for name, tensor in found.items() if tensor is not None}


def made(program: Program) -> nn.Module:
    torch.manual_seed(0)
    return Network(program)


@pytest.mark.long
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.filterwarnings("ignore")
def test_bits_are_the_same(name: str, use: Callable[[nn.Module, Tensor], None]) -> None:
    if use is twofold and name == "is_recurrent":
        pytest.skip("torch differentiates it once")
    if use is twofold and name == "maps_and_checkpoints":
        pytest.skip("reentrant checkpoints are differentiated by backward() alone")
    model = made(PROGRAMS[name])
    expected = facts(copy.deepcopy(model), use)
    for plan in PLANS:
        saving = copy.deepcopy(model)
        recompute(saving, plan)
        assert facts(saving, use) == expected, plan
        if name != "gives_buffers_other_memory":  # what it writes unseen, plain autograd reads written
            offload(saving, True)
            saving.load_state_dict(model.state_dict())
            saving.zero_grad()
            assert facts(saving, use) == expected, plan


# ---- programs by chance ----------------------------------------------------------------------------------------------

MAPS: list[Callable[..., Tensor]] = [
    lambda block, a, b: block.conv(a),
    lambda block, a, b: block.last(a) * block.scale,
    lambda block, a, b: block.norm(a),
    lambda block, a, b: a.sin(),
    lambda block, a, b: a.sigmoid() * b,
    lambda block, a, b: a + b,
    lambda block, a, b: torch.cat([a[:, :3], b[:, 3:]], 1),
    lambda block, a, b: a.detach() * 2,
    lambda block, a, b: a.flip(1).transpose(2, 3).contiguous(),
    lambda block, a, b: a.mean((2, 3), keepdim=True).expand_as(a),
    lambda block, a, b: F.dropout(a, 0.3),
    lambda block, a, b: a.view(a.shape[0], -1).view_as(a) if a.is_contiguous() else a.reshape(a.shape),
    lambda block, a, b: F.relu(a),
]
WRITES: list[Callable[..., object]] = [
    lambda block, a, b: a.mul_(0.5),
    lambda block, a, b: a[:, 1:4].add_(1),
    lambda block, a, b: a[:, :2].copy_(b[:, 2:4].clone()),
    lambda block, a, b: a.sigmoid_(),
    lambda block, a, b: F.hardtanh(a, -1, 1, inplace=True),
    lambda block, a, b: a.detach().mul_(1.5),
    lambda block, a, b: block.level.add_(a.detach().mean((0, 2, 3), keepdim=True)),
    lambda block, a, b: a.add_(block.level),
]
STEPS = st.lists(
    st.tuples(st.booleans(), st.integers(0, 99), st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=14
)


def by_steps(steps: list[tuple[bool, int, int, int]]) -> Program:
    def run(block: Block, x: Tensor) -> Any:
        known = [x, block.conv(x)]
        for writes, which, first, second in steps:
            a, b = known[-1 - first % len(known)], known[-1 - second % len(known)]
            if writes:
                WRITES[which % len(WRITES)](block, a, b)
            else:
                known.append(MAPS[which % len(MAPS)](block, a, b))
        return known[-1] + known[len(known) // 2].tanh()

    return run


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(STEPS, st.sampled_from(PLANS), st.sampled_from(USES))
def test_programs_by_chance(
    steps: list[tuple[bool, int, int, int]], plan: str, use: Callable[[nn.Module, Tensor], None]
) -> None:
    model = made(by_steps(steps))
    try:
        expected = facts(copy.deepcopy(model), use)
    except RuntimeError:  # torch refuses what was changed in place
        return
    recompute(model, plan)
    assert facts(model, use) == expected


# ---- around the pass -------------------------------------------------------------------------------------------------


def usual(block: Block, x: Tensor) -> Any:
    return F.silu(block.norm(block.conv(x))) + F.dropout(x, 0.1)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_a_pass_that_fails_leaves_no_hook_and_no_mode(error: type[BaseException]) -> None:
    model = made(usual)
    recompute(model, PLANS[3])
    before = len(torch_modules._global_forward_hooks), len(torch_modules._global_forward_pre_hooks)

    def fail(*_: Any) -> None:
        raise error

    hook = model.get_submodule("blocks.1.norm").register_forward_hook(fail)
    with pytest.raises(error):
        model(torch.randn(2, 3, 6, 6))
    hook.remove()
    assert (len(torch_modules._global_forward_hooks), len(torch_modules._global_forward_pre_hooks)) == before
    assert _get_current_dispatch_mode() is None
    expected, found = made(usual), model
    found.load_state_dict(expected.state_dict())
    assert facts(found, plain) == facts(expected, plain)


def test_trainings_in_several_threads_are_each_their_own() -> None:
    def gradients(number: int, plan: str, into: dict[int, Any]) -> None:
        into[number] = []
        for scale in range(10):
            models[number].zero_grad()
            models[number](images * (number + scale)).square().sum().backward()
            into[number].append([p.grad.clone() for p in models[number].parameters() if p.grad is not None])

    def still(block: Block, x: Tensor) -> Any:
        return F.silu(block.norm(block.conv(x)))

    images, found = torch.randn(2, 3, 6, 6), []
    for plan in ("none", PLANS[3]):
        models = [made(still).train() for _ in range(3)]
        for model in models:
            recompute(model, plan)
        of_threads: dict[int, Any] = {}
        threads = [threading.Thread(target=gradients, args=(number, plan, of_threads)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found.append(of_threads)
    plain, saving = (torch.cat([g.flatten() for i in range(3) for step in each[i] for g in step]) for each in found)
    assert torch.equal(plain, saving)


@pytest.mark.parametrize("plan", PLANS)
def test_nothing_lives_longer_than_the_backward_pass(plan: str) -> None:
    model, alive = made(usual), []
    recompute(model, plan)
    for module in list(model.modules())[1:]:
        module.register_forward_hook(lambda *given: alive.append(weakref.ref(given[2].untyped_storage())))
    gc.disable()  # by references alone, without a collection
    try:
        loss = model(torch.randn(2, 3, 6, 6)).square().sum()
        assert any(ref() is not None for ref in alive)
        loss.backward()
        assert all(ref() is None for ref in alive)
    finally:
        gc.enable()


class Failing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails at one of the operators, and knows the memory of the results of those before it."""

    def __init__(self, number: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left = number
        self.alive: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        out = func(*args, **(kwargs or {}))
        self.alive += [weakref.ref(each.untyped_storage()) for each in tree_leaves(out) if isinstance(each, Tensor)]
        return out


@program
def saves_results(block: Block, x: Tensor) -> Any:
    y = block.conv(x).sigmoid()
    return block.last(F.silu(block.norm(y), inplace=True) * y.mean((2, 3), keepdim=True).sigmoid()).exp()


@pytest.mark.long
@pytest.mark.parametrize("is_offloaded", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_nothing_stays_of_a_pass_that_fails(plan: str, is_offloaded: bool) -> None:
    """At any of its operators: an error is followed by no backward pass that would free what was kept."""
    model, images = made(saves_results).train(), torch.randn(2, 3, 6, 6)
    recompute(model, plan)
    offload(model, is_offloaded)
    number, has_failed = 0, True
    while has_failed:
        stays = {id(tensor.untyped_storage()) for tensor in (images, *model.parameters(), *model.buffers())}
        failing, has_failed = Failing(number), False
        try:
            with failing:
                model(images).square().sum().backward()
        except torch.OutOfMemoryError:
            has_failed = True
        model.zero_grad()
        gc.collect()
        torch.zeros((), requires_grad=True).backward()  # type: ignore[no-untyped-call]
        left = [storage for ref in failing.alive if (storage := ref()) is not None and id(storage) not in stays]
        assert left == [], f"failed at operator {number}"
        number += 7
    assert number > 70


def test_a_network_from_a_file_recomputes_with_its_own_weights() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.SiLU()))
    recompute(model, "whole:1+cheap:rest")
    twin = pickle.loads(pickle.dumps(model))
    assert list(twin.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert twin(torch.randn(2, 3, 9, 9)).abs().sum() > 0


@pytest.mark.filterwarnings("ignore:TF32")
def test_other_settings_in_the_backward_pass_are_refused() -> None:
    model = made(usual)
    recompute(model, "whole:rest")
    loss = model(torch.randn(2, 3, 6, 6)).sum()
    with torch.backends.mkldnn.flags(enabled=False), pytest.raises(RuntimeError, match="torch's global settings"):
        loss.backward()


def shared() -> nn.Module:
    block = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.SiLU(), nn.Hardtanh(-1, 1, True))
    return nn.Sequential(nn.Conv2d(3, 8, 3), block, block, nn.Sequential(block))


def parametrized() -> nn.Module:
    first, second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
    return nn.Sequential(
        parametrizations.weight_norm(first), nn.ReLU(True), parametrizations.spectral_norm(second), nn.SiLU()
    )


@pytest.mark.parametrize("network", [shared, parametrized])
@pytest.mark.parametrize("plan", ["cheap", "most:1+cheap:rest", "least:rest", "cheap:1+most:rest"])
def test_shared_and_made_weights(network: Callable[[], nn.Module], plan: str) -> None:
    torch.manual_seed(0)
    model = network()
    expected = facts(copy.deepcopy(model), plain)
    recompute(model, plan)
    assert facts(model, plain) == expected
