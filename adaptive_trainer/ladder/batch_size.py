"""`trainer.batch_size=max`: the largest batch size that fits, found with few tries that fail."""

from __future__ import annotations

from collections.abc import Callable

from adaptive_trainer.config.schema import LARGEST
from adaptive_trainer.errors import ConfigError
from adaptive_trainer.ladder.resolve import DEFAULT_BATCH
from adaptive_trainer.memory.usage import format_bytes

NEAR = 8  # a gap under this share of what fits is closed in quarters


def largest(fits: Callable[[int], bool], *, guess: int, step: int, least: int, most: int) -> int | None:
    """Find the largest n from `least` to `most` that fits; None where none does.

    At the end n has been tried and fits, and n + 1 has been tried and does not, unless n is `most`.

    Args:
        fits: tries a size; above one that does not fit, none may.
        guess: where the boundary is expected.
        step: the first distance from it.
    """
    low, high = least - 1, most + 1  # fits, as far as is known; does not
    # At doubling distances from the guess, so that a good one costs few tries and a bad one only their logarithm.
    size = min(max(guess, least), most)
    if fits(size):
        low = size
        while low < most:
            size = min(low + step, most)
            if not fits(size):
                high = size
                break
            low, step = size, 2 * step
    else:
        high = size
        while high > least:
            step *= 2  # down at once as far as it takes: each further failure is one more
            size = max(high - step, least)
            if fits(size):
                low = size
                break
            high = size
    while high - low > 1:
        gap = high - low
        # a wide gap is halved; in a narrow one the next try is nearer to what fits, for a failed try is the dear one
        size = low + max(1, gap // (4 if gap * NEAR < low else 2))
        low, high = (size, high) if fits(size) else (low, size)
    return low if low >= least else None


def find(fits: Callable[[int], bool], *, predicted: int | None, most: int, room: int) -> tuple[int, str]:
    """Find the batch size for a run, and why it is this one. A prediction only says where to look.

    Args:
        fits: tries a size on the device by a dry run.
        predicted: the largest size that is predicted to fit, if that is known.
        most: samples of the training set.
        room: bytes that training may use.
    """
    tries: dict[int, bool] = {}

    def tried(size: int) -> bool:
        tries[size] = fits(size)
        return tries[size]

    guess = DEFAULT_BATCH if predicted is None else predicted
    step = guess if predicted is None else max(1, guess // 100)  # a prediction is near, a default may be far
    least = min(2, most)  # a single sample is tried last: BatchNorm may not train on it
    size = largest(tried, guess=guess, step=step, least=least, most=most)
    if size is None and least > 1 and tried(1):
        size = 1
    expected = "not predicted" if predicted is None else f"predicted {predicted}"
    effort = f"({expected}, {len(tries)} tried, {len(tries) - sum(tries.values())} failed)"
    space = format_bytes(room)
    if size is None:  # the smaller rungs may fit, and a rung needs a number
        return least, f"not even that is proven in {space}, so the ladder goes on from there {effort}"
    if size == most:
        return size, f"proven in {space}, and there are no more training samples {effort}"
    return size, f"{size} is proven and {size + 1} ran out of memory in {space} {effort}"


def kept(found: int | None, used: int) -> tuple[int, str]:
    """The batch size of a resumed run, and why.

    Args:
        found: what `find` gave when the run began, or None.
        used: the batch size of the run.

    Raises:
        ConfigError: the run began with a number.
    """
    if found is None:
        raise ConfigError(
            f"trainer.batch_size={LARGEST} is for the start of a run, and the one that is resumed has batch size "
            f"{used}; give trainer.batch_size a number, or start anew with resume=null"
        )
    return found, "found when the run began; a resumed run keeps it"
