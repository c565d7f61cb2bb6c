"""`python -m adaptive_trainer`, which Ctrl-C and SIGTERM end with one line, from the first import on."""

import logging
import signal
import sys
from types import FrameType

__all__ = ["main"]

STOPPED, TERMINATED = 130, 143  # as shells say it: 128 and the number of the signal


class Terminated(KeyboardInterrupt):
    """SIGTERM came; whatever cleans up after Ctrl-C does so after this."""


def main() -> None:
    """The command line; ends the process with its exit code."""
    try:
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # else whoever started the program has decided
            signal.signal(signal.SIGTERM, _terminate)
        from adaptive_trainer.cli.main import main as run  # in here: Ctrl-C may come in the seconds that it imports

        run()
    except KeyboardInterrupt as error:
        logging.disable()  # torch, imported by half, says at the end of the process how its caches did
        is_term = isinstance(error, Terminated)
        print(f"stopped by {'SIGTERM' if is_term else 'Ctrl-C'}", file=sys.stderr)
        sys.exit(TERMINATED if is_term else STOPPED)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


if __name__ == "__main__":
    main()
