"""Two trainings in one process of each rank; the network draws its weights from a generator that nobody has seeded.

Usage: torchrun --nproc-per-node=2 -m tests.attack.two_fits FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from adaptive_trainer import Trainer, compose_config
from adaptive_trainer.config.schema import ModelConfig

SETTINGS = [
    "data.num_workers=0", "data.image_size=8", "device=cpu", "memory.limit=none", "trainer.epochs=2",
    "ladder.climb=true", "trainer.batch_size=6", "report=false", "verbosity=quiet", "trainer.eval_batch_size=1",
]  # fmt: skip


def make_model(_: ModelConfig, num_classes: int) -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4), nn.Linear(4, num_classes))
    drawn = np.random.default_rng()  # of the system
    for weight in net.parameters():
        weight.data.copy_(torch.from_numpy(drawn.normal(size=tuple(weight.shape))))
    net.register_parameter("gaps", nn.Parameter(torch.ones(4, 8)[:, :4]))
    return net


def pictures(count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(count)
    return TensorDataset(torch.rand(count, 3, 8, 8, generator=generator), torch.arange(count) % 3)


def main() -> None:
    folder, rank, said = Path(sys.argv[1]), os.environ["RANK"], []
    for number in range(2):
        config = compose_config([*SETTINGS, "model.num_classes=3"])
        trainer = Trainer(
            config, model=make_model, train_data=pictures(20), val_data=pictures(7), output_dir=folder / str(number)
        )
        metrics = trainer.fit().metrics
        assert trainer.model is not None
        weights = {name: value.tolist() for name, value in trainer.model.state_dict().items()}
        said.append({"metrics": [metrics["train_loss"], metrics["val_loss"]], "weights": weights})
    (folder / f"{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
