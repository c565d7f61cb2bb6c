"""`python -m adaptive_trainer`, which Ctrl-C and SIGTERM end with two lines, from the first import on."""

import logging
import signal
import sys
from types import FrameType

from adaptive_trainer.errors import Stopped, Terminated

__all__ = ["main"]


def main() -> None:
    """The command line; ends the process with its exit code."""
    try:
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # else whoever started the program has decided
            signal.signal(signal.SIGTERM, _terminate)
        from adaptive_trainer.cli.main import main as run  # in here: Ctrl-C may come in the seconds that it imports

        run()
    except KeyboardInterrupt as error:
        logging.disable()  # torch, imported by half, says at the end of the process how its caches did
        stopped = Stopped("nothing is saved", is_term=isinstance(error, Terminated))
        print(stopped.shown, file=sys.stderr)
        sys.exit(stopped.exit_code)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


if __name__ == "__main__":
    main()
