"""How far a pass over images has come: a bar on a terminal and in a notebook, elsewhere a line once in a while."""

from __future__ import annotations

import logging
import os
import stat
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from adaptive_trainer.utils.screen import duration, is_terminal, width

log = logging.getLogger(__name__)

ROOM_FOR_RATE = 72  # columns: a bar with fewer leaves the rate out
LEAST_PAUSE, LONGEST_PAUSE = 5.0, 60.0  # seconds between two lines
PAUSE_SHARE = 0.25  # of the time that has passed: lines become rarer as a pass goes on


class Progress:
    """Counts images while the block runs: a bar, or a plain line now and then.

    Args:
        what: what is under way, with a colon.
        total, done: images in all, and those that count as done already.
    """

    def __init__(self, what: str, total: int, done: int = 0, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._total, self._done, self._first = what, total, done, done
        self._figures = ""
        self._clock = clock
        self._started = self._last = clock()
        self._bar = _bar(what, total, done)

    def __enter__(self) -> Progress:
        """Begin."""
        return self

    def __exit__(self, *error: object) -> None:
        """The bar goes."""
        if self._bar is not None:
            self._bar.close()

    def note(self, figures: str) -> None:
        """What is shown beside the counts from now on."""
        self._figures = figures
        if self._bar is not None:
            self._bar.set_postfix_str(figures, refresh=False)  # the next step draws it

    def advance(self, images: int) -> None:
        """So many more are done."""
        self._done += images
        if self._bar is not None:
            self._bar.update(images)
            return
        now = self._clock()
        pause = min(max(PAUSE_SHARE * (now - self._started), LEAST_PAUSE), LONGEST_PAUSE)
        if now - self._last >= pause and self._done < self._total:  # who asked for the pass reports its end
            self._last = now
            log.info("%s", self._line(now - self._started))

    def _line(self, seconds: float) -> str:
        rate = (self._done - self._first) / seconds
        left = f", {duration((self._total - self._done) / rate)} left" if rate else ""
        figures = f", {self._figures}" if self._figures else ""
        return f"{self._what} {self._done}/{self._total} images{figures}, {rate:.3g} images/s{left}"


def _bar(what: str, total: int, done: int) -> Any:
    """A bar of tqdm; None where nobody would see it move."""
    in_notebook = _in_notebook()
    if not log.isEnabledFor(logging.INFO) or not (in_notebook or _on_terminal()):
        return None
    with warnings.catch_warnings():  # that ipywidgets are missing, in which case the bar is made of letters
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm
    rate = ", {rate_noinv_fmt}" if in_notebook or width(sys.stderr) >= ROOM_FOR_RATE else ""
    return tqdm(
        desc=what,
        total=total,
        initial=done,
        unit="img",
        leave=False,
        dynamic_ncols=True,
        file=sys.stdout if in_notebook else sys.stderr,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left" + rate + "{postfix}",
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
