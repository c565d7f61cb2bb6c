"""What `load_model` gives: the network with the names of its classes, its preprocessing and its recipe."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from adaptive_trainer import CheckpointError, Trainer, compose_config, load_model

SETTINGS = (
    "ladder=none", "trainer.batch_size=4", "data.image_size=16", "data.num_workers=0", "memory.limit=none",
    "data.mean=[0.1,0.2,0.3]", "data.std=[0.5,0.6,0.7]",
)  # fmt: skip


class Pixels(Dataset[Any]):
    classes = ("cat", "dog")

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((3, 20, 20), index / 10), index % 2


def network(config: Any, classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 2, 16), nn.Flatten(), nn.Linear(2, classes))


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    settings = compose_config([*SETTINGS, "model.num_classes=3"])
    Trainer(settings, model=network, train_data=Pixels(), output_dir=folder).fit()
    return folder / "checkpoints" / "best.pt"


def test_it_carries_what_its_use_needs(best: Path) -> None:
    found: Any = load_model(best, network)
    assert found.classes == ("cat", "dog", "2")  # the head is wider than the names of the data set
    assert (found.recipe.batch_size, found.recipe.image_size, found.recipe.num_classes) == (4, 16, 3)
    assert not found.training
    assert list(found.state_dict()) == list(torch.load(best, weights_only=True)["model"])


def test_its_transform_is_that_of_evaluation(best: Path) -> None:
    found: Any = load_model(best, network)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 4), dtype=np.uint8)
    photo = Image.fromarray(pixels, "CMYK")
    plain = v2.Compose(
        [
            v2.Resize(18, antialias=True),  # 16 / 0.875
            v2.CenterCrop(16),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.1, 0.2, 0.3], [0.5, 0.6, 0.7]),
        ]
    )
    assert torch.equal(found.transform(photo), plain(photo.convert("RGB")))
    assert found(found.transform(photo)[None]).shape == (1, 3)


def test_it_can_be_copied_and_pickled(best: Path) -> None:
    found: Any = load_model(best, network)
    for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert other.classes == found.classes
        image = torch.rand(3, 20, 20)
        assert torch.equal(other.transform(image), found.transform(image))


def test_a_checkpoint_without_names_has_numbers(best: Path, tmp_path: Path) -> None:
    content = torch.load(best, weights_only=True)
    del content["classes"]
    torch.save(content, tmp_path / "old.pt")
    old: Any = load_model(tmp_path / "old.pt", network)
    assert old.classes == ("0", "1", "2")


def test_names_that_are_no_texts_are_refused(best: Path, tmp_path: Path) -> None:
    content = torch.load(best, weights_only=True)
    content["classes"] = [1, 2]
    torch.save(content, tmp_path / "altered.pt")
    with pytest.raises(CheckpointError, match="'classes' is not what was saved"):
        load_model(tmp_path / "altered.pt", network)


def test_what_the_network_has_itself_stays(best: Path) -> None:
    def own(config: Any, classes: int) -> nn.Module:
        made = network(config, classes)
        made.classes = 7  # type: ignore[assignment]
        return made

    found: Any = load_model(best, own)
    assert found.classes == 7
    assert found.recipe.image_size == 16
