"""The batches of one rung, from files or from stored images; where a data worker dies, the same samples with fewer."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils.data._utils.signal_handling import _set_SIGCHLD_handler

from adaptive_trainer import oom
from adaptive_trainer.config.schema import Config
from adaptive_trainer.data.cached.prefetch import Prefetcher
from adaptive_trainer.data.datasets import DataSets
from adaptive_trainer.data.loader import Batch, Loader, fewer_workers, resumed
from adaptive_trainer.data.position import Position
from adaptive_trainer.distributed.peers import peers
from adaptive_trainer.errors import DataError, OutOfMemory
from adaptive_trainer.ladder.resolve import recipe

log = logging.getLogger(__name__)
LOADING = "loading data"  # the phase of a failure


@contextmanager
def worker_deaths_deferred() -> Iterator[None]:
    """While the block runs, the death of a data worker is an error of the loader that is asked for a batch."""
    # torch's own handler raises it wherever the main thread is, were it between the commit of weights and of position.
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    _set_SIGCHLD_handler()  # torch installs it once, with the first loader: now, so that it is not done later
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def begun(data: DataSets, config: Config, device: torch.device, position: Position) -> Loader | None:
    """A loader whose workers have begun to read from `position` on, while something else is done; None without workers.

    Stored images have none.
    """
    if data.stored is not None or not config.data.num_workers:
        return None
    loader = _loader(data, config, device, config.data.num_workers)
    try:
        loader.begin(position)
    except Exception:  # tried again where a batch is wanted, and answered there
        loader.close()
        return None
    return loader


def _loader(data: DataSets, config: Config, device: torch.device, num_workers: int) -> Loader:
    return Loader(
        replace(data, config=config.data),
        batch_size=config.trainer.batch_size,
        image_size=config.data.image_size,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        weights=_weights(config),
    )


def _weights(config: Config) -> tuple[float, ...]:
    return recipe(config).weights(peers().size)


@dataclass
class Pipeline:
    """What a rung trains and evaluates on; data workers start with the first batch and go on until `close`.

    Attributes:
        make_room: returns what work returns; where the device has no room for it, makes room and runs it once more.
            `stays` says whether something on the device that the work makes is needed later.
        channels_last: the images' memory format.
        pressure: whether device memory is really short (`oom.describe`).
        event: something was decided, in words, for the record.
    """

    data: DataSets
    config: Config
    device: torch.device
    make_room: Callable[..., Any]
    channels_last: bool
    pressure: Callable[[], bool]
    event: Callable[[str], None]
    num_workers: int = field(init=False)
    _loader: Loader | Prefetcher | None = field(init=False, default=None)
    _retried_at: int = field(init=False, default=-1)

    def __post_init__(self) -> None:
        """Begin with the workers that the settings ask for."""
        self.num_workers = self.config.data.num_workers if self.data.stored is None else 0

    def take_over(self, loader: Loader | None) -> None:
        """Go on with a loader of the same data and settings, whose workers run."""
        self._loader = loader

    def train(self, position: Position) -> Generator[Batch, None, None]:
        """The rest of the epoch from `position` on, one batch an update, augmented.

        Raises:
            OutOfMemory: the data set itself ran out of the device's memory, twice.
            DataError: the host's memory ran out twice, without data workers.
        """
        left = position.size - position.cursor
        return self._batches(left, lambda done: self._opened().train(position.advance(done)))

    def evaluate(self, batch_size: int, start: int) -> Generator[Batch, None, None]:
        """The validation set in order, from sample `start` on, not augmented; raises what `train` raises."""
        left = len(self.data.val) - start
        return self._batches(left, lambda done: self._opened().evaluate(batch_size, start + done))

    def close(self) -> None:
        """End the data workers."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def _opened(self) -> Loader | Prefetcher:
        if self._loader is None and self.data.stored is not None:
            self._loader = Prefetcher(
                replace(self.data, config=self.config.data),
                batch_size=self.config.trainer.batch_size,
                image_size=self.config.data.image_size,
                device=self.device,
                channels_last=self.channels_last,
                weights=_weights(self.config),
            )
        elif self._loader is None:
            self._loader = _loader(self.data, self.config, self.device, self.num_workers)
        return self._loader

    def _batches(self, samples: int, begin: Callable[[int], Iterator[Batch]]) -> Generator[Batch, None, None]:
        self._retried_at = -1
        return resumed(
            samples, begin, self._answer, kinds=oom.OF_MEMORY, pressure=self.pressure, make_room=self.make_room,
            are_refilled=self.data.stored is not None,
        )  # fmt: skip

    def _answer(self, failure: oom.Failure, done: int) -> None:
        """Make room for the same samples once more; raise where that was no help."""
        if failure.is_of_loading and self.num_workers:
            self.close()
            was, self.num_workers = self.num_workers, fewer_workers(self.num_workers)
            self.event(f"a data worker failed ({failure.text}): fewer workers, the same samples again")
            self.event(f"data.num_workers {was} -> {self.num_workers}")
            return
        oom.release(self.device)
        is_first, self._retried_at = done != self._retried_at, done
        if is_first and not failure.exact:
            log.warning("out of memory in loading data (%s): the same samples once more", failure.text)
        elif failure.kind is oom.Kind.DEVICE or self.device.type == "cpu":
            raise OutOfMemory(failure.text, phase=LOADING)
        else:
            raise DataError(
                f"the host has too little memory to load data, twice and without data workers: {failure.text}; close "
                "other programs, or use a smaller trainer.batch_size, smaller images or data.cache=disk"
            )
