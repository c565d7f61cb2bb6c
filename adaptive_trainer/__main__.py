"""`python -m adaptive_trainer`, quiet about Ctrl-C from the first import on."""

import logging
import sys

__all__ = ["main"]

STOPPED = 130  # as shells say it: 128 + SIGINT


def main() -> None:
    """The command line; ends the process with its exit code."""
    try:
        from adaptive_trainer.cli.main import main as run  # in here: Ctrl-C may come in the seconds that it imports

        run()
    except KeyboardInterrupt:
        logging.disable()  # torch, imported by half, says at the end of the process how its caches did
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
