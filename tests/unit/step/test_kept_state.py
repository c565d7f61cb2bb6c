"""What networks do to their own state beside the gradients: an out-of-memory anywhere leaves no trace of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import Dataset as TorchDataset

from adaptive_trainer.checkpoints import checkpoint, packing
from adaptive_trainer.config.overrides import compose_config
from adaptive_trainer.errors import OutOfMemory
from adaptive_trainer.memory.limit import Capacity
from adaptive_trainer.models.losses import CrossEntropy
from adaptive_trainer.models.recomputing import keeper
from adaptive_trainer.models.savers.offload import apply as offload
from adaptive_trainer.models.savers.recompute import apply as recompute
from adaptive_trainer.recipe import Recipe
from adaptive_trainer.step.copies import layout
from adaptive_trainer.step.dry_run import dry_run
from adaptive_trainer.step.update import Update
from adaptive_trainer.training.trainer import Trainer
from adaptive_trainer.utils.belongings import Belongings
from tests.support.faults import Fault, differences, dump
from tests.support.runs import CPU, OPTIMIZERS, Case, Run, start

Network = Callable[[], nn.Module]
SHAPES = Recipe(batch_size=7, micro_batch_size=7, eval_batch_size=5, image_size=8, num_classes=5)
ONCE_EVERY = 7  # operators: a failure that is retried needs a run of its own


def run_of(network: Network, capacity: Capacity, *, ema: bool = False) -> Run:
    run = start(Case("sgd", "fp32", warm=False, ema=ema, clip=False, accumulate=True), capacity, network)
    run.advance(run.update())
    run.schedule.apply(run.state.position.schedule_step(7))
    return run


def in_place(run: Run) -> list[Any]:
    """Which tensor objects lie where: identity, memory and layout of parameters and buffers."""
    found = tensors_of_network(run.state.model)
    return [(name, id(t), t.storage_offset(), t.shape, t.stride(), t.dtype) for name, t in found]


def check_operators(network: Network, capacity: Capacity, every: int, first: int, *, ema: bool = False) -> None:
    """Fail operators of the second update with all that follow; some once, and one update more."""
    expected = []
    undisturbed = run_of(network, capacity, ema=ema)
    update = undisturbed.update()
    for _ in range(2):
        undisturbed.advance(update)
        expected.append(dump(undisturbed.state))
    run = run_of(network, capacity, ema=ema)
    update, before, places = run.update(), dump(run.state), in_place(run)
    raised, at = True, first % every
    while raised:
        fault = Fault(at, keeps_failing=True)
        with suppress(OutOfMemory):
            run.advance(update, fault)
        raised = fault.raised > 0
        if raised:
            assert differences(dump(run.state), before) == [], at
            assert in_place(run) == places, at
            at += every
    assert at > 40
    assert differences(dump(run.state), expected[0]) == []
    for once in range(first % every, at, ONCE_EVERY * every):
        check_retry(run_of(network, capacity, ema=ema), once, expected)


def check_retry(run: Run, at: int, expected: list[dict[str, Any]]) -> None:
    update = run.update()
    run.advance(update, Fault(at))
    assert differences(dump(run.state), expected[0]) == [], at
    run.advance(update)
    assert differences(dump(run.state), expected[1]) == [], at


# ---- recomputed blocks -----------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recompute what is small as well, as these networks are."""
    monkeypatch.setattr(keeper, "SMALL", 0)


