"""Loaders: the same samples and augmentations whatever the workers, batch sizes and starting points."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from adaptive_trainer.config.overrides import compose_config, typed
from adaptive_trainer.config.schema import DataConfig
from adaptive_trainer.data.datasets import DataSets, build_datasets
from adaptive_trainer.data.loader import Batch, Loader
from adaptive_trainer.data.position import Position
from adaptive_trainer.data.samples import EVALUATION, SampleError
from adaptive_trainer.errors import DataError

# Python 3.12 warns of every fork in a process with threads, and torch always has some
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


class Noise(Dataset[Any]):
    """Augments by itself, with all three kinds of random numbers, and tells which process it runs in."""

    def __init__(self, size: int = 23, labels: list[Any] | None = None) -> None:
        self.size, self.labels = size, labels or [n % 3 for n in range(size)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        values = [float(index), random.random(), float(np.random.random()), float(torch.rand(()))]
        return torch.tensor(values).repeat(3, 4, 1), self.labels[index]


class Seeds(Noise):
    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        torch.manual_seed(index)
        return super().__getitem__(index)


class InWorkers(Noise):
    """Uses the data worker itself: broken, out of memory, or a bug."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        if index == 5:
            raise self.error
        return super().__getitem__(index)


class Signals(Noise):
    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        assert get_worker_info() is not None
        os.kill(os.getpid(), signal.SIGINT)
        return super().__getitem__(index)


def plain(data: Any, on_error: str = "raise", transforms: str = "none") -> DataSets:
    config = DataConfig(transforms=transforms, on_error=on_error)
    return DataSets(data, data, 3, ("a", "b", "c"), config)


def opened(data: DataSets, batch_size: int = 4, num_workers: int = 0, image_size: int = 4) -> Loader:
    return Loader(data, batch_size=batch_size, image_size=image_size, num_workers=num_workers, pin_memory=False)


def batches(
    data: DataSets, position: Position, batch_size: int = 4, num_workers: int = 0, image_size: int = 4
) -> list[Batch]:
    with closing(opened(data, batch_size, num_workers, image_size)) as loader:
        return list(loader.train(position))


def rows(found: list[Batch]) -> Tensor:
    return torch.cat([batch.images for batch in found])


@pytest.mark.parametrize("transforms", ["none", "torchvision", "timm"])
def test_augmentation_depends_on_seed_epoch_and_index_alone(transforms: str) -> None:
    data = plain(Noise(), transforms=transforms)
    start = Position(7, 2, 0, 23)
    expected = rows(batches(data, start))
    assert torch.equal(rows(batches(data, start, batch_size=7, num_workers=2)), expected)
    assert torch.equal(rows(batches(data, start.advance(9), batch_size=3, num_workers=1)), expected[9:])
    assert not torch.equal(rows(batches(data, Position(8, 2, 0, 23))), expected)
    assert not torch.equal(rows(batches(data, Position(7, 3, 0, 23))), expected)


def test_every_sample_once_whatever_changes_on_the_way() -> None:
    data, position = plain(Noise()), Position(0, 0, 0, 23)
    expected, found = rows(batches(data, position)), []
    for batch_size, num_workers in [(4, 0), (8, 2), (3, 1), (2, 0), (5, 2), (9, 0)]:
        batch = batches(data, position, batch_size, num_workers)[0]
        found.append(batch)
        position = position.advance(batch.samples)
        if position.epoch:
            break
    assert position == Position(0, 1, 0, 23)
    assert torch.equal(rows(found), expected)
    assert sorted(rows(found)[:, 0, 0, 0].tolist()) == list(range(23))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", [Noise, Seeds])
def test_loading_leaves_the_random_numbers_alone(num_workers: int, kind: type[Noise]) -> None:
    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    data = plain(kind(), transforms="torchvision")
    batches(data, Position(0, 0, 0, 23), num_workers=num_workers)
    with closing(opened(data, num_workers=num_workers)) as loader:
        list(loader.evaluate(4))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), repr(np.random.get_state())) == before[1:]


