"""Trainings in processes of their own, which are killed: one process that has imported everything forks them.

The nursery (`python -m tests.attack.nursery ROOT`) reads one request a line as JSON and answers with one line. It never
trains itself, so that it has no threads that a fork would lose.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

INTERRUPTED = 130  # exit status of a KeyboardInterrupt
RAW = 1


@dataclass(frozen=True)
class Request:
    """One training to be started.

    Attributes:
        fault: text of a fault with a signal's name for its error; empty: none.
        sends: name of a signal that is sent from outside, `delay` seconds after the start; empty: none.
        facts: file that gets the evidence of a training that ends; `facts.error` beside it what a failed one says.
    """

    case: str
    folder: str
    facts: str
    more: tuple[str, ...] = ()
    fault: str = ""
    sends: str = ""
    delay: float = 0.0
    limit: float = 120.0


class Nursery:
    """Starts trainings and waits for their ends."""

    def __init__(self, root: Path) -> None:
        command = [sys.executable, "-m", "tests.attack.nursery", str(root)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, request: Request) -> tuple[int | None, float]:
        """Exit status (negative: killed by that signal; None: it hung), and the seconds it took."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asdict(request)) + "\n")
        self.process.stdin.flush()
        status, seconds = json.loads(self.process.stdout.readline())
        return status, seconds

    def close(self) -> None:
        """Let the process end."""
        self.process.communicate(timeout=60)


def _child(root: Path, request: Request) -> int:
    """Train; the exit status is that of the command line."""
    import torch

    from tests.attack.cases import BY_NAME
    from tests.attack.evidence import evidence
    from tests.attack.injector import Fault, Injector

    torch.set_num_threads(1)
    case, folder = BY_NAME[request.case], Path(request.folder)
    os.environ["ADAPTIVE_TRAINER_CACHE"] = str(folder / "cache") if case.from_files else ""
    try:
        trainer = case.trainer(case.settings(root / "files", *request.more), folder)
        fault = Fault.parse(request.fault) if request.fault else None
        with nullcontext() if fault is None else Injector(fault.door, fault).active():
            trainer.fit()
        part = Path(f"{request.facts}.part")  # a signal can come here too
        part.write_bytes(pickle.dumps(evidence(folder, trainer.model)))
        part.replace(request.facts)
    except BaseException as error:
        Path(f"{request.facts}.error").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else int(getattr(error, "exit_code", RAW))
    return 0


def _raise(request: Request, root: Path) -> tuple[int | None, float]:
    """Fork a training, send it its signal, wait for its end."""
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)  # its data workers end with it
        status = RAW
        try:
            status = _child(root, request)
        except KeyboardInterrupt:  # sent before the training began
            status = INTERRUPTED
        finally:
            os._exit(status)
    sends = request.sends
    while time.monotonic() - start < request.limit:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), time.monotonic() - start
        if sends and time.monotonic() - start >= request.delay:
            os.kill(pid, signal.Signals[sends])
            sends = ""
        time.sleep(0.002)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None, request.limit


def _main() -> None:
    import gc
    import logging

    import timm  # noqa: F401
    import torch

    import tests.attack.cases  # noqa: F401

    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    gc.collect()
    gc.freeze()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what trainings print is no answer
    for line in sys.stdin:
        fields: dict[str, Any] = json.loads(line)
        answers.write(json.dumps(_raise(Request(**fields), Path(sys.argv[1]))) + "\n")
        answers.flush()


if __name__ == "__main__":
    _main()
