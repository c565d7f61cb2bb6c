"""Smallest limits of plans that are not traced: their traces are put together from those of one depth each."""

from __future__ import annotations

import math
from collections.abc import Sequence

from adaptive_trainer.planning.depths import Chosen, Depths
from adaptive_trainer.prediction.estimator import runs, smallest_limit
from adaptive_trainer.prediction.replay import Replay
from adaptive_trainer.prediction.splicing import splice
from adaptive_trainer.prediction.stretches import Profile
from adaptive_trainer.prediction.tracer import TraceSpec, no_collection
from adaptive_trainer.prediction.workspaces import Workspaces


class Estimates:
    """Estimates of one recipe, which take about a fiftieth of the time of a trace.

    Args:
        profiles: of each depth, for all blocks alike.
        spec: how the update is made.

    Attributes:
        further: bytes that a whole update needs beside the single micro-batch of the profiles.
    """

    def __init__(self, depths: Depths, profiles: Sequence[Profile], workspaces: Workspaces, spec: TraceSpec) -> None:
        self._depths = depths
        self._sections = [each.sections for each in profiles]
        self._workspaces = workspaces
        self._spec = spec
        self._bounds: dict[tuple[int, ...], tuple[float, float]] = {}  # in which it does not run, and in which it does
        self.further = 0

    def fits(self, chosen: Chosen, limit: float) -> bool:
        """Whether the update seems to run under a limit in bytes."""
        key, room = self._key(chosen), limit - self.further
        too_little, enough = self._bounds.get(key, (0.0, math.inf))
        if too_little < room < enough:
            with no_collection():
                is_enough = runs(splice(self._sections, key), self._workspaces, int(room), self._spec)
            too_little, enough = self._bounds[key] = (too_little, room) if is_enough else (room, enough)
        return room >= enough

    def limit(self, chosen: Chosen) -> int:
        """The smallest limit, in bytes, under which it seems to run."""
        key = self._key(chosen)
        too_little, enough = self._bounds.get(key, (0.0, math.inf))
        if enough - too_little > 1:
            trace, workspaces = splice(self._sections, key), self._workspaces
            with no_collection():
                free = Replay(trace, workspaces)
                free.run()
                most = free.allocator.peak_reserved
                enough = smallest_limit(trace, workspaces, most, self._spec)
            self._bounds[key] = enough - 1, enough
        return int(enough) + self.further

    def _key(self, chosen: Chosen) -> tuple[int, ...]:
        """The profile that shows each stretch best: one between two blocks is as in that of the block before it."""
        depths = self._depths.by_stretch(chosen)
        near = [*depths[1:2], *depths[:-1]]
        places = zip(self._depths.names, depths, near or depths, strict=True)
        return tuple((beside or depth) if depth and not name else depth for name, depth, beside in places)
