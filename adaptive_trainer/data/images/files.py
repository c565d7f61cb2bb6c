"""Image files in one folder a class."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from adaptive_trainer import oom
from adaptive_trainer.data.images.folders import beside_splits, class_folders, is_hidden, photo_or_folder, split_folder
from adaptive_trainer.data.images.transforms import TOO_LARGE, read_as_rgb
from adaptive_trainer.errors import DataError

IMAGE_FILES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
WITH_PLUGIN = (".heic", ".heif", ".avif")  # read where Pillow can: by itself, or by a plugin that is registered


class ImageFiles(Dataset[tuple[Image.Image, int]]):
    """Image files in one folder a class: FOLDER/CLASS/.../image.jpg.

    Attributes:
        classes: names of the folders, sorted; hidden ones are left out.
        samples: (path, label) of every image.
    """

    def __init__(self, folder: Path, classes: tuple[str, ...] | None = None, beside: Sequence[str] = ()) -> None:
        """Find the files.

        Args:
            classes: of the training set, for a validation set, which may lack some; None: those that have folders.
            beside: names of folders beside this one that are not used.

        Raises:
            DataError: fewer than two classes, or a class without an image.
        """
        self.classes = class_folders(folder) if classes is None else classes
        top = frozenset([os.path.realpath(folder)])
        hidden = [path.name for path in folder.iterdir() if is_hidden(path.name, path.is_dir())]
        others: list[str] = []
        files: list[list[str]] = []
        for path in (folder / name for name in self.classes):
            found = list(_files_in(str(path), top, hidden)) if path.is_dir() else []
            files.append([name for name in found if _is_image(name)])
            others += [os.path.basename(name).lower() for name in found if not _is_image(name)]
        empty = [name for name, paths in zip(self.classes, files, strict=True) if not paths]
        if empty and classes is None:
            raise DataError(
                f"{folder} has no images in {', '.join(empty)}; put some there ({' '.join(_suffixes())}) "
                "or remove the folder"
            )
        # counters, since the fingerprint of the images leaves them out
        self._others = Counter(os.path.splitext(name)[1] or name for name in others)
        self._hidden = Counter("._*" if name.startswith("._") else name for name in hidden)
        self._beside = Counter(beside)
        self.samples = [(path, label) for label, paths in enumerate(files) for path in paths]
        self.targets = [label for _, label in self.samples]

    @property
    def not_used(self) -> list[str]:
        """What else is there, in words."""
        found = []
        if self._others:
            found.append(f"{_counted(self._others)} are not used: images are {' '.join(_suffixes())}")
        if self._hidden:
            found.append(f"{self._hidden.total()} hidden files and folders are left out: {_counted(self._hidden)}")
        if self._beside:
            found.append(f"beside the training images, nothing uses the folders {', '.join(self._beside)}")
        return found

    def __len__(self) -> int:
        """Number of images."""
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """An upright RGB image and its label; an OSError where the file is broken."""
        path, label = self.samples[index]
        return read_image(path), label


class Photos(Dataset[tuple[Image.Image, int]]):
    """Image files without labels, wherever they lie.

    Attributes:
        samples: (path, 0) of every image; the 0 stands for the label that there is not.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self.samples = [(path, 0) for path in dict.fromkeys(paths)]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """An upright RGB image and 0; an OSError where the file is broken."""
        path, label = self.samples[index]
        return read_image(path), label


def read_image(path: str) -> Image.Image:
    """An upright RGB image from a file; an OSError where it is broken."""
    try:
        with warnings.catch_warnings():
            # Data beside the pixels may be broken, and a large image can be read.
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
            warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning, append=True)
            with Image.open(path) as image:
                return read_as_rgb(image)
    except (OSError, *TOO_LARGE):
        raise
    except Exception as error:  # Pillow's decoders raise every kind of error for a broken file
        if oom.describe(error).kind is not oom.Kind.OTHER:
            raise
        problem = f"{type(error).__name__}: {error}"
    raise UnidentifiedImageError(problem)


def find_photos(place: str | Path) -> list[str]:
    """The path of every image in a folder and the folders within, sorted folder by folder; or of a single file.

    Raises:
        DataError: there is no such file or folder, or there are no images in it.
    """
    top = photo_or_folder(place)
    if not top.is_dir():
        return [str(top)]
    found = [name for name in _files_in(str(top), frozenset(), []) if _is_image(name)]
    if not found:
        raise DataError(f"{place} has no images ({' '.join(_suffixes())}); give a photo, or a folder of photos")
    return found


def _is_image(name: str) -> bool:
    name = name.lower()
    # Pillow is asked only where it has to be: to answer, it imports all of its formats
    return name.endswith(IMAGE_FILES) or (name.endswith(WITH_PLUGIN) and name.endswith(_suffixes()))


def _suffixes() -> tuple[str, ...]:
    known = Image.registered_extensions()
    return (*IMAGE_FILES, *(suffix for suffix in WITH_PLUGIN if suffix in known))


def _files_in(folder: str, above: frozenset[str], hidden: list[str]) -> Iterator[str]:
    """Files below a folder, and links that lead nowhere; names of what is hidden are added to `hidden`."""
    here = os.path.realpath(folder)
    if here in above:  # a link to a folder that it is in
        return
    with os.scandir(folder) as entries:
        every = sorted(entries, key=lambda entry: entry.name)
    folders = []
    for entry in every:
        is_folder, is_file = _kind(entry)
        if is_hidden(entry.name, is_folder):
            hidden.append(entry.name)
        elif is_folder:
            folders.append(entry.path)
        elif is_file or not os.path.exists(entry.path):  # no pipes or sockets, which would be waited for
            yield entry.path
    for path in folders:
        yield from _files_in(path, above | {here}, hidden)


def _kind(entry: os.DirEntry[str]) -> tuple[bool, bool]:
    try:
        # the folder knows, unless it is a link: millions of files are not looked at one by one
        return entry.is_dir(), entry.is_file()
    except OSError:  # a circle of links
        return False, False


def _counted(found: Counter[str]) -> str:
    counts = ", ".join(f"{count} {kind}" for kind, count in found.most_common(5))
    return f"{counts} and {len(found) - 5} other kinds" if len(found) > 5 else counts


def image_folder(root: str | None, split: str = "train") -> ImageFiles | None:
    """Images sorted into folders, one a class: ROOT/CLASS/image.jpg, or ROOT/train/CLASS/... and ROOT/val/CLASS/...

    Args:
        split: `train` (also found as `training`), `val` (also `valid` or `validation`) or `test` (also `testing`), in
            whatever case. None comes back for `val` and `test` where there is no such folder. There, classes without
            images are no mistake.

    Raises:
        DataError: a folder is missing, has fewer than two classes, or a class without an image.
    """
    folder, train = split_folder(root, split), split_folder(root, "train")
    if folder is None or train is None or split == "train":
        return None if folder is None else ImageFiles(folder, beside=beside_splits(str(root)))
    classes, own = class_folders(train), class_folders(folder, least=1)
    return ImageFiles(folder, classes if set(own) <= set(classes) else own)
