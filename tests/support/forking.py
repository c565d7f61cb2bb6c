"""Runs programs in processes of their own that are forked from one which has imported torch and timm already.

Such a process is what `python -m adaptive_trainer` is, from its own `sys.argv` to its own exit, three to four seconds
earlier. `Launcher` is the tests' side, `serve` the other one.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import exact_advice
from tests.support.composing import without_report

ROOT = Path(__file__).parents[2]
WARM = ("adaptive_trainer.training.trainer", "timm", "torchvision", "sklearn.datasets")
LONGEST = 300  # seconds, then the process is ended by SIGALRM


@dataclass(frozen=True)
class Ended:
    """What a process came to; a negative code is the signal that ended it."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


@dataclass(frozen=True)
class Started:
    """A running process. It must be waited for."""

    pid: int
    folder: Path
    launcher: Launcher

    def wait(self) -> Ended:
        code = int(self.launcher.ask({"wait": self.pid}))
        return Ended(code, (self.folder / "stdout").read_text(), (self.folder / "stderr").read_text())


class Launcher:
    """Starts processes; each writes its output into files of the given folder, which is its working directory."""

    def __init__(self) -> None:
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forking"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def close(self) -> None:
        self.server.communicate()

    def ask(self, request: dict[str, Any]) -> str:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        print(json.dumps(request), file=self.server.stdin, flush=True)
        return self.server.stdout.readline()

    def start(
        self,
        *args: str,
        folder: Path,
        script: Path | None = None,
        env: dict[str, str] | None = None,
        largest_file: int | None = None,
    ) -> Started:
        """Start `python -m adaptive_trainer *args`, without a report where none is asked for, or `python script *args`.

        Args:
            largest_file: bytes; writing more into a file fails, as it does on a full disk.
        """
        folder.mkdir(parents=True, exist_ok=True)
        request = {
            "args": args if script is not None else without_report(args),
            "folder": str(folder),
            "script": None if script is None else str(script),
            "env": env or {},
            "largest_file": largest_file,
        }
        return Started(int(self.ask(request)), folder, self)

    def run(self, *args: str, folder: Path, **how: Any) -> Ended:
        return self.start(*args, folder=folder, **how).wait()


def serve() -> None:
    """Fork for every request line; only the child, set up as asked, returns from here with something to run."""
    for name in WARM:
        importlib.import_module(name)
    exact_advice.where_asked()
    gc.freeze()  # a child that collects garbage would copy every page
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "wait" in request:
            print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _become(request)
            return
        print(pid, flush=True)
    os._exit(0)


def _become(request: dict[str, Any]) -> None:
    os.chdir(request["folder"])
    os.environ.update(request["env"])
    for number, name, flags in ((0, os.devnull, os.O_RDONLY), (1, "stdout", 0), (2, "stderr", 0)):
        handle = os.open(name, flags or os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
        os.close(handle)
    signal.alarm(LONGEST)
    if request["largest_file"] is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"], resource.RLIM_INFINITY))
    sys.path.insert(0, request["folder"])
    sys.argv = [request["script"] or "adaptive_trainer", *request["args"]]


if __name__ == "__main__":
    serve()
    if sys.argv[0] == "adaptive_trainer":
        runpy.run_module("adaptive_trainer", run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
