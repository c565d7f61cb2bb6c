"""An update of a loop of your own that runs out of memory leaves no trace, and the next rung trains on from there."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from adaptive_trainer import Transaction, descend, limit_memory, make_ladder, recompute

UPDATES = 10


class Training:
    """A small network and what trains it, kept from rung to rung."""

    def __init__(self) -> None:
        layers = [
            layer for width in (3, 16, 16, 16) for layer in (nn.Conv2d(width, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        ]
        self.model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.ema = AveragedModel(self.model)
        self.transaction = Transaction(self.model, self.optimizer, ema=self.ema)
        self.done = 0

    def run(self, plan: str, micro_batch: int) -> int:
        """Train on to the last update; the images become larger on the way, and need four times the memory."""
        recompute(self.model, plan)  # less memory, the same bits
        while self.done < UPDATES:
            size = 32 if self.done < UPDATES // 2 else 64
            self.update(torch.rand(128, 3, size, size), torch.randint(10, (128,)), micro_batch)
            self.done += 1  # after the block: what is in it may be undone
        return self.done

    def update(self, images: Tensor, labels: Tensor, micro_batch: int) -> None:
        with self.transaction:
            for x, y in zip(torch.split(images, micro_batch), torch.split(labels, micro_batch), strict=True):
                loss = nn.functional.cross_entropy(self.model(x), y, reduction="sum") / len(labels)
                loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.update_parameters(self.model)


def main() -> None:
    request = {"plan": "none", "micro_batch": 128}
    ladder = make_ladder(request, {"recompute": {"plan": "cheap"}, "micro-32": {"micro_batch": 32}})
    training = Training()
    with limit_memory("256MiB", device="cpu"):  # on a card: "cuda" and any limit below its size, or no limit at all
        found = descend(ladder, lambda settings: training.run(**settings))
    for attempt in found.attempts:
        print(f"{attempt.rung}: {attempt.outcome} {attempt.reason}")
    print(f"rung {found.rung.name} fits, {found.value} updates are done")


if __name__ == "__main__":
    main()
