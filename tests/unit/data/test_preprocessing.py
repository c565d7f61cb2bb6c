"""Images are normalised, cropped and resampled as a pretrained network's weights expect, unless the user says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.models import get_model_weights, list_models

from adaptive_trainer import Trainer, compose_config
from adaptive_trainer.checkpoints import checkpoint
from adaptive_trainer.config.schema import USUAL, Config, DataConfig, ModelConfig
from adaptive_trainer.data.cached.gpu_transforms import DeviceBatch, center_windows, windows
from adaptive_trainer.data.images.preprocessing import own, remark, settled
from adaptive_trainer.data.images.transforms import build_transform
from adaptive_trainer.errors import ConfigError
from adaptive_trainer.ladder.resolve import resolve
from adaptive_trainer.ladder.rung import Rung
from adaptive_trainer.models.zoo import build_model

CPU = torch.device("cpu")
TAGS = timm.list_models(pretrained=True)


def ladder(*overrides: str) -> tuple[Rung[Config], ...]:
    return resolve(compose_config(["data.num_workers=0", *overrides]))


def images_of(config: Config) -> dict[str, Any]:
    return {key: getattr(config.data, key) for key in USUAL}


def test_every_pretrained_tag_of_timm_is_known_by_its_configuration() -> None:
    other = 0
    for name in TAGS:
        cfg, found = timm.get_pretrained_cfg(name), own(ModelConfig(name))
        assert cfg is not None
        known = resolve_data_config(pretrained_cfg=cfg.to_dict())  # type: ignore[no-untyped-call]
        assert found is not None, name
        assert (found["mean"], found["std"]) == (list(known["mean"]), list(known["std"])), name
        assert (found["crop_pct"], found["interpolation"]) == (known["crop_pct"], known["interpolation"]), name
        other += (found["mean"], found["std"]) != (USUAL["mean"], USUAL["std"])
    assert other > 600


def test_every_network_and_tag_can_be_settled() -> None:
    plain = ladder("ladder=none")[0]
    for name in [*TAGS, *(f"torchvision/{name}" for name in list_models(module=torchvision.models))]:
        config = Config(**{**vars(plain.settings), "model": ModelConfig(name, pretrained=True)})
        used = settled([Rung("requested", config)], build_model, None)[0].settings
        assert images_of(used) == own(config.model), name
        assert build_transform(used.data, 32, training=False)(Image.new("RGB", (40, 50))).shape == (3, 32, 32)


def test_torchvisions_weights_say_it_with_their_transforms() -> None:
    for name in list_models(module=torchvision.models):
        how, found = get_model_weights(name).DEFAULT.transforms(), own(ModelConfig(f"torchvision/{name}"))
        assert found is not None
        assert found["mean"] == how.mean
        assert round(how.crop_size[0] / found["crop_pct"]) == how.resize_size[0]
        assert found["interpolation"] == how.interpolation.value


@pytest.mark.parametrize(
    ("name", "kwargs", "mean"),
    [
        ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", {}, [0.5, 0.5, 0.5]),
        ("vit_tiny_patch16_224", {}, [0.5, 0.5, 0.5]),
        ("resnet18", {}, USUAL["mean"]),
        ("resnet18", {"pretrained_cfg_overlay": {"mean": [0.1, 0.2, 0.3]}}, [0.1, 0.2, 0.3]),
        ("convnext_tiny", {"pretrained_cfg": "fb_in22k"}, USUAL["mean"]),
    ],
)
def test_the_settings_of_the_network_count(name: str, kwargs: dict[str, Any], mean: list[float]) -> None:
    found = own(ModelConfig(name, kwargs=kwargs))
    assert found is not None
    assert found["mean"] == mean


def test_a_network_in_a_folder_is_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"architecture": "resnet18", "pretrained_cfg": {"mean": [0.1, 0.1, 0.1], "std": [1, 1, 1], "crop_pct": 0.9}}'
    )
    found = own(ModelConfig(f"local-dir:{tmp_path}"))
    assert found is not None
    assert (found["mean"], found["crop_pct"]) == ([0.1, 0.1, 0.1], 0.9)


def test_each_rung_has_its_own_networks() -> None:
    rungs = settled(ladder("model.name=vit_tiny_patch16_224", "model.pretrained=true"), build_model, None)
    assert rungs[0].settings.data.mean == [0.5, 0.5, 0.5]
    for rung in rungs:
        assert images_of(rung.settings) == own(rung.settings.model)
    assert rungs[-1].settings.data.mean == USUAL["mean"]


def test_without_pretrained_weights_all_is_as_usual() -> None:
    for overrides, make in ((["model.pretrained=false"], build_model), (["model.pretrained=true"], make_tiny)):
        for rung in settled(ladder("model.name=vit_tiny_patch16_224", *overrides), make, None):
            assert images_of(rung.settings) == USUAL


def test_what_the_user_sets_wins_and_the_difference_is_named() -> None:
    given = ["model.name=vit_tiny_patch16_224", "model.pretrained=true", "data.mean=[0.4,0.4,0.4]", "data.crop_pct=0.8"]
    config = settled(ladder(*given), build_model, None)[0].settings
    assert images_of(config) == {**(own(config.model) or {}), "mean": [0.4] * 3, "crop_pct": 0.8}
    said = remark(config, build_model)
    assert "data.mean=[0.4,0.4,0.4]" in said
    assert said.endswith("the weights of vit_tiny_patch16_224 expect data.mean=[0.5,0.5,0.5] data.crop_pct=0.9")


def make_tiny(model: ModelConfig, classes: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, classes))


@pytest.mark.parametrize(
    ("overrides", "make", "message"),
    [
        ([], build_model, "as the weights of vit_tiny_patch16_224 expect"),
        (["data.cache=ram"], build_model, "data.cache=ram resamples bilinear all the same"),
        (
            ["data.transforms=none"],
            build_model,
            "images are not normalised: data.transforms=none; the weights of vit_tiny",
        ),
        ([], make_tiny, "it is not known what the weights of the network expect"),
    ],
)
def test_what_is_decided_is_said(overrides: list[str], make: Callable[..., nn.Module], message: str) -> None:
    given = ["model.name=vit_tiny_patch16_224", "model.pretrained=true", *overrides]
    assert message in remark(settled(ladder(*given), make, None)[0].settings, make)


@pytest.mark.parametrize("override", ["data.crop_pct=0", "data.crop_mode=border", "data.interpolation=area"])
def test_settings_that_cannot_be(override: str) -> None:
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        ladder(override)


def gradient(height: int = 60, width: int = 90) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack((rows * 255 // height, columns * 255 // width, np.full_like(rows, 128)), axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("crop_pct", [0.5, 0.875, 0.95, 1.0])
def test_all_paths_evaluate_the_same_window_with_the_same_normalisation(crop_pct: float, crop_mode: str) -> None:
    how: dict[str, Any] = {
        "mean": [0.5, 0.4, 0.3],
        "std": [0.5, 0.25, 0.2],
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
    }
    image, size, stored = gradient(), 32, 128
    config = DataConfig(**how)
    plain = build_transform(config, size, training=False)(image)
    theirs = create_transform((3, size, size), interpolation="bilinear", **how)(image)
    by_timm = build_transform(DataConfig(**how, transforms="timm"), size, training=False)(image)
    assert torch.equal(by_timm, theirs)
    assert (plain - theirs).abs().mean() < 0.06  # timm rounds the size down
    batch = DeviceBatch(1, size, stored, CPU, config=config)
    squashed = np.asarray(image.resize((stored, stored))).transpose(2, 0, 1)
    batch.stored[0] = torch.from_numpy(squashed.copy())
    boxes = windows(
        config, np.array([[60, 90]]), np.array([0]), image_size=size, stored_size=stored, seed=0, epoch=None
    )
    batch.windows[0] = torch.from_numpy(boxes[0])
    cached, _ = batch.resample(1)
    assert (cached[0] - plain).abs().mean() < 0.06
    assert center_windows(np.array([[60, 90]]), 32).tolist() == center_windows(np.array([[60, 90]]), 32, 0.875).tolist()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("transforms", ["torchvision", "timm"])
def test_images_are_resampled_as_asked(transforms: str, training: bool) -> None:
    noise = Image.fromarray((255 * np.random.default_rng(0).random((64, 64, 3))).astype(np.uint8))
    outs = []
    for interpolation in (None, "bilinear", "bicubic"):
        torch.manual_seed(0)
        config = DataConfig(transforms=transforms, interpolation=interpolation, hflip=0.0, crop_scale=[1.0, 1.0])
        outs.append(build_transform(config, 24, training=training)(noise))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[1], outs[2])


@pytest.fixture
def weights(tmp_path: Path) -> list[str]:
    """The settings of a small pretrained network whose weights lie in a file."""
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_vit").state_dict(), path)
    overlay = f"{{file: {path}, mean: [0.25, 0.25, 0.25], std: [2.0, 2.0, 2.0], crop_pct: 0.9}}"
    return ["model.name=test_vit", "model.pretrained=true", f"+model.kwargs.pretrained_cfg_overlay={overlay}"]


def fit(folder: Path, *overrides: str) -> Any:
    base = ["data.num_workers=0", "trainer.batch_size=8", "data.image_size=160", "memory.limit=none", "ladder=none"]
    data = TensorDataset(torch.rand(10, 3, 160, 160), torch.tensor([0, 1] * 5))
    return Trainer(compose_config([*base, *overrides]), train_data=data, output_dir=folder).fit()


@pytest.mark.long
def test_a_run_and_its_resumed_run_use_and_record_it(weights: list[str], tmp_path: Path) -> None:
    result = fit(tmp_path, *weights)
    assert (result.images["mean"], result.images["std"], result.images["crop_pct"]) == ([0.25] * 3, [2.0] * 3, 0.9)
    assert [text for text in result.events if text.startswith("images are prepared with data.mean=[0.25,0.25,0.25]")]
    assert result.changes == []
    path = tmp_path / "checkpoints" / "last.pt"
    assert checkpoint.load(path)["config"]["data"]["mean"] == [0.25] * 3
    again = fit(tmp_path, *weights, "resume=auto", "trainer.epochs=2")
    assert again.images == result.images
    assert not [text for text in again.events if "resumed with another data" in text]
    other = fit(tmp_path, *weights, "resume=auto", "trainer.epochs=3", "data.mean=[0,0,0]")
    assert (other.images["mean"], other.images["std"]) == ([0.0] * 3, [2.0] * 3)
    assert [text for text in other.events if "resumed with another data.mean: [0.25, 0.25, 0.25] -> [0.0" in text]


@pytest.mark.long
def test_a_checkpoint_without_these_settings_goes_on_with_what_was_usual(weights: list[str], tmp_path: Path) -> None:
    fit(tmp_path, *weights)
    path = tmp_path / "checkpoints" / "last.pt"
    saved = {key: value for key, value in checkpoint.load(path).items() if key not in ("format", "version")}
    data = saved["config"]["data"]
    saved["config"]["data"] = {**data, "mean": USUAL["mean"], "std": USUAL["std"]}
    for key in ("crop_pct", "crop_mode", "interpolation"):
        del saved["config"]["data"][key]
    checkpoint.save(path, saved)
    for epochs in (2, 3):
        result = fit(tmp_path, *weights, "resume=auto", f"trainer.epochs={epochs}")
        assert result.images == USUAL
        assert not [text for text in result.events if "resumed with another data" in text]
