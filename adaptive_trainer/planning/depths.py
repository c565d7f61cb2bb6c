"""The integer program of `recomputation`: a depth for each block of a network, the least time in given memory."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from adaptive_trainer.models.recomputing.plan import Level
from adaptive_trainer.prediction.stretches import Profile, Stretch

MiB, MILLISECOND = 2**20, 1e-3  # the units of the program, whose numbers are then of like size
LONGEST = 2.0  # seconds of search
MEMORY_FOR_TIME = 0.1  # MiB that a millisecond counts as, where the least memory is looked for

Chosen = tuple[Sequence[int], Level]  # the depth of each block, in the order of `Depths.paths`, and what is between


class Depths:
    """A variable for each block and depth, and one more: that what lies between blocks is cheap rather than kept.

    In each stretch of the network, those before it have left what they keep, and it takes what it takes itself.

    Args:
        profiles: of each depth, used for all blocks alike; the first keeps everything, the second what is dear.
        having: for each depth, the blocks that can have it.

    Attributes:
        paths: the blocks, in the order of the forward pass.

    Raises:
        ValueError: the blocks run in another order from one profile to the next.
    """

    def __init__(self, profiles: Sequence[Profile], having: Sequence[Collection[str]]) -> None:
        names = [stretch.part for stretch in profiles[0].stretches]
        if any([stretch.part for stretch in each.stretches] != names for each in profiles):
            raise ValueError("the parts of the network run in another order from one pass to the next")
        self.paths = list(dict.fromkeys(name for name in names if name))
        self._count = len(profiles)
        self._variables = len(self.paths) * self._count + 1
        kept, kept_anyway = self._table(profiles, "kept")
        work, work_anyway = self._table(profiles, "work")
        self._seconds = self._table(profiles, "seconds")[0].sum(0)
        # Bytes that each stretch meets, in each variable and without any.
        self._met = np.cumsum(kept, 0) - kept + work
        met_anyway = np.cumsum(kept_anyway) - kept_anyway + work_anyway
        self._met_anyway = met_anyway + profiles[0].peak - max(_met(profiles[0].stretches))
        self._allowed = np.array([path in each for path in self.paths for each in having], dtype=float)

    def _table(self, profiles: Sequence[Profile], figure: str) -> tuple[Any, Any]:
        """A figure of each stretch (rows) by variable, and what it is in any case."""
        stretches = profiles[0].stretches
        table, anyway = np.zeros((len(stretches), self._variables)), np.zeros(len(stretches))
        for row, stretch in enumerate(stretches):
            values = [getattr(each.stretches[row], figure) for each in profiles]
            if stretch.part:
                first = self.paths.index(stretch.part) * self._count
                table[row, first : first + self._count] = values
            else:
                anyway[row], table[row, -1] = values[0], values[1] - values[0]
        return table, anyway

    def solve(self, room: float) -> Chosen | None:
        """The depths of the least time under which no stretch meets more than `room` bytes; None where none do."""
        return self._solved(self._seconds / MILLISECOND, self._met / MiB, (room - self._met_anyway) / MiB)

    def least(self) -> Chosen:
        """The depths under which the stretch that meets most meets least, and of these, those of the least time."""
        # One more variable: what that stretch meets.
        costs = np.append(self._seconds / MILLISECOND * MEMORY_FOR_TIME, 1.0)
        met = np.hstack([self._met / MiB, -np.ones((len(self._met), 1))])
        found = self._solved(costs, met, -self._met_anyway / MiB)
        return found or ([self._count - 1] * len(self.paths), Level.CHEAP)

    def peak(self, chosen: Chosen) -> float:
        """Bytes that the stretch meets that meets most."""
        return float((self._met @ self._variables_of(chosen) + self._met_anyway).max())

    def seconds(self, chosen: Chosen) -> float:
        """Seconds of an update, beside what takes its time in any case."""
        return float(self._seconds @ self._variables_of(chosen))

    def _variables_of(self, chosen: Chosen) -> Any:
        depths, between = chosen
        x = np.zeros(self._variables)
        x[[place * self._count + depth for place, depth in enumerate(depths)]] = 1
        x[-1] = between == Level.CHEAP
        return x

    def faster(self, chosen: Chosen) -> list[Chosen]:
        """Choices that differ in one block and take less time, those first that save most."""
        depths, between = chosen
        times = self._seconds[:-1].reshape(len(self.paths), self._count)
        allowed = self._allowed.reshape(times.shape)
        found: list[tuple[float, Chosen]] = []
        for place, depth in enumerate(depths):
            for other in range(self._count):
                saved = times[place, depth] - times[place, other]
                if allowed[place, other] and saved > 0:
                    found.append((saved, ([*depths[:place], other, *depths[place + 1 :]], between)))
        return [each for _, each in sorted(found, key=lambda pair: -pair[0])]

    def _solved(self, costs: Any, rows: Any, most: Any) -> Chosen | None:
        """The choice of least cost under which no row comes to more than `most`."""
        from scipy.optimize import Bounds, LinearConstraint, milp  # half a second, and few runs need it

        further = len(costs) - self._variables
        one = np.hstack(
            [np.kron(np.eye(len(self.paths)), np.ones(self._count)), np.zeros((len(self.paths), 1 + further))]
        )
        found = milp(
            costs,
            integrality=[1] * self._variables + [0] * further,
            bounds=Bounds(0, [*self._allowed, 1, *[np.inf] * further]),
            constraints=[
                LinearConstraint(np.round(rows, 2), ub=np.round(most, 2)),
                *([LinearConstraint(one, 1, 1)] if self.paths else []),
            ],
            options={"time_limit": LONGEST, "mip_rel_gap": 1e-3},
        )
        if found.x is None:
            return None
        of_blocks = np.reshape(found.x[: self._variables - 1], (len(self.paths), self._count))
        between = found.x[self._variables - 1] > 0.5
        return of_blocks.argmax(1).tolist(), Level.CHEAP if between else Level.KEEP


def _met(stretches: Sequence[Stretch]) -> list[int]:
    before, met = 0, []
    for stretch in stretches:
        met.append(before + stretch.work)
        before += stretch.kept
    return met
