"""Names in plots are written in a font that has their letters, or as numbers. A warning of matplotlib fails a test."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.font_manager import FontProperties, findfont

from adaptive_trainer.report import plots
from adaptive_trainer.report.fonts import USUAL, _letters, writable

UNASSIGNED = "\U000e0fff"  # which no font has


def test_usual_letters_take_the_usual_font() -> None:
    assert writable(["cat", "Äpfel", "собака"]) == (["cat", "Äpfel", "собака"], [USUAL])


def test_other_letters_take_another_font() -> None:
    usual, other = (_letters(findfont(FontProperties(family=family))) for family in (USUAL, "STIXGeneral"))
    letter = chr(min(other - usual))
    names, fonts = writable(["cat", letter])
    assert names == ["cat", letter]
    assert fonts[0] == USUAL
    assert ord(letter) in _letters(findfont(FontProperties(family=fonts[1])))
    drawn(["cat", letter])


def test_letters_that_no_font_has_become_numbers() -> None:
    assert writable(["cat", UNASSIGNED]) == (["1", "2"], [USUAL])
    drawn(["cat", UNASSIGNED])


def drawn(names: list[str]) -> None:
    figure = plots.confusion(np.eye(2, dtype=int), names)
    figure.savefig(io.BytesIO(), format="png")
