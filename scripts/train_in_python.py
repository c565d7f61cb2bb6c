"""Train from Python: settings by overrides, the Trainer, a plain result, and the trained model back."""

from __future__ import annotations

import sys

import torch

from adaptive_trainer import Trainer, compose_config, load_model


def main(overrides: list[str]) -> None:
    result = Trainer(compose_config(overrides)).fit()
    print(
        f"rung {result.rung}, validation accuracy {result.metrics['val_accuracy']:.3f}, record in {result.output_dir}"
    )
    for change in result.changes:
        print(f"  {change.key}: {change.asked} -> {change.used} ({change.why})")
    model = load_model(f"{result.output_dir}/checkpoints/best.pt")
    size = result.used.image_size
    print("scores of one image:", model(torch.rand(1, 3, size, size)).shape)


if __name__ == "__main__":
    main(sys.argv[1:])
