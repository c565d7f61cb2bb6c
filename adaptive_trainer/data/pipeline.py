"""The batches of one rung, from files or from stored images; where a data worker dies, the same samples with fewer."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch.utils.data._utils.signal_handling import _set_SIGCHLD_handler

from adaptive_trainer import oom
from adaptive_trainer.config.schema import Config
from adaptive_trainer.data.cached.prefetch import eval_feed, train_feed
from adaptive_trainer.data.datasets import DataSets
from adaptive_trainer.data.loader import Batch, Loader, end_workers, fewer_workers
from adaptive_trainer.data.position import Position
from adaptive_trainer.errors import DataError, OutOfMemory

T = TypeVar("T")

log = logging.getLogger(__name__)


class MakeRoom(Protocol):
    """Runs work and returns what it returns."""

    def __call__(self, work: Callable[[], T], /) -> T:
        """Run it; where memory runs out, make room and run it once more."""


@contextmanager
def told_by_the_loader() -> Iterator[None]:
    """The death of a data worker is an error of the loader that is asked for a batch, for as long as the block runs.

    torch's own handler raises it wherever the main thread is, were it between the commit of weights and of position.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    _set_SIGCHLD_handler()  # torch installs it once, with the first loader: now, so that it is not done later
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


@dataclass
class Supply:
    """What a rung trains and evaluates on.

    Data workers start with the first batch and go on over epochs until `close`.

    Attributes:
        make_room: returns what work returns; where the device has no room for it, makes room and runs it once more.
        channels_last: the images' memory format.
        pressure: whether device memory is really short (`oom.describe`).
        event: something was decided, in words, for the record.
    """

    data: DataSets
    config: Config
    device: torch.device
    make_room: MakeRoom
    channels_last: bool
    pressure: Callable[[], bool]
    event: Callable[[str], None]
    num_workers: int = field(init=False)
    _loader: Loader | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Begin with the workers that the settings ask for."""
        self.num_workers = self.config.data.num_workers if self.data.stored is None else 0

    def train(self, position: Position) -> Generator[Batch, None, None]:
        """The rest of the epoch from `position` on, one batch an update, augmented.

        Raises:
            OutOfMemory: the data set itself ran out of the device's memory, twice.
            DataError: the host's memory ran out twice, without data workers.
        """

        def begin(done: int) -> Iterator[Batch]:
            start, trainer = position.advance(done), self.config.trainer
            if self.data.stored is None:
                return self._opened().train(start)
            return iter(train_feed(
                self.data, start, batch_size=trainer.batch_size, image_size=self.config.data.image_size,
                device=self.device, channels_last=self.channels_last,
            ))  # fmt: skip

        return self._batches(position.size - position.cursor, begin)

    def evaluate(self, batch_size: int, start: int) -> Generator[Batch, None, None]:
        """The validation set in order, from sample `start` on, not augmented.

        Raises:
            OutOfMemory, DataError: as `train`.
        """

        def begin(done: int) -> Iterator[Batch]:
            if self.data.stored is None:
                return self._opened().evaluate(batch_size, start + done)
            return iter(eval_feed(
                self.data, batch_size=batch_size, image_size=self.config.data.image_size, device=self.device,
                channels_last=self.channels_last, start=start + done,
            ))  # fmt: skip

        return self._batches(len(self.data.val) - start, begin)

    def close(self) -> None:
        """End the data workers."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def _opened(self) -> Loader:
        if self._loader is None:
            self._loader = Loader(
                self.data,
                batch_size=self.config.trainer.batch_size,
                image_size=self.config.data.image_size,
                num_workers=self.num_workers,
                pin_memory=self.device.type == "cuda",
            )
        return self._loader

    def _batches(self, samples: int, begin: Callable[[int], Iterator[Batch]]) -> Generator[Batch, None, None]:
        """So many samples, by a pass that `begin` starts after those already given; by another when memory ran out."""
        done, retried_at = 0, -1
        while done < samples:
            failure, running, batch = None, None, None
            try:
                running = self.make_room(partial(begin, done))  # starts workers, which can fail too
                while done < samples:
                    batch = self.make_room(partial(next, running))
                    yield batch
                    done += batch.samples
            except OutOfMemory:
                raise
            except Exception as error:
                failure = oom.describe(error, pressure=self.pressure)
                if not failure.is_of_loading and failure.kind is not oom.Kind.DEVICE:
                    raise
            finally:
                if self.data.stored is not None:
                    end_workers(running)  # a pass over stored images has buffers of its own
            if failure is not None:
                running = batch = None
                if failure.is_of_loading and self.num_workers:
                    self._end_some_workers(failure)
                else:
                    self._release(failure, is_first=done != retried_at)
                    retried_at = done

    def _release(self, failure: oom.Failure, *, is_first: bool) -> None:
        """Make room for the same samples once more; raise where that was no help."""
        oom.release(self.device)
        if is_first and not failure.exact:
            log.warning("out of memory in loading data (%s): the same samples once more", failure.text)
        elif failure.kind is oom.Kind.DEVICE or self.device.type == "cpu":
            raise OutOfMemory(failure.text, phase="loading data")
        else:
            raise DataError(
                f"the host has too little memory to load data, twice and without data workers: {failure.text}; close "
                "other programs, or use a smaller trainer.batch_size, smaller images or data.cache=disk"
            )

    def _end_some_workers(self, failure: oom.Failure) -> None:
        self.close()
        self.event(f"a data worker failed ({failure.text}): fewer workers, the same samples again")
        fewer = fewer_workers(self.num_workers)
        self.event(f"data.num_workers {self.num_workers} -> {fewer}")
        self.num_workers = fewer
