"""Updates of 8 to 1,024 ranks, on paper; and what one vote takes on this machine.

Usage: python -m scripts.scaling_model
       torchrun --nproc-per-node=N -m scripts.scaling_model --measure-vote

An update is the computation of a rank, then the sum of gradients, of which nothing is hidden. Votes are on the host.
The sum is a ring or a tree, whichever is faster. A rank is one card, and a host has 8.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator

import torch

from adaptive_trainer.distributed.peers import Site, joined
from scripts.timing import row, table

# Seconds and bytes. Measured on two H200 (docs/scaling.md): an update of one card as a graph, and sums over both.
RECIPES = {"EfficientNet-B0 24@224": (24 / 1697, 16e6), "ResNet-50 24@224": (24 / 1757, 94e6)}
SUM_SMALL, SUM_LARGE = (16e6, 0.08e-3), (94e6, 0.34e-3)
RETRIED = 0.24  # of an update that runs out of memory and is done once more
# An all-reduce of one number by gloo took 0.12 ms there, which is two rounds between two ranks. An all-gather has a
# round for each other rank (gloo/allgather.cc); a tree would have one for each doubling.
ROUND = 0.12e-3 / 2
READ = 1.4e-6  # Python's, for what one rank has said: measured with 1,024
GRAPH, OPERATORS = 1, 3  # votes of an update: beside graphs, and operator by operator
# A step along a ring over NVLink and over a network: NCCL's own table (src/graph/tuning.cc, protocol Simple).
HOP_NVLINK, HOP_NETWORK = 3.4e-6, 9.6e-6
NVLINK = (SUM_LARGE[0] - SUM_SMALL[0]) / (SUM_LARGE[1] - SUM_SMALL[1])  # bytes a second, as the two sums have it
BEGIN = SUM_SMALL[1] - SUM_SMALL[0] / NVLINK - 2 * HOP_NVLINK  # the rest of what was measured: kernels start
UPDATE = 15e-3  # about what both take
HOST = 8
NETWORKS = (25e9, 50e9, 100e9)  # bytes a second into and out of a host
RANKS = (1, 2, 8, 16, 32, 64, 128, 256, 512, 1024)
CHANCES = (1e-7, 1e-6, 1e-5)  # of a rank to run out of memory in an update, each by itself
LOST = 50_700 * 3600  # seconds of one card to an unplanned stop: 419 in 54 days of 16,384 (The Llama 3 Herd of Models)
RESTART = 60.0  # assumed: torchrun, imports, the network, the checkpoint, NCCL


def reduction(ranks: int, size: float, network: float) -> float:
    """Seconds of the sum of `size` bytes over all ranks."""
    if ranks == 1:
        return 0.0
    hosts = math.ceil(ranks / HOST)
    rate = min(NVLINK, network) if hosts > 1 else NVLINK
    ring = 2 * (ranks - 1) / ranks * size / rate + 2 * ((ranks - hosts) * HOP_NVLINK + (hosts - 1) * HOP_NETWORK)
    levels = math.ceil(math.log2(hosts))
    tree = 2 * size / rate + 2 * ((min(ranks, HOST) - 1) * HOP_NVLINK + levels * HOP_NETWORK)
    return BEGIN + min(ring, tree)


def vote(ranks: int, *, is_tree: bool = False) -> float:
    """Seconds of one vote, as gloo's all-gather passes it on now, or along a tree."""
    rounds = math.ceil(math.log2(ranks)) if is_tree else ranks - 1
    return rounds * ROUND + ranks * READ if ranks > 1 else 0.0


def update(ranks: int, recipe: str, network: float, *, is_tree: bool = False) -> float:
    """Seconds of an update as graphs; its vote runs beside them, so that only what is longer shows."""
    compute, size = RECIPES[recipe]
    return max(compute + reduction(ranks, size, network), GRAPH * vote(ranks, is_tree=is_tree))


def largest(share: float, seconds: float, *, votes: int, is_tree: bool = False) -> int:
    """The most ranks with which the votes take at most this share of an update of so many seconds."""
    fit = (n for n in range(1, 100_000) if votes * vote(n, is_tree=is_tree) > share * seconds)
    return next(fit) - 1


def left(chance: float, cost: float) -> float:
    """The share of throughput that is left where each update fails with this chance, at `cost` updates."""
    return 1 / (1 + chance * cost)


def times() -> Iterator[str]:
    """The table of what an update takes."""
    for name, (compute, size) in RECIPES.items():
        yield f"\n{name}: {compute * 1e3:.2f} ms of computation, {size / 1e6:.0f} MB of gradients\n"
        yield from table(
            "ranks", "sum at 25 / 50 / 100 GB/s, ms", "a vote: now / tree, ms",
            "of ideal throughput, at 50 GB/s: now / tree",
        )  # fmt: skip
        for ranks in RANKS:
            sums = " / ".join(f"{reduction(ranks, size, each) * 1e3:.2f}" for each in NETWORKS)
            votes = " / ".join(f"{vote(ranks, is_tree=tree) * 1e3:.2f}" for tree in (False, True))
            shares = (compute / update(ranks, name, NETWORKS[1], is_tree=tree) for tree in (False, True))
            yield row(f"{ranks:,}", sums, votes, " / ".join(f"{share:.0%}" for share in shares))


def faults() -> Iterator[str]:
    """The table of what failures cost."""
    yield from table(
        "ranks", f"one in how many updates runs out of memory, for {' / '.join(map(str, CHANCES))} a rank",
        "throughput left", "hours between lost ranks", "throughput left",
    )  # fmt: skip
    for ranks in RANKS[2:]:
        some = [-math.expm1(ranks * math.log1p(-chance)) for chance in CHANCES]
        often, kept = (f"{1 / each:,.0f}" for each in some), (f"{left(each, RETRIED / UPDATE):.3%}" for each in some)
        hours = LOST / ranks / 3600
        yield row(
            f"{ranks:,}", " / ".join(often), " / ".join(kept), f"{hours:,.0f}", f"{left(RESTART, ranks / LOST):.3%}"
        )


def measured(count: int = 1000) -> None:
    """Print what a vote of these ranks takes, over gloo on the host."""
    with joined(torch.device("cpu")) as here:
        for _ in range(count):
            here.vote(Site.UPDATE)
        started = time.perf_counter()
        for _ in range(count):
            here.vote(Site.UPDATE)
        if here.is_first:
            print(f"{here.size} ranks: {(time.perf_counter() - started) / count * 1e3:.2f} ms a vote")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure-vote", action="store_true", help="under torchrun: time votes on this machine")
    if parser.parse_args().measure_vote:
        measured()
        return
    for line in (*times(), "", *faults(), ""):
        print(line)
    for is_tree, name in ((False, "now"), (True, "tree")):
        for votes in (GRAPH, OPERATORS):
            most, all_of_it = (largest(share, UPDATE, votes=votes, is_tree=is_tree) for share in (0.01, 1))
            print(
                f"{votes} votes an update ({name}) take 1 % of {UPDATE * 1e3:.0f} ms up to {most} ranks, and less than "
                f"all of it up to {all_of_it}"
            )


if __name__ == "__main__":
    main()
