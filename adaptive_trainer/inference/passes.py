"""One pass of a trained network over images, in order; a batch that does not fit is halved, and no image is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from adaptive_trainer import oom
from adaptive_trainer.config.schema import Config
from adaptive_trainer.data.datasets import DataSets, MapDataset, sample_name
from adaptive_trainer.data.loader import Batch
from adaptive_trainer.data.pipeline import Pipeline, worker_deaths_deferred
from adaptive_trainer.errors import LadderExhausted, ModelError
from adaptive_trainer.inference.model import Trained
from adaptive_trainer.memory.limit import Capacity, limit_for, limited
from adaptive_trainer.models.memory_format import to_channels_last
from adaptive_trainer.utils.device import AUTOCAST, device_of, precision_refusal
from adaptive_trainer.utils.global_state import private_process_state
from adaptive_trainer.utils.progress import Progress

BATCH = 32  # images at a time, where `trainer.eval_batch_size` gives no number
Event = Callable[[str], None]
T = TypeVar("T")


class Part(NamedTuple):
    """A batch that is done.

    Attributes:
        places: the places in the data set of the images that could be read, in order.
        labels: theirs, int64 (N,).
        scores: theirs, float32 (N, classes), on the CPU.
        skipped: the places of those that cannot be read.
    """

    places: list[int]
    labels: Tensor
    scores: Tensor
    skipped: list[int]


class Passes:
    """Runs a trained network over data sets on one device.

    Args:
        trained: what is run; its network is moved to the device.
        config: how: `trainer.eval_batch_size`, `trainer.precision`, `data.num_workers`, `data.max_pixels`.
        capacity: the device, and the memory that may be used.
        event: hears of what is decided, in words.
        poll: is called before each batch, and may raise.

    Raises:
        LadderExhausted: the weights alone do not fit.

    Attributes:
        batch_size: images at a time; it is halved where they do not fit.
    """

    def __init__(
        self,
        trained: Trained,
        config: Config,
        capacity: Capacity,
        event: Event,
        poll: Callable[[], None] = lambda: None,
    ) -> None:
        self._trained, self._config, self._capacity, self._event = trained, config, capacity, event
        self._poll = poll
        self._device = capacity.device
        self.batch_size = config.trainer.eval_batch_size or BATCH
        self._precision = config.trainer.precision
        if problem := precision_refusal(self._device, self._precision):
            event(f"fp32 is used: {problem}")
            self._precision = "fp32"
        self._network = trained.network
        moved = self._fitting(lambda: self._network.to(self._device), "moving the network to the device")
        if isinstance(moved, oom.Failure):
            raise LadderExhausted(f"the network alone does not fit: {moved.text}; {self._advice()}")
        if config.trainer.channels_last:
            to_channels_last(self._network)

    @property
    def where(self) -> str:
        """Where it runs, and with how much memory, in words."""
        return self._capacity.description

    def run(self, data: MapDataset, what: str) -> Iterator[Part]:
        """The scores of all images of a data set, batch by batch.

        Args:
            data: of (image, label), the labels below the number of classes.
            what: names the pass in its progress, with a colon.

        Raises:
            LadderExhausted: a single image does not fit.
            ModelError: the output is no row of scores for each image.
        """
        total, done = len(data), 0
        failure: oom.Failure | None = None
        with closing(self._pipeline(data)) as pipeline, Progress(what, total) as progress:
            while done < total:
                if failure is not None:
                    self._halve(min(self.batch_size, total - done), failure)
                    failure = None
                # a generator: closed, it takes no more batches of the size that did not fit
                with closing(pipeline.evaluate(self.batch_size, done)) as batches:
                    for batch in batches:
                        self._poll()
                        scores = self._scores(batch.images)
                        if isinstance(scores, oom.Failure):
                            failure = scores
                            break
                        yield _part(data, done, batch, scores)
                        done += batch.samples  # only now: a batch that fails comes again, in smaller ones
                        progress.advance(batch.samples)

    def _pipeline(self, data: MapDataset) -> Pipeline:
        used, trainer = self._trained.data, replace(self._config.trainer, batch_size=self.batch_size)
        given = self._config.data
        used = replace(used, num_workers=given.num_workers, max_pixels=given.max_pixels, on_error="skip")
        config = replace(self._config, data=used, trainer=trainer)
        classes = self._trained.classes
        return Pipeline(
            DataSets(data, data, len(classes), classes, used),
            config,
            self._device,
            make_room=lambda work, *, stays: work(),  # nothing here could give memory back
            channels_last=bool(trainer.channels_last),
            pressure=self._capacity.pressure,
            event=self._event,
        )

    def _scores(self, images: Tensor) -> Tensor | oom.Failure:
        if not len(images):  # none could be read
            return torch.empty(0, len(self._trained.classes))
        return self._fitting(partial(self._forward, images), "a forward pass")

    @torch.no_grad()
    def _forward(self, images: Tensor) -> Tensor:
        channels_last = self._config.trainer.channels_last
        memory_format = torch.channels_last if channels_last else torch.preserve_format
        dtype = AUTOCAST[self._precision]
        # the same shapes take the same memory: a simulated card need not count each batch
        with self._capacity.device_work((id(self), tuple(images.shape))):
            placed = images.to(self._device, non_blocking=True, memory_format=memory_format)
            with nullcontext() if dtype is None else torch.autocast(self._device.type, dtype):
                output = self._network(placed)
            self._check(output, len(images))
            return output.float().cpu()  # type: ignore[no-any-return]

    def _check(self, output: object, samples: int) -> None:
        wanted = (samples, len(self._trained.classes))
        if not isinstance(output, Tensor) or tuple(output.shape) != wanted:
            shape = f" of shape {tuple(output.shape)}" if isinstance(output, Tensor) else ""
            raise ModelError(
                f"the network gives a {type(output).__name__}{shape}; a tensor of scores {wanted} (images, classes) "
                "is needed"
            )

    def _fitting(self, work: Callable[[], T], what: str) -> T | oom.Failure:
        kinds = oom.kinds_of(self._device)
        return oom.retry(work, self._device, what, kinds=kinds, pressure=self._capacity.pressure)

    def _halve(self, size: int, failure: oom.Failure) -> None:
        if size == 1:
            raise LadderExhausted(f"a single image does not fit: {failure.text}; {self._advice()}")
        self._event(f"out of memory: batches of {self.batch_size} -> {size // 2} images, the same images again")
        self.batch_size = size // 2

    def _advice(self) -> str:
        return f"there is {self.where}. Close other programs, or use device=cpu or a larger memory.limit"


def _part(data: MapDataset, start: int, batch: Batch, scores: Tensor) -> Part:
    places, broken = range(start, start + batch.samples), set(batch.skipped)
    skipped = [place for place in places if sample_name(data, place) in broken] if broken else []
    return Part([place for place in places if place not in skipped], batch.labels, scores, skipped)


@contextmanager
def opened(trained: Trained, config: Config, event: Event) -> Iterator[Passes]:
    """Open the device that the settings name, under their `memory.limit`, and run the network there in the block."""
    device = device_of(config.device)
    process = private_process_state(deterministic=config.trainer.deterministic, tf32=config.trainer.tf32)
    with (
        process,
        torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
        limited(device, limit_for(config, device, is_own_data=True)) as capacity,
        worker_deaths_deferred(),
    ):
        yield Passes(trained, config, capacity, event)
