"""Loaders of stored images: a thread gathers the next batch and copies it to the device while the current one trains.

They give the same samples in the same order as the loaders of `data`, from any position on. Two buffers on the host
and one on the device are used again for every batch; a batch is valid until the next one is asked for.
"""

from __future__ import annotations

import itertools
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from adaptive_trainer.config.schema import DataConfig
from adaptive_trainer.data.cached.gpu_transforms import DeviceBatch, fitting, windows
from adaptive_trainer.data.cached.store import Stored
from adaptive_trainer.data.datasets import DataSets, MapDataset, sample_name
from adaptive_trainer.data.loader import Batch
from adaptive_trainer.data.position import Position

Array = np.ndarray[Any, Any]
GROUP = 64  # batches


@dataclass(frozen=True)
class FeedLoader:
    """Batches of stored images; every pass over it has a thread and buffers of its own.

    Attributes:
        data: the data set, for the names of its samples.
        stored: its images.
        config: how they are transformed.
        batches: indices of the samples of each batch, anew for every pass.
        capacity: most samples in a batch.
        image_size, channels_last: what the network is given.
        seed, epoch: of the augmentation; None for evaluation.
    """

    data: MapDataset
    stored: Stored
    config: DataConfig
    batches: Callable[[], Iterator[Array]]
    capacity: int
    image_size: int
    device: torch.device
    channels_last: bool
    seed: int = 0
    epoch: int | None = None

    def __iter__(self) -> Iterator[Batch]:
        """Start a pass.

        Raises:
            OutOfMemory: the buffers do not fit on the device.
        """
        return _Feed(self)

    def buffers(self) -> DeviceBatch:
        """What the batches of a pass hold on the device."""
        sizes = (self.capacity, self.image_size, self.stored.size)
        return DeviceBatch(*sizes, self.device, channels_last=self.channels_last, config=self.config)

    def windows(self, sizes: Array, index: Array) -> Array:
        """`augment.windows` of samples whose originals have these sizes."""
        how = {"image_size": self.image_size, "stored_size": self.stored.size, "seed": self.seed}
        return windows(self.config, sizes, index, **how, epoch=self.epoch)


def train_feed(
    data: DataSets, position: Position, *, batch_size: int, image_size: int, device: torch.device, channels_last: bool
) -> FeedLoader:
    """The rest of the epoch from `position` on, one batch an update, augmented."""
    most = min(batch_size + (batch_size == 2), position.size - position.cursor)  # 3 of 3: see Position.next_size
    return FeedLoader(
        data.train, _stored(data)[0], data.config, lambda: position.indices(batch_size), most, image_size, device,
        channels_last, position.seed, position.epoch,
    )  # fmt: skip


def eval_feed(
    data: DataSets, *, batch_size: int, image_size: int, device: torch.device, channels_last: bool, start: int = 0
) -> FeedLoader:
    """The validation set in order, from sample `start` on, not augmented."""
    size = len(data.val)

    def batches() -> Iterator[Array]:
        return (np.arange(first, min(first + batch_size, size)) for first in range(start, size, batch_size))

    most = min(batch_size, size)
    return FeedLoader(data.val, _stored(data)[1], data.config, batches, most, image_size, device, channels_last)


def _stored(data: DataSets) -> tuple[Stored, Stored]:
    if data.stored is None:
        raise RuntimeError("no images are stored")
    return data.stored


class _Host:
    """A batch on the host, pinned where it goes to a card: stored pixels, windows and labels."""

    def __init__(self, capacity: int, size: int, device: torch.device) -> None:
        pin = device.type == "cuda"
        self.stored = torch.empty(capacity, 3, size, size, dtype=torch.uint8, pin_memory=pin)
        self.windows = torch.empty(capacity, 5, pin_memory=pin)
        self.labels = torch.empty(capacity, dtype=torch.int64, pin_memory=pin)


@dataclass(frozen=True)
class _Sent:
    """What came of one batch: `count` samples are on their way to the device."""

    count: int
    samples: int
    skipped: list[str]


