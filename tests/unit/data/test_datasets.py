"""Data sets by configuration, and one clear message for each way in which they can be wrong."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from adaptive_trainer.config.overrides import compose_config, typed
from adaptive_trainer.config.schema import Config, DataConfig
from adaptive_trainer.data.datasets import build_datasets, described, digits, sample_name
from adaptive_trainer.data.images.files import image_folder
from adaptive_trainer.data.images.folders import check_folders
from adaptive_trainer.errors import ConfigError, DataError


def settings(*overrides: str) -> Config:
    return typed(compose_config(["trainer.batch_size=2", *overrides]))


def images(folder: Path, *classes: str, count: int = 3) -> Path:
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (9, 7), (10 * number, 0, 0)).save(folder / name / f"{number}.png")
    return folder


class Plain(Dataset[Any]):
    """No list of classes or labels."""

    def __init__(self, labels: list[int]) -> None:
        self.all = labels

    def __len__(self) -> int:
        return len(self.all)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(3, 8, 8), self.all[index]


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return itertools.count()


class Buggy(Dataset[Any]):
    def __init__(self) -> None:
        raise KeyError("a bug of the user's own")


class Unreadable(Dataset[Any]):
    def __init__(self) -> None:
        raise PermissionError(13, "not allowed", "/data/labels.csv")


def test_digits_are_those_of_scikit_learn() -> None:
    known, found = load_digits(), digits()
    assert np.array_equal(found.images, (known.images * (255 / 16)).astype(np.uint8))
    assert found.targets == known.target.tolist()


def test_digits_are_real_and_split_by_the_seed() -> None:
    data = build_datasets(settings())
    assert (len(data.train), len(data.val), data.num_classes) == (1438, 359, 10)
    image, label = digits()[0]
    assert (image.size, image.getextrema(), label) == ((8, 8), (0, 239), 0)
    assert isinstance(data.train, Subset)
    assert isinstance(data.val, Subset)
    assert sorted([*data.train.indices, *data.val.indices]) == list(range(1797))
    again, other = build_datasets(settings()), build_datasets(settings("seed=1"))
    assert isinstance(again.val, Subset)
    assert isinstance(other.val, Subset)
    assert list(again.val.indices) == list(data.val.indices) != list(other.val.indices)


def test_splitting_draws_no_global_random_number() -> None:
    before = torch.get_rng_state()
    build_datasets(settings())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("train", "val"), [("train", "val"), ("train", "valid"), ("train", "validation"), ("Training", "Validation")]
)
def test_folder_with_train_and_val(tmp_path: Path, train: str, val: str) -> None:
    images(tmp_path / train, "cat", "dog", ".cache")
    images(tmp_path / val, "cat", "dog", count=2)
    data = build_datasets(settings("data=imagefolder", f"data.root={tmp_path}"))
    assert (len(data.train), len(data.val), data.num_classes, data.classes) == (6, 4, 2, ("cat", "dog"))
    assert data.train[5][1] == 1
    assert sample_name(data.val, 3) == str(tmp_path / val / "dog" / "1.png")
    text = "6 training and 4 validation images, of a set of their own; 2 classes: cat, dog"
    assert described(data) == (text, ["1 hidden files and folders are left out: 1 .cache"])


def test_folder_of_classes_is_split(tmp_path: Path) -> None:
    images(tmp_path, "cat", "dog", count=5)
    data = build_datasets(settings("data=imagefolder", f"data.root={tmp_path}"))
    assert (len(data.train), len(data.val), data.classes) == (8, 2, ("cat", "dog"))
    names = {sample_name(data.train, n) for n in range(8)} | {sample_name(data.val, n) for n in range(2)}
    assert names == {str(p) for p in tmp_path.glob("*/*.png")}


def test_a_class_may_be_a_train(tmp_path: Path) -> None:
    data = build_datasets(settings("data=imagefolder", f"data.root={images(tmp_path, 'Bus', 'Train', count=5)}"))
    assert data.classes == ("Bus", "Train")


def test_files_that_are_not_used_are_told(tmp_path: Path) -> None:
    images(tmp_path, "cat", "dog", count=5)
    for name in ("a.gif", "b.GIF", "c.heic", "README", ".DS_Store"):
        (tmp_path / "cat" / name).touch()
    (tmp_path / "dog" / "loop").symlink_to(tmp_path / "dog")
    (tmp_path / "dog" / "gone.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(tmp_path / "dog" / "pipe.png")
    data = build_datasets(settings("data=imagefolder", f"data.root={tmp_path}"))
    counts, not_used = described(data)
    assert counts == "9 training and 2 validation images, held out of the training set; 2 classes: cat, dog"
    assert not_used[0].startswith("2 .gif, 1 readme, 1 .heic are not used: images are .jpg")
    assert not_used[1] == "1 hidden files and folders are left out: 1 .DS_Store"


def test_train_without_val_is_split(tmp_path: Path) -> None:
    images(tmp_path / "train", "cat", "dog", count=5)
    images(tmp_path / "test", "cat", "dog")
    data = build_datasets(settings("data=imagefolder", f"data.root={tmp_path}"))
    assert (len(data.train), len(data.val)) == (8, 2)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing is no folder; give one with ROOT/CLASS/image\.jpg"):
        image_folder(str(tmp_path / "missing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no class folders; two or more"):
        image_folder(str(tmp_path / "empty"))
    with pytest.raises(DataError, match="has one class folder, cat; two or more"):
        image_folder(str(images(tmp_path / "one", "cat")))
    images(tmp_path / "hollow", "cat", "dog")
    (tmp_path / "hollow" / "eel").mkdir()
    (tmp_path / "hollow" / "eel" / "notes.txt").write_text("none yet")
    with pytest.raises(DataError, match=r"has no images in eel; put some there .*\.jpg .*or remove the folder"):
        image_folder(str(tmp_path / "hollow"))


def test_a_class_that_cannot_be_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images(tmp_path, "cat", "dog")
    look = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", path)
        return look(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"cannot get its data: .*Permission denied: .*dog"):
        build_datasets(settings("data=imagefolder", f"data.root={tmp_path}"))


def test_classes_that_differ(tmp_path: Path) -> None:
    images(tmp_path / "train", "cat", "dog")
    images(tmp_path / "val", "cat", "eel")
    with pytest.raises(DataError, match=r"only in training \['dog'\], only in validation \['eel'\]"):
        build_datasets(settings("data=imagefolder", f"data.root={tmp_path}"))


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["trainer.batch_size=2000"], ConfigError, "batch_size=2000 is above the 1438 samples"),
        (["model.num_classes=3"], ConfigError, "model.num_classes=3 and the data has 10 classes; use null or 10"),
        (["data.train._target_=no.such.Thing"], ConfigError, "no.such.Thing cannot be used: Error locating"),
        (["+data.train.nonsense=1"], ConfigError, "other arguments than it takes: .*nonsense"),
        (["data.train._target_=null"], ConfigError, "data.train has no _target_"),
        ([f"data.train._target_={__name__}.Unreadable"], DataError, "cannot get its data: .*labels.csv"),
        ([f"data.train._target_={__name__}.Endless"], ConfigError, "is a Endless; one with a length"),
        (["data.auto_augment=nonsense"], ConfigError, "data.auto_augment=nonsense is none of ra"),
        (["data.auto_augment=nonsense", "data.transforms=timm"], ConfigError, "timm does not take"),
        (["data=cifar10", "data.train.download=false", "data.root=/nowhere"], DataError, "Dataset not found"),
    ],
)
def test_configurations_that_cannot_be_used(overrides: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_datasets(settings(*overrides))


def test_a_bug_in_the_users_data_set_passes_unchanged() -> None:
    with pytest.raises(KeyError, match="a bug of the user's own"):
        build_datasets(settings(f"data.train._target_={__name__}.Buggy"))


def test_given_data_sets() -> None:
    train, val = Plain([0, 1, 2, 1]), Plain([0, 2])
    data = build_datasets(settings(), train, val)
    assert (len(data.train), len(data.val), data.num_classes, data.classes) == (4, 2, 3, ("0", "1", "2"))
    assert len(build_datasets(settings("data.val_fraction=0.25"), train).val) == 1
    tensors = TensorDataset(torch.zeros(4, 3, 8, 8), torch.tensor([0, 3, 1, 0]))
    assert build_datasets(settings(), tensors, val).num_classes == 4
    assert build_datasets(settings("model.num_classes=7"), train, val).num_classes == 7


def test_outputs_without_a_name_go_by_their_number() -> None:
    data = build_datasets(settings("model.num_classes=12"))
    assert data.classes == (*"0123456789", "10", "11")
    assert "classes without training images: 10, 11; the network cannot learn them" in data.notes


class Counted(Endless):
    """Says how long it is, and has no index."""

    def __len__(self) -> int:
        return 4


def test_given_data_sets_that_cannot_be_used() -> None:
    with pytest.raises(DataError, match="one class only"):
        build_datasets(settings(), Plain([0, 0, 0]), Plain([0]))
    for wrong in ("photos", Counted()):
        with pytest.raises(ConfigError, match="one with a length and an index is needed"):
            build_datasets(settings(), wrong, Plain([0]))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="the validation set is empty"):
        build_datasets(settings(), Plain([0, 1]), Plain([]))
    with pytest.raises(DataError, match="has 1 sample"):
        build_datasets(settings(), Plain([0]))
    with pytest.raises(ConfigError, match=r"Plain has no `classes` or `targets`; give model\.num_classes"):
        build_datasets(settings(), Plain([0, 1] * 4000), Plain([0]))
    assert build_datasets(settings("model.num_classes=2"), Plain([0, 1] * 4000), Plain([0])).num_classes == 2


def test_a_folder_is_used_by_way_of_another_name() -> None:
    check_folders(DataConfig(train={"_target_": "mine.Photos", "where": "photos/training"}, root="photos"))
    with pytest.raises(DataError, match="data=imagefolder"):
        build_datasets(typed(compose_config(["data.root=photos"])))


def test_a_set_that_cannot_say_how_long_it_is() -> None:
    with pytest.raises(ConfigError, match="the validation set cannot say how long it is"):
        build_datasets(settings("data=fakedata", "data.val.size=none"))
