"""Small files written whole or not at all, JSON and CSV for them, and what is said where the disk refuses."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from adaptive_trainer.errors import UserError, remedy

__all__ = ["append", "as_csv", "as_json", "refused_by_disk", "write_whole"]


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file by way of a temporary name, so that no reader meets half of it, nor is half of it left."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink()


def append(path: Path, text: str) -> None:
    """Add whole lines to a text file; where they cannot be written whole, the file is as it was."""
    with path.open("ab") as file:
        before = file.tell()
        try:
            file.write(text.encode())
            file.flush()
        except OSError:
            file.truncate(before)
            raise


@contextmanager
def refused_by_disk(kind: type[UserError], what: str) -> Iterator[None]:
    """Raise `kind` for an OSError of the block: what cannot be done, why, and what to do."""
    problem = ""
    try:
        yield
    except OSError as error:
        problem = f"{error}. {remedy(error)}"
    if problem:
        raise kind(f"{what}: {problem}")


def as_csv(rows: Sequence[dict[str, Any]], *, with_header: bool = True) -> str:
    """CSV of rows with the keys of the first."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    if with_header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON of plain data; a number that is not finite, which JSON does not have, is null."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False, default=str)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
