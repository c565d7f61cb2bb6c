"""Workspaces memory of kernels: what was seen on an H100 (132 multiprocessors, torch 2.11), and bounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptive_trainer.prediction.workspaces import Workspaces

H100 = Workspaces.of((9, 0), 132, (2, 11))


@pytest.mark.parametrize(("outputs", "nbytes"), [(192, 4915200), (768, 19660800), (1536, 39321600)])
def test_a_bias_gradient_of_3152_rows_as_an_h100_allocates_it(outputs: int, nbytes: int) -> None:
    assert H100.reduction(3152, outputs) == nbytes


def test_few_rows_need_nothing() -> None:
    assert H100.reduction(1000, 768) == 0
    assert H100.reduction(1, 1) == 0


def test_a_smaller_card_shares_the_rows_among_fewer_blocks() -> None:
    smaller = Workspaces.of((7, 5), 30, (2, 11))
    assert 0 < smaller.reduction(100_000, 768) < H100.reduction(100_000, 768)


@given(st.integers(1, 10**6), st.integers(1, 10**5), st.integers(1, 200))
def test_partial_sums_are_bounded_by_the_card(rows: int, outputs: int, multiprocessors: int) -> None:
    """A block leaves at most 128 sums for an output, and there are about as many blocks as the card holds at once."""
    card = Workspaces.of((9, 0), multiprocessors, (2, 11))
    least = -(-rows // 256)  # blocks, so that no thread adds up more
    assert 0 <= card.reduction(rows, outputs) <= 4 * outputs * 128 * max(card.threads, least)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "outputs"), [(3152, 192), (25088, 96), (6272, 384), (2048, 10), (1000, 512), (50000, 1000), (4096, 33)]
)
def test_sums_on_this_card(rows: int, outputs: int, dtype: torch.dtype) -> None:
    about = torch.cuda.get_device_properties(0)
    version = torch.__version__.split(".")
    card = Workspaces.of((about.major, about.minor), about.multi_processor_count, (int(version[0]), int(version[1])))
    x = torch.ones(rows, outputs, device="cuda", dtype=dtype)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    total = x.sum(0)
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    taken = card.reduction(rows, outputs)
    semaphores = peak - total.nbytes - taken
    assert 0 <= semaphores <= 4 * outputs if taken else semaphores == 0
