"""Where a folder of images has its splits and classes; without torch, so that a wrong folder is refused at once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from adaptive_trainer.config.schema import DIGITS, DataConfig
from adaptive_trainer.errors import DataError

TARGET = "adaptive_trainer.data.image_folder"  # what `data=imagefolder` calls with `root` and `split`
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
# in whatever case, where they have folders: a class may be a Train
ALIKE = SPLITS | {"train": ("train", "training"), "test": ("test", "testing")}
# What systems and programs leave beside photos without a dot in front: copies, thumbnails, settings, rubbish bins.
HIDDEN = (
    "@__thumb", "@eadir", "@recently-snapshot", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "lost+found",
    "system volume information", "desktop.ini", "ehthumbs.db", "thumbs.db", "icon\r",
)  # fmt: skip


def is_hidden(name: str, is_folder: bool) -> bool:
    """Whether a file or folder is left out, at whatever depth: a system hides it, or a program keeps its own there."""
    return name.startswith(".") or name.lower() in HIDDEN or (is_folder and name.startswith("__"))


def check_folders(data: DataConfig) -> None:
    """Raise a DataError for folders of images that cannot be trained on, as far as a look at their classes tells."""
    check_root(data)
    for node in (data.train, data.val or {}, data.test or {}):
        if node.get("_target_") == TARGET:
            with suppress(OSError):  # the data set explains what cannot be looked at
                folder = split_folder(node.get("root"), node.get("split", "train"))
                if folder is not None:
                    class_folders(folder, least=2 if node.get("split", "train") == "train" else 1)


def check_root(data: DataConfig) -> None:
    """Raise a DataError for a folder that is named where nothing uses it."""
    if data.root is None:
        return
    named = re.compile(rf"(?<!\w){re.escape(data.root.rstrip('/'))}(?!\w)")  # or a folder within
    if not any(named.search(text) for text in _texts([data.train, data.val])):
        raise DataError(
            f"data.root={data.root} is named, and these settings take no data from there; "
            "add data=imagefolder for a folder of images"
        )


def _texts(node: Any) -> Iterator[str]:
    """Yield the texts in a node and in what is within it, but for the names of what is called."""
    if isinstance(node, dict):
        node = [value for key, value in node.items() if key != "_target_"]
    if isinstance(node, list | tuple):
        for value in node:
            yield from _texts(value)
    elif node is not None:
        yield str(node)


def split_folder(root: str | None, split: str) -> Path | None:
    """The folder of a split; None for `val` and `test` where there is none. A missing root is a DataError."""
    if split not in SPLITS:
        raise DataError(f"split={split} of a folder of images is neither {' nor '.join(SPLITS)}")
    if not root:
        raise DataError("data.root has no value; give the folder of your images: data.root=FOLDER")
    top = Path(root).expanduser()
    if not top.is_dir():
        raise DataError(f"data.root={root} is no folder; give one with ROOT/CLASS/image.jpg")
    train = _split_in(top, "train")
    if split == "train":
        return train or top
    return None if train is None else _split_in(top, split)


def photo_or_folder(place: str | Path) -> Path:
    """The path of a photo, or of a folder of photos.

    Raises:
        DataError: there is none.
    """
    top = Path(place).expanduser()
    if not top.exists():
        raise DataError(f"{place} is neither a file nor a folder; give a photo, or a folder of photos")
    return top


def evaluates_folder(data: DataConfig) -> bool:
    """Whether `task=evaluate` takes the images below `data.root`; any other data set has a root of its own kind."""
    return bool(data.root) and data.train.get("_target_") in (TARGET, DIGITS)


def evaluation_folder(root: str | Path, classes: Sequence[str]) -> Path:
    """The folder of images to evaluate on: the one of the test split, else of validation, else the root itself.

    Args:
        classes: of the network; a folder with the name of one is no split.

    Raises:
        DataError: the root is no folder.
    """
    top = Path(root).expanduser()
    if not top.is_dir():
        raise DataError(f"{root} is no folder; give one with ROOT/CLASS/image.jpg, or ROOT/test/CLASS/image.jpg")
    found = [folder for split in ("test", "val") if (folder := _split_in(top, split)) and folder.name not in classes]
    return found[0] if found else top


def _split_in(top: Path, split: str) -> Path | None:
    for name in SPLITS[split]:
        if (top / name).is_dir():
            return top / name
    for path in sorted(top.iterdir()):
        if path.name.lower() in ALIKE[split] and path.is_dir() and _shown_folders(path):
            return path
    return None


def _shown_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name, True))


def beside_splits(root: str) -> list[str]:
    """The names of folders beside those of the splits, which nothing uses; none where there is no `train`."""
    top = Path(root).expanduser()
    used = [folder for folder in (split_folder(root, split) for split in SPLITS) if folder]
    return [] if top in used else [name for name in _shown_folders(top) if top / name not in used]


def class_folders(folder: Path, least: int = 2) -> tuple[str, ...]:
    """The names of the classes, sorted, without hidden folders; fewer than `least` are a DataError."""
    names = _shown_folders(folder)
    if len(names) < least:
        found = f"one class folder, {names[0]}" if names else "no class folders"
        needed = "two or more are" if least > 1 else "one for each class is"
        raise DataError(f"{folder} has {found}; {needed} needed, each with images: CLASS/image.jpg")
    return tuple(names)
