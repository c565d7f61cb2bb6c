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
        not_used: what else is there, hidden files aside, in words; empty where there is nothing.
    """

    def __init__(self, folder: Path) -> None:
        """Find the files.

        Raises:
            DataError: fewer than two classes, or a class without an image.
        """
        self.classes = class_folders(folder)
        found = [list(_files_in(str(folder / name))) for name in self.classes]
        files = [[path for path in paths if path.lower().endswith(IMAGE_FILES)] for paths in found]
        if empty := [name for name, paths in zip(self.classes, files, strict=True) if not paths]:
            raise DataError(
                f"{folder} has no images in {', '.join(empty)}; put some there ({' '.join(IMAGE_FILES)}) "
                "or remove the folder"
            )
        self.not_used = _not_used(folder, found)
        self.samples = [(path, label) for label, paths in enumerate(files) for path in paths]
        self.targets = [label for _, label in self.samples]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """An RGB image and its label."""
        path, label = self.samples[index]
        with Image.open(path) as image:
            return read_as_rgb(image), label


def _files_in(folder: str, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Files below a folder, and links that lead nowhere; no pipes or sockets, which would be waited for.

    What cannot be looked into is no folder without images.
    """
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link to a folder that it is in
        return
    with os.scandir(folder) as entries:
        every = sorted(entries, key=lambda entry: entry.name)
    folders = []
    for entry in every:
        if _is_folder(entry):
            folders.append(entry.path)
        elif os.path.isfile(entry.path) or not os.path.exists(entry.path):
            yield entry.path
    for path in folders:
        yield from _files_in(path, above | {here})


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a circle of links
        return False


def _not_used(folder: Path, found: list[list[str]]) -> str:
    names = [os.path.basename(path).lower() for paths in found for path in paths if not path.endswith(IMAGE_FILES)]
    kinds = Counter(os.path.splitext(n)[1] or n for n in names if not n.startswith(".") and not n.endswith(IMAGE_FILES))
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
    more = f" and {len(kinds) - 5} other kinds" if len(kinds) > 5 else ""
    return f"{folder} has files that are not used: {counts}{more}; images are {' '.join(IMAGE_FILES)}" if counts else ""


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
