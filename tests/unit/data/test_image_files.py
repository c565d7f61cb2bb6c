"""Folders of images as people have them: photos that lie down, broken metadata, and what systems hide among them."""

from __future__ import annotations

import shutil
import struct
import warnings
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from adaptive_trainer import Trainer
from adaptive_trainer.config.overrides import compose_config, typed
from adaptive_trainer.config.schema import Config, DataConfig
from adaptive_trainer.data.cached import build as caching
from adaptive_trainer.data.cached.build import with_cache
from adaptive_trainer.data.cached.prefetch import Prefetcher
from adaptive_trainer.data.datasets import DataSets, build_datasets, described
from adaptive_trainer.data.images.files import ImageFiles
from adaptive_trainer.data.images.folders import check_folders, check_root
from adaptive_trainer.data.images.transforms import to_rgb
from adaptive_trainer.data.loader import Batch, Loader
from adaptive_trainer.errors import DataError

# What a camera stores for an upright scene, by the orientation it notes: the inverse of what makes it upright.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
FORMATS = ["jpg", "png", "webp", "tif", *(["avif"] if features.check("avif") else [])]
CPU = torch.device("cpu")


def scene() -> Image.Image:
    """Upright, 32 pixels wide and 16 high: red sky over green, with a blue corner at the top left."""
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :, 0] = pixels[8:, :, 1] = 250
    pixels[:8, :16] = (0, 0, 250)
    return Image.fromarray(pixels)


def photograph(path: Path, orientation: int, exif: bytes | None = None) -> None:
    turn = STORED[orientation]
    image = scene() if turn is None else scene().transpose(turn)
    about = Image.Exif()
    about[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, exif=about.tobytes() if exif is None else exif)


def is_upright(image: Tensor) -> bool:
    """Whether a square of the scene (3, S, S), not normalised, has its colours where they belong."""
    low, high = image.shape[-1] // 4, 3 * image.shape[-1] // 4
    corners = [image[:, y, x] for y, x in ((low, low), (low, high), (high, low), (high, high))]
    return [int(corner.argmax()) for corner in corners] == [2, 0, 1, 1]


def settings(root: Path, *overrides: str) -> Config:
    base = ["data=imagefolder", f"data.root={root}", "trainer.batch_size=2", "data.num_workers=0"]
    return typed(compose_config([*base, "data.mean=[0,0,0]", "data.std=[1,1,1]", *overrides]))


def evaluated(config: Config, train: Any = None, val: Any = None) -> list[Batch]:
    """The validation batches, by way of what the settings ask for."""
    data = build_datasets(config, train, val)
    if config.data.cache != "none":
        data = with_cache(data, 32, event=lambda text: None)
        return list(Prefetcher(data, batch_size=8, image_size=16, device=CPU).evaluate(8))
    with closing(Loader(data, batch_size=8, image_size=16, num_workers=0, pin_memory=False)) as loader:
        return list(loader.evaluate(8))