class Recomputed(nn.Module):
    """Blocks whose second computation may change no buffer: written to, bound anew, made by the first pass."""

    class Block(nn.Module):
        total: Tensor
        mean: Tensor

        def __init__(self, how: str) -> None:
            super().__init__()
            self.body, self.norm, self.how = nn.Linear(6, 6), nn.BatchNorm1d(6), how
            self.register_buffer("total", torch.zeros(()))
            self.register_buffer("mean", torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.norm(self.body(x)))
            with torch.no_grad():
                self.total += x.sum()
                if self.how == "bound":
                    self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
                elif self.how == "data":
                    self.mean.data = 0.9 * self.mean + 0.1 * x.mean(0)
                else:
                    self.mean.lerp_(x.mean(0), 0.1)
            return x + self.mean

    def __init__(self, how: str, *, within: bool, offloads: bool = False) -> None:
        super().__init__()
        blocks = [self.Block(how) for _ in range(2)]
        self.first = nn.Linear(192, 6)
        self.blocks = nn.Sequential(*[nn.Sequential(block, nn.Linear(6, 6)) for block in blocks] if within else blocks)
        self.head = nn.Linear(6, 5)
        recompute(self, "blocks")
        offload(self, offloads)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.first(x.flatten(1))))
        return out


@pytest.mark.parametrize("how", ["bound", "data", "written"])
@pytest.mark.parametrize("within", [False, True], ids=["a block", "within a block"])
@pytest.mark.parametrize("offloads", [False, True], ids=["", "offloaded"])
@pytest.mark.usefixtures("small")
def test_memory_that_runs_out_in_a_recomputed_block_leaves_no_trace(
    how: str, within: bool, offloads: bool, capacity: Capacity, every: int
) -> None:
    check_operators(lambda: Recomputed(how, within=within, offloads=offloads), capacity, every, len(how) + within)


@pytest.mark.parametrize("plan", ["cheap", "most:blocks.0|blocks.1+cheap:rest", "least:blocks.0+whole:blocks.1"])
@pytest.mark.usefixtures("small")
def test_memory_that_runs_out_under_a_plan_leaves_no_trace(plan: str, capacity: Capacity, every: int) -> None:
    def network() -> nn.Module:
        model = Recomputed("data", within=False)
        recompute(model, plan)
        return model

    check_operators(network, capacity, every, len(plan))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("offloads", [False, True])
def test_recomputed_blocks_train_as_others_do(offloads: bool, capacity: Capacity) -> None:
    runs = [run_of(lambda: Recomputed("bound", within=False, offloads=offloads), capacity) for _ in range(2)]
    recompute(runs[0].state.model, "none")
    offload(runs[0].state.model, False)
    for run in runs:
        run.advance(run.update())
    assert differences(dump(runs[0].state), dump(runs[1].state)) == []


# ---- layout ----------------------------------------------------------------------------------------------------------


