"""Limits, the cap on a CUDA card, and the simulated card."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from adaptive_trainer import oom
from adaptive_trainer.errors import ConfigError
from adaptive_trainer.ladder.descent import Found, descend
from adaptive_trainer.ladder.rung import make_ladder
from adaptive_trainer.memory.limit import DEFAULT_SIMULATED, Capacity, limit_memory, limited
from adaptive_trainer.memory.simulated import COUNTED_EVERY, COUNTED_FIRST

CPU = torch.device("cpu")
MiB = 2**20


@pytest.fixture
def card() -> Iterator[Capacity]:
    with limited(CPU, "64MiB") as capacity:
        yield capacity


def block(mib: float) -> torch.Tensor:
    return torch.zeros(int(mib * MiB), dtype=torch.uint8)


# -- limit_memory


def test_limit_memory_is_a_device_of_that_size_for_the_block() -> None:
    with limit_memory("64MiB", device="cpu") as capacity:
        kept = block(40)
        with pytest.raises(torch.OutOfMemoryError, match="total capacity of 64 MiB"):
            block(40)
        assert (capacity.size, capacity.peaks()) == (64 * MiB, (40 * MiB, 40 * MiB))
    assert kept.numel() + block(40).numel() == 80 * MiB


@pytest.mark.parametrize(
    ("limit", "size"), [("8 MB", 8 * 10**6), (8 * MiB, 8 * MiB), (0.5, DEFAULT_SIMULATED // 2), ("none", None)]
)
@pytest.mark.parametrize("device", ["cpu", CPU])
def test_limit_memory_takes_sizes_and_fractions(limit: Any, size: int | None, device: Any) -> None:
    with limit_memory(limit, device=device) as capacity:
        assert capacity.size == size


@pytest.mark.parametrize(
    ("limit", "device", "text"),
    [
        (None, "cpu", "was given None; write a size"),
        ("", "cpu", "was given ''; write a size"),
        ("6 apples", "cpu", "'6 apples' cannot be read"),
        (-1, "cpu", "neither a size nor a fraction"),
        (True, "cpu", "True cannot be read"),
        (100, "cpu", "is 100 bytes, less than"),
        ("6GiB", "abacus", "device=abacus: there is no such device"),
        ("6GiB", "cuda:63", "device=cuda:63 was asked for"),
    ],
)
def test_limit_memory_refuses(limit: Any, device: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text), limit_memory(limit, device=device):
        pass


@pytest.mark.parametrize("limit", ["6 apples", 1.5, 100, 1e-9])
def test_limit_memory_speaks_of_its_own_argument(limit: Any) -> None:
    with pytest.raises(ConfigError) as caught, limit_memory(limit, device="cpu"):
        pass
    assert str(caught.value).startswith(f"limit={limit!r}")
    assert "memory.limit" not in str(caught.value)
    assert "null" not in str(caught.value)
    with limit_memory("8MiB", device="cpu") as capacity:
        assert "limit=none lifts it" in capacity.description
        assert "memory.limit" not in capacity.description


def test_limit_memory_empties_the_cache_of_a_failed_rung() -> None:
    ladder = make_ladder({"mib": 40}, {"small": {"mib": 2}})
    with limit_memory("64MiB", device="cpu") as capacity:
        found: Found[Any, int] = descend(ladder, lambda settings: two_of(settings["mib"]), meter=capacity)
        assert not capacity.pressure()
    assert found.value == 2
    assert [each.outcome for each in found.attempts] == ["oom", "fits"]
    assert found.attempts[-1].peak_reserved_bytes == 20 * MiB  # one segment


def two_of(mib: int) -> int:
    kept = [block(mib), block(mib)]
    return len(kept[0]) // MiB


# -- the context


def test_the_default_and_a_fraction_of_it() -> None:
    with limited(CPU, None) as whole, limited(CPU, 0.5) as half:
        assert whole.bytes == whole.room() == DEFAULT_SIMULATED
        assert half.bytes == DEFAULT_SIMULATED // 2
        assert "simulated card of 512 MiB" in whole.description
        assert "none lifts it" in whole.description


def test_no_limit_counts_nothing() -> None:
    with limited(CPU, "none") as capacity:
        with capacity.device_work():
            block(1)
        assert capacity.bytes is capacity.room() is None
        assert capacity.peaks() == (None, None)
        assert not capacity.pressure()
        assert "no limit" in capacity.description
        capacity.reset_peaks()
        capacity.empty_cache()


def test_a_device_without_caps() -> None:
    with limited(torch.device("mps"), None) as capacity, capacity.device_work():
        assert "neither limited nor measured" in capacity.description
    with pytest.raises(ConfigError, match="cannot be set on mps"):
        limited(torch.device("mps"), "6GiB")


def test_nothing_leaks_from_one_context_to_the_next() -> None:
    for _ in range(2):
        with limited(CPU, "64MiB") as capacity:
            assert capacity.usage().peak_reserved == 0
            with capacity.device_work():
                kept = block(40)
            assert capacity.usage().allocated == len(kept)
    total = block(100)  # outside of all: not counted
    assert len(total) == 100 * MiB


# -- what is counted


def test_results_are_counted_and_given_back(card: Capacity) -> None:
    with card.device_work():
        a = block(8)
        b = a + 1
    assert card.usage().allocated == 16 * MiB
    del a
    assert card.usage().allocated == 8 * MiB
    del b
    assert card.usage().allocated == 0
    assert card.peaks()[0] == 16 * MiB
    card.reset_peaks()
    assert card.peaks()[0] == 0


def test_views_and_in_place_count_once(card: Capacity) -> None:
    with card.device_work():
        a = block(8)
        view = a.view(-1, 1024)[3:]
        a.add_(1)
        torch.add(a, 1, out=a)
        del a
    assert card.usage().allocated == 8 * MiB
    del view
    assert card.usage().allocated == 0


def test_resizing(card: Capacity) -> None:
    with card.device_work():
        a, out = block(4), torch.empty(0, dtype=torch.uint8)
        a.resize_(16 * MiB)
        assert card.usage().allocated == 16 * MiB
        torch.add(a, 1, out=out)
        assert card.usage().allocated == 32 * MiB
    del a, out
    assert card.usage().allocated == 0


def test_what_was_there_before_counts_when_it_is_used(card: Capacity) -> None:
    model, x = nn.Linear(1024, 1024), torch.zeros(16, 1024)
    assert card.usage().allocated == 0
    with card.device_work(), torch.no_grad():
        y = model(x)
    wanted = sum(t.nbytes for t in (*model.parameters(), x, y))
    assert card.usage().allocated == wanted


def test_saved_for_backward_counts_until_backward(card: Capacity) -> None:
    x = torch.zeros(MiB, requires_grad=True)  # 4 MiB
    with card.device_work():
        y = (x * 2).exp().sum()
        assert card.usage().allocated == (4 + 4) * MiB + 512  # x, what exp keeps, the sum
        card.reset_peaks()
        y.backward()  # type: ignore[no-untyped-call]
        assert (card.peaks()[0] or 0) >= (4 + 4 + 4) * MiB  # backward is seen: its own results on top
    del y
    assert card.usage().allocated == (4 + 4) * MiB  # x and its gradient


def test_fake_meta_and_sparse_tensors_are_no_ones_memory(card: Capacity) -> None:
    with card.device_work():
        torch.empty(2**40, device="meta").add(1)
        with FakeTensorMode():
            torch.empty(2**40).add(1)
        torch.eye(3).to_sparse() * 2
    assert (card.peaks()[0] or 0) < MiB
    with FakeTensorMode(), card.device_work():
        torch.empty(2**40).add(1)
    assert (card.peaks()[0] or 0) < MiB


# -- running out


def test_full(card: Capacity) -> None:
    with card.device_work():
        a = block(40)
        with pytest.raises(
            torch.OutOfMemoryError, match=r"out of memory\. Tried to allocate 32 MiB.*capacity of 64 MiB"
        ):
            block(32)
        assert card.usage().allocated == 40 * MiB
        b = block(20)
    assert card.usage().allocated == len(a) + len(b)
    assert card.usage().num_alloc_retries == 1  # the cache was flushed in vain


def test_the_error_keeps_no_result_alive(card: Capacity) -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught, card.device_work():
        block(40).repeat(2)
    assert oom.describe(caught.value).exact
    del caught
    assert card.usage().allocated == 0


def test_a_card_too_small_for_the_weights() -> None:
    with (
        limited(CPU, "2MiB") as capacity,
        pytest.raises(torch.OutOfMemoryError),
        capacity.device_work(),
    ):
        nn.Linear(1024, 1024)(torch.zeros(1, 1024))


def test_after_a_failure_the_next_work_begins_with_an_empty_cache(card: Capacity) -> None:
    def fail() -> None:
        with card.device_work():
            kept = [block(24), block(24)]
            kept.append(block(24))

    with pytest.raises(torch.OutOfMemoryError):
        fail()
    assert card.usage().reserved == 48 * MiB
    with card.device_work():
        assert card.usage().reserved == 0
        block(56)
    assert card.usage().num_alloc_retries == 1  # of the failed try; none after it


def test_pressure(card: Capacity) -> None:
    with card.device_work():
        assert not card.pressure()
        kept = block(60)
        assert card.pressure()
    assert len(kept) == 60 * MiB


def test_device_work_may_be_nested_and_cards_too(card: Capacity) -> None:
    with card.device_work(), card.device_work():
        a = block(8)
    with limited(CPU, "32MiB") as inner, card.device_work(), inner.device_work():
        b = block(8)
        with pytest.raises(torch.OutOfMemoryError, match="of 32 MiB"):
            block(28)
    assert card.usage().allocated == len(a) + len(b)


# -- work that repeats itself


def counts(card: Capacity, kind: str | None, mib: float = 8) -> bool:
    """Whether a simulated card counts work of a kind; outside of it nothing is left."""
    with card.device_work(kind):
        before = card.usage().allocated
        kept = block(mib)
        return card.usage().allocated >= before + len(kept)


def test_the_first_are_counted_until_nothing_changes_and_then_a_few(card: Capacity) -> None:
    counted = [counts(card, "a") for _ in range(COUNTED_FIRST + 2 * COUNTED_EVERY)]
    rarely = [False] * (COUNTED_EVERY - 1) + [True]
    assert counted == [*[True] * COUNTED_FIRST, *rarely, *rarely]
    assert card.peaks() == (8 * MiB, 20 * MiB)


def test_work_of_no_kind_is_always_counted(card: Capacity) -> None:
    assert all(counts(card, None) for _ in range(9))


def settled(card: Capacity, kind: str = "a", mib: float = 8) -> None:
    """Come to where work of this kind is not counted any more."""
    while counts(card, kind, mib):
        pass


def fail(card: Capacity, kind: str, error: BaseException | None = None) -> None:
    """Run out of memory, or into the error, in the middle of work."""
    with card.device_work(kind):
        block(8)
        if error is not None:
            raise error
        block(100)


def run_out(card: Capacity) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        fail(card, "b")


def shrink(card: Capacity) -> None:
    assert card.simulated is not None
    card.simulated.capacity = card.simulated._allocator.capacity = 32 * MiB


@pytest.mark.parametrize(
    "change",
    [
        lambda card: card.reset_peaks(),
        lambda card: card.empty_cache(),
        lambda card: counts(card, "b", 30),
        lambda card: counts(card, None, 30),
        run_out,
        shrink,
    ],
    ids=["peaks", "cache", "other work", "other work of no kind", "out of memory", "size"],
)
def test_what_changes_the_card_has_all_kinds_counted_again(change: Callable[[Capacity], Any], card: Capacity) -> None:
    settled(card, "a")
    settled(card, "c")
    assert not counts(card, "a")
    change(card)
    assert counts(card, "a")
    assert counts(card, "c")
    settled(card, "a")


def test_what_the_card_holds_and_loses_has_work_counted_again(card: Capacity) -> None:
    with card.device_work():
        kept = block(8)
    settled(card)
    del kept
    assert counts(card, "a")


def test_a_block_in_another_place_has_work_counted_again(card: Capacity) -> None:
    """As many bytes are used and reserved as before, and where 11 MiB were free in one piece, there are 9 and 2."""
    with card.device_work():
        first = block(9)
    settled(card, "a", 11)
    before = card.usage()
    with card.device_work():
        second = block(9)
    assert len(first) == len(second)
    del first
    assert card.usage() == before
    assert counts(card, "a", 11)
    assert card.usage().reserved == before.reserved + 12 * MiB


@pytest.mark.usefixtures("soon_known")
def test_other_work_that_changes_nothing_leaves_a_kind_known(card: Capacity) -> None:
    settled(card)
    assert counts(card, "smaller", 4)
    assert not counts(card, "smaller", 4), "its first counting has changed nothing"
    assert not counts(card, "a")


def test_work_that_was_not_done_to_its_end_is_not_known(card: Capacity) -> None:
    settled(card)
    card.empty_cache()  # so that there is nothing to empty after the failure
    for _ in range(3):
        with pytest.raises(KeyError):
            fail(card, "b", KeyError())
        assert card.simulated is not None
        card.simulated._allocator.empty_cache()
    assert counts(card, "b", 8)


def test_a_leak_runs_out_of_memory_where_it_would_on_a_card(card: Capacity) -> None:
    kept: list[torch.Tensor] = []

    def leak() -> None:
        while len(kept) < 100:
            with card.device_work("a"):
                kept.append(block(4))

    with pytest.raises(torch.OutOfMemoryError):
        leak()
    assert len(kept) == 15, "64 MiB in segments of 20, with five blocks each"


@pytest.mark.long
def test_memory_that_grows_later_is_found_when_it_is_counted_next(card: Capacity) -> None:
    settled(card)  # with one that was not counted
    for _ in range(COUNTED_EVERY - 2):
        assert not counts(card, "a", 100)
    with pytest.raises(torch.OutOfMemoryError):
        counts(card, "a", 100)


# -- with the rest of torch


class Recorder(TorchDispatchMode):
    """Counts operators; raises at one of them, where asked to."""

    def __init__(self, fail_at: int = -1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = 0
        self.fail_at = fail_at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        if self.seen == self.fail_at:
            raise torch.OutOfMemoryError("injected")
        return func(*args, **(kwargs or {}))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 4))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype | None, *, save: bool, steps: int = 2
) -> float:
    """A few updates with autocast, GradScaler, activation checkpointing and clipping; the last loss."""
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)
    x, y = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(4)
    value = 0.0
    for _ in range(steps):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            out = checkpoint(model, x, use_reentrant=False) if save else model(x)
            loss = nn.functional.cross_entropy(out, y)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.unscale_(optimizer) if scaler.is_enabled() else None
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        value = float(loss.detach())
    return value


@pytest.mark.long
@pytest.mark.parametrize("save", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [{"foreach": True}, {"fused": True}, {"foreach": False}], ids=str)
def test_training_is_not_changed_and_nothing_is_left(
    card: Capacity, kind: dict[str, Any], dtype: torch.dtype | None, save: bool
) -> None:
    def run() -> tuple[float, nn.Module]:
        model = network()
        return train(model, torch.optim.AdamW(model.parameters(), **kind), dtype, save=save), model

    wanted, reference = run()
    with card.device_work():
        value, model = run()
    assert value == wanted
    pairs = zip(model.state_dict().values(), reference.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert (card.peaks()[0] or 0) > 0
    del model, pairs
    gc.collect()
    assert card.usage().allocated == 0


def test_an_outer_mode_sees_the_operators_and_its_error_passes(card: Capacity) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder() as outer, card.device_work():
        train(model, optimizer, None, save=False, steps=1)
    assert outer.seen > 20
    with (
        pytest.raises(torch.OutOfMemoryError, match="injected") as caught,
        Recorder(outer.seen // 2),
        card.device_work(),
    ):
        train(model, optimizer, None, save=False, steps=1)
    assert not oom.describe(caught.value).exact


def test_a_failed_training_leaves_only_the_weights(card: Capacity) -> None:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))
    weights = sum(p.nbytes for p in model.parameters())

    def fail() -> None:
        with card.device_work():
            model(torch.zeros(2**14, 256)).sum().backward()  # 16 MiB each: does not fit

    with pytest.raises(torch.OutOfMemoryError):
        fail()
    for parameter in model.parameters():
        parameter.grad = None
    gc.collect()
    assert card.usage().allocated <= weights
    with card.device_work():
        model(torch.zeros(2**10, 256)).sum().backward()


# -- a real card


@pytest.mark.gpu
@pytest.mark.parametrize("mib", [140, 700, 2600])
def test_a_cap_on_cuda_is_exact(mib: int) -> None:
    device = torch.device("cuda", 0)
    oom.release(device)
    before = torch.cuda.memory_allocated(device)
    fraction = torch.cuda.get_per_process_memory_fraction(device)
    with limited(device, f"{mib}MiB") as capacity:
        assert capacity.bytes == mib * MiB
        assert (capacity.room() or 0) <= mib * MiB
        whole = torch.empty(mib * MiB - before, dtype=torch.uint8, device=device) if not before else None
        del whole
        torch.cuda.empty_cache()
        with pytest.raises(torch.OutOfMemoryError) as caught:
            torch.empty(mib * MiB + 1, dtype=torch.uint8, device=device)
        assert oom.describe(caught.value).kind is oom.Kind.DEVICE
        assert not oom.describe(caught.value).exact
    assert torch.cuda.get_per_process_memory_fraction(device) == fraction
    assert torch.cuda.memory_allocated(device) == before
    torch.empty(3000 * MiB, dtype=torch.uint8, device=device)


@pytest.mark.gpu
def test_caps_on_cuda_nest_and_a_default_keeps_the_callers() -> None:
    device = torch.device("cuda", 0)
    with limited(device, "700MiB"):
        with limited(device, None) as same:
            assert same.bytes == 700 * MiB
        with limited(device, "none") as free:
            assert free.bytes is None
            torch.empty(2000 * MiB, dtype=torch.uint8, device=device)
        oom.release(device)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2000 * MiB, dtype=torch.uint8, device=device)
    with pytest.raises(ConfigError, match="more than all of"), limited(device, "1000GiB"):
        pass


@pytest.mark.gpu
@pytest.mark.parametrize("phase", ["forward", "backward", "step"])
def test_memory_returns_to_its_value_after_a_real_out_of_memory(phase: str) -> None:
    device = torch.device("cuda", 0)
    model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(8))).to(device)  # 128 MiB
    optimizer = torch.optim.AdamW(model.parameters())

    reached = ""

    def attempt(rows: int) -> None:
        nonlocal reached
        reached = "forward"
        loss = model(torch.zeros(rows, 2048, device=device)).sum()
        reached = "backward"
        loss.backward()
        reached = "step"
        optimizer.step()

    limits = {"forward": "700MiB", "backward": "250MiB", "step": "420MiB"}
    oom.release(device)
    before = torch.cuda.memory_allocated(device)
    kind = None
    with limited(device, limits[phase]) as capacity:
        try:
            attempt(200_000 if phase == "forward" else 64)
        except RuntimeError as error:
            kind = oom.describe(error, pressure=capacity.pressure).kind
        assert (reached, kind) == (phase, oom.Kind.DEVICE)
        assert oom.probe(device)
        optimizer.zero_grad()
        optimizer.state.clear()
        oom.release(device)
        assert torch.cuda.memory_allocated(device) == before
    attempt(64)
