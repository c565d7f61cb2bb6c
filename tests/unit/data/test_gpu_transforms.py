"""Windows against torchvision's own, random numbers, and what the resampling of a batch gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop, v2

from adaptive_trainer.config.schema import USUAL, DataConfig
from adaptive_trainer.data.cached.gpu_transforms import (
    CHUNK,
    DeviceBatch,
    center_windows,
    crop_windows,
    uniform,
    windows,
)
from adaptive_trainer.data.images.transforms import build_transform

CPU = torch.device("cpu")
SIDES = st.integers(1, 4000)
SCALES = st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(lambda pair: (min(pair), max(pair)))


def sizes_of(*pairs: tuple[int, int]) -> Any:
    return np.array(pairs, dtype=np.int64)


@given(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=20), SCALES, st.integers(0, 2**63 - 1))
@settings(max_examples=200, deadline=None)
def test_crops_lie_within_their_image(pairs: list[tuple[int, int]], scale: tuple[float, float], seed: int) -> None:
    sizes = sizes_of(*pairs)
    top, left, height, width = crop_windows(sizes, uniform(seed, np.arange(len(sizes)), 40), scale).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= sizes[:, 0]).all()
    assert (left + width <= sizes[:, 1]).all()
    assert (height > 0).all()
    assert (width > 0).all()


def torchvision_crop(size: tuple[int, int], draws: Any, scale: tuple[float, float]) -> list[int]:
    """What torchvision cuts out when its random numbers are these."""
    numbers: Iterator[float] = iter(draws)
    places: list[float] = []

    def drawn(tensor: Tensor, low: float, high: float) -> Tensor:
        if not places or len(places) == 3:  # area and ratio of a new try; the places of the last were not asked for
            places.clear()
        value = low + next(numbers) * (high - low)
        places.append(0)
        if len(places) == 2:
            places[:] = [next(numbers), next(numbers), 0]
        return tensor.double().fill_(value)

    def place(low: int, high: int, size: tuple[int]) -> Tensor:
        return torch.tensor(int(low + places.pop(0) * (high - low)))

    with patch.object(torch.Tensor, "uniform_", drawn), patch.object(torch, "randint", place):
        return list(RandomResizedCrop.get_params(torch.empty(3, *size), list(scale), [3 / 4, 4 / 3]))


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (224, 224), (30, 400), (400, 30), (3, 5), (1, 1)])
@pytest.mark.parametrize("scale", [(0.35, 1.0), (0.08, 1.0), (0.9, 1.0)])
def test_crops_are_those_of_torchvision_for_the_same_random_numbers(
    size: tuple[int, int], scale: tuple[float, float]
) -> None:
    draws = uniform(1, np.arange(200), 40)
    found = crop_windows(sizes_of(*[size] * 200), draws, scale)
    assert found.tolist() == [torchvision_crop(size, row, scale) for row in draws]


@pytest.mark.parametrize("size", [(375, 500), (60, 200)])
def test_crops_have_the_distribution_of_torchvision(size: tuple[int, int]) -> None:
    count, scale = 4000, (0.1, 1.0)
    torch.manual_seed(0)
    image = torch.empty(3, *size)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(count)])
    ours = crop_windows(sizes_of(*[size] * count), uniform(0, np.arange(count), 40), scale)
    shares = np.linspace(0.05, 0.95, 19)
    for column in range(4):
        mine, other = (np.quantile(values[:, column], shares) for values in (ours, theirs))
        assert np.abs(mine - other).max() < 0.05 * max(size)


def test_random_numbers_are_uniform_and_belong_to_their_sample_alone() -> None:
    found = uniform(5, np.arange(20000), 5)
    assert found.min() >= 0
    assert found.max() < 1
    assert np.abs(np.corrcoef(np.concatenate((found, np.roll(found, 1, axis=0)), axis=1).T) - np.eye(10)).max() < 0.03
    assert np.abs(np.histogram(found, 20, (0, 1))[0] / found.size - 0.05).max() < 0.002
    some = np.array([17, 3, 19999])
    assert (uniform(5, some, 5) == found[some]).all()
    assert (uniform(5, some, 2) == found[some, :2]).all()
    assert not (uniform(6, some, 5) == found[some]).any()


@given(SIDES.filter(lambda n: n > 3), SIDES.filter(lambda n: n > 3), st.sampled_from([8, 160, 192, 224]))
@settings(max_examples=200, deadline=None)
def test_centre_windows_are_resize_and_centre_crop(height: int, width: int, size: int) -> None:
    if max(height, width) / min(height, width) > 20:
        return
    nearest = v2.Resize(round(size / 0.875), interpolation=v2.InterpolationMode.NEAREST)
    resized = nearest(torch.empty(1, height, width, device="meta")).shape[1:]
    top, left, high, wide = center_windows(sizes_of((height, width)), size)[0]
    assert high * resized[0] / height == pytest.approx(size)
    assert wide * resized[1] / width == pytest.approx(size)
    assert top * resized[0] / height == pytest.approx(round((resized[0] - size) / 2), abs=1e-6)
    assert left * resized[1] / width == pytest.approx(round((resized[1] - size) / 2), abs=1e-6)


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def stored(image: Image.Image, size: int) -> Tensor:
    pixels: Tensor = v2.functional.pil_to_tensor(image.resize((size, size), Image.Resampling.BILINEAR))
    return pixels


@pytest.mark.parametrize(
    ("height", "width", "size"), [(256, 256, 224), (375, 500, 224), (500, 300, 160), (90, 70, 160)]
)
def test_evaluation_looks_as_the_transform_of_single_samples(height: int, width: int, size: int) -> None:
    config, image = DataConfig(), photo(height, width)
    buffers = DeviceBatch(1, size, 256, CPU, config=config)
    buffers.stored[0] = stored(image, 256)
    buffers.windows[0] = torch.from_numpy(
        windows(config, sizes_of((height, width)), np.zeros(1), image_size=size, stored_size=256, seed=0, epoch=None)
    )[0]
    expected = build_transform(config, size, training=False)(image)
    difference = (buffers.resample(1)[0][0] - expected).abs()
    exact = (height, width, size) == (256, 256, 224)
    assert difference.max() < (1e-5 if exact else 0.25), "in standard deviations: 0.25 are 14 of 255 steps"
    assert difference.mean() < 0.02


@pytest.mark.parametrize("channels_last", [False, True])
def test_windows_flip_and_normalise_each_sample_for_itself(channels_last: bool) -> None:
    count, config = CHUNK + 3, DataConfig(hflip=0.5, crop_scale=[0.2, 1.0])
    sizes = sizes_of(*[(40 + n, 60 - n) for n in range(count)])
    found = windows(config, sizes, np.arange(count), image_size=24, stored_size=32, seed=3, epoch=1)
    assert 0 < found[:, 4].sum() < count
    buffers = DeviceBatch(count, 24, 32, CPU, channels_last=channels_last, config=config)
    for n in range(count):
        buffers.stored[n], buffers.sent[n] = stored(photo(40 + n, 60 - n, n), 32), n
    buffers.windows.copy_(torch.from_numpy(found))
    images, labels = buffers.resample(count)
    assert labels.tolist() == list(range(count))
    assert images.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    for n in range(count):
        left, top, right, bottom, flip = found[n]
        x, y = (
            torch.linspace(low, high, 49, dtype=torch.float64)[1::2] for low, high in ((left, right), (top, bottom))
        )
        grid = torch.stack(torch.meshgrid(y, x.flip(0) if flip else x, indexing="ij")[::-1], dim=-1) / 16 - 1
        source = buffers.stored[n : n + 1].double() / 255
        if max(right - left, bottom - top) > 24:
            continue  # shrunk: the mean of several points
        expected = torch.nn.functional.grid_sample(source, grid[None], padding_mode="border", align_corners=False)[0]
        expected = v2.functional.normalize(expected, USUAL["mean"], USUAL["std"])
        assert (images[n] - expected).abs().max() < 1e-3


def test_no_transforms_means_the_whole_image_as_it_is() -> None:
    config = DataConfig(transforms="none")
    found = windows(config, sizes_of((7, 9)), np.zeros(1), image_size=32, stored_size=32, seed=0, epoch=0)
    buffers = DeviceBatch(1, 32, 32, CPU, config=config)
    buffers.stored[0] = stored(photo(7, 9), 32)
    buffers.windows.copy_(torch.from_numpy(found))
    assert torch.allclose(buffers.resample(1)[0], buffers.stored / 255)