class Changing(nn.Module):
    """Changes what its buffer, or its weight, is and where it lies, in every forward pass of training."""

    table: Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.body, self.head = how, nn.Linear(192, 6), nn.Linear(6, 5)
        self.register_buffer("table", torch.linspace(0, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x.flatten(1))
        if self.training:
            with torch.no_grad():
                getattr(self, self.how)(x)
        out: Tensor = self.head(x * (1 + self.table.double().mean().float()))
        return out

    def data_longer(self, x: Tensor) -> None:
        self.table.data = torch.cat([self.table, x[:1, 0]])

    def data_one(self, x: Tensor) -> None:
        """Of a shape that everything can be broadcast to, and back."""
        self.table.data = x.mean().reshape(1) if self.table.numel() > 1 else x.mean(0)

    def data_double(self, x: Tensor) -> None:
        self.table.data = self.table.double() / 3 + x.mean(0).double() / 7

    def data_bits(self, x: Tensor) -> None:
        """The same memory read as another type."""
        self.table.mul_(1.25) if self.table.is_floating_point() else None
        self.table.data = self.table.data.view(torch.int32 if self.table.is_floating_point() else torch.float32)

    def data_integer(self, x: Tensor) -> None:
        self.table.data = self.table.long() + 2**40 + 1

    def data_transposed(self, x: Tensor) -> None:
        self.table.data = x[:6, :4].contiguous().t() if self.table.ndim == 1 else self.table.data.t().contiguous()

    def data_view(self, x: Tensor) -> None:
        """Another stretch of a larger memory."""
        self.table.data = x.flatten()[1:13:2].clone() if self.table.numel() != 6 else x.flatten()[3:9]

    def data_expanded(self, x: Tensor) -> None:
        self.table.data = x.mean().reshape(1).expand(6)

    def bound_expanded(self, x: Tensor) -> None:
        self.table = x.mean().reshape(1).expand(5)

    def resize_larger(self, x: Tensor) -> None:
        size = self.table.numel()
        self.table.resize_(size + 1)[size] = x.sum()

    def resize_smaller_and_write(self, x: Tensor) -> None:
        self.table.resize_(max(2, self.table.numel() - 1)).mul_(0.5)

    def resize_shape(self, x: Tensor) -> None:
        self.table.resize_((2, 3) if self.table.ndim == 1 else (6,)).add_(1)

    def set_other(self, x: Tensor) -> None:
        self.table.set_(torch.cat([self.table, x[0, :1]]))  # type: ignore[call-overload]

    def set_offset(self, x: Tensor) -> None:
        storage = self.table.untyped_storage()
        self.table.set_(storage, storage.nbytes() // 4 - 3, (3,), (1,)).add_(1)

    def storage_freed(self, x: Tensor) -> None:
        """What is gone of the memory itself, and comes back with other values."""
        values = self.table.clone()
        self.table.untyped_storage().resize_(0)
        self.table.untyped_storage().resize_(24)
        self.table.copy_(0.5 * values)

    def weight_data(self, x: Tensor) -> None:
        self.head.weight.data = 0.9 * self.head.weight

    def weight_set(self, x: Tensor) -> None:
        self.head.bias.set_(self.head.bias * 0.5)  # type: ignore[call-overload]


WAYS = [name for name in vars(Changing) if "_" in name.strip("_")]


@pytest.mark.parametrize("how", WAYS)
def test_a_layout_that_changes_in_place_is_put_back(how: str, capacity: Capacity, every: int) -> None:
    check_operators(lambda: Changing(how), capacity, every, WAYS.index(how))


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.usefixtures("small")
def test_offloading_takes_what_changes_in_place_as_it_was(how: str, capacity: Capacity) -> None:
    runs = [run_of(lambda: Changing(how), capacity) for _ in range(2)]
    offload(runs[0].state.model, True)
    for _ in range(2):
        for run in runs:
            run.advance(run.update())
    assert differences(dump(runs[0].state), dump(runs[1].state)) == []


@pytest.mark.parametrize("how", [how for how in WAYS if "weight" not in how])
def test_an_average_takes_what_has_another_layout_as_it_is(how: str, capacity: Capacity, every: int) -> None:
    check_operators(lambda: Changing(how), capacity, every, WAYS.index(how) + 1, ema=True)
    run = run_of(lambda: Changing(how), capacity, ema=True)
    run.advance(run.update())
    assert run.state.ema is not None
    average = run.state.ema.module.get_buffer("table")
    assert (average.shape, average.dtype) == (run.state.model.table.shape, run.state.model.table.dtype)


@pytest.mark.parametrize("how", WAYS)
def test_a_dry_run_puts_layouts_back(how: str, capacity: Capacity) -> None:
    run = run_of(lambda: Changing(how), capacity)
    update, before, places = run.update(), dump(run.state), in_place(run)
    dry_run(update, SHAPES)
    assert differences(dump(run.state), before) == []
    assert in_place(run) == places


@pytest.mark.parametrize("how", WAYS)
def test_a_checkpoint_keeps_layouts(how: str, capacity: Capacity, tmp_path: Path) -> None:
    """A resumed run goes on as the one that was not stopped."""
    run, resumed = (run_of(lambda: Changing(how), capacity) for _ in range(2))
    fresh = Changing(how)
    resumed.state.factory = {name: layout(tensor) for name, tensor in tensors_of_network(fresh)}
    resumed.state.model, run.state.factory = fresh, resumed.state.factory
    resumed.state.optimizer = OPTIMIZERS["sgd"](fresh)
    checkpoint.save(tmp_path / "last.pt", packing.pack(run.state, CPU))
    saved = checkpoint.load(tmp_path / "last.pt")
    packing.unpack(saved, resumed.state, CPU, keep_groups=False, with_optimizer=True)
    assert differences(dump(resumed.state), dump(run.state)) == []
    for each in (run, resumed):
        each.advance(each.update())
    assert differences(dump(resumed.state), dump(run.state)) == []


def tensors_of_network(network: nn.Module) -> list[tuple[str, Tensor]]:
    return [*network.named_parameters(), *network.named_buffers()]


# ---- generators that a network, a loss or a data set owns ------------------------------------------------------------


@dataclass(slots=True)
class Slotted:
    rng: Any


def draw(generator: Any) -> float:
    if isinstance(generator, torch.Generator):
        return float(torch.rand((), generator=generator))
    if isinstance(generator, np.random.BitGenerator):
        return float(np.random.Generator(generator).normal())
    return float(generator.normal() if hasattr(generator, "normal") else generator.gauss(0, 1))


GENERATORS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.Generator().manual_seed(3),
    "python": lambda: random.Random(3),
    "numpy": lambda: np.random.default_rng(3),
    "numpy of old": lambda: np.random.RandomState(3),
    "numpy's bits": lambda: np.random.Philox(3),
    "sfc64": lambda: np.random.Generator(np.random.SFC64(3)),
    "mt19937": lambda: np.random.Generator(np.random.MT19937(3)),
}
PLACES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "alone": (lambda g: g, lambda held: held),
    "list": (lambda g: [None, g], lambda held: held[1]),
    "tuple": (lambda g: ((g,), 0), lambda held: held[0][0]),
    "dictionary": (lambda g: {"a": {1: g}}, lambda held: held["a"][1]),
    "object": (lambda g: SimpleNamespace(inner=[g]), lambda held: held.inner[0]),
    "slots": (Slotted, lambda held: held.rng),
    "partial": (lambda g: partial(draw, g), lambda held: held.args[0]),
    "closure": (lambda g: lambda: g, lambda held: held()),
}
ALONE = [(kind, "alone") for kind in GENERATORS]
WHERE = [*ALONE, *(("python", place) for place in PLACES), *(("torch", place) for place in PLACES)]


