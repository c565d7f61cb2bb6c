"""A depth for each block of a network: the least time in given memory, by dynamic programming along the forward pass.

What a block meets depends on what those before it keep, and on nothing else of them. So of two ways to reach a block,
one that keeps no less and takes no less time than the other leads nowhere better.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from adaptive_trainer.models.recomputing.plan import Level
from adaptive_trainer.prediction.stretches import Profile, Stretch
from adaptive_trainer.prediction.transfer import update_seconds

STEPS = 2000  # of the room: of ways that keep as much but for one, the fastest is followed
PRECISE = 1e-3  # share of the least memory to which that is found

Chosen = tuple[Sequence[int], Level]  # the depth of each block, in the order of `Depths.paths`, and what is between
BETWEEN = ""  # the name of what lies between two blocks, which is cheap (depth 1) or kept (0) everywhere


class Depths:
    """What each stretch of the network keeps, takes and costs under each depth.

    Args:
        profiles: of each depth, used for all blocks alike; the first keeps everything, the second what is dear.
        having: for each depth, the blocks that can have it.
        link: bytes a second at which activations are offloaded, in one direction.

    Attributes:
        names: the block that each stretch of the forward pass is; empty between two.
        paths: the blocks, in the order of the forward pass.

    Raises:
        ValueError: the blocks run in another order from one profile to the next.
    """

    def __init__(self, profiles: Sequence[Profile], having: Sequence[Collection[str]], link: float) -> None:
        self.names = [stretch.part for stretch in profiles[0].stretches]
        if any([stretch.part for stretch in each.stretches] != self.names for each in profiles):
            raise ValueError("the parts of the network run in another order from one pass to the next")
        self.paths = list(dict.fromkeys(filter(None, self.names)))
        self._kept, self._work, self._compute, self._moved = (  # by depth and stretch
            np.array([[getattr(stretch, figure) for stretch in each.stretches] for each in profiles])
            for figure in ("kept", "work", "seconds", "moved")
        )
        self._link = link
        # Each way: beside how much of the computation that is, only the sum shows.
        self._seconds = self._compute + 2 * self._moved / link
        self._anyway = profiles[0].peak - max(_met(profiles[0].stretches))
        self._allowed = {
            path: [depth for depth, those in enumerate(having) if path in those] for path in self.paths
        } | {BETWEEN: [0, 1]}

    def solve(self, room: float) -> Chosen | None:
        """The depths of the least time under which no stretch meets more than `room` bytes; None where none do."""
        found = [chosen for alike in self._alike() if (chosen := self._fastest(room, alike)) is not None]
        return min(found, key=self.seconds, default=None)

    def least(self) -> Chosen:
        """The depths under which the stretch that meets most meets least; of those that are near to it, the fastest."""
        found: Chosen = [those[-1] for those in map(self._allowed.__getitem__, self.paths)], Level.CHEAP
        low, high = 0.0, self.peak(found)
        while high - low > PRECISE * high:
            middle = (low + high) / 2
            chosen = self.solve(middle)
            if chosen is None:
                low = middle
            else:
                found, high = chosen, self.peak(chosen)
        return self.solve((1 + PRECISE) * high) or found

    def peak(self, chosen: Chosen) -> float:
        """Bytes that the stretch meets that meets most."""
        depths = self.by_stretch(chosen)
        kept, work = (table[depths, range(len(depths))] for table in (self._kept, self._work))
        return float((np.cumsum(kept) - kept + work).max() + self._anyway)

    def seconds(self, chosen: Chosen) -> float:
        """Seconds of an update."""
        depths = self.by_stretch(chosen)
        compute, moved = (table[depths, range(len(depths))].sum() for table in (self._compute, self._moved))
        return update_seconds(float(compute), int(moved), self._link)

    def neighbours(self, chosen: Chosen) -> list[Chosen]:
        """All choices that differ in one block, the fastest first."""
        depths, between = chosen
        changed = (
            ([*depths[:place], other, *depths[place + 1 :]], between)
            for place, path in enumerate(self.paths)
            for other in self._allowed[path]
            if other != depths[place]
        )
        return sorted(changed, key=self.seconds)

    def by_stretch(self, chosen: Chosen) -> list[int]:
        """The depth of each stretch."""
        depths, between = chosen
        of = dict(zip(self.paths, depths, strict=True)) | {BETWEEN: int(between == Level.CHEAP)}
        return [of[name] for name in self.names]

    def _alike(self) -> Iterator[dict[str, int]]:
        """The depths of what runs more than once, which the walk below has no choice about."""
        often = [name for name, count in Counter(self.names).items() if count > 1 and name]
        for between, depth in itertools.product(self._allowed[BETWEEN], range(len(self._kept)) if often else [0]):
            if all(depth in self._allowed[name] for name in often):
                yield dict.fromkeys(often, depth) | {BETWEEN: between}

    def _fastest(self, room: float, alike: Mapping[str, int]) -> Chosen | None:
        kept, seconds = np.array([float(self._anyway)]), np.zeros(1)  # of all ways to where the walk is
        steps: list[tuple[Any, Any]] = []  # of each way: which one it goes on from, and by which depth
        for stretch, name in enumerate(self.names):
            depths = [alike[name]] if name in alike else self._allowed[name]
            fit = [np.flatnonzero(kept + self._work[depth, stretch] <= room) for depth in depths]
            before, depth = np.concatenate(fit), np.repeat(depths, [len(each) for each in fit])
            kept = kept[before] + self._kept[depth, stretch]
            seconds = seconds[before] + self._seconds[depth, stretch]
            best = _undominated(kept, seconds, room / STEPS)
            kept, seconds = kept[best], seconds[best]
            steps.append((before[best], depth[best]))
        if not len(kept):
            return None
        way, chosen = int(seconds.argmin()), dict[str, int]()
        for name, (before, depth) in zip(reversed(self.names), reversed(steps), strict=True):
            chosen[name] = int(depth[way])
            way = before[way]
        return [chosen[path] for path in self.paths], Level.CHEAP if alike[BETWEEN] else Level.KEEP


def _undominated(kept: Any, seconds: Any, step: float) -> Any:
    """The ways that are faster than all that keep less; the fastest of those in a step of memory."""
    order = np.lexsort((kept, seconds, kept // step))
    fastest = np.minimum.accumulate(seconds[order])
    return order[np.diff(fastest, prepend=np.inf) < 0]


def _met(stretches: Sequence[Stretch]) -> list[int]:
    before, met = 0, []
    for stretch in stretches:
        met.append(before + stretch.work)
        before += stretch.kept
    return met
