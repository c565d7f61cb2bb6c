"""`data.cache`: what is stored, when it is believed, and what happens where there is no room or no peace."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import tempfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.datasets import FakeData, ImageFolder

from adaptive_trainer import Trainer, compose_config
from adaptive_trainer.config.overrides import typed
from adaptive_trainer.config.schema import DataConfig
from adaptive_trainer.data.cached import build as caching
from adaptive_trainer.data.cached.build import with_cache
from adaptive_trainer.data.cached.fingerprint import fingerprint
from adaptive_trainer.data.cached.store import available_memory
from adaptive_trainer.data.datasets import DataSets, build_datasets, digits
from adaptive_trainer.data.images.files import ImageFiles
from adaptive_trainer.data.samples import SampleError
from adaptive_trainer.errors import ConfigError, DataError, Stopped
from tests.support.forking import Launcher, Started

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture
def top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of disk caches."""
    monkeypatch.setenv("ADAPTIVE_TRAINER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of five images of different shapes."""
    for number in range(10):
        path = tmp_path / "photos" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + number, 14), (25 * number, 0, 0)).save(path)
    return tmp_path / "photos"


def sets(data: Any, cache: str = "disk", num_workers: int = 0, on_error: str = "raise", classes: int = 2) -> DataSets:
    config = DataConfig(cache=cache, num_workers=num_workers, on_error=on_error)
    half = len(data) // 2
    parts: list[Any] = [Subset(data, list(range(half, len(data)))), Subset(data, list(range(half)))]
    return DataSets(parts[0], parts[1], classes, tuple("abcdefghij")[:classes], config)


def built(data: Any, size: int = 16, **how: Any) -> tuple[DataSets, list[str]]:
    events: list[str] = []
    return with_cache(sets(data, **how), size, event=events.append), events


def images(data: DataSets) -> Tensor:
    assert data.stored is not None
    return torch.cat([torch.from_numpy(part.decoded.images[part.rows]) for part in data.stored])


