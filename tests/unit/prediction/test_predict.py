"""Traces replayed through the allocator: peaks, scratch memory, the smallest capacity, and the verdict."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from adaptive_trainer.memory.allocator import AllocatorFull
from adaptive_trainer.prediction.derivation import Tracer
from adaptive_trainer.prediction.estimator import Prediction, predict, verdict, workspaces_of
from adaptive_trainer.prediction.recorder import Kind
from adaptive_trainer.prediction.replay import Replay
from adaptive_trainer.prediction.tracer import Trace, TraceSpec

MiB = 2**20
GiB = 2**30


class Canned(Tracer):
    """Gives one trace, whatever it is asked for."""

    def __init__(
        self, events: list[tuple[int, int]], sizes: list[int], update_start: int = 0, copies: tuple[int, int] = (0, 0)
    ) -> None:
        super().__init__()
        kinds, numbers = bytes(kind for kind, _ in events), tuple(number for _, number in events)
        stop = len(events)
        self.canned = Trace(kinds, numbers, tuple(sizes), bytes(len(sizes)), (0, 1, 0), 1, update_start, stop, copies)

    def trace(self, spec: TraceSpec) -> Trace:
        return self.canned


B, D = int(Kind.BORN), int(Kind.DIED)


def test_an_update_that_is_retried_starts_from_an_empty_cache() -> None:
    """What the first update leaves in the cache divides the memory of the second; a retry gives it back first.

    The 12 MiB of 0 are followed by 24 of 1; then 2 stays for good in the segment of 0. From the second update on 0
    takes half of the free segment of 1, and 1 needs another: 12 + 24 + 24 MiB. From an empty cache it is 12 + 12 + 24.
    """
    events = [(B, 0), (B, 1), (D, 0), (B, 2), (D, 1)]
    sizes = [12 * MiB, 24 * MiB, 12 * MiB]

    def least(*, undo: bool) -> int | None:
        return predict(replace(SPEC, undo=undo), tracer=Canned(events, sizes)).min_capacity_bytes

    assert least(undo=False) == 60 * MiB
    assert least(undo=True) == 48 * MiB


def test_copies_are_made_once_a_step_is_known_to_allocate() -> None:
    """Two updates go by without them, as in the dry run: what is made meanwhile takes the place they would have had.

    0 is a gradient of 24 MiB, 1 a copy of 24, and 2 state of 12. Without copies the state takes half of the segment
    that the gradient leaves; the second update's gradient needs another, which the copy then takes, and the fourth's
    a third. Were the copy made in the first update it would take the first, and the state one of 12: 24 + 12 + 24.
    """
    events = [(B, 0), (D, 0), (B, 1), (B, 2)]
    sizes = [24 * MiB, 24 * MiB, 12 * MiB]

    def needs(copies: tuple[int, int]) -> tuple[int | None, int | None]:
        found = predict(replace(SPEC, undo=True), tracer=Canned(events, sizes, copies=copies))
        return found.reserved_bytes, found.min_capacity_bytes

    assert needs((0, 0)) == (60 * MiB, 60 * MiB)
    assert needs((1, 2)) == (72 * MiB, 72 * MiB)


def test_copies_outlive_a_roll_back() -> None:
    """In the third update the copy, 0, takes a third of the segment that 1 has left, so that 1 needs another.

    They are 36 + 36 MiB, and trying again changes nothing, since the copy stays. From nothing it would be 12 + 36.
    """
    events, sizes = [(B, 0), (B, 1), (D, 1)], [12 * MiB, 36 * MiB]
    found = predict(replace(SPEC, undo=True), tracer=Canned(events, sizes, copies=(0, 1)))
    assert found.min_capacity_bytes == 72 * MiB


def linear() -> nn.Module:
    return nn.Linear(4, 4)


SPEC = TraceSpec(linear, lambda m: torch.optim.SGD(m.parameters(), 0.1), (4,), (2,))


def replayed(
    events: list[tuple[int, int]], sizes: list[int], *, version: str = "2.14.1", capability: tuple[int, int] = (9, 0)
) -> tuple[int, int, int, int]:
    found = predict(SPEC, version=version, capability=capability, tracer=Canned(events, sizes))
    assert found.live_bytes is not None
    assert found.allocated_bytes is not None
    assert found.reserved_bytes is not None
    assert found.min_capacity_bytes is not None
    return found.live_bytes, found.allocated_bytes, found.reserved_bytes, found.min_capacity_bytes


BORN, DIED = Kind.BORN, Kind.DIED


def test_live_allocated_and_reserved() -> None:
    events = [(BORN, 0), (BORN, 1), (DIED, 0), (DIED, 1)]
    assert replayed(events, [100, 14 * MiB]) == (14 * MiB + 100, 14 * MiB + 512, 16 * MiB, 16 * MiB)


def test_what_outlives_an_update_is_not_taken_again() -> None:
    assert replayed([(BORN, 0)], [30 * MiB]) == (30 * MiB, 30 * MiB, 30 * MiB, 30 * MiB)


def test_the_smallest_capacity_is_below_what_is_reserved_when_it_may() -> None:
    """30 MiB are free in the cache, in pieces of which none is large enough, and can be given back."""
    small = list(range(3))
    events = [*((BORN, n) for n in small), *((DIED, n) for n in small), (BORN, 3), (DIED, 3)]
    live, _, reserved, least = replayed(events, [10 * MiB] * 3 + [31 * MiB])
    assert live == 31 * MiB
    assert reserved == 62 * MiB
    assert least == 32 * MiB


@given(st.lists(st.one_of(st.integers(0, 40 * MiB), st.floats(0, 1, exclude_max=True)), min_size=1), st.data())
def test_with_less_than_what_is_alive_no_update_runs(happens: list[Any], data: st.DataObject) -> None:
    """A size is born, and a share of all that live says which one dies."""
    events, sizes, alive = list[tuple[int, int]](), list[int](), list[int]()
    for each in happens:
        if isinstance(each, int):
            alive.append(len(sizes))
            events.append((B, len(sizes)))
            sizes.append(each)
        elif alive:
            events.append((D, alive.pop(int(each * len(alive)))))
    first, last = sorted(data.draw(st.integers(0, len(sizes))) for _ in range(2))
    trace = Canned(events, sizes, data.draw(st.integers(0, len(events))), (first, last)).canned
    workspaces = workspaces_of((9, 0), 132)
    free = Replay(trace, workspaces)
    free.run()
    assert trace.most_alive <= free.allocator.peak_allocated
    if trace.most_alive:
        with pytest.raises(AllocatorFull):
            Replay(trace, workspaces, trace.most_alive - 1, retried=True).run()


def test_what_is_alive_counts_what_the_first_update_leaves() -> None:
    """0 dies in the first update, 1 is left by it, and 2 passes."""
    events = [(B, 0), (D, 0), (B, 2), (D, 2), (B, 1)]
    assert Canned(events, [9 * MiB, 2 * MiB, 4 * MiB], update_start=1).canned.most_alive == 6 * MiB


@pytest.mark.parametrize(
    ("version", "capability", "bytes_kept"),
    [
        ("2.11.0", (9, 0), 32 * MiB + MiB),  # cublasLt has a workspace of its own
        ("2.14.1+cu130", (9, 0), 32 * MiB),
        ("2.14.1", (10, 0), 32 * MiB),
        ("2.14.1", (8, 6), 8 * MiB + 128 * 1024),
        ("2.14.1", (7, 5), 8 * MiB + 128 * 1024),
    ],
)
def test_workspaces_of_matrix_products_are_kept(version: str, capability: tuple[int, int], bytes_kept: int) -> None:
    events = [(Kind.GEMM_BIAS, 0), (BORN, 1), (DIED, 1)]
    live, *_ = replayed(events, [0, MiB], version=version, capability=capability)
    assert live == bytes_kept + MiB


def test_the_thread_of_backward_has_a_workspace_of_its_own() -> None:
    one, *_ = replayed([(Kind.GEMM, 0), (Kind.GEMM, 1)], [0, 0])
    two, *_ = replayed([(Kind.GEMM, 0), (Kind.GEMM_BACKWARD, 1)], [0, 0])
    assert (one, two) == (32 * MiB, 64 * MiB)


def test_later_versions_hold_workspaces_only_during_the_product() -> None:
    events = [(Kind.GEMM, 0), (Kind.GEMM_BACKWARD, 1), (BORN, 2), (DIED, 2)]
    live, *_ = replayed(events, [0, 0, MiB], version="2.15.0")
    assert live == 32 * MiB


def test_a_convolution_goes_without_a_workspace_that_does_not_fit() -> None:
    live, _, reserved, least = replayed([(BORN, 0), (Kind.CONV, 1), (DIED, 0)], [20 * MiB, 50 * MiB])
    assert (live, reserved, least) == (70 * MiB, 70 * MiB, 20 * MiB)


def test_where_kernels_are_to_stay_the_same_a_convolution_needs_its_workspace() -> None:
    """Beside it there is room for small blocks, and memory comes in one piece."""
    canned = Canned([(BORN, 0), (Kind.CONV, 1), (DIED, 0)], [20 * MiB, 50 * MiB])
    found = predict(replace(SPEC, same_kernels=True, undo=True), tracer=canned)
    assert found.min_capacity_bytes == 70 * MiB


def test_weight_gradients_are_split_over_the_samples_unless_that_is_out_of_proportion() -> None:
    split, *_ = replayed([(Kind.SPLIT, 0), (Kind.CONV, 1)], [40 * MiB, 8 * MiB])
    not_split, *_ = replayed([(Kind.SPLIT, 0), (Kind.CONV, 1)], [41 * MiB, 8 * MiB])
    half, *_ = replayed([(Kind.SPLIT_HALF, 0), (Kind.CONV, 1)], [80 * MiB, 8 * MiB])
    assert (split, not_split, half) == (40 * MiB, 8 * MiB, 80 * MiB)


def test_a_network_that_cannot_be_traced_is_unknown() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("no such mode")

    found = predict(TraceSpec(Broken, lambda m: torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1), (4,), (2,)))
    assert found.reason == "ValueError: no such mode"
    assert (found.live_bytes, found.allocated_bytes, found.reserved_bytes, found.min_capacity_bytes) == (None,) * 4
    assert verdict(found, GiB) == "unknown"


@pytest.mark.parametrize(
    ("capacity", "answer"),
    [(1070, "fits"), (1069, "unsure"), (1000, "unsure"), (900, "unsure"), (899, "hopeless"), (0, "hopeless")],
)
def test_verdict(capacity: int, answer: str) -> None:
    prediction = Prediction(900, 950, 1200, 1000 * MiB, 0.0)
    assert verdict(prediction, capacity * MiB) == answer


@given(st.integers(1, 2000), st.integers(0, 4000))
def test_a_verdict_leaves_room_for_a_segment(least: int, capacity: int) -> None:
    """2 MiB where all fits into small segments, 20 MiB else; the shares above from 286 MiB on."""
    answer = verdict(Prediction(1, 1, 1, least * MiB, 0.0), capacity * MiB)
    segment = 20 if least >= 20 else 2
    if answer == "fits":
        assert capacity >= least + segment
        assert capacity >= 1.07 * least
    elif answer == "hopeless":
        assert capacity < least - segment
        assert capacity < 0.9 * least
    else:
        assert answer == "unsure"
        assert min(0.9 * least, least - segment) <= capacity < max(1.07 * least, least + segment)


def test_any_module_optimizer_and_shape() -> None:
    """Weights and their gradients, momentum, and the batch with its activations, all in the small pool."""
    make = lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9)  # noqa: E731
    found = predict(TraceSpec(linear, make, (4,), (2,), cuda=False))
    weights = 4 * (4 * 4 + 4)
    assert found.live_bytes is not None
    assert 3 * weights <= found.live_bytes <= 3 * weights + 1024
    assert found.reserved_bytes == 2 * MiB
