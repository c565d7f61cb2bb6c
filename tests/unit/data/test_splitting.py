"""What is held out for validation: a share of every class, the same in a resumed run; and classes without images."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder

from adaptive_trainer import Trainer, compose_config
from adaptive_trainer.checkpoints import checkpoint
from adaptive_trainer.config.overrides import typed
from adaptive_trainer.config.schema import Config
from adaptive_trainer.data.datasets import build_datasets, described
from adaptive_trainer.data.images.files import image_folder
from adaptive_trainer.data.images.folders import check_folders
from adaptive_trainer.data.splitting import RANDOM, STRATIFIED, Split, held_out, known_labels
from adaptive_trainer.errors import CheckpointError, DataError


def settings(*overrides: str) -> Config:
    return typed(compose_config(["trainer.batch_size=1", *overrides]))


def tensors(*labels: int) -> TensorDataset:
    return TensorDataset(torch.zeros(len(labels), 3, 8, 8), torch.tensor(labels))


def photos(top: Path, **counts: int) -> Path:
    for name, count in counts.items():
        (top / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (9, 7), (10 * number, 0, 0)).save(top / name / f"{number}.png")
    return top


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32),
)
def test_a_split_takes_its_share_of_every_class(sizes: list[int], fraction: float, seed: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(7 * np.arange(len(sizes)), sizes))
    total = len(labels)
    if total < 2 or max(sizes) < 2:
        return
    chosen, split = held_out(total, fraction, Split(STRATIFIED, seed), labels)
    wanted = min(max(1, round(total * fraction)), total - 1)
    most = sum(size - 1 for size in sizes)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(wanted, most)
    given_up = Counter((labels[chosen] // 7).tolist())
    for number, size in enumerate(sizes):
        assert given_up[number] <= size - 1, "every class keeps a training image"
        if sum(size > 1 for size in sizes) <= len(chosen):
            assert given_up[number] >= min(1, size - 1), "and gives one where there is room for all"
    if min(sizes) * min(len(chosen), total - len(chosen)) >= 2 * total:  # no class is near a bound
        assert all(abs(given_up[n] - size * len(chosen) / total) < 1 for n, size in enumerate(sizes))
    assert held_out(total, fraction, Split(STRATIFIED, seed), labels) == (chosen, split)


@pytest.mark.parametrize("seed", range(8))
def test_no_class_of_a_folder_is_without_training_or_validation_images(seed: int, tmp_path: Path) -> None:
    photos(tmp_path, cat=12, dog=8, eel=2, fox=2)
    data = build_datasets(settings("data=imagefolder", f"data.root={tmp_path}", f"seed={seed}"))
    for part in (data.train, data.val):
        labels = known_labels(part)
        assert labels is not None
        assert sorted(set(labels.tolist())) == [0, 1, 2, 3]
    assert described(data)[1] == []


def test_a_class_of_one_image_is_trained_on(tmp_path: Path) -> None:
    data = build_datasets(settings("data=imagefolder", f"data.root={photos(tmp_path, cat=5, dog=4, eel=1)}"))
    labels = known_labels(data.train)
    assert labels is not None
    assert 2 in labels
    assert described(data)[1] == [
        "classes without validation images: eel; they are trained on and not validated (1 have a single image)"
    ]


@pytest.mark.parametrize(
    ("make", "is_known"),
    [
        (lambda: tensors(*[0] * 8, 1, 1), True),
        (lambda: Subset(tensors(*[0] * 8, 1, 1, 5, 5), list(range(10))), True),
        (lambda: Listed([0] * 8 + [1, 1], "targets"), True),
        (lambda: Listed(torch.tensor([0] * 8 + [1, 1]), "labels"), True),
        (lambda: Listed([0] * 8 + [1, 1], "_labels"), True),
        (lambda: Listed([0] * 8 + [1, 1], "nothing"), True),
        (lambda: Listed(["a"] * 10, "targets"), True),
        (lambda: Listed([0] * 8 + [1, 1], "nothing", classes=["a", "b"]), False),
        (lambda: Listed([[0, 1]] * 10, "targets", classes=["a", "b"]), False),
    ],
)
def test_labels_are_found_where_they_are_listed(make: Any, is_known: bool) -> None:
    data = build_datasets(settings(), make())
    assert data.split is not None
    if is_known:
        assert (data.split.kind, [data.val[n][1] for n in range(2)]) == (STRATIFIED, [0, 1])
    else:
        assert data.split.kind == RANDOM
        assert "no list of its labels (`targets`)" in described(data)[1][0]


class Listed(Dataset[Any]):
    def __init__(self, labels: Any, name: str, **attributes: Any) -> None:
        vars(self).update(attributes, **{name: labels})

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(3, 8, 8), int(index > 7)


def test_every_class_of_one_sample_is_split_at_random() -> None:
    data = build_datasets(settings(), tensors(0, 1, 2, 3, 4))
    assert (len(data.train), len(data.val)) == (4, 1)
    assert "since every class has one image only" in described(data)[1][0]
    assert "classes without training images: " in described(data)[1][1]


def test_a_class_without_validation_images_can_be_trained(tmp_path: Path) -> None:
    photos(tmp_path / "train", cat=3, dog=3, eel=3, fox=3)
    photos(tmp_path / "val", dog=2, fox=0)
    config = settings("data=imagefolder", f"data.root={tmp_path}")
    check_folders(config.data)
    data = build_datasets(config)
    assert [data.val[n][1] for n in range(2)] == [1, 1]
    assert described(data)[1] == [
        "classes without validation images: cat, eel, fox; they are trained on and not validated"
    ]


def test_a_class_of_the_validation_set_alone_is_refused(tmp_path: Path) -> None:
    photos(tmp_path / "train", cat=3, dog=3)
    photos(tmp_path / "val", eel=2)
    with pytest.raises(DataError, match=r"only in validation \['eel'\]"):
        build_datasets(settings("data=imagefolder", f"data.root={tmp_path}"))


def test_classes_of_given_sets_that_have_no_images_are_reported() -> None:
    named = Listed([0] * 10, "targets", classes=["cat", "dog", "eel"])
    data = build_datasets(settings(), named, Listed([0, 1] * 5, "targets", classes=["cat", "dog", "eel"]))
    assert described(data)[1] == ["classes without training images: dog, eel; the network cannot learn them"]


LABELS = [
    (
        [0, 1, 2, 255],
        256,
        "3 to 254; the network cannot learn them. The labels are 0 to 2, 255, and the network gets 256",
    ),
    ([1, 2, 3], 4, "classes without training images: 0; the network cannot learn them. The labels are 1 to 3,"),
    ([0, 2, 5, 6], 7, "classes without training images: 1, 3 to 4;"),
]


@pytest.mark.parametrize(("labels", "count", "message"), LABELS)
def test_labels_with_gaps_are_reported(labels: list[int], count: int, message: str) -> None:
    data = build_datasets(settings(), tensors(*labels * 5))
    assert data.num_classes == count
    assert [text for text in described(data)[1] if message in text]


@pytest.mark.parametrize("wrong", [255, -1, -100, 3])
def test_labels_that_are_no_classes_are_refused_at_once(wrong: int) -> None:
    class Named(TensorDataset):
        classes = ("cat", "dog", "eel")

    right = Named(*tensors(0, 1, 2, 0).tensors)
    odd = Named(*tensors(0, 1, 2, wrong, wrong).tensors)
    for name, pair in {"training": (odd, right), "validation": (right, odd)}.items():
        message = (
            rf"the {name} set has labels that are no classes: {wrong} \(2 samples\); allowed are 0 to 2 \(3 classes\)"
        )
        with pytest.raises(DataError, match=message):
            build_datasets(settings(), *pair)


def test_a_list_of_labels_that_is_not_what_the_data_set_gives_is_not_believed() -> None:
    data = build_datasets(settings(), Listed([70, 80] * 5, "targets", classes=["a", "b"]), Listed([0] * 10, "targets"))
    assert described(data)[1] == []


def test_folders_beside_train_are_named(tmp_path: Path) -> None:
    photos(tmp_path / "train", cat=5, dog=5)
    for name in ("test", "holdout", ".git", "__MACOSX"):
        photos(tmp_path / name, cat=2, dog=2)
    message = "beside the training images, nothing uses the folders holdout"  # the test folder is evaluated at the end
    config = settings("data=imagefolder", f"data.root={tmp_path}")
    assert described(build_datasets(config))[1] == [message]
    photos(tmp_path / "val", cat=2, dog=2)
    assert described(build_datasets(config))[1] == [message]
    assert image_folder(str(photos(tmp_path / "other", cat=2, test=2))).not_used == []  # type: ignore[union-attr]


def fit(folder: Path, *overrides: str, data: Any = None) -> Any:
    base = ["model.name=test_resnet", "data.image_size=32", "data.num_workers=0", "trainer.batch_size=8"]
    cfg = compose_config([*base, "memory.limit=none", "ladder=none", *overrides])
    return Trainer(cfg, train_data=data, output_dir=folder).fit()


def unbalanced() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(40, 3, 32, 32, generator=generator), torch.tensor([0] * 36 + [1] * 4))


def validated(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The indices that each run from now on holds out."""
    found: list[list[int]] = []
    from adaptive_trainer.training import trainer

    def noted(*args: Any, **kwargs: Any) -> Any:
        data = build_datasets(*args, **kwargs)
        found.append(list(data.val.indices))  # type: ignore[attr-defined]
        return data

    monkeypatch.setattr(trainer, "build_datasets", noted)
    return found


