"""Memory that single kernels take beside the tensors, on one kind of card."""

from __future__ import annotations

import math
from dataclasses import dataclass

MiB = 1 << 20
HOPPER = (9, 0)
SCOPED_WORKSPACES_SINCE = (2, 15)
UNIFIED_WORKSPACES_SINCE = (2, 12)
MULTIPROCESSORS = 28  # of an RTX 3060, where the card is not known
# Threads that a multiprocessor holds at once (CUDA C++ Programming Guide, table of technical specifications).
FEWER_THREADS = {(7, 5): 1024, (8, 6): 1536, (8, 7): 1536, (8, 9): 1536, (12, 0): 1536, (12, 1): 1536}
MOST_THREADS = 2048
# Of a kernel that adds up (aten/src/ATen/native/cuda/Reduce.cuh)
BLOCK_THREADS, WARP, VECTOR = 512, 32, 4
LEAST_VALUES, MOST_VALUES = 16, 256  # a thread adds up


@dataclass(frozen=True)
class Workspaces:
    """What libraries and kernels take, in bytes."""

    gemm: int  # workspace of a matrix product
    bias: int  # of one that adds a bias in the same go; 0: none of its own
    kept: bool  # the threads that multiply keep theirs
    threads: int  # that the card's multiprocessors hold at once

    @staticmethod
    def of(capability: tuple[int, int], multiprocessors: int, version: tuple[int, int]) -> Workspaces:
        """Find them for a card and a version of torch such as (2, 11)."""
        gemm = 32 * MiB if capability >= HOPPER else 8 * MiB + 128 * 1024
        kept = version < SCOPED_WORKSPACES_SINCE
        threads = multiprocessors * FEWER_THREADS.get(capability, MOST_THREADS)
        return Workspaces(gemm, 0 if kept and version >= UNIFIED_WORKSPACES_SINCE else MiB, kept, threads)

    def reduction(self, rows: int, outputs: int) -> int:
        """Find what the kernel takes that adds up `rows` values for each of `outputs` values that lie side by side.

        Where the outputs alone do not fill the card, several blocks share the rows and leave their float32 sums in
        global memory: one for each block, output and, as torch has it, each further thread of a row of the block and
        element of a vector. Source: `setReduceConfig` and `global_memory_size` of aten/src/ATen/native/cuda/Reduce.cuh.
        """
        vector = math.gcd(outputs, VECTOR)
        most = BLOCK_THREADS // vector
        across, down = (min(most, _last_power(n)) for n in (outputs // vector, rows))
        height = min(down, most // min(across, WARP))
        width = min(across, most // height)
        values = -(-rows // height)
        grid = -(-(outputs // vector) // width)
        at_once = self.threads // (width * height)
        is_split = rows >= min(height * LEAST_VALUES, MOST_VALUES)  # across the rows of a block
        if not is_split or values < MOST_VALUES or grid > at_once:
            return 0
        blocks = min(max(-(-at_once // grid), -(-values // MOST_VALUES)), -(-values // LEAST_VALUES))
        return 4 * outputs * blocks * width * vector if blocks > 1 else 0


def _last_power(n: int) -> int:
    return 1 << (max(n, 1).bit_length() - 1)
