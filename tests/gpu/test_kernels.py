"""cuDNN's choice of kernels on a card that is almost full: it is noticed, refused, and displaced."""

from __future__ import annotations

from collections.abc import Iterator

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


@pytest.mark.usefixtures("uncapped")
def test_a_kernel_that_was_taken_for_lack_of_memory_is_refused_and_displaced() -> None:
    torch.manual_seed(0)
    images, weight = (torch.randn(n, 32, s, s, device="cuda", requires_grad=True) for n, s in ((24, 150), (96, 3)))
    kernels = Kernels(gpu_checks.CUDA, is_strict=True)
    usual = bits(images, weight)
    total = torch.cuda.get_device_properties(0).total_memory
    refused = None
    for spare in range(3000, 100, -20):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + spare * MiB) / total)
        kernels.begin()
        bits(images, weight)
        try:
            kernels.check()
        except torch.OutOfMemoryError as error:
            refused = str(error)
            break
    assert refused is not None
    assert "took another kernel" in refused
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert not equal(bits(images, weight), usual), "torch keeps to its choice"
    kernels.restore()
    assert equal(bits(images, weight), usual)