@pytest.mark.long
@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    "how",
    [[], ["data.transforms=timm"], ["data.transforms=none"], ["data.cache=ram"], ["data.cache=disk"]],
    ids=lambda how: "".join(how) or "none",
)
def test_photos_that_lie_down_are_turned_upright(
    suffix: str, how: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPTIVE_TRAINER_CACHE", str(tmp_path / "cache"))
    for orientation in STORED:
        photograph(tmp_path / "photos" / "val" / "cat" / f"{orientation}.{suffix}", orientation)
    photograph(tmp_path / "photos" / "val" / "dog" / f"1.{suffix}", 1)
    shutil.copytree(tmp_path / "photos" / "val", tmp_path / "photos" / "train")
    images = torch.cat([batch.images for batch in evaluated(settings(tmp_path / "photos", *how))])
    assert [is_upright(image) for image in images] == [True] * 9


def test_photos_of_other_data_sets_are_turned_once(tmp_path: Path) -> None:
    for orientation in STORED:
        photograph(tmp_path / "cat" / f"{orientation}.jpg", orientation)
    photograph(tmp_path / "dog" / "1.jpg", 1)
    theirs = ImageFolder(str(tmp_path))
    found = evaluated(typed(compose_config(["trainer.batch_size=2", "data.transforms=none"])), theirs, theirs)
    assert all(is_upright(image) for batch in found for image in batch.images)
    for orientation in STORED:
        with Image.open(tmp_path / "cat" / f"{orientation}.jpg") as image:
            assert to_rgb(to_rgb(image)).size == (32, 16)


def broken_exif() -> dict[str, bytes]:
    about = Image.Exif()
    about[0x0112], about[0x010E], about[0x011A] = 6, "a text", 72.0
    about.get_ifd(0x8769)[0x9003] = "2026:01:01 00:00:00"
    whole = about.tobytes()
    start = whole.index(b"MM") if b"MM" in whole else whole.index(b"II")
    order = ">" if whole[start : start + 2] == b"MM" else "<"
    entry = struct.pack(f"{order}HHI", 0x0112, 3, 1)
    assert entry in whole
    return {
        "cut": whole[: start + 20],
        "no head": whole[:start] + b"XXXX" + whole[start + 4 :],
        "far offset": whole[: start + 4] + b"\x7f\xff\xff\xff" + whole[start + 8 :],
        "no orientation": whole.replace(entry + struct.pack(f"{order}H", 6), entry + struct.pack(f"{order}H", 99)),
        "a text as orientation": whole.replace(entry, struct.pack(f"{order}HHI", 0x0112, 2, 1)),
        "many orientations": whole.replace(entry, struct.pack(f"{order}HHI", 0x0112, 3, 2**20)),
        "unknown type": whole.replace(entry, struct.pack(f"{order}HHI", 0x0112, 77, 1)),
        "rubbish": whole[: start + 8] + bytes(range(256)),
        "empty": whole[:start],
    }


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("kind", broken_exif())
def test_broken_exif_data_is_no_broken_image(kind: str, suffix: str, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        photograph(tmp_path / name / f"1.{suffix}", 1, broken_exif()[kind])
    files = ImageFiles(tmp_path)
    assert [files[index][0].mode for index in (0, 1)] == ["RGB", "RGB"]


@pytest.mark.parametrize("content", [b"P6\n3\xa3 2 255\n" + bytes(99), b"P6\nx", b"BM" + bytes(80), b"RIFF", b""])
def test_whatever_a_decoder_raises_is_a_broken_file(content: bytes, tmp_path: Path) -> None:
    photograph(tmp_path / "cat" / "1.png", 1)
    photograph(tmp_path / "dog" / "1.png", 1)
    (tmp_path / "dog" / "1.png").write_bytes(content)
    with pytest.raises(DataError, match=r"1\.png cannot be read"):
        evaluated(settings(tmp_path), ImageFiles(tmp_path), ImageFiles(tmp_path))


def test_stored_images_of_an_earlier_version_are_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTIVE_TRAINER_CACHE", str(tmp_path / "cache"))
    for name in ("cat", "dog"):
        photograph(tmp_path / "photos" / name / "1.png", 6)
    data = build_datasets(settings(tmp_path / "photos", "data.cache=disk", "trainer.batch_size=1"))
    with monkeypatch.context() as before:
        before.setattr(caching, "FORMAT", 1)  # of images that were not turned
        with_cache(data, 32, event=lambda text: None)
    with_cache(data, 32, event=lambda text: None)
    assert len(list((tmp_path / "cache" / "images").glob("*/head.json"))) == 2


HIDDEN = [
    "._01.jpg", ".ipynb_checkpoints/0-checkpoint.jpg", ".thumbnails/0.jpg", "@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg",
    "__MACOSX/._0.jpg", "__MACOSX/0.jpg", "Thumbs.db", "thumbs.db", "desktop.ini", ".DS_Store", "@__thumb/s800_0.jpg",
    "deep/down/.ipynb_checkpoints/0.jpg", "deep/@eaDir/0.jpg", "$RECYCLE.BIN/0.jpg", ".hidden/.more/0.jpg",
]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("place", ["inside a class", "beside the classes"])
@pytest.mark.parametrize("name", HIDDEN)
def test_what_is_hidden_is_left_out_and_counted(name: str, place: str, tmp_path: Path) -> None:
    for number in range(6):
        photograph(tmp_path / ("cat", "dog")[number % 2] / f"{number}.jpg", 1)
    is_inside = place == "inside a class" or name.startswith("deep")  # which would be a class without images
    hidden = (tmp_path / "cat" if is_inside else tmp_path) / name
    hidden.parent.mkdir(parents=True, exist_ok=True)
    hidden.write_bytes(
        b"\x00\x05\x16\x07 Mac OS X, not an image" if "._" in name else (tmp_path / "cat/0.jpg").read_bytes()
    )
    data = build_datasets(settings(tmp_path))
    assert (len(data.train) + len(data.val), data.classes) == (6, ("cat", "dog"))
    assert [text for text in described(data)[1] if "1 hidden files and folders are left out: 1 " in text]


def test_a_hidden_folder_makes_no_class_a_split(tmp_path: Path) -> None:
    for name in ("Bus", "Train"):
        photograph(tmp_path / name / "1.jpg", 1)
        photograph(tmp_path / name / ".ipynb_checkpoints" / "1.jpg", 1)
    assert ImageFiles(tmp_path).classes == ("Bus", "Train")
    assert build_datasets(settings(tmp_path, "trainer.batch_size=1")).classes == ("Bus", "Train")


def test_a_hidden_file_changes_no_cache_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTIVE_TRAINER_CACHE", str(tmp_path / "cache"))
    for name in ("cat", "dog"):
        photograph(tmp_path / "photos" / name / "1.png", 1)
    for _ in range(2):
        data = build_datasets(settings(tmp_path / "photos", "data.cache=disk", "trainer.batch_size=1"))
        with_cache(data, 32, event=lambda text: None)
        (tmp_path / "photos" / "cat" / "Thumbs.db").touch()
    assert len(list((tmp_path / "cache" / "images").glob("*/head.json"))) == 1


def test_a_folder_below_a_hidden_one_is_used(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        photograph(tmp_path / ".photos" / name / "1.png", 1)
    assert len(ImageFiles(tmp_path / ".photos")) == 2


ROOTS = [
    r"C:\Users\Ann\photos", "C:\\photos\\", r"\\server\share", "my\u00a0photos", "it's \"mine\"", "'", '"', "a\\'\"b",
    "tab\there", "new\nline", "\u200bzero", "\ud7ff", "é", "photos (1)", "a+b[c]", "{braces}", "${x}", "/", ".", "a/",
]  # fmt: skip


@pytest.mark.parametrize("root", ROOTS)
def test_a_root_is_used_whatever_its_letters(root: str) -> None:
    for node in (
        {"_target_": "adaptive_trainer.data.image_folder", "root": root},
        {"_target_": "mine.Photos", "nested": {"folders": ["elsewhere", f"{root.rstrip('/')}/train"]}},
    ):
        check_root(DataConfig(train=node, root=root))
        check_root(DataConfig(train={"_target_": "mine.Digits"}, val=node, root=root))


@pytest.mark.parametrize("root", ["data", "adaptive_trainer", "digits", "_target_", "root", "phot", "{", "'", ": "])
def test_a_root_that_nothing_uses_is_refused(root: str) -> None:
    train = {"_target_": "adaptive_trainer.data.digits", "root": "photos"}
    with pytest.raises(DataError, match="these settings take no data from there"):
        check_folders(DataConfig(train=train, root=root))


def test_a_folder_with_such_a_name_is_trained_on(tmp_path: Path) -> None:
    root = tmp_path / "my\u00a0'pho\\tos\" (1)"
    for number in range(8):
        photograph(root / ("cat", "dog")[number % 2] / f"{number}.jpg", 6)
    settings = ["data=imagefolder", "trainer.batch_size=2", "data.num_workers=0", "data.image_size=32", "ladder=none"]
    cfg = compose_config(settings)
    cfg.data.root, cfg.model.name = str(root), "test_resnet"
    assert Trainer(cfg, output_dir=tmp_path / "out").fit().outcome == "trained"


def loaded(data: Any, **how: Any) -> list[Batch]:
    """A pass over the data set, by way of what the settings ask for."""
    sets = DataSets(data, data, 2, ("cat", "dog"), DataConfig(num_workers=0, **how))
    if sets.config.cache != "none":
        sets = with_cache(sets, 16, event=lambda text: None)
        return list(Prefetcher(sets, batch_size=8, image_size=16, device=CPU).evaluate(8))
    with closing(Loader(sets, batch_size=8, image_size=16, num_workers=0, pin_memory=False)) as loader:
        return list(loader.evaluate(8))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("how", [{}, {"transforms": "timm"}, {"cache": "ram"}], ids=str)
@pytest.mark.parametrize("kind", [ImageFiles, ImageFolder])
@pytest.mark.parametrize("limit", [300, 400])  # below half of the image Pillow raises an error, above a warning
def test_images_above_the_pixel_limit_can_be_allowed(
    limit: int, kind: Any, how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cat", "dog"):
        photograph(tmp_path / name / "1.png", 1)
    (tmp_path / "dog" / "1.png").unlink()
    Image.new("RGB", (25, 28)).save(tmp_path / "dog" / "1.png")
    photographed = kind(str(tmp_path)) if kind is ImageFolder else kind(tmp_path)
    message = r"1\.png cannot be read \(.*512 pixels.*; make it smaller, allow it with data\.max_pixels=512, or use"
    with pytest.raises(DataError, match=message):
        loaded(photographed, max_pixels=511, **how)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match=r"allow it with data\.max_pixels=(512|700), or use data\.on_error=skip"):
        loaded(photographed, **{**how, "max_pixels": None if kind is ImageFolder else 511})
    assert [len(batch.labels) for batch in loaded(photographed, max_pixels=700, **how)] == [2]
    skipped = loaded(photographed, max_pixels=600, on_error="skip", **how)
    assert [batch.skipped for batch in skipped] == [[str(tmp_path / "dog" / "1.png")]]
    assert limit == Image.MAX_IMAGE_PIXELS


def test_images_that_pillow_only_warns_of_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photograph(tmp_path / "cat" / "1.png", 1)
    photograph(tmp_path / "dog" / "1.png", 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with warnings.catch_warnings(record=True) as said:
        warnings.resetwarnings()
        assert [len(batch.labels) for batch in loaded(ImageFiles(tmp_path))] == [2]
    assert said == []


GIVEN = {
    "floats to 255": (255 * torch.rand(3, 20, 20), r"floats from [\d.]+ to 25\d.*, which are taken to go from 0 to 1"),
    "dark floats": (torch.full((3, 20, 20), 40.0), "has floats from 40 to 40, which are taken"),
    "halves": (torch.full((1, 20, 20), 200.0, dtype=torch.float16), "has floats from 200 to 200"),
    "doubles": (torch.full((20, 20), 200.0, dtype=torch.float64), "has floats from 200 to 200"),
    "int64": (torch.full((3, 20, 20), 200), r"is a tensor of torch\.int64; give bytes \(torch\.uint8\), or floats"),
    "int32": (torch.zeros((3, 20, 20), dtype=torch.int32), r"is a tensor of torch\.int32"),
    "an array": (np.zeros((20, 20, 3), np.float32), "the image is ndarray; a PIL image or a tensor"),
    "mode F": (Image.fromarray(np.full((20, 20), 200, np.float32)), "its shades are numbers of 32 bits"),
}


class Given(Dataset[Any]):
    def __init__(self, image: Any) -> None:
        self.image = image

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.image, index


@pytest.mark.parametrize("how", [{}, {"transforms": "timm"}, {"cache": "ram"}, {"transforms": "none", "cache": "ram"}])
@pytest.mark.parametrize("kind", GIVEN)
def test_images_of_another_range_are_noticed(kind: str, how: dict[str, Any]) -> None:
    image, message = GIVEN[kind]
    with pytest.raises(DataError, match=f"^sample 0 .*{message}"):
        loaded(Given(image), **how)


@pytest.mark.parametrize(
    ("image", "how"),
    [
        (torch.rand(3, 20, 20), {}),
        (1.05 * torch.ones(3, 20, 20), {}),
        (torch.randn(3, 20, 20), {}),
        (200 * torch.ones(3, 20, 20), {"transforms": "none"}),
        (torch.zeros(3, 20, 20, dtype=torch.uint8), {}),
        (torch.ones(3, 20, 20, dtype=torch.bool), {}),
    ],
)
def test_images_of_a_range_that_is_meant_are_let_through(image: Any, how: dict[str, Any]) -> None:
    assert [len(batch.labels) for batch in loaded(Given(image), **how)] == [2]