@pytest.mark.parametrize("owner", [random, np.random])
def test_a_seed_that_finds_no_memory_leaves_the_random_numbers_alone(
    owner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise MemoryError("no room for a seed")

    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    data = plain(Noise(), transforms="torchvision")
    monkeypatch.setattr(owner, "seed", refuse)
    with pytest.raises(MemoryError, match="seed"):
        batches(data, Position(0, 0, 0, 23))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), repr(np.random.get_state())) == before[1:]


def test_evaluation_is_in_order_and_can_start_anywhere() -> None:
    def load(batch_size: int, start: int, num_workers: int) -> Tensor:
        with closing(opened(plain(Noise()), num_workers=num_workers)) as loader:
            return rows(list(loader.evaluate(batch_size, start)))

    whole = load(5, 0, 0)
    assert whole[:, 0, 0, 0].tolist() == list(range(23))
    assert torch.equal(load(7, 11, 2), whole[11:])
    assert load(4, 22, 0).shape == (1, 3, 4, 4)


def folder(path: Path) -> DataSets:
    for name in ("cat", "dog"):
        (path / name).mkdir()
        for number in range(4):
            Image.new("L" if number % 2 else "RGBA", (20, 14), 60 * number).save(path / name / f"{number}.png")
    (path / "dog" / "2.png").write_bytes((path / "dog" / "1.png").read_bytes()[:45])
    return build_datasets(typed(compose_config(["data=imagefolder", f"data.root={path}", "trainer.batch_size=2"])))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_file_is_named(tmp_path: Path, num_workers: int) -> None:
    data = folder(tmp_path)
    name = str(tmp_path / "dog" / "2.png")
    everything = Position(0, 0, 0, len(data.train) + len(data.val))
    whole = DataSets(data.train.dataset, data.val, 2, data.classes, data.config)  # type: ignore[attr-defined]
    with pytest.raises(DataError) as caught:
        batches(whole, everything, num_workers=num_workers, image_size=16)
    assert str(caught.value).startswith(f"{name} cannot be read (")
    assert str(caught.value).endswith("repair or remove it, or use data.on_error=skip")
    assert "\n" not in str(caught.value)
    whole.config.on_error = "skip"
    found = batches(whole, everything, num_workers=num_workers, image_size=16)
    assert [len(batch.labels) for batch in found if batch.skipped] == [3]
    assert [name] == [skipped for batch in found for skipped in batch.skipped]
    assert sum(batch.samples for batch in found) == 8
    assert all(batch.images.shape[1:] == (3, 16, 16) for batch in found)


