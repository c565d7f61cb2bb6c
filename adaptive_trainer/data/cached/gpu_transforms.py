"""Crop, flip and normalise a whole batch at once, on the device, for images that are kept decoded.

The images are stored squashed to S x S pixels. A window is a box in the pixels of the original, so it maps to the
stored image exactly, and one kernel (RoIAlign; He et al., 2017, arXiv 1703.06870) resamples all windows of a batch.
Random numbers are a hash of (seed, epoch, index, draw): a sample's augmentation is the same in whatever batch it comes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from adaptive_trainer import oom
from adaptive_trainer.config.schema import EVAL_CROP, DataConfig, with_usual
from adaptive_trainer.data.position import key_seed
from adaptive_trainer.errors import OutOfMemory
from adaptive_trainer.memory.usage import is_short

Array = np.ndarray[Any, Any]
T = TypeVar("T")
GAMMA = np.uint64(0x9E3779B97F4A7C15)
TRIES = 10  # as torchvision's RandomResizedCrop
RATIO = (3 / 4, 4 / 3)
DRAWS = 4 * TRIES + 1  # area, ratio, top and left of every try; the flip
CHUNK = 32  # images that are resampled at a time: what is held meanwhile stays small beside an update


def uniform(seed: int, index: Array, draws: int) -> Array:
    """Random numbers in [0, 1), float64 (N, draws), that depend on seed, index (N,) and the number of the draw alone.

    SplitMix64 (Steele, Lea and Flood, 2014, doi 10.1145/2660193.2660195) as a hash of a counter.
    """
    start = _mixed(np.asarray(index, dtype=np.uint64) * GAMMA + np.uint64(seed))
    counters = np.arange(1, draws + 1, dtype=np.uint64) * GAMMA
    return np.asarray((_mixed(start[:, None] + counters) >> np.uint64(11)) * 2.0**-53)  # as many bits as a float64 has


def _mixed(z: Array) -> Array:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


def crop_windows(sizes: Array, draws: Array, scale: tuple[float, float]) -> Array:
    """What torchvision's RandomResizedCrop cuts out: an area uniform in `scale`, a ratio log-uniform in 3/4 to 4/3.

    Args:
        sizes: height and width of the originals, (N, 2).
        draws: uniform random numbers, (N, at least 40).

    Returns:
        top, left, height, width in whole pixels of the original, int64 (N, 4).
    """
    area, ratio, top, left = draws[:, : 4 * TRIES].reshape(-1, TRIES, 4).transpose(2, 0, 1)
    full_height, full_width = sizes[:, :1], sizes[:, 1:]
    area = full_height * full_width * (scale[0] + area * (scale[1] - scale[0]))
    low, high = np.log(RATIO)
    ratio = np.exp(low + ratio * (high - low))
    width, height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    inside = (width > 0) & (width <= full_width) & (height > 0) & (height <= full_height)
    tries = np.stack(
        (np.floor(top * (full_height - height + 1)), np.floor(left * (full_width - width + 1)), height, width), axis=2
    )
    # the first try that lies within the image, else the largest centre crop of an allowed ratio
    chosen = tries[np.arange(len(sizes)), inside.argmax(axis=1)].astype(np.int64)
    return np.where(inside.any(axis=1)[:, None], chosen, _largest_centre(sizes))


def _largest_centre(sizes: Array) -> Array:
    height, width = sizes.T
    used_height = np.where(width / height < RATIO[0], np.rint(width / RATIO[0]), height)
    used_width = np.where(width / height > RATIO[1], np.rint(height * RATIO[1]), width)
    used = np.stack((used_height, used_width), axis=1).astype(np.int64)
    return np.concatenate(((sizes - used) // 2, used), axis=1)


def center_windows(sizes: Array, image_size: int, crop_pct: float = EVAL_CROP, crop_mode: str = "center") -> Array:
    """What is left of the originals after Resize(image_size / crop_pct) and CenterCrop(image_size).

    Args:
        crop_mode: `squash` resizes both sides, `center` the shorter one.

    Returns:
        top, left, height, width in pixels of the original, float64 (N, 4).
    """
    side = round(image_size / crop_pct)
    shorter = sizes if crop_mode == "squash" else sizes.min(axis=1, keepdims=True)
    resized = (side * sizes / shorter).astype(np.int64)
    start = np.rint((resized - image_size) / 2)
    boxes = np.concatenate((start, np.full_like(start, image_size)), axis=1)  # of the resized image
    return np.asarray(boxes * np.tile(sizes / resized, 2))  # of the original


def windows(
    config: DataConfig, sizes: Array, index: Array, *, image_size: int, stored_size: int, seed: int, epoch: int | None
) -> Array:
    """Where each sample's window lies in its stored image, and whether it is flipped.

    Args:
        sizes: height and width of the originals, (N, 2).
        index: of the samples in the data set, (N,).
        epoch: of training; None for evaluation, which is not random.

    Returns:
        float32 (N, 5): left, top, right, bottom in stored pixels, flip (0 or 1).
    """
    flip: Array = np.zeros(len(sizes))
    boxes: Array = np.concatenate((np.zeros_like(sizes), sizes), axis=1)
    if config.transforms == "none":
        pass
    elif epoch is None:
        used = with_usual(config)
        boxes = center_windows(sizes, image_size, used.crop_pct or EVAL_CROP, used.crop_mode or "")
    else:
        draws = uniform(key_seed(seed, epoch), index, DRAWS)
        boxes = crop_windows(sizes, draws, (config.crop_scale[0], config.crop_scale[1]))
        flip = draws[:, -1] < config.hflip
    top, left, height, width = (boxes * np.tile(stored_size / sizes, 2)).T
    return np.stack((left, top, left + width, top + height, flip), axis=1).astype(np.float32)


class DeviceBatch:
    """What an update of cached data holds on its device, made once and used again for every batch.

    Args:
        capacity: most samples in a batch.
        image_size, channels_last: of the network's input.
        config: with how images are normalised; None leaves them as they are.

    Attributes:
        stored, windows, sent: uint8 (capacity, 3, stored_size, stored_size), float32 (capacity, 5), int64 (capacity,):
            images, windows and labels of the next batch, which are copied here while one trains.
        images, labels: float32 (capacity, 3, image_size, image_size), int64 (capacity,): those of the current batch.
    """

    def __init__(
        self,
        capacity: int,
        image_size: int,
        stored_size: int,
        device: torch.device,
        *,
        channels_last: bool = False,
        config: DataConfig | None = None,
    ) -> None:
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.windows = torch.zeros(capacity, 5, device=device)
        self._places = torch.arange(CHUNK, dtype=torch.float32, device=device)[:, None]
        import torchvision  # noqa: F401  # registers the operator that `resample` calls

        self.sent, self.labels = (torch.zeros(capacity, dtype=torch.int64, device=device) for _ in range(2))
        self.stored = torch.empty(capacity, 3, stored_size, stored_size, dtype=torch.uint8, device=device)
        self.images = torch.empty(capacity, 3, image_size, image_size, device=device, memory_format=memory_format)
        used = None if config is None or config.transforms == "none" else with_usual(config)
        mean, std = (used and used.mean) or [0.0] * 3, (used and used.std) or [1.0] * 3
        self._scale = torch.tensor([1 / (255 * s) for s in std], device=device).view(3, 1, 1)
        self._shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device).view(3, 1, 1)

    @torch.no_grad()
    def resample(self, count: int) -> tuple[Tensor, Tensor]:
        """Make the current batch of the first `count` samples that were sent; the next call overwrites it."""
        side, out = self.images.shape[-1], self.images[:count]
        for first in range(0, count, CHUNK):
            part = self.windows[first : min(first + CHUNK, count)]
            source = self.stored[first : first + len(part)].float()
            # Not through torchvision.ops.roi_align, which compiles a slower one when deterministic algorithms are asked
            # for; forward is deterministic in any case. One sample a pixel, more where the window shrinks (-1).
            boxes = torch.cat((self._places[: len(part)], part[:, :4]), 1)
            found = torch.ops.torchvision.roi_align(source, boxes, 1.0, side, side, -1, True)
            found.mul_(self._scale).add_(self._shift)
            out[first : first + len(part)].copy_(torch.where(part[:, 4, None, None, None] > 0, found.flip(3), found))
        return out, self.labels[:count].copy_(self.sent[:count])


def fitting(device: torch.device, work: Callable[[], T]) -> T:
    """Return what the work of the data path returns.

    Raises:
        OutOfMemory: it failed for lack of memory on `device`, twice where that could help; what it held is freed.
    """
    done = oom.retry(work, device, pressure=lambda: is_short(device))
    if isinstance(done, oom.Failure):
        raise OutOfMemory(done.text, phase="loading data")
    return done
