"""What is exported gives the network's scores, for any number of images, and says what its use needs."""

from __future__ import annotations

import json
import os
import threading
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

from adaptive_trainer import ConfigError, ModelError
from adaptive_trainer.inference.export import ABOUT, ONNX, PROGRAM, export
from adaptive_trainer.inference.model import Trained, load

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def exported(best: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float], Trained]:
    folder, trained = tmp_path_factory.mktemp("export"), load(best)
    found = export(trained, folder)
    assert found.no_onnx == ""
    return folder, found.differences, trained


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
@pytest.mark.parametrize(
    "name",
    [
        "test_vit",
        *(pytest.param(f"test_{kind}", marks=pytest.mark.slow) for kind in ("efficientnet", "convnext", "mambaout")),
    ],
)
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
    [
        (Looks(), "cannot be exported by torch.export: .* In Python, load_model gives"),
        (Draws(), "model.pt2 gives other scores than the network"),
    ],
)
def test_what_cannot_be_exported_leaves_the_folder_as_it_was(
    network: nn.Module, said: str, best: Path, tmp_path: Path
) -> None:
    trained = replace(load(best), network=network)
    with pytest.raises(ModelError, match=f"{said}(?!.*earlier)"):
        export(trained, tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / PROGRAM).write_text("old")
    with pytest.raises(ModelError, match=f"{said}.*model.pt2 in .* stay from an earlier export"):
        export(trained, tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(PROGRAM, "old")]


def test_a_full_disk_leaves_an_earlier_export_whole(
    best: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (PROGRAM, ONNX, ABOUT):
        (tmp_path / name).write_text("old")
    (tmp_path / f"{ABOUT}.{os.getpid()}.{threading.get_native_id()}.part").mkdir()  # the last one cannot be written
    with pytest.raises(ConfigError, match=r"cannot write the export in .*model.pt2 and model.onnx in .* stay from"):
        export(load(best), tmp_path)
    assert {path.read_text() for path in tmp_path.iterdir() if path.is_file()} == {"old"}


def broken(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("[ONNXRuntimeError] : 6\nand more")


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (f"{export.__module__}.NEEDED", ("onnx", "no_such_package"), "it needs no_such_package; pip install"),
        (f"{export.__module__}.LARGEST", 1000, "the weights take 1465 KiB, and a file of ONNX holds less than 2 GiB"),
        (
            "torch.onnx.export",
            broken,
            "torch.onnx cannot export the network: RuntimeError: [ONNXRuntimeError] : 6; newer",
        ),
        (
            "onnxruntime.InferenceSession",
            broken,
            "onnxruntime does not load it: RuntimeError: [ONNXRuntimeError] : 6; ",
        ),
        (
            "onnxruntime.InferenceSession.run",
            broken,
            "onnxruntime does not run it: RuntimeError: [ONNXRuntimeError] : 6",
        ),
    ],
)
def test_where_onnx_cannot_be_made_the_program_is(
    place: str, value: Any, said: str, best: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ONNX).write_text("of another network")
    monkeypatch.setattr(place, value)
    found = export(load(best), tmp_path)
    assert found.no_onnx.startswith(said)
    assert list(found.differences) == [PROGRAM]
    assert sorted(path.name for path in tmp_path.iterdir()) == [ABOUT, PROGRAM]