class Odd(Noise):
    """Gives one image as numbers of no known range."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, label = super().__getitem__(index)
        return (Image.fromarray(np.ones((4, 4), np.float32)) if index == 5 else image), label


def test_an_image_that_cannot_be_read_as_colours_is_a_broken_sample() -> None:
    with pytest.raises(DataError, match=r"sample 5 cannot be read \(UnidentifiedImageError: its shades are numbers"):
        batches(plain(Odd()), Position(0, 0, 0, 23))
    found = batches(plain(Odd(), on_error="skip"), Position(0, 0, 0, 23))
    assert [skipped for batch in found for skipped in batch.skipped] == ["sample 5"]


def test_a_batch_of_broken_samples_only_is_empty_and_counted() -> None:
    data = plain(InWorkers(OSError("truncated")), on_error="skip")
    sizes = [len(batch.labels) for batch in batches(data, Position(0, 0, 0, 23), batch_size=1)]
    assert sorted(sizes) == [0] + [1] * 22
    empty = next(b for b in batches(data, Position(0, 0, 0, 23), batch_size=1) if b.skipped)
    assert (len(empty.images), empty.labels.dtype, empty.samples, empty.skipped) == (0, torch.int64, 1, ["sample 5"])


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("label", "message"),
    [
        (3, r"sample 5 has label 3; allowed are 0 to 2 \(3 classes\)"),
        (-1, r"sample 5 has label -1; allowed are 0 to 2"),
        (0.5, "sample 5 is not a pair of an image and a whole number"),
    ],
)
def test_a_bad_label_is_named(label: Any, message: str, num_workers: int) -> None:
    labels: list[Any] = [n % 3 for n in range(23)]
    labels[5] = label
    with pytest.raises(SampleError, match=f"^{message}"):
        batches(plain(Noise(labels=labels), on_error="skip"), Position(0, 0, 0, 23), num_workers=num_workers)


@pytest.mark.parametrize("label", [torch.tensor(1), np.int64(1)])
def test_labels_may_be_whole_numbers_of_any_kind(label: Any) -> None:
    found = batches(plain(Noise(labels=[label] * 23)), Position(0, 0, 0, 23))
    assert torch.cat([batch.labels for batch in found]).tolist() == [1] * 23


@pytest.mark.parametrize(
    "error", [KeyError("a bug"), ZeroDivisionError("a bug"), MemoryError("no room"), OSError(12, "")]
)
def test_what_is_not_a_broken_file_passes_unchanged(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        batches(plain(InWorkers(error), on_error="skip"), Position(0, 0, 0, 23))
    assert caught.value is error


def test_an_abandoned_loader_leaves_no_process() -> None:
    loader = opened(plain(Noise(200)), batch_size=2, num_workers=2)
    next(loader.train(Position(0, 0, 0, 200)))
    assert len(multiprocessing.active_children()) == 2
    del loader
    assert multiprocessing.active_children() == []


def test_one_set_of_workers_serves_passes_of_all_kinds() -> None:
    data = plain(Noise(), transforms="torchvision")
    passes: list[Callable[[Loader], Iterator[Batch]]] = [
        lambda loader: loader.train(Position(7, 0, 0, 23)),
        lambda loader: loader.evaluate(5),
        lambda loader: itertools.islice(loader.train(Position(7, 1, 0, 23)), 2),  # left with batches on their way
        lambda loader: itertools.islice(loader.evaluate(3, start=4), 1),
        lambda loader: loader.evaluate(2, start=9),
        lambda loader: loader.train(Position(8, 1, 11, 23)),
    ]
    pids = set()
    with closing(opened(data, num_workers=2)) as loader, closing(opened(data)) as alone:
        for each in passes:
            assert torch.equal(rows(list(each(loader))), rows(list(each(alone))))
            pids.add(frozenset(child.pid for child in multiprocessing.active_children()))
    assert [len(each) for each in pids] == [2]
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(("train", "val", "started"), [(3, 40, 4), (40, 3, 4), (3, 7, 2)])
def test_no_more_workers_than_batches(train: int, val: int, started: int) -> None:
    data = replace(plain(Noise(train)), val=Noise(val))
    with closing(opened(data, num_workers=4)) as loader:
        assert len(rows(list(loader.evaluate(4)))) == val
        assert len(multiprocessing.active_children()) == started


def test_workers_do_not_answer_ctrl_c() -> None:
    found = batches(plain(Signals()), Position(0, 0, 0, 23), num_workers=2)
    assert sum(batch.samples for batch in found) == 23


@pytest.mark.parametrize("transforms", ["none", "torchvision", "timm"])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_loader_can_be_sent_to_a_spawned_worker(transforms: str, on_error: str) -> None:
    data = build_datasets(typed(compose_config([f"data.transforms={transforms}", f"data.on_error={on_error}"])))
    loader = opened(data, image_size=8)._loader
    twin = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    for key in ((0, 0, 3), (0, EVALUATION, 3)):
        assert torch.equal(twin[1]([twin[0][key]]).images, loader.collate_fn([loader.dataset[key]]).images)
