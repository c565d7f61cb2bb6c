"""The same descent for a training loop of your own: no Trainer, no configuration files."""

from __future__ import annotations

import torch
from torch import nn

from adaptive_trainer import descend, limit_memory, make_ladder


def train(batch_size: int, width: int) -> float:
    """A few updates of a small network on made-up data; returns the last loss."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, width), nn.ReLU(), nn.Linear(width, 10))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        images, labels = torch.rand(batch_size, 3, 64, 64), torch.randint(10, (batch_size,))
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return loss.item()


def main() -> None:
    ladder = make_ladder(
        {"batch_size": 512, "width": 1024},
        {"batch-128": {"batch_size": 128}, "batch-32": {"batch_size": 32}, "narrow": {"width": 64}},
    )
    with limit_memory("64MiB", device="cpu"):  # on a card: "cuda" and any limit below its size, or no limit at all
        found = descend(ladder, lambda settings: train(**settings))
    for attempt in found.attempts:
        print(f"{attempt.rung}: {attempt.outcome} {attempt.reason}")
    print(f"rung {found.rung.name} fits, loss {found.value:.3f}")


if __name__ == "__main__":
    main()
