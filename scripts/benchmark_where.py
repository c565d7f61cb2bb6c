"""Where the time of one update goes: kernels, launches, copies and waiting, against what its memory traffic takes.

Usage: python -m scripts.benchmark_where

Each rung is shown eager and as a graph. Wall time is measured without a profiler; kernels, launches and copies come
from torch.profiler. "At least" is the time in which the card could move the bytes that the operators read and write.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adaptive_trainer.utils.global_state import private_process_state
from scripts.benchmark_speed import RUNGS, UPDATES, WARM_UP, batch_of, engine_of
from scripts.timing import BLOCKS, CUDA, heading, need_cuda, per_update, row, synchronize, table

PROFILED = 10


class Traffic(TorchDispatchMode):
    """Bytes that operators read and write on a device: each input once, each output once, views nothing.

    An operator that changes an argument in place reads and writes it; one that only fills it writes it. Elements that
    an expanded tensor repeats count once. What a kernel reads again, or keeps in scratch memory, does not count: it is
    what the operators must move when each is a kernel that finds nothing in a cache.
    """

    FILLS = ("copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_")  # their first argument

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.bytes, self.operators = device, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        moved = self._moved(func, args, kwargs or {}, out)
        self.bytes += moved
        self.operators += moved > 0
        return out

    def _moved(self, func: Any, args: Any, kwargs: Any, out: Any) -> int:
        schema, name = func._schema, func._schema.name.rpartition("::")[2]
        is_changing = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
        if not any(is_changing) and any(r.alias_info is not None for r in schema.returns):
            return 0  # a view
        given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
        total, held = 0, {id(leaf) for leaf in tree_leaves(given)}
        for argument, is_changed in zip(schema.arguments, is_changing, strict=True):
            size = self._size(given.get(argument.name))
            is_only_filled = is_changed and (
                argument.is_out or (name in self.FILLS and argument is schema.arguments[0])
            )
            total += 0 if is_only_filled else size
            if name.startswith("_fused_") and argument.name == "grads" and given.get("grad_scale") is None:
                continue  # declared as changed, and changed only where it is scaled
            total += size if is_changed else 0
        if not name.startswith(("empty", "new_empty")):
            total += sum(self._size(leaf) for leaf in tree_leaves(out) if id(leaf) not in held)
        return total

    def _size(self, value: Any) -> int:
        return sum(
            _own_bytes(t) for t in tree_leaves(value) if isinstance(t, Tensor) and t.device.type == self.device.type
        )


def _own_bytes(tensor: Tensor) -> int:
    """Bytes of the elements that have memory of their own."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride or not size else 1
    return elements * tensor.element_size()


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy of 1 GiB reads and writes within the device."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    return 2 * source.nbytes / min(per_update(lambda: target.copy_(source), 10, device) for _ in range(5))


@dataclass
class Timeline:
    """What a profiler saw of a number of updates on the card, an update: milliseconds, counts, bytes."""

    kernel_ms: float
    kernels: float
    launches: float
    copy_ms: float
    copied: float
    busy_ms: float


def timeline(step: Callable[[], None]) -> Timeline:
    step()
    synchronize(CUDA)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            step()
        synchronize(CUDA)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text(encoding="utf-8"))["traceEvents"] if e.get("ph") == "X"]
    kernels, copies, sets = (
        [e for e in events if e.get("cat") == kind] for kind in ("kernel", "gpu_memcpy", "gpu_memset")
    )
    starts = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
    launches = sum(str(e.get("name")).startswith(starts) for e in events if str(e.get("cat")).startswith("cuda_"))
    return Timeline(
        sum(e["dur"] for e in kernels) / 1e3 / PROFILED,
        len(kernels) / PROFILED,
        launches / PROFILED,
        sum(e["dur"] for e in copies + sets) / 1e3 / PROFILED,
        sum(int(e["args"].get("bytes", 0)) for e in copies) / PROFILED,
        covered([(e["ts"], e["ts"] + e["dur"]) for e in kernels + copies + sets]) / 1e3 / PROFILED,
    )


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    total, end = 0.0, float("-inf")
    for begin, until in sorted(spans):
        total += max(0.0, until - max(begin, end))
        end = max(end, until)
    return total


def where() -> Iterator[str]:
    """A row for each rung and engine."""
    speed = bandwidth(CUDA)
    yield f"A copy within the card moves {speed / 1e9:.0f} GB/s.\n"
    yield from table(
        "recipe", "engine", "wall ms", "kernels ms", "kernels", "launches", "copies ms", "copied KiB", "idle ms",
        "operators move MB", "at least ms", "wall / least",
    )  # fmt: skip
    for case in RUNGS:
        images, labels = batch_of(case)
        for name in ("eager", "graph"):
            engine = engine_of(case, name)

            step = partial(engine.run, images, labels, samples=0)

            per_update(step, WARM_UP)
            wall = 1e3 * statistics.median(per_update(step, UPDATES) for _ in range(BLOCKS))
            seen = timeline(step)
            with Traffic(CUDA) as traffic:
                engine.update.program.run(images, labels)
            least = 1e3 * traffic.bytes / speed
            yield row(
                case.name, name, f"{wall:.2f}", f"{seen.kernel_ms:.2f}", f"{seen.kernels:.0f}", f"{seen.launches:.0f}",
                f"{seen.copy_ms:.3f}", f"{seen.copied / 1024:.0f}", f"{wall - seen.busy_ms:.2f}",
                f"{traffic.bytes / 1e6:.0f}", f"{least:.2f}", f"{wall / least:.2f}",
            )  # fmt: skip


def main() -> None:
    need_cuda()
    print(heading("where an update's time goes"), "", sep="\n")
    with private_process_state(deterministic=False):
        for line in where():
            print(line, flush=True)


if __name__ == "__main__":
    main()
