"""What is exported gives the network's scores, for any number of images, and says what its use needs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from adaptive_trainer import ModelError
from adaptive_trainer.inference import export as exporting
from adaptive_trainer.inference.export import ABOUT, ONNX, PROGRAM, export
from adaptive_trainer.inference.model import Trained, load


@pytest.fixture(scope="module")
def exported(best: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float], Trained]:
    folder, trained = tmp_path_factory.mktemp("export"), load(best)
    return folder, export(trained, folder), trained


def scores_of(folder: Path, name: str, images: Tensor) -> Tensor:
    """As another program would have them."""
    if name == PROGRAM:
        found: Tensor = torch.export.load(folder / name).module()(images)
        return found
    session = onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["scores"], {"images": images.numpy()})[0])


@pytest.mark.parametrize("name", [PROGRAM, ONNX])
def test_its_scores_are_those_of_the_network(name: str, exported: Any) -> None:
    folder, found, trained = exported
    images = torch.rand(7, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(scores_of(folder, name, images), trained.network(images), atol=1e-4, rtol=1e-4)
    assert 0 <= found[name] <= 1e-4


def test_a_photo_prepared_as_the_json_says(exported: Any, photos: Path) -> None:
    """With nothing of this package."""
    folder, _, trained = exported
    about = json.loads((folder / ABOUT).read_text())
    how = about["input"]["preprocessing"]
    image = Image.open(photos / "test" / "red" / "3.jpg").convert("RGB")
    chain = v2.Compose(
        [
            v2.Resize(how["resize"], interpolation=v2.InterpolationMode(how["interpolation"])),
            v2.CenterCrop(how["center_crop"]),
        ]
    )
    pixels = np.asarray(chain(image)) * how["scale"]
    ready = torch.from_numpy((pixels - how["mean"]) / how["std"]).permute(2, 0, 1)[None].float()
    torch.testing.assert_close(ready[0], trained.transform(image))
    scores = scores_of(folder, ONNX, ready)
    with torch.no_grad():
        wanted = trained.network(trained.transform(image)[None])
    assert about["classes"][int(scores.argmax())] == trained.classes[int(wanted.argmax())]
    assert about["input"]["shape"] == ["batch", 3, 32, 32]
    assert about["output"]["shape"] == ["batch", 3]
    assert about["tolerance"] == {"absolute": 1e-4, "relative": 1e-4}


@pytest.mark.long
@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "test_convnext", "test_mambaout"])
def test_networks_of_other_kinds(name: str, best: Path, tmp_path: Path) -> None:
    size = 160
    trained = load(best)
    data = replace(trained.config.data, image_size=size)
    network = timm.create_model(name, num_classes=3).eval()
    export(replace(trained, network=network, config=replace(trained.config, data=data)), tmp_path)
    images = torch.rand(3, 3, size, size)
    with torch.no_grad():
        for file in (PROGRAM, ONNX):
            torch.testing.assert_close(scores_of(tmp_path, file, images), network(images), atol=1e-4, rtol=1e-4)


class Looks(nn.Module):
    """Decides by a value, which no exported program can follow."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


class Draws(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) + torch.rand(3)


@pytest.mark.parametrize(
    ("network", "said"),
    [(Looks(), "cannot be exported by torch.export: "), (Draws(), "model.pt2 gives other scores than the network")],
)
def test_what_cannot_be_exported_leaves_nothing(network: nn.Module, said: str, best: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=said):
        export(replace(load(best), network=network), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_the_packages_of_onnx(best: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "NEEDED", ("onnx", "no_such_package"))
    assert exporting.missing() == ["no_such_package"]
    assert list(export(load(best), tmp_path)) == [PROGRAM]
    assert sorted(path.name for path in tmp_path.iterdir()) == [ABOUT, PROGRAM]
