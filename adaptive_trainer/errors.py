"""Every error the package raises on purpose, and the exit code each ends the command line with.

    AdaptiveTrainerError
    |- UserError (also a ValueError)         exit 2   what the user can mend
    |  |- ConfigError                                 a key, value, rung or combination of them
    |  |- DataError                                   a missing, empty or broken data set
    |  |- ModelError                                  an unknown model, or one that refuses its input
    |  |- CheckpointError                             a damaged or foreign checkpoint, a folder that takes none
    |  `- DivergedError                               the loss is no longer a number
    |- OutOfMemory                           -        one attempt ran out of memory; the descent answers it
    |- LadderExhausted                       exit 3   no rung fits
    |- DeviceUnusable                        exit 4   the device answers nothing any more
    |- PeerLost                              exit 5   another rank of the run has ended, or hangs
    `- Interrupted                           exit 75  stopped by a signal, state saved, can be resumed
       `- Stopped                            exit 130 stopped at once: nothing was to be saved

Messages say what came, what is allowed and what to do. No error keeps another exception, a traceback or a tensor:
whatever a failed step held must be free to go.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

E = TypeVar("E", bound=BaseException)
FULL = (errno.ENOSPC, errno.EDQUOT)
BARE = re.compile(r"[A-Za-z0-9_./:+%@-]+")  # what neither Hydra nor a shell takes for more than it is
FORBIDDEN = (errno.EACCES, errno.EPERM)


def remedy(error: OSError, folder: str = "output_dir") -> str:
    """What to do where a file cannot be written; `folder` is the setting that names another place."""
    if error.errno in FULL:
        return f"Free some disk space, or choose another {folder}"
    if error.errno in FORBIDDEN:
        return f"Get the permission to write there, or choose another {folder}"
    return f"Choose another {folder}, where files can be written"


def override(key: str, value: object) -> str:
    """`key=value` for a command line: with Hydra's quotes, and the shell's, where the value needs them."""
    text = str(value)
    if BARE.fullmatch(text):
        return f"{key}={text}"
    return shlex.quote(f"{key}={quoted(text)}")


def quoted(text: str) -> str:
    """A text in Hydra's quotes."""
    # a backslash counts as one, unless a quote follows it
    return '"' + re.sub(r'(\\*)("|$)', lambda found: 2 * found[1] + ('\\"' if found[2] else ""), text) + '"'


class AdaptiveTrainerError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line ends with."""

    exit_code = 1

    def _render_traceback_(self) -> list[str]:
        """What IPython, and so a notebook, shows: the message; the traceback too with HYDRA_FULL_ERROR=1."""
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            return traceback.format_exception(self)
        return f"{type(self).__name__}: {self}".splitlines()


class UserError(AdaptiveTrainerError, ValueError):
    """Something the user can mend."""

    exit_code = 2


class ConfigError(UserError):
    """A key, a value, a rung or a combination of them that cannot be used."""


def refuse_all(problems: Iterable[str]) -> None:
    """Raise one ConfigError that names every problem, where there is any: one run shows them all."""
    if text := "; ".join(problems):
        raise ConfigError(text)


class DataError(UserError):
    """A data set that is missing, empty, of one class, or has a broken file."""


class ModelError(UserError):
    """An unknown model, or one that refuses the input it is given."""


class CheckpointError(UserError):
    """A checkpoint that is damaged, foreign, or cannot be written."""


class DivergedError(UserError):
    """The loss is no longer a number."""


class OutOfMemory(AdaptiveTrainerError):
    """One attempt ran out of memory, and what it held has been rolled back and released.

    Attributes:
        phase: where it happened, in words for the record ("forward", "optimizer step", "evaluation", ...).
        reason: the first line of the original message.
        is_final: the same cannot help once more, whatever room is made.
    """

    def __init__(self, reason: str, *, phase: str, is_final: bool = False) -> None:
        super().__init__(f"out of memory in {phase}: {reason}")
        self.phase = phase
        self.reason = reason
        self.is_final = is_final


class LadderExhausted(AdaptiveTrainerError):
    """No rung of the ladder fits."""

    exit_code = 3


class DeviceUnusable(AdaptiveTrainerError):
    """After an error the device answers nothing any more; only a new process can use it."""

    exit_code = 4


class PeerLost(AdaptiveTrainerError):
    """Another rank of the run has ended, or is silent for too long.

    Attributes:
        is_whole: every update that was begun here is done or undone.
    """

    exit_code = 5
    is_whole = True


class Interrupted(AdaptiveTrainerError):
    """A signal stopped the run after its state was saved. 75 is EX_TEMPFAIL of sysexits.h: "try again later"."""

    exit_code = 75

    def _render_traceback_(self) -> list[str]:
        """What is shown instead of a traceback, also in a notebook: what happened, and how to go on."""
        return str(self).split("; ", 1)

    @property
    def shown(self) -> str:
        """Two lines for people."""
        return "\n".join(self._render_traceback_())


class Terminated(KeyboardInterrupt):
    """SIGTERM came; whatever cleans up after Ctrl-C does so after this."""


class Stopped(Interrupted):
    """A signal ended the work at once; 128 and the number of the signal, as shells say it."""

    exit_code = 130

    def __init__(self, text: str, *, is_term: bool) -> None:
        super().__init__(f"stopped by {'SIGTERM' if is_term else 'Ctrl-C'}; {text}")
        self.exit_code = 143 if is_term else 130


def when_stopped(say: Callable[[], str]) -> AbstractContextManager[None]:
    """Raise `Stopped`, with what is to be said of what there is, in place of a KeyboardInterrupt."""
    return explained(lambda error: Stopped(say(), is_term=isinstance(error, Terminated)), (KeyboardInterrupt,))


@contextmanager
def explained(
    explain: Callable[[E], AdaptiveTrainerError | None],
    kinds: tuple[type[E], ...] = (Exception,),  # type: ignore[assignment]
) -> Iterator[None]:
    """Raise our own error in place of another's.

    Our error keeps nothing of the other one: its frames may hold a model.

    Args:
        explain: makes our error of the other one; None lets the other one pass.
        kinds: the errors that are explained.
    """
    ours = None
    try:
        yield
    except kinds as error:
        ours = explain(error)
        if ours is None:
            raise
    if ours is not None:
        try:
            raise ours
        finally:
            ours.__context__ = None  # Python has just set it to the other error
            del ours  # else it and this frame, which its traceback holds, keep each other alive