@pytest.mark.long
@pytest.mark.parametrize("overrides", [[], ["seed=5"]])
def test_a_resumed_run_holds_out_the_same_samples(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = validated(monkeypatch)
    fit(tmp_path, data=unbalanced())
    fit(tmp_path, "resume=auto", "trainer.epochs=2", *overrides, data=unbalanced())
    assert found[0] == found[1]
    fit(tmp_path / "new", *overrides, data=unbalanced())
    assert (found[2] == found[0]) is not bool(overrides)


@pytest.mark.long
def test_a_checkpoint_of_the_random_split_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = validated(monkeypatch)
    fit(tmp_path, data=unbalanced())
    path = tmp_path / "checkpoints" / "last.pt"
    saved = {key: value for key, value in checkpoint.load(path).items() if key not in ("split", "format", "version")}
    checkpoint.save(path, saved)
    result = fit(tmp_path, "resume=auto", "trainer.epochs=2", data=unbalanced())
    assert found[1] == held_out(40, 0.2, Split(RANDOM, 0), None)[0] != found[0]
    assert [text for text in result.events if "at random, and not a share of every class, as in the run" in text]
    fit(tmp_path, "resume=auto", "trainer.epochs=3", data=unbalanced())
    assert found[2] == found[1]


def test_a_split_that_cannot_be_made_again_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, data=unbalanced())
    other = unbalanced()
    other.tensors[1][:4], other.tensors[1][36:] = 1, 0
    with pytest.raises(CheckpointError, match="other samples would be held out for validation than in the run"):
        fit(tmp_path, "resume=auto", "trainer.epochs=2", data=other)
    fit(tmp_path, "resume=auto", "trainer.epochs=2", data=unbalanced())


def test_torchvisions_folders_are_split_by_class(tmp_path: Path) -> None:
    data = build_datasets(settings(), ImageFolder(str(photos(tmp_path, cat=16, dog=4))))
    assert [data.val[n][1] for n in range(4)] == [0, 0, 0, 1]
