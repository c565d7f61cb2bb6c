"""The screen: log records as plain lines on standard output, with colours on a terminal; errors on standard error.

Nothing else in the package writes to the screen but bars (`progress`), above which the lines are kept, and the
functions that print GPU memory when they are called.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import wrap
from typing import IO, Any

from adaptive_trainer.utils.launch import MODULE, rank

log = logging.getLogger(__name__)

PACKAGE = __name__.partition(".")[0]
USUAL_WIDTH = 80  # columns, where there is no terminal to ask
QUOTED = re.compile(r"""(?<![^\s(=\['"])(['"]).+?\1(?=[\s,.;:)\]'"]|$)""")
LABEL = re.compile(r"[a-z][a-z ]{,20}:(?= )")  # what a line is about
BOLD, RED, YELLOW, PLAIN = "\x1b[1m", "\x1b[31m", "\x1b[33m", "\x1b[0m"
MOST_BLANKS = 8  # in a path that is kept whole
NO_BREAK = "\0"  # stands for a space where a line must not be broken


class Screen(logging.Handler):
    """Shows log records: of this package all, of others warnings and errors."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show one record."""
        is_ours = record.name.partition(".")[0] == PACKAGE
        is_error = record.levelno >= logging.ERROR
        if is_ours or (record.levelno >= logging.WARNING and not _shows_itself(record.name)):
            show(self.format(record), sys.stderr if is_error or not is_ours else sys.stdout, record.levelno)


def _shows_itself(name: str) -> bool:
    return bool(logging.getLogger(name.partition(".")[0]).handlers)  # as huggingface_hub and torch have


def show(text: str, stream: IO[str] | None, level: int = logging.INFO) -> None:
    """Write lines above the bars; break long ones between words, and on a terminal colour them by their level.

    Where neither a terminal nor COLUMNS says how wide the screen is, lines stay whole: programs read them.
    """
    # Nothing here is a reason to stop training: no reader that has gone, nor a letter that a terminal does not have.
    if stream is None:
        return
    if number := rank():
        text = f"rank {number}: {text}"
    if columns := _columns(stream):
        text = "\n".join(_broken(line, columns) for line in text.splitlines())
    if is_terminal(stream) and has_colours():
        text = _coloured(text, level)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    text = text.encode(encoding, "replace").decode(encoding)
    bars = sys.modules.get("tqdm")  # not loaded: there are no bars
    write = print if bars is None else bars.tqdm.write
    try:
        write(text, file=stream)
        stream.flush()
    except BrokenPipeError:
        silence(stream.fileno())
    except (OSError, ValueError):  # a full disk; closed
        pass


def has_colours() -> bool:
    """Whether terminals are to have colours: https://no-color.org."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _coloured(text: str, level: int) -> str:
    if level >= logging.WARNING:
        return f"{RED if level >= logging.ERROR else YELLOW}{text}{PLAIN}"
    return "\n".join(
        LABEL.sub(lambda label: f"{BOLD}{label[0]}{PLAIN}", line, count=1) if LABEL.match(line) else line
        for line in text.splitlines()
    )


def silence(descriptor: int) -> None:
    """Let what is written there, to a reader that has gone, go nowhere."""
    # Python flushes the stream once more at its end, and would print what that raises.
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def show_error(text: str) -> None:
    """Write what has gone wrong to standard error, and to the log files, whatever else logging is set up to do."""
    show(text, sys.stderr, logging.ERROR)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(log.makeRecord(log.name, logging.ERROR, "", 0, text, (), None))


def _broken(line: str, columns: int) -> str:
    if len(line) <= columns or MODULE in line:  # half a command, pasted, would run
        return line
    indent = (len(line) - len(line.lstrip()) + 2) * " "
    whole = QUOTED.sub(lambda found: found[0].replace(" ", NO_BREAK), line)  # as in paths, which are copied too
    lines = wrap(_with_paths(whole), columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace(NO_BREAK, " ")


def _with_paths(line: str) -> str:
    """The line with no break in paths that have blanks: of words that are a path together, as there is one."""
    words, done = line.split(" "), list[str]()
    while words:
        ends = (end for end in range(min(MOST_BLANKS + 1, len(words)), 1, -1) if _is_path(" ".join(words[:end])))
        end = next(ends, 1)
        done.append(NO_BREAK.join(words[:end]))
        words = words[end:]
    return " ".join(done)


def _is_path(text: str) -> bool:
    path = text.rpartition("=")[2].rstrip(",.;:)")
    return os.sep in path and os.path.exists(path)  # False, too, for what cannot be one


@contextmanager
def showing(verbosity: str = "normal") -> Iterator[None]:
    """Show this package's log while the block runs, unless the caller has configured logging.

    Args:
        verbosity: `silent` shows errors, `quiet` warnings too, `normal` what happens, `debug` each step of it.
    """
    ours = logging.getLogger(PACKAGE)
    added = [] if ours.handlers or logging.getLogger().handlers else [Screen()]
    screens, level = [*added, *_screens()], ours.level
    levels = [each.level for each in screens]
    try:
        for each in screens:
            each.setLevel({"silent": logging.ERROR, "quiet": logging.WARNING}.get(verbosity, logging.NOTSET))
        if screens and verbosity == "debug":
            ours.setLevel(logging.DEBUG)
        elif added:
            ours.setLevel(level or logging.INFO)
        for each in added:
            ours.addHandler(each)
        yield
    finally:
        for each in added:
            ours.removeHandler(each)
        for each, before in zip(screens, levels, strict=True):
            each.setLevel(before)
        ours.setLevel(level)


def is_shown(level: int) -> bool:
    """Whether lines of this level come to a screen, or to whatever the caller's logging makes of them."""
    return logging.getLogger(PACKAGE).isEnabledFor(level) and all(each.level <= level for each in _screens())


def _screens() -> list[Screen]:
    handlers = (*logging.getLogger(PACKAGE).handlers, *logging.getLogger().handlers)
    return [each for each in handlers if isinstance(each, Screen)]


@contextmanager
def unlogged(name: str) -> Iterator[None]:
    """Leave out what a library logs under this name before it raises the same: whoever catches it reports it."""
    logger = logging.getLogger(name)
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


def log_file() -> Path | None:
    """The file that log records go to, where there is one."""
    handlers = [*logging.getLogger(PACKAGE).handlers, *logging.getLogger().handlers]
    return next((Path(each.baseFilename) for each in handlers if isinstance(each, logging.FileHandler)), None)


def nearby(path: Path) -> str:
    """A path as it can be typed in the shell that started the program: relative if it is below the shell's folder."""
    with suppress(OSError):  # the folder is gone
        here = Path.cwd()
        is_the_shells = here.samefile(os.environ.get("PWD", here))  # neither Hydra nor a script has left it
        return str(path.relative_to(here) if is_the_shells and path.is_relative_to(here) else path)
    return str(path)


def width(stream: IO[str] | None = None) -> int:
    """Columns of the terminal that a stream, by default standard output, ends at; elsewhere COLUMNS, or 80."""
    return _columns(stream or sys.stdout) or USUAL_WIDTH


def _columns(stream: IO[str]) -> int:
    """Columns of the terminal, or what COLUMNS says; 0 where neither is known."""
    with suppress(OSError, ValueError):
        if is_terminal(stream):
            return os.get_terminal_size(stream.fileno()).columns or USUAL_WIDTH  # 0 where none was ever set
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isdecimal() else 0


def is_terminal(stream: Any) -> bool:
    """Whether a stream ends at a terminal; not one that is closed or None."""
    with suppress(ValueError, AttributeError):
        return bool(stream.isatty())
    return False


def duration(seconds: float) -> str:
    """A length of time in one or two units."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
