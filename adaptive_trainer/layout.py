"""The memory format of weights and images; where the settings leave it open, channels_last where it should be faster.

It changes which kernels run and not what they compute. docs/benchmarks.md has the measurements.
"""

from __future__ import annotations

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from adaptive_trainer.config import Config, apply_overrides, typed

__all__ = ["to_channels_last", "uses_channels_last", "with_layout"]

HALF_FROM, TF32_FROM = (7, 0), (9, 0)  # compute capabilities: tensor cores; where fp32 was measured
LEAST_PIXELS = 8 * 160 * 160  # in a forward pass: the smallest that was measured to be faster


def to_channels_last(model: nn.Module) -> None:
    """Give its four-dimensional weights and buffers that memory format; unlike `Module.to`, with any others beside."""

    def convert(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor

    model._apply(convert)  # type: ignore[no-untyped-call]


def uses_channels_last(config: Config, capability: tuple[int, int], *, by_name: bool) -> bool:
    """Whether weights and images are in channels_last.

    Args:
        config: the settings; `trainer.channels_last` may be left open.
        capability: of the CUDA card; (0, 0) where there is none.
        by_name: the network is one of timm or torchvision. Another may take for granted that its activations are
            contiguous (`view`), so it is left as it is.
    """
    trainer = config.trainer
    if trainer.channels_last is not None:
        return trainer.channels_last
    if not by_name or _is_small(config):
        return False
    if trainer.precision == "fp32":
        return trainer.tf32 is not False and capability >= TF32_FROM
    return capability >= HALF_FROM


def _is_small(config: Config) -> bool:
    batch, micro = config.trainer.batch_size, config.trainer.micro_batch_size
    if not isinstance(batch, int):  # max
        return False
    return min(micro or batch, batch) * config.data.image_size**2 < LEAST_PIXELS


def with_layout(cfg: DictConfig, capability: tuple[int, int], *, by_name: bool) -> DictConfig:
    """The settings with this decided for the whole run, whatever its stages and rungs set; arguments as above."""
    config = typed(cfg)
    if config.trainer.channels_last is not None:
        return cfg
    decided = uses_channels_last(config, capability, by_name=by_name)
    return apply_overrides(cfg, [f"trainer.channels_last={str(decided).lower()}"])
