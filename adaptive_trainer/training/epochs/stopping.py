"""How a run is stopped from outside."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from adaptive_trainer.distributed.peers import peers

SIGNALS = ("", "SIGINT", "SIGTERM")


class StopSignal:
    """Ctrl-C and SIGTERM become a request to stop after the running update; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.name = ""

    @property
    def is_term(self) -> bool:
        """Whether it was SIGTERM that came."""
        return self.name == signal.SIGTERM.name

    def asked(self) -> str:
        """The signal that has come; of several ranks, to any of them by the last vote, so that all stop together."""
        here = peers()
        if here.size == 1:
            return self.name
        here.wish = SIGNALS.index(self.name)
        self.name = self.name or SIGNALS[here.wished]
        return SIGNALS[here.wished]

    @contextmanager
    def listening(self) -> Iterator[StopSignal]:
        """Listen while the block runs, in the main thread (elsewhere Python takes no signals); then restore."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        # schedulers of clusters send SIGTERM some seconds before they kill
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name and number == signal.SIGINT:  # an update, or a data set, may hang
            raise KeyboardInterrupt
        # nothing else: a handler runs between any two lines, and the state is whole only after an update
        self.name = signal.Signals(number).name