class Noisy(nn.Module):
    """Scales what passes by what it draws from a generator of its own, made with it or in the first pass."""

    def __init__(self, kind: str, place: str, *, late: bool = False) -> None:
        super().__init__()
        self.kind, self.place, self.calls = kind, place, 0
        self.held = None if late else self.hold()

    def hold(self) -> Any:
        return PLACES[self.place][0](GENERATORS[self.kind]())

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.held is None:
            self.held = self.hold()
        return x * (1 + 0.1 * draw(PLACES[self.place][1](self.held)))


class Noise(nn.Module):
    """A loss that draws, and counts in a buffer."""

    seen: Tensor

    def __init__(self, noisy: Noisy) -> None:
        super().__init__()
        self.noisy = noisy
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.seen += len(target)
        return nn.functional.cross_entropy(self.noisy(output), target) * (1 + self.seen / 100)


def noisy_network(kind: str, place: str, *, late: bool = False) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.Sequential(Noisy(kind, place, late=late)), nn.Linear(6, 5))


@pytest.mark.parametrize(("kind", "place"), WHERE)
@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
def test_what_an_own_generator_drew_is_drawn_again(kind: str, place: str, late: bool, capacity: Capacity) -> None:
    """In a retry and at the next rung, after an out-of-memory in the first update, and in a dry run before it."""
    network = partial(noisy_network, kind, place, late=late)
    expected = trained(network, capacity)
    assert trained(network, capacity, faults=(0, 9, 20, 30)) == expected
    assert trained(network, capacity, after_dry_run=True) == expected