class _Lane:
    """What the thread and the loop share, and the order in which they may touch the buffers.

    On a card the copies run on a stream of their own: a copy waits until the batch before has been resampled, and
    resampling waits for its copy. Neither makes the host wait.
    """

    def __init__(self, loader: FeedLoader) -> None:
        self.buffers = loader.buffers()
        self.device = loader.device
        self.hosts = [_Host(loader.capacity, loader.stored.size, self.device) for _ in range(2)]
        self.sent: queue.SimpleQueue[_Sent | BaseException | None] = queue.SimpleQueue()
        self.turns: queue.SimpleQueue[bool] = queue.SimpleQueue()  # True: a batch may be sent; False: it is over
        self.side: Any = None
        if self.device.type == "cuda":
            self.side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            self.resampled = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.copied = [torch.cuda.Event() for _ in self.hosts]  # type: ignore[no-untyped-call]
        self.give_turn()

    def give_turn(self) -> None:
        """Let the next batch be sent once what the current stream has been given is done."""
        if self.side is not None:
            self.resampled.record(torch.cuda.current_stream(self.device))
        self.turns.put(True)

    def wait_until_sent(self, number: int) -> None:
        """Before the host buffer of an earlier batch is written again."""
        if self.side is not None:
            self.copied[number % 2].synchronize()

    def send(self, number: int, count: int) -> None:
        """Copy a batch to the device, from the thread."""
        host, buffers = self.hosts[number % 2], self.buffers
        if self.side is not None:
            self.side.wait_event(self.resampled)
        for there, here in (
            (buffers.stored, host.stored),
            (buffers.windows, host.windows),
            (buffers.sent, host.labels),
        ):
            there[:count].copy_(here[:count], non_blocking=True)
        if self.side is not None:
            self.copied[number % 2].record(self.side)

    def end(self, error: BaseException | None) -> None:
        """Say that no more batches come, and why, once no copy is on its way: the buffers may go with the thread."""
        try:
            if self.side is not None:
                self.side.synchronize()
        except RuntimeError as unusable:  # the device answers nothing any more
            error = error or unusable
        finally:
            self.sent.put(error)

    def await_copy(self, number: int) -> None:
        """What the current stream is given from now on comes after the copy of a batch."""
        if self.side is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied[number % 2])


class _Feed(Iterator[Batch]):
    """One pass over a loader; its thread ends with it."""

    def __init__(self, loader: FeedLoader) -> None:
        self._lane: _Lane | None = fitting(loader.device, lambda: _Lane(loader))
        self._number = 0
        self._current: _Sent | None = None
        self._thread = threading.Thread(target=_work, args=(loader, self._lane), name="feed", daemon=True)
        weakref.finalize(self, self._lane.turns.put, False)  # the thread does not know this object
        self._thread.start()

    def __next__(self) -> Batch:
        """The next batch; where it does not fit, asking again gives the same one.

        Raises:
            OutOfMemory: it does not fit on the device.
        """
        lane = self._lane
        if lane is None:
            raise StopIteration
        if self._current is None:
            found = lane.sent.get()
            if not isinstance(found, _Sent):
                self._shutdown_workers()
                raise StopIteration if found is None else found
            self._current = found
            lane.await_copy(self._number)
        batch = self._current
        images, labels = fitting(lane.device, lambda: lane.buffers.resample(batch.count))
        lane.give_turn()
        self._current = None
        self._number += 1
        return Batch(images, labels, batch.samples, batch.skipped)

    def _shutdown_workers(self) -> None:
        """End the thread and let the memory go, as the loop asks of every loader."""
        if self._lane is None:
            return
        self._lane.turns.put(False)
        self._thread.join()
        if self._lane.side is not None:  # before others get its memory
            torch.cuda.current_stream(self._lane.device).wait_stream(self._lane.side)
        self._lane = None


def _work(loader: FeedLoader, lane: _Lane) -> None:
    """The thread: gather, wait for a turn, send."""
    end: BaseException | None = None
    try:
        with ExitStack() as stack:
            if lane.side is not None:
                stack.enter_context(torch.cuda.device(lane.device))
                stack.enter_context(torch.cuda.stream(lane.side))
            for number, (index, boxes) in enumerate(_with_windows(loader)):
                lane.wait_until_sent(number)
                batch = _gathered(loader, lane.hosts[number % 2], index, boxes)
                if not lane.turns.get():
                    return
                lane.send(number, batch.count)
                lane.sent.put(batch)
    except BaseException as error:
        end = error
    finally:
        lane.end(end)
        del end  # it knows this frame, and the frame the buffers


def _with_windows(loader: FeedLoader) -> Iterator[tuple[Array, Array]]:
    """Indices and windows of each batch; the windows of many are found at once, since numpy's calls cost more."""
    batches, decoded = loader.batches(), loader.stored.decoded
    while group := list(itertools.islice(batches, GROUP)):
        index = np.concatenate(group)
        rows = loader.stored.rows[index]
        is_sound = decoded.is_sound[rows]
        boxes = np.zeros((len(index), 5), np.float32)
        boxes[is_sound] = loader.windows(decoded.sizes[rows[is_sound]], index[is_sound])
        yield from zip(group, np.split(boxes, np.cumsum([len(batch) for batch in group])[:-1]), strict=True)


def _gathered(loader: FeedLoader, host: _Host, index: Array, boxes: Array) -> _Sent:
    """Put the samples with these indices and windows into the host's buffers."""
    rows, decoded, samples = loader.stored.rows[index], loader.stored.decoded, len(index)
    is_sound, skipped = decoded.is_sound[rows], list[str]()
    if not is_sound.all():
        skipped = [sample_name(loader.data, int(number)) for number in index[~is_sound]]
        rows, boxes = rows[is_sound], boxes[is_sound]
    count = len(rows)
    # "clip" copies straight into the buffer; "raise" would go by way of another
    np.take(decoded.images, rows, axis=0, out=host.stored[:count].numpy(), mode="clip")
    host.windows[:count].numpy()[:] = boxes
    host.labels[:count].numpy()[:] = decoded.labels[rows]
    return _Sent(count, samples, skipped)
