"""Loaders that start at any position and give the same samples whatever the workers and the batch sizes."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from adaptive_trainer import oom
from adaptive_trainer.data.datasets import DataSets
from adaptive_trainer.data.images.transforms import build_transform
from adaptive_trainer.data.position import Key, Position, part_of, updates_per_epoch
from adaptive_trainer.data.samples import EVALUATION, Both, Samples
from adaptive_trainer.distributed.peers import peers
from adaptive_trainer.errors import OutOfMemory

SECONDS_AFTER_SIGTERM = 30
LOADING = frozenset({oom.Kind.HOST, oom.Kind.WORKER})  # what fewer workers, or another try, can answer


class Batch(NamedTuple):
    """The samples of one update.

    Attributes:
        images: float, (N, 3, size, size).
        labels: int64, (N,).
        samples: how many of the data set it stands for: N and those left out.
        skipped: names of those left out.
    """

    images: Tensor
    labels: Tensor
    samples: int
    skipped: list[str]


class SampleLoader:
    """Samples by their keys, read by the same workers in one pass after another, until it is closed.

    They start with the first pass. A pass ends the one before it, wherever that has come to.
    """

    def __init__(
        self,
        dataset: Samples | Both,
        num_workers: int,
        *,
        pin_memory: bool = False,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        self._keys = _Keys()
        self._running: Iterator[Any] | None = None
        self._loader = _DataLoader(
            dataset,
            batch_sampler=self._keys,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,  # they start slowly: once, and not in every epoch
            collate_fn=collate or _collate,
            pin_memory=pin_memory,
            worker_init_fn=_start_worker,
            # without one of its own, it draws its workers' seeds from the run's random numbers
            generator=torch.Generator().manual_seed(0),
        )

    def start(self, batches: Iterable[list[Key]]) -> Generator[Any, None, None]:
        """A pass over batches of these samples."""
        self._keys.batches = batches
        self._running = running = iter(self._loader)  # with workers it is the same object each time
        return (batch for batch in running)  # can be closed without ending the workers

    def close(self) -> None:
        """End the workers."""
        # Now, and not when the last reference to the iterator goes: the frames of an error keep it alive.
        if isinstance(self._running, _Workers):
            self._running._shutdown_workers()


class Loader(SampleLoader):
    """Batches of training and of evaluation.

    Args:
        weights: of the ranks, in training; in evaluation each has as many.
    """

    def __init__(
        self,
        data: DataSets,
        *,
        batch_size: int,
        image_size: int,
        num_workers: int,
        pin_memory: bool,
        weights: Sequence[float] = (1,),
    ) -> None:
        train, val = (
            Samples(part, build_transform(data.config, image_size, training=training), data.num_classes, data.config)
            for part, training in ((data.train, True), (data.val, False))
        )
        self._val_size, self._batch_size = len(data.val), batch_size
        self._peers, self._weights = peers(), weights
        self._begun: tuple[Position, Generator[Batch, None, None]] | None = None
        most = max(updates_per_epoch(size, batch_size) for size in (len(data.train), len(data.val)))
        # more workers than batches would have nothing to do
        super().__init__(Both(train, val), min(num_workers, most), pin_memory=pin_memory)

    def begin(self, position: Position) -> None:
        """Let the workers start, and read the first batches from `position` on; `train` from there returns these."""
        self._begun = position, self._shared(position.batches(self._batch_size), self._weights)

    def train(self, position: Position) -> Generator[Batch, None, None]:
        """The rest of the epoch from `position` on, one batch an update, augmented."""
        begun, self._begun = self._begun, None
        if begun is not None and begun[0] == position:
            return begun[1]
        return self._shared(position.batches(self._batch_size), self._weights)

    def evaluate(self, batch_size: int, start: int = 0) -> Generator[Batch, None, None]:
        """The validation set in order, from sample `start` on, not augmented; so many samples for each rank."""
        self._begun = None  # a pass ends the one before it
        ranks = self._peers.size
        return self._shared(in_order(start, self._val_size, ranks * batch_size), (1,) * ranks, avoid_single=False)

    def _shared(
        self, batches: Iterable[list[Key]], weights: Sequence[float], *, avoid_single: bool = True
    ) -> Generator[Batch, None, None]:
        """A pass over this rank's part of each batch; the samples that one stands for are those of all ranks."""
        sizes = deque[int]()

        def parts() -> Iterator[list[Key]]:
            for batch in batches:
                sizes.append(len(batch))
                yield part_of(batch, self._peers.rank, weights, avoid_single=avoid_single)

        is_whole = len(weights) == 1
        running = self.start(batches if is_whole else parts())
        return running if is_whole else (batch._replace(samples=sizes.popleft()) for batch in running)


