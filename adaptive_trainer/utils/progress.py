"""How far a pass over images has come: a line that moves on a terminal and in a notebook, elsewhere one at times."""

from __future__ import annotations

import logging
import os
import stat
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from adaptive_trainer.utils.screen import duration, is_shown, is_terminal, width

log = logging.getLogger(__name__)

DRAWN_EVERY = 0.1  # seconds
ROOM_FOR_BAR = 12  # columns beside the figures, with fewer there is no bar
WARM_UP = 3  # the first parts of a pass, which are slow: the rate is that of the others
LEAST_PAUSE, LONGEST_PAUSE = 5.0, 60.0  # seconds between two lines
PAUSE_SHARE = 0.25  # of the time that has passed: lines become rarer as a pass goes on

Figures = Callable[[], Sequence[str]]


class Progress:
    """Counts images while the block runs: a line that moves, or a plain line now and then.

    Args:
        what: what is under way, with a colon.
        total, done: images in all, and those that count as done already.
        figures: what to say beside the counts, the most important first: a narrow screen has no room for the last
            ones. Asked only when a line is shown.
        later: images to come after this pass, which count for the time that is left.
        step: images of an update, where updates are counted in place of images.
    """

    def __init__(
        self,
        what: str,
        total: int,
        done: int = 0,
        *,
        figures: Figures = tuple,
        later: int = 0,
        step: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._total, self._done, self._parts = what, total, done, 0
        self._figures, self._later, self._step, self._clock = figures, later, step, clock
        self._started = self._last = clock()
        self._begun = self._warm = (done, self._started)  # images and time
        self._bar = _bar(total, done)

    def __enter__(self) -> Progress:
        """Begin."""
        return self

    def __exit__(self, *error: object) -> None:
        """The line that moves goes."""
        if self._bar is not None:
            self._bar.close()

    def advance(self, images: int) -> None:
        """So many more are done."""
        self._done += images
        now = self._clock()
        self._parts += 1
        if self._parts == WARM_UP:
            self._warm = (self._done, now)
        if self._bar is not None:
            if now - self._last >= DRAWN_EVERY or self._done >= self._total:
                self._last = now
                self._draw()
            return
        pause = min(max(PAUSE_SHARE * (now - self._started), LEAST_PAUSE), LONGEST_PAUSE)
        if now - self._last >= pause and self._done < self._total:  # who asked for the pass reports its end
            self._last = now
            if is_shown(logging.INFO):
                log.info("%s %s", self._what, ", ".join(self._said()))

    def _said(self) -> list[str]:
        """Counts, time left, rate and the figures, in the order of their importance."""
        is_warm = self._parts > WARM_UP
        first, since = self._warm if is_warm else self._begun
        seconds = self._clock() - since
        rate = (self._done - first) / seconds if seconds else 0.0
        counts = (-(-images // (self._step or 1)) for images in (self._done, self._total))
        said = ["/".join(map(str, counts)) + ("" if self._step else " images")]
        if rate and is_warm:
            said.append(f"{duration((self._total - self._done + self._later) / rate)} left")
        if rate:
            said.append(f"{rate:.3g} img/s")
        return [*said, *filter(None, self._figures())]

    def _draw(self) -> None:
        text, room = self._what, width(self._bar.fp) - 1  # a full line would make a terminal begin another
        for each in self._said():
            longer = f"{text}{',' if text != self._what else ''} {each}"
            if not _in_notebook() and len(longer) > room:
                break
            text = longer
        has_bar = _in_notebook() or room - len(text) >= ROOM_FOR_BAR
        self._bar.bar_format = "{desc} {bar}" if has_bar else "{desc}"
        self._bar.n = self._done
        self._bar.set_description_str(text, refresh=True)


def _bar(total: int, done: int) -> Any:
    """A line of tqdm; None where nobody would see it move."""
    in_notebook = _in_notebook()
    if not is_shown(logging.INFO) or not (in_notebook or _on_terminal()):
        return None
    with warnings.catch_warnings():  # that ipywidgets are missing, in which case the bar is made of letters
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm
    return tqdm(
        total=total,
        initial=done,
        leave=False,
        dynamic_ncols=True,
        file=sys.stdout if in_notebook else sys.stderr,
        bar_format="{desc} {bar}",
    )


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config


def _on_terminal() -> bool:
    if not is_terminal(sys.stderr):
        return False
    # The reader of a pipe may write to the same terminal, into the bar.
    with suppress(OSError, ValueError, AttributeError):
        return not stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode)
    return True
