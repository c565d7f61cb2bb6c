"""Tables that fit the screen."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from textwrap import wrap

from adaptive_trainer.utils.screen import width


def table(rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,), columns: int | None = None) -> str:
    """Rows as lines that fit; the first row is the head, and the last column is text of any length.

    Args:
        left: the columns that are aligned to the left; the others but the last are figures.
        columns: of the screen, if not those of `width`.
    """
    room = columns or width()
    cells = [row[:-1] for row in rows]
    heads = [[head] for head in cells[0]]
    if _total(_widths(cells)) > room:  # heads are longer than their figures
        heads = [head.split() or [""] for head in cells[0]]
    tall = max(map(len, heads))
    above = [[head[-tall + n] if len(head) >= tall - n else "" for head in heads] for n in range(tall)]
    widths = _widths([*above, *cells[1:]])
    if _total(widths) > room:  # a terminal would break lines anywhere, and no column would be seen
        return "\n".join(_sentence(rows[0], row, room) for row in rows[1:])
    lines = [_aligned(line, widths, left) for line in above]
    lines[-1] = _with_text(lines[-1], rows[0][-1], room)
    lines += [_with_text(_aligned(row[:-1], widths, left), row[-1], room) for row in rows[1:]]
    return "\n".join(lines)


def html(rows: Sequence[Sequence[object]]) -> str:
    """Rows as a table for notebooks; the first row is the head, and None an empty cell."""
    kinds = ["th", *(["td"] * (len(rows) - 1))]
    lines = (
        "".join(f"<{kind}>{'' if cell is None else escape(str(cell))}</{kind}>" for cell in row)
        for kind, row in zip(kinds, rows, strict=True)
    )
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _widths(cells: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*cells, strict=True)]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + 2 * (len(widths) - 1)


def _aligned(row: Sequence[str], widths: Sequence[int], left: Sequence[int]) -> str:
    sized = enumerate(zip(row, widths, strict=True))
    return "  ".join(cell.ljust(size) if number in left else cell.rjust(size) for number, (cell, size) in sized)


def _with_text(line: str, text: str, room: int) -> str:
    if len(line) + 2 + len(text) <= room:
        return f"{line}  {text}".rstrip()
    return "\n".join([line.rstrip(), *_indented(text, room)])


def _sentence(head: Sequence[str], row: Sequence[str], room: int) -> str:
    about = ", ".join(f"{name} {cell}".strip() for name, cell in zip(head[1:-1], row[1:-1], strict=True))
    return "\n".join([f"{row[0]}:", *_indented(about, room), *_indented(row[-1], room)])


def _indented(text: str, room: int) -> list[str]:
    return wrap(text, room, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
