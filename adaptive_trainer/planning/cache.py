"""Predictions, measurements and the like on disk: the second run of a recipe knows at once what the first found out.

Every entry is a small JSON file of its own, named by a digest of its key and put in place whole: two processes never
see half an entry, and a damaged or foreign file counts as absent and is written anew. Where nothing can be written
nothing is remembered; that is no error.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from adaptive_trainer.prediction.estimator import Prediction

Key = dict[str, Any]
PACKAGES = ("torch", "torchvision", "timm")


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one recipe came to on one card.

    Attributes:
        fits_in: the smallest room, in bytes for the allocator, in which it held; None: it never did.
        oom_in: the largest room in which it ran out of memory; None: it never did.
        peak_allocated, peak_reserved: bytes, of the last time it held.
    """

    fits_in: int | None = None
    oom_in: int | None = None
    peak_allocated: int | None = None
    peak_reserved: int | None = None

    def verdict(self, room: int) -> str:
        """ "fits" or "hopeless" in `room` bytes; "" where what was measured says neither."""
        if self.fits_in is not None and room >= self.fits_in:
            return "fits"
        return "hopeless" if self.oom_in is not None and room <= self.oom_in else ""

    def fitted(self, room: int, peak_allocated: int, peak_reserved: int) -> Measurement:
        """With the news that it held in `room` bytes; what contradicts it is forgotten."""
        fits_in = room if self.fits_in is None else min(room, self.fits_in)
        oom_in = None if self.oom_in is not None and self.oom_in >= room else self.oom_in
        return Measurement(fits_in, oom_in, peak_allocated, peak_reserved)

    def failed(self, room: int) -> Measurement:
        """With the news that it ran out of memory in `room` bytes; what contradicts it is forgotten."""
        oom_in = room if self.oom_in is None else max(room, self.oom_in)
        if self.fits_in is not None and self.fits_in <= room:
            return Measurement(None, oom_in)
        return Measurement(self.fits_in, oom_in, self.peak_allocated, self.peak_reserved)


class PlanCache:
    """Entries in a folder; None for a folder keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def prediction(self, key: Key) -> Prediction | None:
        """The prediction kept under the key. `seconds` is what it once took."""
        found = self._read("prediction", key)
        return None if found is None else _made(Prediction, found)

    def keep_prediction(self, key: Key, prediction: Prediction) -> None:
        """Keep a prediction under the key; not one that failed, for the failure may have been the machine's."""
        if not prediction.reason:
            self._write("prediction", key, asdict(prediction))

    def measurement(self, key: Key, card: str) -> Measurement:
        """What was measured of the recipe on the card so named; nothing, the first time."""
        found = self._read("measurement", {**key, "card": card})
        return (None if found is None else _made(Measurement, found)) or Measurement()

    def keep_measurement(self, key: Key, card: str, measurement: Measurement) -> None:
        """Replace what is known of the recipe on the card. Of two processes at once, the later is believed."""
        self._write("measurement", {**key, "card": card}, asdict(measurement))

    def takes_images(self, key: Key) -> bool:
        """Whether the network of the key has been seen to take images of the key's size."""
        return self._read("size", key) is not None

    def keep_takes_images(self, key: Key) -> None:
        """Keep that it does."""
        self._write("size", key, {})

    def context_bytes(self, card: str) -> int | None:
        """The least that was seen to be taken of the card outside the allocator: the CUDA context and its modules."""
        found = self._read("context", {"card": card, "torch": version("torch")})
        value = None if found is None else found.get("context_bytes")
        return value if isinstance(value, int) and value >= 0 else None

    def keep_context(self, card: str, context_bytes: int) -> None:
        """Keep what is taken of the card outside the allocator, if that is less than what is known.

        Other processes add to it, so the least is nearest to what a process of one's own takes.
        """
        context_bytes = min(context_bytes, self.context_bytes(card) or context_bytes)
        self._write("context", {"card": card, "torch": version("torch")}, {"context_bytes": context_bytes})

    def _path(self, kind: str, key: Key) -> Path | None:
        digest = hashlib.sha256(_text(key).encode()).hexdigest()[:32]
        return None if self.folder is None else self.folder / f"{kind}-{digest}.json"

    def _read(self, kind: str, key: Key) -> dict[str, Any] | None:
        path = self._path(kind, key)
        if path is None:
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(content, dict) or _text(content.get("key")) != _text(key):
            return None
        value = content.get("value")
        return value if isinstance(value, dict) else None

    def _write(self, kind: str, key: Key, value: dict[str, Any]) -> None:
        path = self._path(kind, key)
        if path is None:
            return
        part = ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
                part = file.name
                file.write(_text({"key": key, "value": value}))
            os.replace(part, path)
        except OSError:
            with suppress(OSError):
                os.unlink(part)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _made(kind: type[Any], fields: dict[str, Any]) -> Any:
    """A dataclass from what was read; None where the file holds something else."""
    known = fields.keys() == kind.__dataclass_fields__.keys()
    return kind(**fields) if known and all(_is_sound(name, value) for name, value in fields.items()) else None


def _is_sound(name: str, value: Any) -> bool:
    if name == "reason":
        return bool(value == "")  # what failed is not kept
    if name == "seconds":
        return isinstance(value, float) and math.isfinite(value)
    return value is None or (type(value) is int and value >= 0)


@cache
def versions() -> dict[str, str]:
    """Of everything whose change may change a prediction; of this package, a digest of its source."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).resolve().parent.parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return {**found, "adaptive_trainer": digest.hexdigest()[:32]}
