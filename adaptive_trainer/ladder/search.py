"""The largest size that holds, found with few tries that fail: a failed try is the dear one."""

from __future__ import annotations

from collections.abc import Callable

NEAR = 8  # a gap under this share of what holds is closed in quarters


def largest(holds: Callable[[int], bool], *, guess: int, step: int, least: int, most: int) -> int | None:
    """The largest n from `least` to `most` that holds, or None; `holds` must not come back once it is lost.

    The guess is tried first, then larger or smaller sizes at doubling distances, until one that holds and one that
    does not enclose the boundary. A wide gap between them is halved; in a narrow one the next try is nearer to what
    holds, because that is more likely to hold. At the end n has been tried and held, and n + 1 has been tried and
    failed, unless n is `most`.

    Args:
        holds: tries a size.
        guess: where the boundary is expected.
        step: the first distance from it.
    """
    low, high = least - 1, most + 1  # holds, as far as is known; does not
    size = min(max(guess, least), most)
    if holds(size):
        low = size
        while low < most:
            size = min(low + step, most)
            if not holds(size):
                high = size
                break
            low, step = size, 2 * step
    else:
        high = size
        while high > least:
            step *= 2  # down at once as far as it takes, each further failure being one more
            size = max(high - step, least)
            if holds(size):
                low = size
                break
            high = size
    while high - low > 1:
        gap = high - low
        size = low + max(1, gap // (4 if gap * NEAR < low else 2))
        low, high = (size, high) if holds(size) else (low, size)
    return low if low >= least else None