class FailsOnce(nn.Module):
    """Counts its forward passes in Python, and runs out of memory in one of them."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.calls, self.body = at, 0, nn.Linear(3 * 8 * 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
        output: Tensor = self.body(x.flatten(1))
        return output


def test_a_network_that_counts_its_own_failures_fails_once(capacity: Capacity) -> None:
    run = start(Case("sgd", "fp32", warm=False, ema=False, accumulate=False), capacity, partial(FailsOnce, 2))
    update = run.update()
    for _ in range(3):
        run.advance(update)
    assert run.state.updates == 3
    assert isinstance(run.state.model, FailsOnce)
    assert run.state.model.calls == 4


@pytest.mark.parametrize(("kind", "place"), ALONE)
def test_a_loss_draws_again_and_counts_once(kind: str, place: str, capacity: Capacity) -> None:
    network = partial(noisy_network, kind, place)
    expected = trained(network, capacity, loss=Noise(Noisy(kind, place)))
    assert trained(network, capacity, loss=Noise(Noisy(kind, place)), faults=(30, 9)) == expected


def trained(
    network: Network, capacity: Capacity, *, faults: tuple[int, ...] = (), after_dry_run: bool = False, loss: Any = None
) -> list[float]:
    """Weights and the loss's buffer after three updates."""
    run = start(Case("sgd", "fp32", warm=False, ema=False, clip=False), capacity, network)
    update, model = run.update(), run.state.model
    if loss is not None:
        update = Update(run.state, loss, Recipe(batch_size=7, micro_batch_size=4), device=CPU, capacity=capacity)
    if after_dry_run:
        dry_run(update, SHAPES)
    for at in faults:
        with suppress(OutOfMemory):
            run.advance(update, Fault(at, keeps_failing=True))
    for number in range(3):
        run.advance(update, Fault(12) if faults and number == 1 else None)
    found = torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()
    return [*found, float(loss.seen)] if loss is not None else found


class Block(nn.Module):
    """A part that is recomputed where activations are not kept."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body, self.noisy = nn.Linear(6, 6), Noisy(kind, "list")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.relu(self.body(self.noisy(x)))
        return out


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.usefixtures("small")
def test_a_recomputed_block_draws_what_it_drew(kind: str, capacity: Capacity) -> None:
    found = []
    for saves_memory in (False, True):
        run = start(Case("sgd", "fp32", warm=False, ema=False), capacity, partial(of_blocks, kind))
        recompute(run.state.model, "blocks" if saves_memory else "none")
        for _ in range(2):
            run.advance(run.update())
        found.append({name: value for name, value in dump(run.state).items() if name.startswith("model/")})
    assert differences(*found) == []


def of_blocks(kind: str) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 6), Block(kind), Block(kind), nn.Linear(6, 5))


class Fed(TorchDataset[Any]):
    """Images of which each is changed by a generator of the data set's own."""

    def __init__(self, kind: str, place: str, *, late: bool) -> None:
        self.noisy = Noisy(kind, place, late=late)

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        return self.noisy(torch.rand(3, 8, 8, generator=generator)).clamp(0, 1), index % 5


def fit(folder: Path, kind: str, place: str, *, stop_at: int = 0, late: bool = False, workers: int = 0) -> list[float]:
    """The weights in the end; stopped after some update and resumed where `stop_at` says so."""
    few = ["trainer.batch_size=6", "trainer.epochs=2", "data.image_size=8", "data.transforms=none", "ladder=none"]
    few += [f"data.num_workers={workers}", "optimizer=sgd", "seed=3", "device=cpu", "trainer.checkpoint_every=1"]
    few += ["trainer.ema_decay=0.5"]

    def trainer(*more: str) -> Trainer:
        loss = Noise(Noisy(kind, place, late=late))
        parts: dict[str, Any] = {
            "train_data": Fed(kind, place, late=late),
            "val_data": Fed(kind, place, late=late),
            "loss": loss,
        }
        make = lambda *_: noisy_network(kind, place, late=late)  # noqa: E731
        return Trainer(compose_config([*few, *more]), model=make, output_dir=folder, **parts)

    if stop_at:
        stopped = trainer()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Update, "commit", stopping(Update.commit, stop_at))
            with pytest.raises(Killed):
                stopped.fit()
        final = trainer("resume=auto")
    else:
        final = trainer()
    final.fit()
    assert final.model is not None
    return torch.cat([p.detach().flatten() for p in final.model.parameters()]).tolist()


