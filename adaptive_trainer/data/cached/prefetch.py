"""Prefetchers of stored images: a thread gathers the next batch and copies it to the device while the current trains.

They give the same samples in the same order as a `Loader`, from any position on. Two buffers on the host and one on the
device are used again for every batch; a batch is valid until the next one is asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from adaptive_trainer.config.schema import DataConfig
from adaptive_trainer.data.cached.gpu_transforms import DeviceBatch, fitting, windows
from adaptive_trainer.data.cached.store import Stored
from adaptive_trainer.data.datasets import DataSets, MapDataset, sample_name
from adaptive_trainer.data.loader import Batch
from adaptive_trainer.data.position import Position, part_of, shares
from adaptive_trainer.distributed.peers import peers

Array = np.ndarray[Any, Any]
Part = tuple[Array, int]  # indices of the samples of this rank, and how many the whole batch has
GROUP = 64  # batches whose windows are found at once


class Prefetcher:
    """Batches of training and of evaluation from stored images; every pass has a thread and buffers of its own.

    Args:
        weights: of the ranks, in training; in evaluation each has as many.
    """

    def __init__(
        self,
        data: DataSets,
        *,
        batch_size: int,
        image_size: int,
        device: torch.device,
        channels_last: bool = False,
        weights: Sequence[float] = (1,),
    ) -> None:
        self.data, self.batch_size = data, batch_size
        self._peers, self._weights = peers(), tuple(weights)
        self.image_size, self.device, self.channels_last = image_size, device, channels_last

    def train(self, position: Position) -> Iterator[Batch]:
        """The rest of the epoch from `position` on; OutOfMemory where the buffers do not fit on the device."""
        batches, sizes = position.indices(self.batch_size), position.sizes(self.batch_size)
        return self._started(0, *self._parts(batches, sizes, self._weights), position.seed, position.epoch)

    def evaluate(self, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """The validation set in order, from sample `start` on; OutOfMemory as `train`."""
        ranks, size = self._peers.size, len(self.data.val)
        step = ranks * batch_size
        batches = (np.arange(first, min(first + step, size)) for first in range(start, size, step))
        parts, most = self._parts(batches, {min(step, size)}, (1,) * ranks, avoid_single=False)
        return self._started(1, parts, most, 0, None)

    def close(self) -> None:
        """Nothing: a pass ends its thread itself."""

    def _parts(
        self, batches: Iterator[Array], sizes: Iterable[int], weights: tuple[float, ...], *, avoid_single: bool = True
    ) -> tuple[Iterator[Part], int]:
        """This rank's part of each batch, and the most samples that one has."""
        rank = self._peers.rank
        parts = ((part_of(batch, rank, weights, avoid_single=avoid_single), len(batch)) for batch in batches)
        return parts, max(shares(size, weights, avoid_single=avoid_single)[rank] for size in sizes)

    def _started(self, part: int, parts: Iterator[Part], most: int, seed: int, epoch: int | None) -> Iterator[Batch]:
        data = self.data
        assert data.stored is not None
        source = _Source((data.train, data.val)[part], data.stored[part], data.config, self.image_size, seed, epoch)
        return _Pass(fitting(self.device, lambda: _Lane(source, parts, most, self.device, self.channels_last)))


@dataclass(frozen=True)
class _Source:
    """What a pass takes its samples from, and how they are transformed; `epoch` is None in evaluation."""

    data: MapDataset
    stored: Stored
    config: DataConfig
    image_size: int
    seed: int
    epoch: int | None

    def with_windows(self, parts: Iterator[Part]) -> Iterator[tuple[Part, Array]]:
        """Each part of a batch, with its windows."""
        how: dict[str, Any] = {"image_size": self.image_size, "stored_size": self.stored.size, "seed": self.seed}
        while group := list(itertools.islice(parts, GROUP)):
            index = np.concatenate(
                [part for part, _ in group]
            )  # the windows of many batches at once: numpy's calls cost more
            rows = self.stored.rows[index]
            is_sound = self.stored.decoded.is_sound[rows]
            boxes = np.zeros((len(index), 5), np.float32)
            sizes = self.stored.decoded.sizes[rows[is_sound]]
            boxes[is_sound] = windows(self.config, sizes, index[is_sound], **how, epoch=self.epoch)
            yield from zip(group, np.split(boxes, np.cumsum([len(part) for part, _ in group])[:-1]), strict=True)

    def gathered(self, parts: Iterator[Part], hosts: list[_Host]) -> Iterator[_Gathered]:
        """Put one part after another into the buffers of the host, in turn."""
        for host, ((index, samples), boxes) in zip(itertools.cycle(hosts), self.with_windows(parts), strict=False):
            if host.copied is not None:
                host.copied.synchronize()  # it still holds an earlier batch
            yield self.gather(host, index, samples, boxes)

    def gather(self, host: _Host, index: Array, samples: int, boxes: Array) -> _Gathered:
        """Put those of the samples of a batch that have these indices and windows into a buffer of the host."""
        rows, decoded = self.stored.rows[index], self.stored.decoded
        is_sound, skipped = decoded.is_sound[rows], list[str]()
        if not is_sound.all():
            skipped = [sample_name(self.data, int(each)) for each in index[~is_sound]]
            rows, boxes = rows[is_sound], boxes[is_sound]
        count = len(rows)
        # "clip" copies straight into the buffer; "raise" would go by way of another
        np.take(decoded.images, rows, axis=0, out=host.stored[:count].numpy(), mode="clip")
        host.windows[:count].numpy()[:] = boxes
        host.labels[:count].numpy()[:] = decoded.labels[rows]
        return _Gathered(host, count, samples, skipped)


