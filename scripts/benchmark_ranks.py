"""Images per second of several ranks, one CUDA card each: this package, torch's own DDP, one card alone.

Usage: torchrun --nproc-per-node=N -m scripts.benchmark_ranks [--blocks N] [--updates N]

Each contender trains the same networks on the same pinned batches with AdamW (fused), fp32. Blocks of updates of each
run in turn, in an order that alternates; a figure is the median of the blocks on the first rank. "alone" is this
package on one card, with the same batch that each rank has. Beside them: what a vote takes, the sum of the gradients,
and an update, kernel by kernel, that the last rank fails in its backward pass: until it is rolled back and done again.
"+": what votes add to an update, against the same updates without them.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from adaptive_trainer import compose_config
from adaptive_trainer.distributed.peers import Site, alone, joined, peers
from adaptive_trainer.ladder.resolve import resolve
from adaptive_trainer.memory.limit import limited
from adaptive_trainer.models.losses import build_loss
from adaptive_trainer.models.zoo import build_model
from adaptive_trainer.step.engine import Engine
from adaptive_trainer.training.session import Parts, enter
from adaptive_trainer.utils.device import device_of
from scripts.timing import alternating, heading, need_cuda, per_update, row, table

WARM_UP = 12


@dataclass(frozen=True)
class Case:
    """A network, and the samples of an update on each rank."""

    model: str
    batch: int
    size: int


CASES = (Case("efficientnet_b0", 8, 160), Case("efficientnet_b0", 24, 224), Case("resnet50", 24, 224))


def batch_of(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(peers().rank)
    images = torch.rand(case.batch, 3, case.size, case.size, generator=generator)
    return images.pin_memory(), torch.randint(10, (case.batch,), generator=generator).pin_memory()


def ours(case: Case, device: torch.device, around: ExitStack) -> Engine:
    """This package's engine, for whoever `peers()` are now."""
    whole = case.batch * peers().size
    config = resolve(
        compose_config([
            f"model.name={case.model}", f"trainer.batch_size={whole}", f"data.image_size={case.size}",
            "trainer.channels_last=false",
        ])
    )[0].settings  # fmt: skip
    parts = Parts(build_model, build_loss, "", 10, 4096, device, around.enter_context(limited(device, None)))
    return Engine(enter(config, parts).update, "graph", whole, lambda text: print(text, file=sys.stderr))


def ddp(case: Case, device: torch.device) -> Callable[[], None]:
    """A plain loop around torch's own wrapper, which sums gradients while backward runs."""
    torch.manual_seed(0)
    network = timm.create_model(case.model, num_classes=10).to(device)
    model = DistributedDataParallel(network, device_ids=[device.index], gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    images, labels = batch_of(case)
    loss_of = nn.CrossEntropyLoss()

    def update() -> None:
        x, y = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        loss_of(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def measured(case: Case, device: torch.device, blocks: int, updates: int) -> dict[str, float]:
    """Medians of seconds an update."""
    with ExitStack() as around:
        engine = ours(case, device, around)
        batch = batch_of(case)
        with alone():
            single = ours(case, device, around)
        steps: dict[str, Callable[[], Any]] = {
            "ours": lambda: engine.run(*batch, samples=0),
            "no vote": lambda: engine.run(*batch, samples=0),
            "DDP": ddp(case, device),
        }

        def by_itself() -> float:
            with alone():
                return per_update(lambda: single.run(*batch, samples=0), updates, device)

        def timed(step: Callable[[], Any], *, votes: bool = True) -> Callable[[], float]:
            def block() -> float:
                dist.barrier()
                with nullcontext() if votes else patch.object(engine.update.agreement, "least", lambda number: number):
                    return per_update(step, updates, device)

            return block

        for step in steps.values():
            per_update(step, WARM_UP, device)
        by_itself()
        asked = {name: timed(step, votes=name != "no vote") for name, step in steps.items()}
        found = alternating({**asked, "alone": by_itself}, blocks)
        medians = {name: statistics.median(times) for name, times in found.items()}
        medians["vote"] = timed(lambda: peers().vote(Site.UPDATE))()
        gradients = torch.zeros(sum(p.numel() for p in engine.update.program.parameters), device=device)
        medians["sum"] = timed(lambda: peers().add(gradients))()
        medians["recovery"] = recovery(engine, batch, device)
        return medians


def recovery(engine: Engine, batch: tuple[Tensor, Tensor], device: torch.device) -> float:
    """Seconds of an update, kernel by kernel, that runs out of memory once on the last rank."""
    program = engine.update.program
    accumulate, failures = program.accumulate, [1 if peers().rank == peers().size - 1 else 0]

    def failing(*args: Any) -> None:
        accumulate(*args)
        if failures[0]:
            failures[0] = 0
            raise torch.OutOfMemoryError("CUDA out of memory, so that recovery can be timed")

    def update() -> None:
        engine.update.run(*batch, samples=0, accumulate=failing)

    per_update(update, 2, device)  # warm, and the first of them fails
    failures[0] = 1 if peers().rank == peers().size - 1 else 0
    dist.barrier()
    return per_update(update, 1, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--updates", type=int, default=30, help="of a block")
    asked = parser.parse_args()
    need_cuda()
    logging.disable(logging.WARNING)
    device = device_of("cuda")
    torch.cuda.set_device(device)
    dist.init_process_group("nccl" if torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"]) else "gloo")
    with joined(device) as ranks:
        say: Callable[..., None] = print if ranks.is_first else lambda *_, **__: None
        say(heading(f"{ranks.size} ranks"), "", sep="\n")
        say(
            *table("recipe, a rank", "ours", "alone", "x", "DDP", "x", "ms: update", "vote", "sum", "fails", "+"),
            sep="\n",
        )
        for case in CASES:
            found = measured(case, device, asked.blocks, asked.updates)
            images = {name: ranks.size * case.batch / found[name] for name in ("ours", "DDP")}
            images["alone"] = case.batch / found["alone"]
            ms = [f"{1e3 * found[name]:.3f}" for name in ("ours", "vote", "sum", "recovery")]
            say(
                row(
                    f"{case.model} {case.batch}@{case.size}", f"{images['ours']:.0f}", f"{images['alone']:.0f}",
                    f"{images['ours'] / images['alone']:.2f}", f"{images['DDP']:.0f}",
                    f"{images['ours'] / images['DDP']:.2f}", *ms, f"{found['ours'] / found['no vote'] - 1:+.1%}",
                ),
                flush=True,
            )  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