class Killed(Exception):
    """Ends a run between two updates."""


def stopping(commit: Callable[..., None], at: int) -> Callable[..., None]:
    def counted(update: Update, samples: int) -> None:
        if samples and update.state.updates == at:
            raise Killed
        commit(update, samples)

    return counted


@pytest.mark.long
@pytest.mark.parametrize(("kind", "place"), [*ALONE, ("python", "list"), ("numpy", "dictionary"), ("torch", "object")])
def test_a_resumed_run_draws_what_an_undisturbed_one_draws(kind: str, place: str, tmp_path: Path) -> None:
    expected = fit(tmp_path / "whole", kind, place)
    for at in (1, 4, 6):
        assert fit(tmp_path / str(at), kind, place, stop_at=at) == expected


@pytest.mark.long
@pytest.mark.parametrize("kind", GENERATORS)
def test_a_generator_made_in_the_first_pass_is_resumed(kind: str, tmp_path: Path) -> None:
    assert fit(tmp_path / "a", kind, "alone", late=True, stop_at=3) == fit(tmp_path / "b", kind, "alone", late=True)


@pytest.mark.long
def test_a_data_set_draws_the_same_in_any_process(tmp_path: Path) -> None:
    expected = fit(tmp_path / "0", "numpy", "list", late=True)
    assert fit(tmp_path / "2", "numpy", "list", late=True, workers=2) == expected


# ---- what is looked at in each update --------------------------------------------------------------------------------


class Shaped(nn.Module):
    """Notes the size of what passes, as many networks do."""

    held: Any

    def __init__(self) -> None:
        super().__init__()
        self.held = ()

    def forward(self, x: Tensor) -> Tensor:
        self.held = (x.shape[-2], float(x.shape[-1]))
        return x


def test_a_tuple_of_numbers_is_a_plain_value() -> None:
    network = Shaped()
    owned = Belongings({"model": network})
    before = owned._holders
    network(torch.rand(1, 3, 4, 5))
    assert owned.keep()
    assert owned._holders is before, "nothing was looked for anew"
    generator = random.Random(1)
    network.held = (generator, 2)
    assert not owned.keep()
    assert list(owned.generators.values()) == [generator]


def hooked(network: nn.Module) -> nn.Module:
    network.register_forward_hook(lambda *_: None)
    return network


@pytest.mark.parametrize(
    ("network", "loss", "is_own"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.CrossEntropyLoss(), False),
        (lambda: timm.create_model("test_resnet"), CrossEntropy(5), False),
        (lambda: nn.Sequential(nn.Linear(3, 4), Shaped()), nn.CrossEntropyLoss(), True),
        (lambda: hooked(nn.Linear(3, 4)), nn.CrossEntropyLoss(), True),
        (lambda: nn.Linear(3, 4), lambda output, labels: output.sum(), True),
        (lambda: nn.Linear(3, 4), partial(lambda output, labels: output.sum()), True),
        (lambda: nn.Linear(3, 4), Noise(Noisy("torch", "alone")), True),
    ],
)
def test_who_may_move_tensors(network: Callable[[], nn.Module], loss: Any, is_own: bool) -> None:
    model = network()
    optimizer, average = torch.optim.AdamW(model.parameters()), ModelEmaV3(model)
    roots = {"model": model, "loss": loss, "optimizer": optimizer, "average": average}
    assert Belongings(roots).has_own_code is is_own
