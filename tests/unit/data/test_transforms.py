"""Every kind of image becomes a float tensor of the size asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from adaptive_trainer.config.schema import DataConfig
from adaptive_trainer.data.images.transforms import build_transform, read_as_rgb, to_rgb


def grey(width: int = 10, height: int = 6) -> Image.Image:
    return Image.fromarray((np.arange(width * height) % 256).astype(np.uint8).reshape(height, width))


IMAGES: list[Any] = [
    grey(),
    grey().convert("RGB"),
    grey().convert("RGBA"),
    grey().convert("P"),
    grey().convert("LA"),
    torch.rand(3, 6, 10),
    torch.randint(256, (1, 6, 10), dtype=torch.uint8),
    torch.rand(4, 6, 10),
    torch.rand(6, 10),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("transforms", ["torchvision", "timm", "none"])
def test_every_kind_of_image(transforms: str, training: bool) -> None:
    transform = build_transform(DataConfig(transforms=transforms), 8, training=training)
    for image in IMAGES:
        out = transform(to_rgb(image))
        assert (out.shape, out.dtype, type(out)) == ((3, 8, 8), torch.float32, torch.Tensor)
        assert torch.isfinite(out).all()


@pytest.mark.parametrize("image", ["a.jpg", np.zeros((6, 10, 3)), torch.rand(5, 6, 10), torch.rand(1, 3, 6, 10), None])
def test_what_is_no_image(image: Any) -> None:
    with pytest.raises(TypeError, match=r"a PIL image or a tensor .* is needed"):
        to_rgb(image)


@pytest.mark.parametrize("transforms", ["torchvision", "timm"])
def test_bytes_are_scaled_and_normalised(transforms: str) -> None:
    config = DataConfig(transforms=transforms, mean=[0.5, 0.25, 0.0], std=[0.5, 0.25, 1.0])
    white = Image.new("RGB", (9, 9), "white")
    for training in (True, False):
        out = build_transform(config, 4, training=training)(white)
        assert torch.allclose(out, torch.tensor([1.0, 3.0, 1.0])[:, None, None].expand(3, 4, 4), atol=1e-6)


def test_none_leaves_the_values_and_a_fitting_size_alone() -> None:
    image = torch.rand(3, 8, 8)
    assert torch.equal(build_transform(DataConfig(transforms="none"), 8, training=True)(image), image)


@pytest.mark.parametrize("transforms", ["torchvision", "timm"])
def test_settings_of_the_augmentation_are_used(transforms: str) -> None:
    image = grey(8, 8).convert("RGB")
    whole: dict[str, Any] = {"transforms": transforms, "crop_scale": [1.0, 1.0], "mean": [0.0] * 3, "std": [1.0] * 3}
    flipped, plain = (
        build_transform(DataConfig(**whole, hflip=hflip), 8, training=True)(image) for hflip in (1.0, 0.0)
    )  # fmt: skip
    assert torch.equal(flipped.flip(2), plain)


@pytest.mark.parametrize("name", ["ra", "ta_wide", "imagenet", "augmix"])
def test_auto_augment_of_torchvision(name: str) -> None:
    torch.manual_seed(0)
    outs = [
        build_transform(DataConfig(auto_augment=chosen, hflip=0.0, crop_scale=[1.0, 1.0]), 8, training=True)(
            grey(8, 8).convert("RGB")
        )
        for chosen in (name, name, name, None)
    ]
    assert any(not torch.equal(out, outs[-1]) for out in outs[:-1])


@pytest.mark.parametrize("shades", [np.array([[0, 70000]], np.int32), np.array([[0.0, 1.0]], np.float32)])
def test_shades_of_no_known_range_are_refused(shades: Any) -> None:
    with pytest.raises(OSError, match=r"numbers of 32 bits .* save it with 8 or 16 bits"):
        read_as_rgb(Image.fromarray(shades))
    assert read_as_rgb(Image.fromarray(np.array([[7]], np.int32))).getpixel((0, 0)) == (7, 7, 7)


def test_grey_images_of_sixteen_bits_in_other_files(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 4 1 65535\n" + np.array([[0, 256, 32768, 65535]], ">u2").tobytes())
    with Image.open(tmp_path / "a.pgm") as image:
        assert np.asarray(read_as_rgb(image))[0, :, 2].tolist() == [0, 1, 128, 255]


def test_grey_images_of_sixteen_bits_keep_their_shades() -> None:
    shades = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    assert np.asarray(to_rgb(Image.fromarray(shades)))[0, :, 2].tolist() == [0, 1, 128, 255]
