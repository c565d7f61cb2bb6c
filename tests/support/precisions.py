"""What a run leaves of the host's choice of TF32, each host in a process: `python -m tests.support.precisions [N]`.

One pair of choices in N is made.
"""

from __future__ import annotations

import gc
import itertools
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from adaptive_trainer import Trainer, compose_config
from adaptive_trainer.utils.global_state import private_process_state

ON: Any = torch.backends
HOSTS: dict[str, Callable[[], None]] = {
    "matmul precision high": lambda: torch.set_float32_matmul_precision("high"),
    "older matmul on": lambda: setattr(ON.cuda.matmul, "allow_tf32", True),
    "older cudnn off": lambda: setattr(ON.cudnn, "allow_tf32", False),
    "all tf32": lambda: setattr(ON, "fp32_precision", "tf32"),
    "all ieee": lambda: setattr(ON, "fp32_precision", "ieee"),
    "all bf16": lambda: setattr(ON, "fp32_precision", "bf16"),
    "cudnn ieee": lambda: setattr(ON.cudnn, "fp32_precision", "ieee"),
    "matmul tf32": lambda: setattr(ON.cuda.matmul, "fp32_precision", "tf32"),
    "conv ieee": lambda: setattr(ON.cudnn.conv, "fp32_precision", "ieee"),
    "conv tf32": lambda: setattr(ON.cudnn.conv, "fp32_precision", "tf32"),
    "mkldnn matmul bf16": lambda: setattr(ON.mkldnn.matmul, "fp32_precision", "bf16"),
}
FITTED = ((), ("matmul precision high",), ("all tf32",), ("all ieee",))
SMALL = [
    "data=fakedata", "data.train.size=8", "data.val.size=4", "data.num_workers=0", "data.image_size=32",
    "trainer.batch_size=4", "trainer.epochs=1", "ladder=none", "device=cpu", "memory.limit=none",
]  # fmt: skip


def answers() -> dict[str, Any]:
    """Every getter's answer, or that it refuses."""
    newer = {
        "all": ON, "cudnn": ON.cudnn, "mkldnn": ON.mkldnn, "matmul": ON.cuda.matmul, "conv": ON.cudnn.conv,
        "rnn": ON.cudnn.rnn, "mkldnn matmul": ON.mkldnn.matmul, "mkldnn conv": ON.mkldnn.conv,
    }  # fmt: skip
    found = {name: backend.fp32_precision for name, backend in newer.items()}
    older = {
        "matmul.allow_tf32": lambda: ON.cuda.matmul.allow_tf32,
        "cudnn.allow_tf32": lambda: ON.cudnn.allow_tf32,
        "get_float32_matmul_precision": torch.get_float32_matmul_precision,
    }
    for name, getter in older.items():
        try:
            found[name] = getter()
        except RuntimeError:
            found[name] = "refused"
    return found


def in_a_run(tf32: str, fits: bool) -> dict[str, Any]:
    """The answers within it."""
    seen = []

    def network(*_: object) -> nn.Module:
        seen.append(answers())
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))

    if fits:
        with tempfile.TemporaryDirectory() as folder:
            Trainer(compose_config([*SMALL, f"trainer.tf32={tf32}"]), model=network, output_dir=folder).fit()
    else:
        with private_process_state(deterministic=False, tf32={"true": True, "false": False}.get(tf32)):
            network()
    return seen[0]


def problems(host: tuple[str, ...], tf32: str, fits: bool) -> list[str]:
    """What is not as it should be where the host had made these choices."""
    for name in host:
        HOSTS[name]()
    before = answers()
    inside = in_a_run(tf32, fits)
    after = answers()
    found = [f"{name}: {before[name]} before, {after[name]} after" for name in before if before[name] != after[name]]
    wanted = {"true": ("tf32", True), "false": ("ieee", False)}.get(tf32)
    if wanted is None:
        return found + (["changed"] if inside != before else [])
    chosen = [inside[name] for name in ("matmul", "conv", "rnn", "matmul.allow_tf32", "cudnn.allow_tf32")]
    if chosen != [wanted[0]] * 3 + [wanted[1]] * 2 or "refused" in inside.values():
        found.append(f"inside: {inside}")
    if host == ("all ieee",):
        ON.fp32_precision = "tf32"
        if ON.cuda.matmul.fp32_precision != "tf32":
            found.append("matrix products do not follow torch.backends.fp32_precision any more")
    return found


def main() -> None:
    """Print a line for every problem, and how many runs there were."""
    alone: list[tuple[str, ...]] = [(), *((name,) for name in HOSTS)]
    runs = [*itertools.product(alone, ("true", "false", "null"))]
    pairs = [*itertools.product(itertools.combinations(HOSTS, 2), ("true", "false"))]
    runs += pairs[:: int(sys.argv[1]) if len(sys.argv) > 1 else 1]
    torch.use_deterministic_algorithms(False)  # imports the compiler, once for all
    warnings.simplefilter("error")
    logging.basicConfig(level=logging.ERROR)  # else each run says on the screen how it goes
    gc.freeze()
    for host, tf32 in runs:
        pid = os.fork()
        if pid == 0:
            try:
                found = problems(host, tf32, host in FITTED)
            except Exception as error:
                found = [repr(error)]
            for line in found:
                print(*host, tf32, line, sep="; ", flush=True)
            os._exit(0)
        os.waitpid(pid, 0)
    print(len(runs), "runs")


if __name__ == "__main__":
    main()
