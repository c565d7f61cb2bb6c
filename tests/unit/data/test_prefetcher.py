"""Loaders of stored images: the same samples as the others, the same bits in any batch, and threads that end."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from adaptive_trainer import Trainer, compose_config
from adaptive_trainer.config.schema import DataConfig
from adaptive_trainer.data.cached.gpu_transforms import DeviceBatch
from adaptive_trainer.data.cached.prefetch import Prefetcher
from adaptive_trainer.data.cached.store import Decoded, Stored
from adaptive_trainer.data.datasets import DataSets
from adaptive_trainer.data.loader import Batch, Loader
from adaptive_trainer.data.position import Position
from adaptive_trainer.errors import LadderExhausted, OutOfMemory

CPU = torch.device("cpu")
SIZE, STORED = 23, 20


class Named(Dataset[Any]):
    """A data set that is never read: its images are stored."""

    def __init__(self) -> None:
        self.samples = [(f"{n}.png", n % 3) for n in range(SIZE)]

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("it is stored")


def kept(broken: tuple[int, ...] = (), **settings: Any) -> DataSets:
    rng = np.random.default_rng(0)
    is_sound = ~np.isin(np.arange(SIZE), broken)
    decoded = Decoded(
        rng.integers(0, 256, (SIZE, 3, STORED, STORED), dtype=np.uint8),
        np.arange(SIZE) % 3,
        rng.integers(10, 60, (SIZE, 2)),
        is_sound,
        np.zeros(SIZE, np.uint32),
    )
    rows = Stored(decoded, np.arange(SIZE))
    return DataSets(Named(), Named(), 3, ("a", "b", "c"), DataConfig(cache="ram", **settings), (rows, rows))


def collected(loader: Iterator[Batch]) -> list[Batch]:
    """A batch is valid until the next: copies."""
    return [batch._replace(images=batch.images.clone(), labels=batch.labels.clone()) for batch in loader]


def train(
    data: DataSets, position: Position, batch_size: int = 4, image_size: int = 16, weights: tuple[float, ...] = (1,)
) -> list[Batch]:
    sizes: dict[str, Any] = {"batch_size": batch_size, "image_size": image_size, "weights": weights}
    return collected(Prefetcher(data, **sizes, device=CPU).train(position))


def rows(found: list[Batch]) -> Tensor:
    return torch.cat([batch.images for batch in found])


def test_augmentation_depends_on_seed_epoch_and_index_alone() -> None:
    data, start = kept(), Position(7, 2, 0, SIZE)
    expected = rows(train(data, start))
    assert torch.equal(rows(train(data, start, batch_size=11)), expected)
    assert torch.equal(rows(train(data, start.advance(9), batch_size=3)), expected[9:])
    assert not torch.equal(rows(train(data, Position(8, 2, 0, SIZE))), expected)
    assert not torch.equal(rows(train(data, Position(7, 3, 0, SIZE))), expected)


@pytest.mark.parametrize("weights", [(1,), (1, 1), (2, 3)])  # of which this is the first rank
@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 11, 22, 23, 24, 50])
def test_the_samples_and_batches_are_those_of_the_other_loaders(batch_size: int, weights: tuple[float, ...]) -> None:
    class Images(Named):
        def __getitem__(self, index: int) -> Any:
            return torch.zeros(3, 4, 4), index % 3

    data = kept()
    plain = replace(data, train=Images(), val=Images(), stored=None)
    loader = Loader(plain, batch_size=batch_size, image_size=16, num_workers=0, pin_memory=False, weights=weights)
    for position in (Position(1, 0, 0, SIZE), Position(1, 1, 5, SIZE)):
        theirs = [(batch.labels.tolist(), batch.samples) for batch in loader.train(position)]
        assert [(b.labels.tolist(), b.samples) for b in train(data, position, batch_size, weights=weights)] == theirs
    theirs = [(batch.labels.tolist(), batch.samples) for batch in loader.evaluate(batch_size, start=3)]
    prefetcher = Prefetcher(data, batch_size=batch_size, image_size=16, device=CPU)
    assert [(b.labels.tolist(), b.samples) for b in collected(prefetcher.evaluate(batch_size, start=3))] == theirs


def test_evaluation_is_the_same_from_any_start() -> None:
    def load(batch_size: int, start: int) -> Tensor:
        prefetcher = Prefetcher(kept(), batch_size=batch_size, image_size=16, device=CPU)
        return rows(collected(prefetcher.evaluate(batch_size, start)))

    assert torch.equal(load(7, 11), load(5, 0)[11:])


def test_broken_samples_are_left_out_named_and_counted() -> None:
    found = train(kept((5, 6)), Position(0, 0, 0, SIZE), batch_size=1)
    empty = [batch for batch in found if batch.skipped]
    assert sorted(name for batch in empty for name in batch.skipped) == ["5.png", "6.png"]
    assert all((len(b.images), len(b.labels), b.samples) == (0, 0, 1) for b in empty)
    whole = train(kept((5, 6)), Position(0, 0, 0, SIZE), batch_size=SIZE)
    assert (len(whole[0].labels), whole[0].samples, len(whole[0].skipped)) == (SIZE - 2, SIZE, 2)
    sound = rows(train(kept(), Position(0, 0, 0, SIZE)))
    order = Position(0, 0, 0, SIZE).permutation()
    assert torch.equal(whole[0].images, sound[[i for i, n in enumerate(order) if n not in (5, 6)]])


def prefetching() -> int:
    return sum(thread.name.startswith("prefetcher") for thread in threading.enumerate())


def test_a_thread_ends_with_its_pass() -> None:
    before = prefetching()
    train(kept(), Position(0, 0, 0, SIZE))
    prefetcher = Prefetcher(kept(), batch_size=2, image_size=8, device=CPU)
    ended, dropped = (prefetcher.train(Position(0, 0, 0, SIZE)) for _ in range(2))
    next(ended), next(dropped)
    assert prefetching() == before + 2
    ended.close()  # type: ignore[attr-defined]
    assert list(ended) == []
    assert prefetching() == before + 1
    [thread] = dropped._thread._threads  # type: ignore[attr-defined]
    del dropped
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_an_error_of_the_thread_is_the_loaders() -> None:
    data = kept()
    stored = Stored(data.stored[0].decoded, np.arange(SIZE - 5))  # type: ignore[index]
    with pytest.raises(IndexError, match="out of bounds"):
        train(replace(data, stored=(stored, stored)), Position(0, 0, 0, SIZE))
    assert not prefetching()


class Unusable:
    """The stream of a card that answers nothing any more."""

    def synchronize(self) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize("earlier", [None, IndexError("earlier")])
def test_a_thread_ends_whatever_the_device_says(earlier: Exception | None) -> None:
    def batches() -> Iterator[Any]:
        ready.wait(10)
        if earlier:
            raise earlier
        yield from ()

    ready = threading.Event()
    prefetcher = Prefetcher(kept(), batch_size=2, image_size=8, device=CPU)
    found: Any = prefetcher._started(0, batches(), 2, 0, 0)
    found._lane.side = Unusable()
    ready.set()
    with pytest.raises(type(earlier) if earlier else RuntimeError, match=r"earlier|illegal memory access"):
        next(found)
    assert not prefetching()


def test_after_an_out_of_memory_the_same_batch_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = rows(train(kept(), Position(0, 0, 0, SIZE)))
    real, calls = DeviceBatch.resample, []

    def full(buffers: DeviceBatch, count: int) -> tuple[Tensor, Tensor]:
        calls.append(count)
        if len(calls) in (3, 4):  # twice: a single failure is tried again
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(buffers, count)

    monkeypatch.setattr(DeviceBatch, "resample", full)
    iterator = Prefetcher(kept(), batch_size=4, image_size=16, device=CPU).train(Position(0, 0, 0, SIZE))
    found = [next(iterator).images.clone() for _ in range(2)]
    with pytest.raises(OutOfMemory) as caught:
        next(iterator)
    assert caught.value.phase == "loading data"
    found += [batch.images.clone() for batch in iterator]
    assert torch.equal(torch.cat(found), expected)
    assert len(calls) == 8


class Eight(Named):
    def __getitem__(self, index: int) -> Any:
        return torch.full((3, 8, 8), index * 10, dtype=torch.uint8), index % 2


SMALL = (
    "data.cache=ram", "model.name=mobilenetv3_small_050", "data.image_size=32", "data.num_workers=0", "device=cpu",
    "trainer.batch_size=8", "model.num_classes=2",
)  # fmt: skip


@pytest.mark.long
def test_no_memory_for_loading_is_a_step_down(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = Prefetcher.train

    def full(prefetcher: Prefetcher, position: Position) -> Any:
        if prefetcher.batch_size == 8:
            raise OutOfMemory("CUDA out of memory. Tried to allocate 2 GiB", phase="loading data")
        return real(prefetcher, position)

    monkeypatch.setattr(Prefetcher, "train", full)
    ladder = ["ladder.rungs=[{name: half, overrides: ['trainer.batch_size=4']}]"]
    result = Trainer(compose_config([*SMALL, *ladder]), train_data=Eight(), output_dir=tmp_path / "a").fit()
    assert result.rung == "half"
    assert [a.phase for a in result.attempts if a.outcome == "oom"] == ["loading data, after update 0"]
    assert not prefetching()
    with pytest.raises(LadderExhausted, match="loading data"):
        Trainer(compose_config([*SMALL, "ladder=none"]), train_data=Eight(), output_dir=tmp_path / "b").fit()