def in_order(start: int, stop: int, batch_size: int) -> list[list[Key]]:
    """The keys of samples that are not augmented, batch by batch."""
    keys = [(0, EVALUATION, index) for index in range(start, stop)]
    return [keys[first : first + batch_size] for first in range(0, len(keys), batch_size)]


def resumed(
    samples: int,
    begin: Callable[[int], Any],
    answer: Callable[[oom.Failure, int], None],
    *,
    kinds: Collection[oom.Kind] = LOADING,
    pressure: Callable[[], bool] | None = None,
    make_room: Callable[..., Any] = lambda work, *, stays: work(),
    are_refilled: bool = False,
) -> Generator[Any, None, None]:
    """Batches of so many samples, pass after pass: where memory runs out, the next goes on with the same samples.

    Args:
        begin: starts a pass behind so many samples: an iterator that can be closed.
        answer: is given a failure, and the samples before it; makes room for the next pass, or raises.
        kinds, pressure: as for `oom.attempt`.
        make_room: runs work; where the device has no room for it, makes room and runs it once more. `stays` says
            whether something on the device that the work makes is needed later.
        are_refilled: batches lie in memory that `begin` has made; so all else that they take goes at once.
    """
    done = 0
    while done < samples:
        failure = running = batch = None
        try:
            running = make_room(partial(begin, done), stays=True)  # starts workers, which can fail too
            while done < samples:
                batch = make_room(partial(next, running), stays=not are_refilled)
                yield batch
                done += batch.samples  # when it comes back for more, this one was used
        except OutOfMemory:  # of work that was tried twice already
            raise
        except Exception as error:
            failure = oom.describe(error, pressure=pressure)
            if failure.kind not in kinds:
                raise
        finally:
            if running is not None:
                running.close()
        if failure is not None:
            running = batch = None  # what they hold is to be free
            answer(failure, done)


def fewer_workers(num_workers: int) -> int:
    """Data workers after one has failed."""
    if num_workers > 4:
        return 4
    return 2 if num_workers == 4 else 0


@dataclass
class _Keys:
    """The keys of each batch of the next pass: what a DataLoader, whose sampler cannot be changed, iterates anew."""

    batches: Iterable[list[Key]] = field(default_factory=list)

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.batches)


class _DataLoader(DataLoader[Any]):
    """More workers than cores are the user's choice, and no reason for a warning."""

    def check_worker_number_rationality(self) -> None:
        pass

    def _get_iterator(self) -> Any:
        return _Workers(self) if self.num_workers else super()._get_iterator()


class _Workers(_MultiProcessingDataLoaderIter):
    """Leaves no process behind where one of them, or a thread beside them, could not be started."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        try:
            super().__init__(loader)
        except BaseException:
            self._shutdown_workers()
            raise

    def _shutdown_workers(self) -> None:
        if hasattr(self, "_workers_status"):  # the last that is made
            super()._shutdown_workers()
            return
        for worker in getattr(self, "_workers", ()):
            worker.kill()  # torch would ask it to end, which it puts off
            worker.join()


def _collate(samples: list[tuple[Tensor, int] | str]) -> Batch:
    pairs = [sample for sample in samples if not isinstance(sample, str)]
    images = torch.stack([image for image, _ in pairs]) if pairs else torch.empty(0, 3, 1, 1)
    labels = torch.tensor([label for _, label in pairs], dtype=torch.int64)
    return Batch(images, labels, len(samples), [sample for sample in samples if isinstance(sample, str)])


def _start_worker(_: int) -> None:
    # Ctrl-C, and a scheduler's SIGTERM, reach every process of the group; only the main one answers them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _ignore_once)


def _ignore_once(number: int, _: FrameType | None) -> None:
    # A second SIGTERM ends the worker at once, and the first after a while: it may be the way to get rid of one that
    # hangs, and whoever sends it may wait for the end.
    signal.signal(number, signal.SIG_DFL)
    if hasattr(signal, "alarm"):
        signal.alarm(SECONDS_AFTER_SIGTERM)
