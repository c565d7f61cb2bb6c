"""Keep activations in the host's memory until the backward pass wants them (Rhu et al., arXiv 1602.08124).

They are copied on a second stream while the device computes (`recomputing.offloading`). What is recomputed is not kept,
so it is not copied either.
"""

from __future__ import annotations

from torch import nn

from adaptive_trainer.models.recomputing.following import follow, is_offloading

KEY = "offload"


def apply(model: nn.Module, value: bool) -> None:
    """Offload what is kept, or leave it where it is, from the next forward pass on."""
    follow(model, offload=value)


def compile_refusal(model: nn.Module) -> str:
    """Say why the network cannot be compiled; empty where it can."""
    return f"offloaded activations (trainer.{KEY}) are not compiled" if is_offloading(model) else ""
