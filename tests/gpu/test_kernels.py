"""cuDNN's choice of kernels on a card that is almost full: it is noticed, refused, and displaced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from adaptive_trainer.memory.kernels import Kernels
from scripts import gpu_checks

pytestmark = pytest.mark.gpu
MiB = 2**20


@pytest.fixture
def uncapped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Convolutions add up in one order; a cap ends with the test."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def bits(images: Tensor, weight: Tensor) -> list[Tensor]:
    """The results of a convolution and of its backward pass."""
    found = functional.conv2d(images, weight, padding=1)
    gradients = torch.autograd.grad(found.square().sum(), (images, weight))
    return [each.detach().cpu() for each in (found, *gradients)]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def refused(kernels: Kernels, images: Tensor, weight: Tensor) -> str:
    """Make less and less room for a convolution, until it takes another kernel; what is said of that."""
    total = torch.cuda.get_device_properties(0).total_memory
    for spare in range(3000, 100, -20):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + spare * MiB) / total)
        kernels.begin()
        bits(images, weight)
        try:
            kernels.check()
        except torch.OutOfMemoryError as error:
            return str(error)
    raise AssertionError("no kernel wanted more")


@pytest.mark.usefixtures("uncapped")
def test_a_kernel_that_was_taken_for_lack_of_memory_is_refused_and_displaced() -> None:
    torch.manual_seed(0)
    images, weight = (torch.randn(n, 32, s, s, device="cuda", requires_grad=True) for n, s in ((24, 150), (96, 3)))
    kernels = Kernels(gpu_checks.CUDA, is_strict=True)
    usual = bits(images, weight)
    assert "took another kernel" in refused(kernels, images, weight)
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert not equal(bits(images, weight), usual), "torch keeps to its choice"
    kernels.restore()
    assert equal(bits(images, weight), usual)


@contextmanager
def full() -> Iterator[None]:
    """A card without a byte for the smallest tensor."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    held: list[Tensor] = []
    with suppress(torch.OutOfMemoryError):
        while True:
            held.append(torch.empty(1, device="cuda"))
    try:
        yield
    finally:
        held.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.usefixtures("uncapped")
def test_a_full_card_ends_no_recovery_and_lets_no_work_begin_with_other_kernels() -> None:
    torch.manual_seed(0)
    images, weight = (torch.randn(n, 32, s, s, device="cuda", requires_grad=True) for n, s in ((26, 150), (96, 3)))
    usual = bits(images, weight)
    kernels = Kernels(gpu_checks.CUDA, is_strict=True)
    refused(kernels, images, weight)
    with full():
        kernels.restore()
        with pytest.raises(torch.OutOfMemoryError, match="are displaced"):
            Kernels(gpu_checks.CUDA, is_strict=True).begin()
    assert not equal(bits(images, weight), usual), "torch keeps to its choice"
    kernels.begin()
    assert equal(bits(images, weight), usual)
