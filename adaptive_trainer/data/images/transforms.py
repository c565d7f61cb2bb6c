"""From a data set's image to the network's input: augmentation for training, resize and crop for evaluation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from adaptive_trainer.config.schema import DataConfig, with_usual
from adaptive_trainer.errors import ConfigError, explained

Transform = Callable[[Any], Tensor]
AUTO_AUGMENT = {  # by the names of torchvision's reference scripts
    "ra": "RandAugment", "ta_wide": "TrivialAugmentWide", "imagenet": "AutoAugment", "augmix": "AugMix",
}  # fmt: skip
TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)  # what Pillow raises for a large image
WHOLE_NUMBERS = (torch.int8, torch.int16, torch.int32, torch.int64)
MOST = 32.0  # that floats which go to 1, or some range of the user's own, have; an image of 0 to 255 has more
TURN = Image.Transpose
UPRIGHT = dict(enumerate((  # by EXIF orientation; 1 is upright
    TURN.FLIP_LEFT_RIGHT, TURN.ROTATE_180, TURN.FLIP_TOP_BOTTOM, TURN.TRANSPOSE, TURN.ROTATE_270, TURN.TRANSVERSE,
    TURN.ROTATE_90,
), start=2))  # fmt: skip


def to_rgb(image: Any) -> Image.Image | Tensor:
    """Give a PIL image, or a tensor (C, H, W) or (H, W), grey or with alpha, exactly three channels.

    A PIL image whose EXIF data says that it lies down, or is mirrored, is turned upright. All else is a TypeError.
    """
    if isinstance(image, Image.Image):
        return image if image.mode == "RGB" and _turn(image) is None else read_as_rgb(image)
    if isinstance(image, Tensor) and image.ndim in (2, 3):
        planes = image if image.ndim == 3 else image[None]
        if planes.shape[0] in (3, 4):
            return planes[:3]  # without alpha
        if planes.shape[0] in (1, 2):
            return planes[:1].expand(3, -1, -1)  # grey, with or without alpha
    got = f"a tensor of shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
    raise TypeError(f"the image is {got}; a PIL image or a tensor (C, H, W) with 1, 3 or 4 channels is needed")


def wrong_range(image: Any, config: DataConfig) -> str | None:
    """Say why a tensor's values would be taken for others: floats from 0 to 255, which are scaled as if they went to 1.

    With `data.transforms=none` floats may have any range, but for a cache, which stores bytes.
    """
    if not isinstance(image, Tensor) or not image.numel():
        return None
    if image.dtype in WHOLE_NUMBERS:
        return f"is a tensor of {image.dtype}; give bytes (torch.uint8), or floats from 0 to 1"
    are_scaled = config.transforms != "none" or config.cache != "none"
    if are_scaled and image.is_floating_point() and image.min() >= 0 and image.max() > MOST:
        return (
            f"has floats from {float(image.min()):g} to {float(image.max()):g}, which are taken to go from 0 to 1; "
            "divide them by 255, or give bytes (torch.uint8)"
        )
    return None


def read_as_rgb(image: Image.Image) -> Image.Image:
    """An upright copy with three channels of bytes, read from its file; an OSError where that cannot be done."""
    turn = _turn(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # else all above 255 is white
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if image.mode == "F" or (image.mode == "I" and np.asarray(image).max() > 255):
        raise UnidentifiedImageError(
            f"its shades are numbers of 32 bits ({image.mode}), of no known range; save it with 8 or 16 bits"
        )
    rgb = image.convert("RGB")
    rgb = rgb if turn is None else rgb.transpose(turn)
    rgb.info = {}  # with the orientation that has been followed
    return rgb


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes an image upright, by its EXIF data; None where it is so already, or the data cannot be read."""
    image.load()  # a TIFF is turned by Pillow here
    # `ImageOps.exif_transpose` writes the data anew, and fails where another part of it is broken.
    with suppress(Exception):  # broken EXIF data raises nearly everything
        return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return None


def build_transform(config: DataConfig, image_size: int, *, training: bool) -> Transform:
    """From an RGB image (PIL, or a tensor of bytes or of floats from 0 to 1) to a float tensor (3, size, size).

    `data.transforms=none` only resizes images of another size, and neither augments nor normalises.

    Raises:
        ConfigError: `data.auto_augment` or another setting of the augmentation is not known.
    """
    make = _timm if config.transforms == "timm" else _torchvision
    return make(with_usual(config), image_size, training)


def _torchvision(config: DataConfig, size: int, training: bool) -> Transform:
    from torchvision.transforms import v2

    to_float: list[Any] = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    if config.transforms == "none":
        return v2.Compose([*to_float, v2.Resize((size, size), antialias=True)])  # type: ignore[no-any-return]
    how: dict[str, Any] = {"interpolation": v2.InterpolationMode(config.interpolation), "antialias": True}
    if training:
        steps = [v2.RandomResizedCrop(size, scale=tuple(config.crop_scale), **how)]
        steps += [v2.RandomHorizontalFlip(config.hflip)] if config.hflip else []
        steps += [_auto_augment(config.auto_augment)] if config.auto_augment else []
    else:
        resized = round(size / (config.crop_pct or 1))
        sides = (resized, resized) if config.crop_mode == "squash" else resized
        steps = [v2.Resize(sides, **how), v2.CenterCrop(size)]
    return v2.Compose([*steps, *to_float, v2.Normalize(config.mean, config.std)])  # type: ignore[no-any-return]


def _auto_augment(name: str) -> Any:
    from torchvision.transforms import v2

    if name not in AUTO_AUGMENT:
        raise ConfigError(
            f"data.auto_augment={name} is none of {', '.join(AUTO_AUGMENT)} (or null); with data.transforms=timm it is "
            "a string of timm, such as rand-m9-mstd0.5"
        )
    return getattr(v2, AUTO_AUGMENT[name])()


def _timm(config: DataConfig, size: int, training: bool) -> Transform:
    from timm.data import create_transform
    from torchvision.transforms import v2

    settings: dict[str, Any] = {
        key: getattr(config, key) for key in ("hflip", "auto_augment", "interpolation", "crop_pct", "crop_mode")
    }
    settings |= {
        "color_jitter": None,
        "mean": tuple(config.mean or ()),
        "std": tuple(config.std or ()),
        "scale": tuple(config.crop_scale),
    }
    what = f"timm does not take these transforms (data.auto_augment={config.auto_augment})"
    with explained(
        lambda error: ConfigError(f"{what}: {type(error).__name__} {error}"),
        (AssertionError, ValueError, KeyError, IndexError),
    ):
        chain = create_transform((3, size, size), is_training=training, **settings)
    return v2.Compose([_to_pil, chain])  # type: ignore[no-any-return]


def _to_pil(image: Any) -> Image.Image:
    from torchvision.transforms.v2.functional import to_pil_image

    return image if isinstance(image, Image.Image) else to_pil_image(image)
