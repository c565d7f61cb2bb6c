"""Names in plots: in a font that has their letters, or as numbers where no installed font does."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cache

from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

USUAL = "DejaVu Sans"  # which comes with matplotlib
BOXES = "Last Resort"  # so does this one, which draws a box for every letter


def writable(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names as they can be written, and the fonts to write them in.

    Where no font has all the letters, the names are their numbers from 1.
    """
    needed = frozenset(map(ord, "".join(names))) - _letters(findfont(FontProperties(family=USUAL)))
    if not needed:
        return [*names], [USUAL]
    font = _font_with(needed)
    if font is None:
        return [str(number) for number, _ in enumerate(names, start=1)], [USUAL]
    return [*names], [USUAL, font]


@cache
def _font_with(letters: frozenset[int]) -> str | None:
    """The family of an installed font with these letters; None where there is none."""
    for entry in fontManager.ttflist:
        if entry.name.startswith(BOXES):
            continue
        # matplotlib finds a font by its family and style: another style of the family may have fewer letters
        if letters <= _letters(entry.fname) and letters <= _letters(findfont(FontProperties(family=entry.name))):
            return str(entry.name)
    return None


@cache
def _letters(path: str) -> frozenset[int]:
    """The code points that a font can draw; none of a font that cannot be read, or is made of pictures."""
    with suppress(OSError, RuntimeError):  # removed since matplotlib has listed it; of a kind that it cannot read
        font = get_font(path)
        return frozenset(font.get_charmap()) if font.scalable else frozenset()
    return frozenset()
