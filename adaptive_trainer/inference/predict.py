"""Predictions for photos: what each shows, by a trained network; streamed into predictions.csv and predictions.json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from adaptive_trainer.data.images.files import Photos, find_photos
from adaptive_trainer.errors import ConfigError
from adaptive_trainer.inference.passes import Passes
from adaptive_trainer.utils.files import as_csv, as_json, refused_by_disk, replacing

TOP = 5  # classes that are named for each photo
DIGITS = 6  # of a probability in files
CSV, JSON = "predictions.csv", "predictions.json"


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a photo shows.

    Attributes:
        path: of the photo.
        classes: the likeliest ones, five at the most, the likeliest first; empty where the file cannot be read.
        probabilities: theirs; those of all classes sum to 1.
    """

    path: str
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()


def photos_of(paths: str | Path | Iterable[str | Path]) -> Photos:
    """The photos that a file, a folder, or a list of files and folders stands for.

    Raises:
        DataError: one does not exist, or a folder has no images.
    """
    places: Iterable[str | Path] = [paths] if isinstance(paths, str | Path) else paths
    return Photos(chain.from_iterable(map(find_photos, places)))


def predictions(passes: Passes, photos: Photos, classes: Sequence[str]) -> Iterator[Prediction]:
    """What each photo shows, in order."""
    for part in passes.run(photos, "prediction:"):
        found = part.scores.softmax(1).topk(min(TOP, len(classes)))
        rows = {place: Prediction(photos.samples[place][0]) for place in part.skipped}
        for place, shares, numbers in zip(part.places, found.values.tolist(), found.indices.tolist(), strict=True):
            names = tuple(classes[number] for number in numbers)
            rows[place] = Prediction(photos.samples[place][0], names, tuple(shares))
        yield from (rows[place] for place in sorted(rows))


class Files:
    """predictions.csv and predictions.json, which appear whole when the block ends without an error.

    Raises:
        ConfigError: the folder cannot be written.
    """

    def __init__(self, folder: Path, model: Path, count: int) -> None:
        """Args: `model` is named in the JSON; `count` classes are named for each photo."""
        self._folder, self._model, self._count = folder, model, count
        self._stack = ExitStack()
        self._files: list[BinaryIO] = []
        self._is_first = True

    def __enter__(self) -> Files:
        """Begin."""
        with self._writing():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._files = [self._stack.enter_context(replacing(self._folder / name)) for name in (CSV, JSON)]
            # by the byte order mark Excel knows that it is UTF-8
            self._write("\ufeff", f'{{"model": {as_json(str(self._model))}, "predictions": [')
        return self

    def add(self, found: Prediction) -> None:
        """Append a photo."""
        shares = [round(each, DIGITS) for each in found.probabilities]
        row: dict[str, Any] = {"path": found.path}
        for place in range(self._count):
            known = place < len(shares)
            row[f"class_{place + 1}"] = found.classes[place] if known else ""
            row[f"probability_{place + 1}"] = shares[place] if known else ""
        content = as_json({"path": found.path, "classes": found.classes, "probabilities": shares})
        with self._writing():
            self._write(as_csv([row], with_header=self._is_first), f"{'' if self._is_first else ','}\n{content}")
        self._is_first = False

    def __exit__(self, *error: Any) -> None:
        """Put the files in their place, unless there was an error."""
        with self._writing():
            if error[0] is None:
                self._write("", "\n]}\n")
            self._stack.__exit__(*error)

    def _write(self, *texts: str) -> None:
        for file, text in zip(self._files, texts, strict=True):
            file.write(text.encode("utf-8", "surrogateescape"))  # names of files may hold bytes that are no text

    def _writing(self) -> AbstractContextManager[None]:
        return refused_by_disk(ConfigError, f"cannot write predictions in {self._folder}")
