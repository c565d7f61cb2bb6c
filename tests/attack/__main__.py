"""One injection again: `python -m tests.attack CASE FAULT`, as a failure of the tests names it."""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path

import torch

from adaptive_trainer.models.recomputing import keeper
from tests.attack.cases import BY_NAME
from tests.attack.injector import Fault
from tests.attack.verdict import BAD, Arena


def main() -> None:
    """Print the verdict; the exit status is 1 for a bad one."""
    torch.set_num_threads(1)
    keeper.SMALL = 0  # as in the tests
    name, fault = sys.argv[1:]
    with tempfile.TemporaryDirectory() as root:
        arena, case = Arena(Path(root)), BY_NAME[name]
        arena.expected(case)
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        verdict = arena.judge(case, Fault.parse(fault))
    print(verdict)
    sys.exit(verdict.kind in BAD)


if __name__ == "__main__":
    main()
