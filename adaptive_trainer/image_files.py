"""Image files in one folder a class."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset

from adaptive_trainer.errors import DataError
from adaptive_trainer.folders import class_folders, split_folder
from adaptive_trainer.transforms import read_as_rgb

__all__ = ["ImageFiles", "image_folder"]

IMAGE_FILES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class ImageFiles(Dataset[tuple[Image.Image, int]]):
    """Image files in one folder a class: FOLDER/CLASS/.../image.jpg.

    Attributes:
        classes: names of the folders, sorted; hidden ones are left out.
        samples: (path, label) of every image.
    """

    def __init__(self, folder: Path) -> None:
        """Find the files.

        Raises:
            DataError: fewer than two classes, or a class without an image.
        """
        self.classes = class_folders(folder)
        top = frozenset([_identity(str(folder))])
        found = [list(_files_in(str(folder / name), top)) for name in self.classes]
        files = [[path for path in paths if path.lower().endswith(IMAGE_FILES)] for paths in found]
        if empty := [name for name, paths in zip(self.classes, files, strict=True) if not paths]:
            raise DataError(
                f"{folder} has no images in {', '.join(empty)}; put some there ({' '.join(IMAGE_FILES)}) "
                "or remove the folder"
            )
        self._others = _others(found)
        self.samples = [(path, label) for label, paths in enumerate(files) for path in paths]
        self.targets = [label for _, label in self.samples]

    @property
    def not_used(self) -> str:
        """What else is there, hidden files aside, in words; empty where there is nothing."""
        counts = ", ".join(f"{count} {kind}" for kind, count in self._others.most_common(5))
        more = f" and {len(self._others) - 5} other kinds" if len(self._others) > 5 else ""
        return f"{counts}{more} are not used: images are {' '.join(IMAGE_FILES)}" if counts else ""

    def __len__(self) -> int:
        """Number of images."""
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """An RGB image and its label."""
        path, label = self.samples[index]
        with Image.open(path) as image:
            return read_as_rgb(image), label


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _files_in(folder: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Files below a folder, and links that lead nowhere; no pipes or sockets, which would be waited for.

    What cannot be looked into is no folder without images.
    """
    here = _identity(folder)
    if here in above:  # a link to a folder that it is in
        return
    with os.scandir(folder) as entries:
        every = sorted(entries, key=lambda entry: entry.name)
    folders = []
    for entry in every:
        is_folder, is_file = _kind(entry)
        if is_folder:
            folders.append(entry.path)
        elif is_file or not os.path.exists(entry.path):
            yield entry.path
    for path in folders:
        yield from _files_in(path, above | {here})


def _kind(entry: os.DirEntry[str]) -> tuple[bool, bool]:
    """Whether it is a folder, and whether it is a file, which takes no look at the file itself but for links."""
    try:
        return entry.is_dir(), entry.is_file()
    except OSError:  # a circle of links
        return False, False


def _others(found: list[list[str]]) -> Counter[str]:
    """How many files of which suffix, or name, are no images."""
    paths = [path for paths in found for path in paths if not path.lower().endswith(IMAGE_FILES)]
    names = [os.path.basename(path).lower() for path in paths]
    return Counter(os.path.splitext(name)[1] or name for name in names if not name.startswith("."))


def image_folder(root: str | None, split: str = "train") -> ImageFiles | None:
    """Images sorted into folders, one a class: ROOT/CLASS/image.jpg, or ROOT/train/CLASS/... and ROOT/val/CLASS/...

    Args:
        root: the folder.
        split: `train` (also found as `training`) or `val` (also `valid` or `validation`), in whatever case. None comes
            back for `val` where there is no such folder: it is then split from the training images.

    Raises:
        DataError: a folder is missing, has fewer than two classes, or a class without an image.
    """
    folder = split_folder(root, split)
    return None if folder is None else ImageFiles(folder)