@pytest.mark.parametrize("cache", ["ram", "disk"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_is_stored(cache: str, num_workers: int, photos: Path, top: Path) -> None:
    data, events = built(ImageFiles(photos), cache=cache, num_workers=num_workers)
    assert data.stored is not None
    train, val = data.stored
    assert train.decoded is val.decoded, "parts of one data set share what is stored"
    assert train.decoded.images.shape == (10, 3, 16, 16)
    assert train.decoded.labels[train.rows].tolist() == [1] * 5
    assert val.decoded.sizes[val.rows].tolist() == [[14, 20 + n] for n in (0, 2, 4, 6, 8)]
    assert images(data)[:, 0, 8, 8].tolist() == [25, 75, 125, 175, 225, 0, 50, 100, 150, 200]
    assert f"data.cache={cache}: 10 images decoded and stored at 16 x 16 pixels" in events[0]


class Counts(ImageFiles):
    """Writes a line for every image that is decoded, and may die at one."""

    def __init__(self, folder: Path, tally: Path, dies_at: int = -1) -> None:
        super().__init__(folder)
        self.tally, self.dies_at = tally, Path(str(dies_at))  # not a setting: the same images come of it

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with self.tally.open("a") as file:
            file.write(f"{index}\n")
        if str(index) == str(self.dies_at):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class Tally:
    def __init__(self, photos: Path) -> None:
        self.photos, self.path, self.seen = photos, photos.parent / "tally", 0

    def decoded(self, **how: Any) -> int:
        """Images decoded to open the cache."""
        built(Counts(self.photos, self.path), **how)
        count = len(self.path.read_text().splitlines())
        self.seen, before = count, self.seen
        return count - before


def rewrite(path: Path) -> None:
    Image.new("RGB", (9, 9)).save(path)


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [rewrite, touch, lambda path: path.rename(path.with_name("new.png"))])
def test_a_disk_cache_is_used_until_a_file_changes(change: Callable[[Path], Any], photos: Path, top: Path) -> None:
    tally = Tally(photos)
    assert [tally.decoded(), tally.decoded(), tally.decoded(size=8), tally.decoded(size=16)] == [10, 0, 10, 0]
    (photos / "cat" / "notes.txt").touch()
    assert tally.decoded() == 0
    change(photos / "cat" / "4.png")
    assert [tally.decoded(), tally.decoded()] == [10, 0]


def cut(folder: Path) -> None:
    os.truncate(folder / "images.u8", 100)


def spoil(folder: Path) -> None:
    with (folder / "images.u8").open("r+b") as file:
        file.seek(5000)
        file.write(b"spoiled")


def garbage(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(b"{}")

    return write


@pytest.mark.parametrize("damage", [cut, spoil, garbage("rows.npz"), garbage("head.json"), shutil.rmtree])
def test_a_damaged_cache_is_made_anew(damage: Callable[[Path], Any], photos: Path, top: Path) -> None:
    tally = Tally(photos)
    tally.decoded()
    (folder,) = (path for path in top.iterdir() if path.is_dir())
    damage(folder)
    assert [tally.decoded(), tally.decoded()] == [10, 0]


CHILD = """
import sys
from pathlib import Path
from tests.integration.test_caching import Counts, built, images
data, _ = built(Counts(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))
print(int(images(data).long().sum()))
"""


def child(launcher: Launcher, photos: Path, top: Path, name: str, dies_at: int = -1) -> Started:
    folder, env = photos.parent / name, {"ADAPTIVE_TRAINER_CACHE": str(top.parent)}
    folder.mkdir()
    script = folder / "child.py"
    script.write_text(CHILD)
    args = (str(photos), str(photos.parent / "tally"), str(dies_at))
    return launcher.start(*args, script=script, folder=folder, env=env)


def test_of_two_processes_one_decodes_and_the_other_waits(launcher: Launcher, photos: Path, top: Path) -> None:
    children = [child(launcher, photos, top, name) for name in ("one", "other")]
    sums = [int(each.wait().out) for each in children]
    assert len((photos.parent / "tally").read_text().splitlines()) == 10
    assert sums == [int(images(built(Counts(photos, photos.parent / "tally"))[0]).long().sum())] * 2


def test_what_a_killed_process_leaves_is_not_believed(launcher: Launcher, photos: Path, top: Path) -> None:
    killed = child(launcher, photos, top, "killed", dies_at=9).wait()
    assert killed.code == -signal.SIGKILL
    assert [path.suffix for path in top.iterdir() if path.is_dir()] == [".part"]
    tally = Tally(photos)
    tally.seen = 10
    assert tally.decoded() == 10
    assert [path.suffix for path in top.iterdir() if path.is_dir()] == [""]


Usage = namedtuple("Usage", "total used free")


def test_where_a_disk_has_no_room_training_goes_on_without(
    photos: Path, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 9000))
    data, events = built(ImageFiles(photos))
    assert data.stored is None
    assert events[0].startswith(
        "data.cache=disk is not used: the images take 7680 bytes, above 80% of the 9000 bytes that are free in"
    )
    assert events[0].endswith("images are decoded anew in every epoch")
    assert not [path for path in top.iterdir() if path.is_dir()]


def test_where_memory_has_no_room_training_goes_on_without(
    photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(caching, "available_memory", lambda: 9000)
    settings = ["data=imagefolder", f"data.root={photos}", "data.cache=ram", "data.image_size=32", "memory.limit=none"]
    more = [
        "model.name=mobilenetv3_small_050",
        "trainer.batch_size=4",
        "data.num_workers=0",
        "device=cpu",
        "ladder=none",
    ]
    result = Trainer(compose_config([*settings, *more]), output_dir=tmp_path / "out").fit()
    assert result.outcome == "trained"
    assert result.events[0].startswith(
        "data.cache=ram is not used: the images take 40 KiB, above 80% of the 9000 bytes of"
    )


def test_available_memory_is_known_here() -> None:
    found = available_memory()
    assert sys.platform != "linux" or (found is not None and found > 2**20)


class Stops(ImageFiles):
    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return super().__getitem__(index)


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_ctrl_c_ends_the_work_and_leaves_nothing(cache: str, photos: Path, top: Path, tmp_path: Path) -> None:
    settings = [f"data.cache={cache}", "data.image_size=32", "trainer.batch_size=4", "data.num_workers=0", "device=cpu"]
    trainer = Trainer(compose_config(settings), train_data=Stops(photos), output_dir=tmp_path / "out")
    with pytest.raises(Stopped, match=r"stopped by Ctrl-C; images were being decoded for data\.cache, and nothing"):
        trainer.fit()
    assert not top.exists() or not [path for path in top.iterdir() if path.is_dir()]


# ---- broken samples and labels -------------------------------------------------------------------------------------


def test_broken_files_are_named_or_skipped_and_tried_again(photos: Path, top: Path) -> None:
    path = photos / "dog" / "5.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:40])
    os.utime(path, ns=(5, 5))
    with pytest.raises(SampleError, match=rf"^{path} cannot be read \(.*or use data.on_error=skip$"):
        built(ImageFiles(photos))
    data, events = built(ImageFiles(photos), on_error="skip")
    assert data.stored is not None
    assert data.stored[0].decoded.is_sound.sum() == 9
    _, events = built(ImageFiles(photos), on_error="skip")
    assert "are taken from" in events[-1]
    with pytest.raises(SampleError, match=rf"^{path} cannot be read"):
        built(ImageFiles(photos))
    path.write_bytes(whole)
    os.utime(path, ns=(5, 5))
    _, events = built(ImageFiles(photos), on_error="skip")
    assert "10 images decoded" in events[-1]


class Odd(Dataset[Any]):
    """Images are given, or errors to be raised."""

    def __init__(self, samples: list[Any]) -> None:
        self.given = samples

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.given[index], Exception):
            raise self.given[index]
        return self.given[index]


def test_nothing_but_broken_samples_is_an_error() -> None:
    with pytest.raises(DataError, match="no image of the data set can be read"):
        built(Odd([OSError("gone")] * 4), cache="ram", on_error="skip")


def test_images_of_every_kind_are_stored() -> None:
    grey = Image.new("L", (8, 6), 128)
    kinds = [grey, grey.convert("RGBA"), torch.full((6, 8), 128, dtype=torch.uint8), torch.full((1, 6, 8), 0.502)]
    data, _ = built(Odd([(kind, 0) for kind in kinds]), cache="ram")
    assert set(images(data).flatten().tolist()) == {128}
    assert data.stored is not None
    assert data.stored[0].decoded.sizes.tolist() == [[6, 8]] * 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_label_is_named(num_workers: int) -> None:
    samples: list[Any] = [(torch.zeros(3, 4, 4), 1)] * 6
    samples[4] = (torch.zeros(3, 4, 4), 2)
    with pytest.raises(SampleError, match=r"^sample 4 has label 2; allowed are 0 to 1"):
        built(Odd(samples), cache="ram", num_workers=num_workers)


def test_a_label_that_is_no_class_any_more_is_named(photos: Path, top: Path) -> None:
    built(ImageFiles(photos))
    with pytest.raises(SampleError, match=r"dog.*has label 1; allowed are 0 to 0"):
        built(ImageFiles(photos), classes=1)


def test_a_worker_that_runs_out_of_memory_is_one_fewer() -> None:
    class Heavy(Odd):
        def __getitem__(self, index: int) -> Any:
            if index == 5 and torch.utils.data.get_worker_info() is not None:
                raise MemoryError("no room")
            return super().__getitem__(index)

    data, events = built(
        Heavy([(torch.full((3, 4, 4), n, dtype=torch.uint8), n % 2) for n in range(40)]), cache="ram", num_workers=2
    )
    assert events[0].startswith("a data worker failed (")
    assert events[0].endswith("data.num_workers 2 -> 0 for the cache")
    assert data.stored is not None
    assert len(data.stored[0].decoded.images) == 40


# ---- what a cache on disk is keyed by ------------------------------------------------------------------------------


def arrays(seed: int = 0) -> TensorDataset:
    numbers = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.rand(4, 3, 5, 5, generator=numbers), torch.tensor([0, 1, 0, 1]))


