"""Predictions, measurements and the like on disk: the second run of a recipe knows at once what the first found out.

Every entry is a small JSON file of its own, named by a digest of its key.
"""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from adaptive_trainer.prediction.estimator import Prediction, Verdict
from adaptive_trainer.utils.files import write_whole

Key = dict[str, Any]
PACKAGES = ("torch", "torchvision", "timm")


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one recipe came to on one card.

    Attributes:
        fits_in: the smallest room, in bytes for the allocator, in which it fitted; None: it never did.
        oom_in: the largest room in which it ran out of memory; None: it never did.
        peak_allocated, peak_reserved: bytes, of the last time it fitted.
    """

    fits_in: int | None = None
    oom_in: int | None = None
    peak_allocated: int | None = None
    peak_reserved: int | None = None

    def verdict(self, room: int) -> Verdict:
        """Whether it fits in `room` bytes; unknown where what was measured does not say."""
        if self.fits_in is not None and room >= self.fits_in:
            return Verdict.FITS
        return Verdict.HOPELESS if self.oom_in is not None and room <= self.oom_in else Verdict.UNKNOWN

    def fitted(self, room: int, peak_allocated: int, peak_reserved: int) -> Measurement:
        """Add that it fitted in `room` bytes."""
        fits_in = room if self.fits_in is None else min(room, self.fits_in)
        # Another process may have held memory when it failed in more: the later finding is believed.
        oom_in = None if self.oom_in is not None and self.oom_in >= room else self.oom_in
        return Measurement(fits_in, oom_in, peak_allocated, peak_reserved)

    def failed(self, room: int) -> Measurement:
        """Add that it ran out of memory in `room` bytes."""
        oom_in = room if self.oom_in is None else max(room, self.oom_in)
        if self.fits_in is not None and self.fits_in <= room:  # the later finding is believed here too
            return Measurement(None, oom_in)
        return Measurement(self.fits_in, oom_in, self.peak_allocated, self.peak_reserved)


@dataclass(frozen=True, slots=True)
class Size:
    """That a network was seen to take images of a size."""


@dataclass(frozen=True, slots=True)
class Context:
    """The least that was seen to be taken of a card outside the allocator: the CUDA context and its modules."""

    context_bytes: int


Entry = TypeVar("Entry", Prediction, Measurement, Size, Context)


class PlanCache:
    """Entries in a folder; None for a folder keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, kind: type[Entry], key: Key) -> Entry | None:
        """The entry of this kind that is kept under the key."""
        if self.folder is None:
            return None
        try:
            content = json.loads(self._path(self.folder, kind, key).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):  # damaged: as if it were not there, and written anew
            return None
        # The key is kept in full, for two may have the same digest, or one be written by another version.
        if not isinstance(content, dict) or _text(content.get("key")) != _text(key):
            return None
        value = content.get("value")  # of a foreign file, of any kind
        if not isinstance(value, dict) or value.keys() != {field.name for field in fields(kind)}:
            return None
        return kind(**value) if all(map(_is_sound, value, value.values())) else None

    def keep(self, key: Key, entry: Entry) -> None:
        """Keep an entry under the key. Of two processes at once, the later is believed."""
        has_failed = isinstance(entry, Prediction) and entry.reason  # which may have been the machine's failure
        if self.folder is None or has_failed:
            return
        with suppress(OSError):  # a full or read-only disk costs time in the next run, and nothing else
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._path(self.folder, type(entry), key), _text({"key": key, "value": asdict(entry)}))

    def context_bytes(self, card: str) -> int | None:
        """What was seen to be taken of the card outside the allocator."""
        found = self.get(Context, _of_card(card))
        return None if found is None else found.context_bytes

    def keep_context(self, card: str, context_bytes: int) -> None:
        """Keep what is taken of the card outside the allocator, if that is less than what is known."""
        # Other processes add to it, so the least is nearest to what a process of one's own takes.
        self.keep(_of_card(card), Context(min(context_bytes, self.context_bytes(card) or context_bytes)))

    def _path(self, folder: Path, kind: type[Any], key: Key) -> Path:
        digest = hashlib.sha256(_text(key).encode()).hexdigest()[:32]
        return folder / f"{kind.__name__.lower()}-{digest}.json"


def _of_card(card: str) -> Key:
    return {"card": card, "torch": version("torch")}  # each version brings kernels of its own, in the context


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _is_sound(name: str, value: Any) -> bool:
    if name in ("reason", "plan"):
        return bool(value == "")  # what failed is not kept, and the key has the plan
    if name == "seconds":
        return isinstance(value, float) and math.isfinite(value)
    return value is None or (type(value) is int and value >= 0)


@cache
def versions() -> dict[str, str]:
    """Everything whose change may change a prediction."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    digest = hashlib.sha256()  # who changes the source is not asked to think of a version
    for path in sorted(Path(__file__).resolve().parent.parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return {**found, "adaptive_trainer": digest.hexdigest()[:32]}
