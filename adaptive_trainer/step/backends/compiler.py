"""A process that compiles for another one: `python -m adaptive_trainer.step.backends.compiler`.

It reads an `Order` from its input and prints an `Answer`; what it compiles goes into torch's caches on the disk. It
ends as soon as its input is closed, so it does not outlive the process that has started it, however that ends. Of a
CUDA device it takes the memory of a context alone, which torch makes as it follows a backward pass: tensors are without
data, and no kernel is loaded.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from adaptive_trainer.errors import AdaptiveTrainerError
from adaptive_trainer.step.backends.passes import Pass, Settings, configured

MAX_TEXT = 300  # characters of a compiler's message
MARK = "compiler answers: "  # begins the line of an answer among what libraries print
BUDGETS = (1.0, 0.7, 0.5, 0.35, 0.2, 0.1, 0.0)
NICE = 5  # of POSIX: a quarter of a processor that training wants too; 19 would leave it nothing


@dataclass(frozen=True)
class Order:
    """What is to be compiled.

    Attributes:
        device: index of the CUDA device; None on a CPU.
        threads: processes that compile kernels at a time.
        room: bytes that may be kept from the forward pass for the backward pass; the rest is recomputed. None: as many
            as are fastest.
    """

    passes: tuple[Pass, ...]
    settings: Settings
    device: int | None
    threads: int
    room: int | None = None


@dataclass(frozen=True)
class Answer:
    """What came of it.

    Attributes:
        reason: why nothing was compiled; empty where all was.
        seconds: that it took.
        again: seconds that it took once more, from the caches.
        budget: share of the activations that is kept.
    """

    reason: str = ""
    seconds: float = 0.0
    again: float = 0.0
    budget: float = 1.0

    def line(self) -> str:
        """As it is printed."""
        return MARK + json.dumps(asdict(self))

    @classmethod
    def of(cls, line: str) -> Answer | None:
        """Read a line; None where it is none."""
        return cls(**json.loads(line.removeprefix(MARK))) if line.startswith(MARK) else None


class _Kept(AdaptiveTrainerError):
    """Bytes that a forward pass keeps for its backward pass."""


def carry_out(order: Order) -> Answer:
    """Compile, and once more from the caches."""
    order.settings.put()
    if order.device is not None:
        stay_off(order.device)
    from torch._inductor import config

    config.compile_threads = order.threads
    started, taken = time.perf_counter(), []
    budget = 1.0 if order.room is None else fitting(order.passes, order.room)
    with configured(budget):
        for _ in range(2):
            for each in order.passes:
                each.compiled()
            taken.append(time.perf_counter() - started)
            started = time.perf_counter()
    return Answer("", taken[0], taken[1], budget)


def fitting(passes: Sequence[Pass], room: int) -> float:
    """The largest of `BUDGETS` with which no pass keeps more bytes than there is room for; else the smallest."""
    return next((each for each in BUDGETS if max(kept(one, each) for one in passes) <= room), BUDGETS[-1])


def kept(one: Pass, budget: float) -> int:
    """Bytes that a forward pass keeps for its backward pass."""

    def look(graph: GraphModule, *_: Any, **__: Any) -> Any:
        (made,) = graph.graph.find_nodes(op="output")
        nodes = {each for each in made.all_input_nodes if isinstance(each, Node) and each.op != "placeholder"}
        values = [each.meta.get("val") for each in nodes]
        raise _Kept(sum(value.nbytes for value in values if isinstance(value, Tensor)))

    try:
        with configured(budget):
            one.compiled(look)
    except _Kept as found:
        return int(found.args[0])
    return 0


def stay_off(device: int) -> None:
    """Keep this process from all memory of a CUDA device but a context's."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from torch._subclasses import fake_tensor

    torch.cuda.set_device(device)
    torch.cuda.set_per_process_memory_fraction(0.0, device)  # whatever asks for memory after all is refused it
    # Tensors without data have a device to be on, which need not be made ready for them.
    fake: Any = fake_tensor
    fake.init_gpu_context = lambda _: None
    fake.FakeTensorMode.avoid_device_init = property(lambda _: True)
    # Kernels are compiled by processes of their own, and are not loaded here.
    tuner: Any = CachingAutotuner
    tuner._make_launchers = tuner._dynamic_scale_rblock = lambda _: None


def _end_with_input() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def main() -> None:
    """Read an order, carry it out, answer."""
    if hasattr(os, "nice"):
        os.nice(NICE)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    size = int(sys.stdin.buffer.readline())
    data = sys.stdin.buffer.read(size)
    threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        answer = carry_out(pickle.loads(data))
    except Exception as error:  # the compiler may raise anything
        answer = Answer(explained(error))
    answers.write(answer.line() + "\n")
    answers.flush()
    sys.stderr.flush()
    os._exit(0)  # without waiting for what compiles kernels


def explained(error: Exception) -> str:
    """The first two lines of a compiler's message that say what is wrong."""
    lines = [line.strip() for line in str(error).splitlines()]
    telling = [line for line in lines if line and not line.endswith("raised:") and not line.startswith("Set TORCH")]
    return "; ".join(telling[:2])[:MAX_TEXT] or type(error).__name__


if __name__ == "__main__":
    main()
