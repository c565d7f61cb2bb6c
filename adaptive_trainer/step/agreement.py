"""What the ranks of a run agree on within one update; of one rank alone nothing.

In order: gradients are made, with no collective operation. Vote. They are summed into buffers made before. They are
clipped. Vote; where a step may allocate, the vote follows it, and each rank keeps copies until then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from adaptive_trainer import oom
from adaptive_trainer.data.position import shares
from adaptive_trainer.distributed.gradients import Gradients
from adaptive_trainer.distributed.peers import PeerFailed, Site, Status, peers
from adaptive_trainer.models.losses import correct
from adaptive_trainer.models.stepping import StepMemory
from adaptive_trainer.step.program import Gather, Program

MAY_ALLOCATE = (False, None, True)  # of a step; what counts among ranks is the last that one of them says


class Agreement:
    """Votes of one update of this rank.

    Args:
        program: the update.
        step_memory: what is known of its step.
        parameters: that it may change.

    Attributes:
        peers: the ranks.
        may_allocate: the step of some rank; as `StepMemory`.
    """

    def __init__(self, program: Program, step_memory: StepMemory, parameters: list[nn.Parameter]) -> None:
        self.peers = peers()
        self.may_allocate: bool | None = None
        self._program, self._step_memory = program, step_memory
        self._gradients = Gradients(parameters, self.peers)

    @property
    def gather(self) -> Gather | None:
        """What sums the gradients over the ranks; None of one alone."""
        return self._gather if self.peers.size > 1 else None

    @property
    def tensors(self) -> list[Tensor]:
        """What it keeps on the device from one update to the next."""
        return self._gradients.tensors

    def begin(self, here: int, samples: int) -> bool:
        """An update of so many samples begins, with some of them here; whether there is anything to do.

        Args:
            samples: of all ranks; 0, in a dry run: as if each had as many as this one.
        """
        if self.peers.size == 1:
            return here > 0
        self._program.whole = self.whole(here, samples)
        return True

    def whole(self, here: int, samples: int) -> int:
        """Samples of an update on all ranks; as `begin`. On one rank those that could be read."""
        return here if self.peers.size == 1 else samples or self.peers.size * here

    def parts(self, samples: int) -> tuple[int, ...]:
        """The samples of an update that are on each rank."""
        return shares(samples, self._program.recipe.weights(self.peers.size))

    def part(self, samples: int) -> int:
        """The samples of an update that are on this rank."""
        return self.parts(samples)[self.peers.rank]

    def look(self) -> None:
        """Find out about the step that comes next."""
        self._step_memory.look()
        self.may_allocate = self._step_memory.may_allocate
        if self.peers.size > 1:
            self.peers.vote(Site.UPDATE, Status.WELL, MAY_ALLOCATE.index(self.may_allocate))
            self.may_allocate = MAY_ALLOCATE[int(max(row[0] for row in self.peers.numbers))]

    @property
    def entering(self) -> Callable[[], None] | None:
        """What the step begins with, where it takes no memory: up to then another rank may have failed."""
        return self._vote if self.peers.size > 1 and self.may_allocate is False else None

    def after_step(self) -> None:
        """The step is done; where it may allocate, it may have gone wrong on another rank.

        Raises:
            PeerFailed: memory has run out there.
        """
        if self.peers.size > 1 and self.may_allocate is not False:
            self._vote()

    def _vote(self) -> None:
        self.peers.vote(Site.UPDATE)

    def evaluated(self) -> None:
        """A batch was evaluated; raises as `after_step`."""
        self.peers.vote(Site.EVALUATION)

    def settled(self, failure: oom.Failure, heard: Status | None, site: Site) -> oom.Failure:
        """Tell the peers of a failure, unless it is theirs; return it as all of them see it.

        Args:
            heard: what a vote has said already; None: the failure is this rank's own.
        """
        if self.peers.size == 1:
            return failure
        own = Status.FAILED_FOR_GOOD if failure.exact else Status.FAILED
        worst = self.peers.vote(site, own) if heard is None else heard
        return replace(failure, exact=worst is Status.FAILED_FOR_GOOD)

    def least(self, number: int) -> int:
        """The least of the numbers that the ranks give before an update.

        Raises:
            PeerFailed: one of them is out of memory elsewhere.
        """
        self.peers.vote(Site.ENGINE, Status.WELL, number)
        return int(min(row[0] for row in self.peers.numbers))

    def collect(self, weights: list[Tensor]) -> None:
        """Put this rank's gradients where they are summed.

        Args:
            weights: the denominators of the parts here.
        """
        self._gradients.collect(weights)

    def add(self, *, with_weights: bool) -> None:
        """Sum the gradients of all ranks, and their denominators where the loss counts something else than samples."""
        self._gradients.add(with_weights=with_weights)

    def hand_out(self, *, with_weights: bool) -> None:
        """Give the parameters the gradients of the whole update."""
        weight = self._gradients.hand_out()
        if with_weights:
            correct(self._program.parameters, self._whole, [weight])

    @property
    def _whole(self) -> int:
        """Samples of the update on all ranks."""
        assert self._program.whole is not None, "begun"
        return self._program.whole

    def _gather(self, weights: list[Tensor], samples: int, is_sum: bool) -> bool:
        found = self._gradients.prepare()
        self.peers.vote(Site.UPDATE, Status.WELL, samples, found, len(weights), is_sum)
        counts, checksums, parts, sums = zip(*self.peers.numbers, strict=True)
        if not any(counts):  # no image could be read
            return False
        self._gradients.settle(checksums)
        self.collect(weights)
        has_weights = any(parts)  # a rank without samples has none
        self.add(with_weights=has_weights)
        self.hand_out(with_weights=has_weights)
        if not has_weights and sum(counts) != self._whole and not any(sums):  # some images could not be read
            gradients = [each.grad for each in self._program.parameters if each.grad is not None]
            torch._foreach_mul_(gradients, self._whole / sum(counts))
        return True


def is_elsewhere(error: BaseException) -> bool:
    """Whether a peer has failed outside of this work: whoever meets it there does it again."""
    return isinstance(error, PeerFailed) and error.is_elsewhere
