from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adaptive_trainer import Trainer, compose_config

COLOURS = ("blue", "green", "red")
SETTINGS = (
    "data=imagefolder", "model.name=test_resnet", "data.image_size=32", "trainer.batch_size=8", "trainer.epochs=3",
    "data.num_workers=0", "ladder=none", "data.crop_pct=0.8", "data.interpolation=bicubic",
)  # fmt: skip


def photograph(path: Path, colour: int, seed: int, **how: Any) -> None:
    """A noisy picture of 50 x 40 pixels, with more of one colour than of the others."""
    pixels = np.random.default_rng(seed).integers(0, 120, (40, 50, 3), dtype=np.uint8)
    pixels[..., 2 - colour] += 100
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **how)


def fill(folder: Path, each: int, first: int = 0) -> None:
    for number, name in enumerate(COLOURS):
        for place in range(each):
            photograph(folder / name / f"{place}.jpg", number, first + 100 * number + place)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of three colours: train, val and test."""
    root = tmp_path_factory.mktemp("photos")
    for split, each, first in (("train", 12, 0), ("val", 4, 1000), ("test", 7, 2000)):
        fill(root / split, each, first)
    test = root / "test"  # with labels that are wrong, so that nobody can be right on all
    shutil.copy(test / "red" / "0.jpg", test / "blue" / "0.jpg")
    shutil.copy(test / "red" / "1.jpg", test / "blue" / "1.jpg")
    shutil.copy(test / "green" / "2.jpg", test / "red" / "2.jpg")
    return root


@pytest.fixture(scope="session")
def best(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a network that has seen some of the colours."""
    folder = tmp_path_factory.mktemp("run")
    Trainer(compose_config([*SETTINGS, f"data.root={photos}"]), output_dir=folder).fit()
    return folder / "checkpoints" / "best.pt"
