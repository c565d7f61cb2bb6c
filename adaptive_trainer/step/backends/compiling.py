"""The process that compiles, as seen by the one that trains."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from typing import IO

import torch

from adaptive_trainer.memory.limit import Capacity
from adaptive_trainer.memory.usage import format_bytes
from adaptive_trainer.step.backends.compiler import Answer, Order

log = logging.getLogger(__name__)

# Bytes of a CUDA context: 524 MiB on an H200 of 132 multiprocessors, and less on smaller cards.
CONTEXT, CONTEXT_OF_EACH = 64 * 2**20, 4 * 2**20
MODULE = "adaptive_trainer.step.backends.compiler"


def lacks_room(capacity: Capacity) -> str:
    """Why no other process may be started that uses the device of training; empty where it may.

    Training keeps what it has held at the most: it is never to run out of memory because of a compiler.
    """
    device = capacity.device
    if device.type != "cuda":
        return ""
    used, free = capacity.usage(), torch.cuda.mem_get_info(device)[0]
    left = free - max(0, used.peak_reserved - used.reserved)
    needed = context_bytes(device)
    if left >= needed:
        return ""
    return (
        f"the process that compiles needs a CUDA context of about {format_bytes(needed)}, and {format_bytes(left)} are "
        f"left on {device}"
    )


def context_bytes(device: torch.device) -> int:
    """About how many bytes of a CUDA device another process takes by being there."""
    return CONTEXT + CONTEXT_OF_EACH * int(torch.cuda.get_device_properties(device).multi_processor_count)


class Compiling:
    """Starts a process that carries out an order, and ends it with this object or with this process."""

    def __init__(self, order: Order) -> None:
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        found = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", MODULE],  # -P: what lies in the working directory is not imported
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": found, "TORCHINDUCTOR_CACHE_DIR": cache_dir()},
            creationflags=getattr(subprocess, "BELOW_NORMAL_PRIORITY_CLASS", 0),  # Windows; elsewhere it is nice itself
        )
        self.close = weakref.finalize(self, _end, self._process)
        self._answer: Answer | None = None
        self._lines: list[str] = []  # the last of them, to say why it has ended
        assert self._process.stderr is not None
        threading.Thread(target=_log, args=(self._process.stderr, self._lines), daemon=True).start()
        threading.Thread(target=_hand_over, args=(self._process, pickle.dumps(order)), daemon=True).start()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def answer(self, wait: float | None = 0.0) -> Answer | None:
        """The answer; None where there is none yet.

        Args:
            wait: seconds to wait for it; None: as long as it takes.
        """
        if self._answer is not None:
            return self._answer
        try:
            code = self._process.wait(wait)
        except subprocess.TimeoutExpired:
            return None
        self._answer = self._read(code)
        return self._answer

    def _read(self, code: int) -> Answer:
        assert self._process.stdout is not None
        for line in self._process.stdout.read().decode(errors="replace").splitlines():
            if answer := Answer.of(line):
                return answer
        last = f": {self._lines[-1]}" if self._lines else ""
        return Answer(f"the process that compiles has ended with {code} and without an answer{last}")


def _hand_over(process: subprocess.Popen[bytes], data: bytes) -> None:
    with suppress(OSError):  # it has ended
        assert process.stdin is not None
        process.stdin.write(b"%d\n" % len(data))
        process.stdin.write(data)
        process.stdin.flush()  # and it stays open: closed, it ends the other process


def _log(lines: IO[bytes], last: list[str]) -> None:
    """Log what the process prints."""
    with lines:
        for line in lines:
            if text := line.decode(errors="replace").rstrip():
                last[:] = [text]
                log.debug("compiler: %s", text)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):
            if pipe is not None:
                pipe.close()