class _Host:
    """A batch on the host, pinned where it goes to a GPU: stored pixels, windows and labels."""

    def __init__(self, capacity: int, size: int, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        self.stored = torch.empty(capacity, 3, size, size, dtype=torch.uint8, pin_memory=on_cuda)
        self.windows = torch.empty(capacity, 5, pin_memory=on_cuda)
        self.labels = torch.empty(capacity, dtype=torch.int64, pin_memory=on_cuda)
        self.copied: Any = torch.cuda.Event() if on_cuda else None  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Gathered:
    """A batch in a buffer of the host: `count` of so many `samples`."""

    host: _Host
    count: int
    samples: int
    skipped: list[str]


class _Lane:
    """The buffers of a pass, and what its thread does with them."""

    def __init__(
        self, source: _Source, parts: Iterator[Part], capacity: int, device: torch.device, channels_last: bool
    ) -> None:
        self.side: Any = None
        self.device = device
        sizes = (capacity, source.image_size, source.stored.size)
        self.buffers = DeviceBatch(*sizes, device, channels_last=channels_last, config=source.config)
        hosts = [_Host(capacity, source.stored.size, device) for _ in range(2)]
        self.batches = source.gathered(parts, hosts)
        if device.type == "cuda":
            # Copies run on a stream of their own: a copy waits until the batch before has been resampled, and
            # resampling waits for its copy. Neither makes the host wait.
            self.side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self.resampled = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.resampled.record(torch.cuda.current_stream(device))

    def __del__(self) -> None:
        # No copy may be on its way when the memory of the buffers goes to others.
        with suppress(RuntimeError):  # of a device that answers nothing any more
            self._synchronize()

    def _synchronize(self) -> None:
        if self.side is not None:
            self.side.synchronize()

    def send(self, gathered: Future[_Gathered | None]) -> _Gathered | None:
        """Copy to the device what was gathered."""
        batch = gathered.result()
        if batch is None:
            self._synchronize()  # what is wrong with the copies is an error of this pass
            return None
        here, there, count = batch.host, self.buffers, batch.count
        with nullcontext() if self.side is None else torch.cuda.stream(self.side):
            if self.side is not None:
                self.side.wait_event(self.resampled)
            there.stored[:count].copy_(here.stored[:count], non_blocking=True)
            there.windows[:count].copy_(here.windows[:count], non_blocking=True)
            there.sent[:count].copy_(here.labels[:count], non_blocking=True)
            if self.side is not None:
                here.copied.record(self.side)
        return batch

    def resample(self, batch: _Gathered) -> Batch:
        """Make the batch that was sent the current one."""
        if self.side is not None:
            torch.cuda.current_stream(self.device).wait_event(batch.host.copied)
        images, labels = fitting(self.device, lambda: self.buffers.resample(batch.count))
        if self.side is not None:
            self.resampled.record(torch.cuda.current_stream(self.device))
        return Batch(images, labels, batch.samples, batch.skipped)


class _Pass(Iterator[Batch]):
    """One pass; its thread ends with it."""

    def __init__(self, lane: _Lane) -> None:
        self._lane: _Lane | None = lane
        # Its one thread gathers the first batch, sends it, gathers the second. Each batch that is resampled makes room
        # on the device for the next to be sent, and that one on the host for another to be gathered.
        self._thread = ThreadPoolExecutor(1, "prefetcher")
        self._gathered = self._thread.submit(next, lane.batches, None)
        self._send_next(lane)

    def _send_next(self, lane: _Lane) -> None:
        self._sent = self._thread.submit(lane.send, self._gathered)
        self._gathered = self._thread.submit(next, lane.batches, None)

    def __next__(self) -> Batch:
        """The next batch. Where it does not fit (OutOfMemory), asking again gives the same one."""
        if self._lane is None:
            raise StopIteration
        sent = None
        try:
            sent = self._sent.result()
        finally:
            if sent is None:
                self.close()
        if sent is None:
            raise StopIteration
        batch = self._lane.resample(sent)
        self._send_next(self._lane)
        return batch

    def close(self) -> None:
        """End the thread and let the memory go."""
        if self._lane is not None:
            self._thread.shutdown()  # after what it has begun
            # an error that a future holds knows the frames of the thread, and they the buffers
            del self._sent, self._gathered
            self._lane = None
