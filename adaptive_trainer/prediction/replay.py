"""Run the allocations of a trace on the model of the allocator, with what a trace cannot show:

- cuBLAS takes a workspace for matrix products. Up to torch 2.14 each thread that multiplies (the caller's, and the one
  that runs backward) keeps its own; from 2.15 on it is held only during the product.
- cublasLt, which multiplies and adds a bias in one go, takes another.
- cuDNN's tensor-core kernels want channels last. For other memory formats they copy all operands of a convolution into
  a workspace.
- For the weight gradient of a 1x1 convolution cuDNN likes to make one float32 gradient per sample and add them up.
- A sum over many rows, such as the gradient of a bias, leaves partial sums in global memory.
"""

from __future__ import annotations

from adaptive_trainer.memory.allocator import AllocatorFull, CachingAllocator
from adaptive_trainer.memory.one_piece import piece, small_blocks
from adaptive_trainer.prediction.recorder import Kind
from adaptive_trainer.prediction.tracer import Trace
from adaptive_trainer.prediction.workspaces import Workspaces

# As in a dry run: the first makes the optimizer's state, the second meets the full peak and shows whether a step
# allocates. Only then are copies made beside the weights, and these stay: two more updates.
UPDATES = COPYING_UPDATES = 2
LATER_UPDATES = 6
SPLIT_LIMIT = {Kind.SPLIT: 5, Kind.SPLIT_HALF: 10}  # of the operands' bytes: more than 5 times their elements


class Replay:
    """One run of a trace on an allocator of its own.

    Args:
        retried: an update that does not fit is rolled back and tried once more with an empty cache, as
            `adaptive_trainer.step.update` does.
        same_kernels: a convolution that finds no workspace does not fit. The memory is in one piece then, no update
            is tried twice, and more of them are made, as each leaves the piece divided in another way.
    """

    def __init__(
        self,
        trace: Trace,
        workspaces: Workspaces,
        capacity: int | None = None,
        *,
        retried: bool = False,
        same_kernels: bool = False,
    ) -> None:
        self.trace = trace
        self.workspaces = workspaces
        self.allocator = CachingAllocator(capacity)
        self.retried = retried and not same_kernels
        self.same_kernels = same_kernels
        self._copies = self._left_out = frozenset(range(*trace.copies))
        self._handles: dict[int, int] = {}  # of allocations that are alive, by number
        self._kept: dict[int, int] = {}  # handles of the workspaces that threads keep

    def run(self) -> None:
        """Make the network and run the updates of a dry run.

        Raises:
            AllocatorFull: the capacity is too small.
        """
        self._play(0, self.trace.update_start)
        made = set(self._handles)
        self._small = small_blocks(self.trace.sizes[number] for number in made)
        self._join()
        for _ in range(UPDATES):
            self._update()
        self._left_out = frozenset()
        for _ in range(COPYING_UPDATES if self._copies else 0):
            self._update()
        if self.same_kernels:
            self._roll_back(made)  # the dry run ends, and training begins
            self._join()
            self._train()

    def evaluate(self) -> None:
        """Run one evaluation batch."""
        self._play(self.trace.evaluation_start, len(self.trace.kinds))

    def _join(self) -> None:
        """As `memory.one_piece.OnePiece` does before the work of a dry run or a training."""
        allocator = self.allocator
        if not self.same_kernels or allocator.capacity is None:
            return
        unreserved = allocator.capacity - allocator.reserved
        size = piece(unreserved, self._small, allocator.peak_small_reserved, allocator.small_reserved)
        allocator.free(allocator.allocate(size))

    def _train(self) -> None:
        """Make updates until one leaves the memory as the one before, or some more."""
        left, before = self.allocator.free_blocks(), None
        for _ in range(LATER_UPDATES):
            if left == before:
                break
            self._update()
            before, left = left, self.allocator.free_blocks()

    def _update(self) -> None:
        before = set(self._handles)
        try:
            self._play(self.trace.update_start, self.trace.evaluation_start)
            return
        except AllocatorFull:
            if not self.retried:
                raise
        # From an empty cache, what the update before has left no longer divides the memory.
        self._roll_back(before)
        self._play(self.trace.update_start, self.trace.evaluation_start)

    def _roll_back(self, before: set[int]) -> None:
        if self._copies <= self._handles.keys():  # they outlive a roll-back
            before |= self._copies
        for number in self._handles.keys() - before:
            self.allocator.free(self._handles.pop(number))
        while self._kept:
            self.allocator.free(self._kept.popitem()[1])
        self.allocator.empty_cache()

    def _play(self, start: int, stop: int) -> None:
        handles, sizes, left_out = self._handles, self.trace.sizes, self._left_out
        allocate, free = self.allocator.allocate, self.allocator.free
        split: int | None = None
        rows = 0
        events = zip(self.trace.kinds[start:stop], self.trace.numbers[start:stop], strict=True)
        for kind, number in events:
            if kind == Kind.BORN:
                if number not in handles and number not in left_out:  # what outlived an earlier update is still there
                    handles[number] = allocate(sizes[number])
            elif kind == Kind.DIED:
                if number in handles:
                    free(handles.pop(number))
            elif kind == Kind.CONV:
                self._convolve(sizes[number] if split is None else split)
                split = None
            elif kind == Kind.SUM:
                rows = sizes[number]
            elif kind == Kind.SUMMED:
                self.allocator.pass_through(
                    self.workspaces.reduction(rows, sizes[number])
                )  # partial sums of all blocks
            elif kind in SPLIT_LIMIT:
                split = sizes[number] if sizes[number] <= SPLIT_LIMIT[kind] * sizes[number + 1] else None
            elif kind != Kind.MOVED:
                self._multiply(kind)

    def _convolve(self, nbytes: int) -> None:
        try:
            self.allocator.pass_through(nbytes)
        except AllocatorFull:
            if self.same_kernels:
                raise
            # Else cuDNN takes a kernel without a workspace, so that alone never makes an update fail.

    def _multiply(self, kind: int) -> None:
        workspaces, allocator = self.workspaces, self.allocator
        if not workspaces.kept:
            allocator.pass_through(workspaces.bias if kind == Kind.GEMM_BIAS else workspaces.gemm)
            return
        # Each thread that multiplies has a workspace of its own; that of cublasLt is one for both.
        thread = Kind.GEMM_BACKWARD if kind == Kind.GEMM_BACKWARD else Kind.GEMM
        for user, nbytes in ((thread, workspaces.gemm), (Kind.GEMM_BIAS, workspaces.bias)):
            if user not in self._kept and user in (thread, kind):
                self._kept[user] = allocator.allocate(nbytes)