@pytest.mark.parametrize("make", [digits, arrays])
def test_data_in_memory_is_known_by_its_content(make: Callable[[], Any], top: Path) -> None:
    for text in ("decoded", "are taken from"):
        _, events = built(make(), classes=10)
        assert text in events[0]
    other = make()
    if isinstance(other, TensorDataset):
        other.tensors[0][0, 0, 0, 0] += 1
    else:
        other.images[3, 3, 3] ^= 1
    assert "decoded" in built(other, classes=10)[1][0]


@pytest.mark.parametrize(
    "data", [FakeData(4, (3, 8, 8), 2), Odd([(torch.zeros(3, 4, 4), 0)] * 4)], ids=["fakedata", "own"]
)
def test_what_cannot_be_known_is_refused_on_disk(data: Any, top: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot tell when a \w+ has changed.*use data.cache=ram"):
        built(data)
    assert built(data, cache="ram")[0].stored is not None


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_data_sets_that_transform_are_refused(cache: str, photos: Path, top: Path) -> None:
    with pytest.raises(ConfigError, match=r"changes its images itself \(transform, transforms\)"):
        built(ImageFolder(str(photos), transform=lambda image: image), cache=cache)
    assert built(ImageFolder(str(photos)), cache=cache)[0].stored is not None


class Inverted(Subset[Any]):
    """A part whose samples are others than those below."""

    def __getitem__(self, index: Any) -> Any:
        image, label = self.dataset[self.indices[index]]
        return ImageOps.invert(image), 1 - label

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


class Named(Subset[Any]):
    """A part with something of its own, and the samples below."""

    note = "mine"


def test_a_part_with_samples_of_its_own_is_not_the_data_set_below(photos: Path, top: Path) -> None:
    below = ImageFiles(photos)
    part = Inverted(below, list(range(len(below))))
    plain, found = built(below, cache="ram")[0], built(part, cache="ram")[0]
    assert found.stored is not None
    assert plain.stored is not None
    assert torch.equal(images(found), 255 - images(plain))
    assert (found.stored[0].decoded.labels == 1 - plain.stored[0].decoded.labels).all()
    with pytest.raises(ConfigError, match="cannot tell when a Inverted has changed"):
        built(part)
    assert built(Named(below, list(range(10))))[0].stored is not None


def test_no_folder_for_caches_is_a_mistake(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTIVE_TRAINER_CACHE", "")
    with pytest.raises(ConfigError, match="ADAPTIVE_TRAINER_CACHE is empty"):
        built(ImageFiles(photos))


@pytest.mark.parametrize("override", ["data.transforms=timm", "data.auto_augment=ra"])
def test_transforms_of_single_samples_are_refused(override: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"works on single images; use data.cache=none, or data.transforms=torchv"):
        Trainer(compose_config(["data.cache=ram", override]), output_dir=tmp_path).fit()


def test_a_rung_cannot_change_the_cache(tmp_path: Path) -> None:
    rungs = "ladder.rungs=[{name: x, overrides: ['data.cache=ram']}]"
    with pytest.raises(ConfigError, match=r"data\.cache cannot change on the way down"):
        Trainer(compose_config([rungs]), output_dir=tmp_path).fit()


# ---- several users -------------------------------------------------------------------------------------------------


@pytest.fixture
def shared(photos: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of disk caches that other users can come to, and `photos/` beside it."""
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        top.chmod(0o755)
        shutil.copytree(photos, top / "photos")
        monkeypatch.setenv("ADAPTIVE_TRAINER_CACHE", str(top / "cache"))
        yield top / "cache" / "images"
        for path in (top / "cache", *(top / "cache").rglob("*")):
            path.chmod(0o755)


@contextmanager
def another_user(*closed: Path, mode: int) -> Iterator[None]:
    """One whom `mode` keeps out of these folders: nobody, where the tests are run by root, who is never kept out."""
    for path in closed:
        path.chmod(mode)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


class Photos:
    """Image files whose code another user can read; it counts what is decoded."""

    def __init__(self, folder: Path) -> None:
        self.samples = [(str(path), number % 2) for number, path in enumerate(sorted(folder.rglob("*.png")))]
        self.decoded = SimpleNamespace(images=0)  # no plain data: what is cached does not depend on it

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        self.decoded.images += 1
        with Image.open(self.samples[index][0]) as image:
            return image.convert("RGB"), self.samples[index][1]


def test_another_users_cache_is_read_where_nothing_can_be_written(shared: Path) -> None:
    photos = Photos(shared.parent.parent / "photos")
    built(photos)
    [made] = [path for path in shared.iterdir() if path.is_dir()]
    umask = os.umask(0o022)
    os.umask(umask)
    assert made.stat().st_mode & 0o777 == 0o777 & ~umask, "readable to whom the umask lets in"
    made.chmod(0o755)
    made.with_suffix(".lock").chmod(0o444)
    with another_user(shared.parent, shared, mode=0o555):
        data, [event] = built(photos)
    assert data.stored is not None
    assert event == f"data.cache=disk: 10 images are taken from {made}"


def test_another_users_cache_that_cannot_be_read_is_no_end(shared: Path) -> None:
    photos = Photos(shared.parent.parent / "photos")
    built(photos)
    [made] = [path for path in shared.iterdir() if path.is_dir()]
    made.with_suffix(".lock").chmod(0o444)
    shared.chmod(0o1777)
    for closed in (made, shared, shared.parent):  # the cache, its folder, the folder of that
        with another_user(closed, mode=0o000):
            data, [event] = built(photos)
        closed.chmod(0o755)
        assert data.stored is None
        assert re.fullmatch(
            r"data.cache=disk is not used: .* cannot be written: \[Errno 13\] Permission denied: .* \(another user's\? "
            r"ADAPTIVE_TRAINER_CACHE=FOLDER names .*\); images are decoded anew in every epoch",
            event,
        )
    assert photos.decoded.images == 10, "known before anything is decoded"
    assert built(photos)[1] == [f"data.cache=disk: 10 images are taken from {made}"], "left as it was"


# ---- whole runs ----------------------------------------------------------------------------------------------------


TINY = (
    "model.name=mobilenetv3_small_050", "data.image_size=32", "trainer.epochs=2", "trainer.batch_size=2",
    "data=imagefolder", "data.num_workers=2", "device=cpu", "ladder=none",
)  # fmt: skip


def test_runs_with_a_cache_on_disk_and_in_memory_have_the_same_bits(
    launcher: Launcher, photos: Path, tmp_path: Path
) -> None:
    found, events = [], []
    for number, cache in enumerate(("disk", "disk", "ram", "ram")):
        env, out = {"ADAPTIVE_TRAINER_CACHE": str(tmp_path / "cache")}, tmp_path / str(number)
        settings = [*TINY, f"data.root={photos}", f"data.cache={cache}", f"output_dir={out}"]
        ended = launcher.run(*settings, folder=tmp_path / "work", env=env)
        assert ended.code == 0, ended.text
        content = torch.load(out / "checkpoints" / "last.pt", weights_only=False)
        found.append(torch.cat([value.flatten().double() for value in content["model"].values()]))
        events.append(ended.text)
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert ["are taken from" in text for text in events] == [False, True, False, False]


def test_a_disk_that_fills_up_meanwhile_is_no_end(launcher: Launcher, photos: Path, tmp_path: Path) -> None:
    for number in range(400):
        Image.new("RGB", (9, 9)).save(photos / "cat" / f"more-{number}.png")
    env = {"ADAPTIVE_TRAINER_CACHE": str(tmp_path / "cache")}
    settings = [*TINY, f"data.root={photos}", "data.cache=disk", f"output_dir={tmp_path / 'out'}"]
    settings += ["data.image_size=128", "trainer.batch_size=64", "trainer.epochs=1", "memory.limit=none"]
    ended = launcher.run(*settings, folder=tmp_path / "work", env=env, largest_file=16_000_000)
    assert ended.code == 0, ended.text
    assert "data.cache=disk is not used" in ended.text
    assert "File too large" in ended.text
    assert not [path for path in (tmp_path / "cache" / "images").iterdir() if path.is_dir()]


def test_the_stages_share_what_is_stored_for_the_largest(photos: Path, tmp_path: Path) -> None:
    stages = (
        "phases.stages=[{name: a, overrides: ['data.image_size=32']}, {name: b, overrides: ['data.image_size=64']}]"
    )
    settings = ["data=imagefolder", f"data.root={photos}", "data.cache=ram", "trainer.batch_size=4", "device=cpu"]
    settings += ["model.name=mobilenetv3_small_050", "data.num_workers=0", "ladder=none", stages]
    result = Trainer(compose_config(settings), output_dir=tmp_path / "out").fit()
    assert "stored at 73 x 73 pixels" in result.events[0]
    assert [stage["rung"] for stage in result.stages] == ["requested", "requested"]


def test_stages_cannot_differ_in_the_cache(tmp_path: Path) -> None:
    stages = "phases.stages=[{name: a}, {name: b, overrides: ['data.cache=ram']}]"
    with pytest.raises(ConfigError, match=r"stage 'b': data\.cache cannot change between stages"):
        Trainer(compose_config([stages]), output_dir=tmp_path).fit()


class Dies(ImageFiles):
    """Its data worker is killed, as the kernel does when memory is short."""

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index == 5 and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_killed_worker_is_one_fewer(photos: Path, tmp_path: Path) -> None:
    settings = ["data.cache=ram", "data.image_size=32", "trainer.batch_size=4", "data.num_workers=1", "device=cpu"]
    more = ["model.name=mobilenetv3_small_050", "ladder=none"]
    result = Trainer(compose_config([*settings, *more]), train_data=Dies(photos), output_dir=tmp_path / "out").fit()
    assert result.events[0].endswith("data.num_workers 1 -> 0 for the cache")
    assert "10 images decoded" in result.events[1]


def test_build_datasets_leaves_the_images_where_they_are() -> None:
    assert build_datasets(typed(compose_config(["data.cache=ram"]))).stored is None


def test_the_stored_images_are_not_copied(photos: Path, top: Path) -> None:
    data, _ = built(ImageFiles(photos))
    assert data.stored is not None
    base = data.stored[0].decoded.images
    while base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)


class Cropped(Dataset[Any]):
    """Files and settings that decide what becomes of them."""

    def __init__(self, box: tuple[int, ...] = (0, 0, 4, 4), names: dict[int, int] | None = None, **more: Any) -> None:
        self.samples = [("a.png", 0), ("b.png", 1)]
        self.box, self.names, self.loader = box, names or {0: 1}, more.get("loader", str)
        self.targets = np.array(more.get("targets", [0, 1]))

    def __len__(self) -> int:
        return 2


class Loads:
    """A loader with a setting."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, path: str) -> str:
        return path[: self.size]


def test_a_fingerprint_knows_the_settings_of_files() -> None:
    made = [
        Cropped(), Cropped((0, 0, 2, 2)), Cropped(names={0: 2}), Cropped(targets=[1, 0]), Cropped(loader=Loads(1)),
        Cropped(loader=Loads(2)), Cropped(loader=partial(str, 1)), Cropped(loader=partial(str, 2)),
        Cropped(loader=partial(str, errors="strict")), Cropped(loader=partial(str, errors=len)),
    ]  # fmt: skip
    keys = [b"".join(fingerprint(data, np.arange(2))) for data in (*made, Cropped())]
    assert len(set(keys)) == len(made)
    assert keys[-1] == keys[0]
    assert b" at 0x" not in b"".join(keys), "an address, which is another in every process"
    tree: dict[str, Any] = {"name": "animal"}
    tree["children"] = [{"name": "cat", "parent": tree}]
    endless = Cropped(names=tree)  # type: ignore[arg-type]
    assert b"itself" in b"".join(fingerprint(endless, np.arange(2)))


def test_a_fingerprint_tells_lists_and_settings_apart() -> None:
    class Held(Dataset[Any]):
        def __init__(self, targets: list[int], grey: bool) -> None:
            self.data, self.targets, self.grey = np.zeros((2, 4, 4, 3), np.uint8), targets, grey

        def __len__(self) -> int:
            return 2

    made = [Held([1, 11], False), Held([11, 1], False), Held([1, 11], True)]
    assert len({b"".join(fingerprint(data, np.arange(2))) for data in made}) == 3
