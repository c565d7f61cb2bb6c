"""The memory format of weights and images: channels_last, and where it makes a run faster.

It changes which kernels run and not what they compute. docs/benchmarks.md has the measurements.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adaptive_trainer.config.schema import Config

HALF_FROM, TF32_FROM = (7, 0), (9, 0)  # compute capabilities: tensor cores; where fp32 was measured
LEAST_PIXELS = 8 * 160 * 160  # in a forward pass: the smallest that was measured to be faster
LEAST_IN_RUN = 50_000 * 224 * 224  # pixels: what is faster in fewer does not make up for loading the kernels


def to_channels_last(model: nn.Module) -> None:
    """Give its four-dimensional weights and buffers that memory format; unlike `Module.to`, with any others beside."""

    def convert(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor

    model._apply(convert)  # type: ignore[no-untyped-call]


def channels_last_pays(config: Config, capability: tuple[int, int], *, images: int) -> bool:
    """Whether a network of timm or torchvision is expected to train a run faster in channels_last.

    Args:
        config: what is asked for.
        capability: of the CUDA device; (0, 0) where there is none.
        images: that the run trains on, each as often as it comes.
    """
    if _pixels_at_a_time(config) < LEAST_PIXELS or images * config.data.image_size**2 < LEAST_IN_RUN:
        return False
    if config.trainer.precision == "fp32":
        return config.trainer.tf32 is not False and capability >= TF32_FROM
    return capability >= HALF_FROM


def _pixels_at_a_time(config: Config) -> float:
    batch, micro = config.trainer.batch_size, config.trainer.micro_batch_size
    samples = min(micro or batch, batch) if isinstance(batch, int) else float("inf")  # max
    return samples * config.data.image_size**2
