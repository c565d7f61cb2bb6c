"""Networks with BatchNorm, which cannot train on a single sample."""

from __future__ import annotations

from torch import nn


def has_batch_norm(model: nn.Module) -> bool:
    """Whether training the network on a single sample is impossible or senseless, because of BatchNorm."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
