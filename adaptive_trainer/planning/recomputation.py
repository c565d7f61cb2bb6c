"""Which parts of a network to recompute, and how deeply: the least added time with which an update fits.

A trace of the update under each depth, used for all blocks alike, says what each block keeps, takes while it runs, and
costs. Dynamic programming (`depths`) chooses a depth for each block: the least time under which no block meets more
bytes than there are. What it chooses is traced and replayed, which gives the smallest limit itself, until one fits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from torch import nn

from adaptive_trainer.config.schema import Config
from adaptive_trainer.ladder.resolve import with_plan
from adaptive_trainer.models.recomputing.plan import CONTAINERS, NONE, Level, Plan, blocks_of
from adaptive_trainer.models.savers.recompute import AUTO, BLOCKS, PLANNED
from adaptive_trainer.planning.depths import Chosen, Depths
from adaptive_trainer.planning.predictor import Predictor
from adaptive_trainer.prediction.costs import Rates
from adaptive_trainer.prediction.stretches import Profile, profile
from adaptive_trainer.prediction.tracer import TraceError, TraceSpec

MARGIN = 1.04  # of the smallest limit: predictions are not exact
SHARES = (1.25, 1.18, 1.12, 1.06, 1.0, 0.94, 0.88, 0.8)  # of the memory there is, for which depths are sought
TIGHT = (1.001, 1.03, 1.07, 1.12, 1.2, 1.3)  # times the least that can be alive
NEIGHBOURS = 8  # plans that differ in one block from one that fits, and are tried for less time
# Operators that a search may trace, about five seconds: large networks have fewer plans tried than small ones.
WORK, LEAST_TRIES = 22_000, 3
FEWEST = 2  # choices of a network without blocks
MOST_PARTS = 4  # kinds of parts of a block that are tried by themselves

SpecOf = Callable[[str], TraceSpec]  # of a plan, as text
LimitOf = Callable[[str], int | None]  # the smallest limit under a plan, in bytes; None where it cannot be predicted


@dataclass(frozen=True)
class Choice:
    """A depth for a block: levels of itself (the empty path) and of parts of it."""

    levels: Mapping[str, Level]

    def of(self, block: str) -> dict[str, Level]:
        """The levels as a plan has them."""
        return {f"{block}.{part}" if part else block: level for part, level in self.levels.items()}


class Search:
    """Looks for plans of one recipe.

    Args:
        outline: the network, on meta or with weights; it is not changed.
        spec_of: the update of a single micro-batch under a plan.
        limit_of: the smallest limit of the recipe under a plan.
        rates: of the device.

    Raises:
        TraceError: the network cannot be traced.
    """

    def __init__(self, outline: nn.Module, spec_of: SpecOf, limit_of: LimitOf, rates: Rates) -> None:
        self._spec_of = spec_of
        self._limit_of = limit_of
        self._rates = rates
        self.blocks = blocks_of(outline)
        self.choices = list(_choices(outline, self.blocks))
        self._limits: dict[str, int | None] = {}
        self._known: dict[str, Profile] = {}
        self._having = [_having(outline, self.blocks, choice) for choice in self.choices]
        alike = ((dict.fromkeys(self.blocks, depth), _between(depth)) for depth in range(len(self.choices)))
        self._profiles = [self._profile(self._written(*each)) for each in alike]
        self._model = Depths(self._profiles, self._having)
        traces = WORK // self._profiles[0].operators - len(self._profiles)
        self._tries = max(LEAST_TRIES, traces // 2)  # of each of the two kinds below

    def fitting(self, room: int) -> str:
        """The plan of the least time that is predicted to fit `room` bytes; the one of least memory where none does."""
        target = room / MARGIN
        return self._plan(self._faster(self._solved(target) or self._tight(target), target))

    def least(self) -> str:
        """The plan that is predicted to need the least memory."""
        return self._plan(self._tight(0.0))

    def seconds(self, plan: str) -> float:
        """The time of an update under a plan."""
        return self._profile(plan).seconds

    def limit(self, plan: str) -> int | None:
        """The smallest limit under a plan."""
        if plan not in self._limits:
            self._limits[plan] = self._limit_of(plan)
        return self._limits[plan]

    def _solved(self, target: float) -> Chosen | None:
        """The first of the fastest choices that fits, from more memory than there is downward; None where none does.

        By how much a limit is above what is alive depends on the plan: it is lost where memory is divided.
        """
        lost = self._over(self._alike(len(self.choices) - 1))
        found, first, last = None, 0, len(SHARES)
        while first < last:  # what fits in more memory takes less time: the first is sought by halves
            middle = (first + last) // 2
            chosen = self._model.solve(target * SHARES[middle] - lost)
            if chosen is None or self._fits(chosen, target):
                found, last = chosen or found, middle
            else:
                first = middle + 1
        return found

    def _tight(self, target: float) -> Chosen:
        """The choice of the least time, among some of little memory, that fits; that of least memory where none does.

        How memory is divided decides here, which no sum of what is alive shows.
        """
        lowest = self._model.peak(self._model.least())
        solved = (self._model.solve(lowest * share) for share in TIGHT)
        tried = [chosen for chosen in solved if chosen is not None]
        tried += [self._alike(depth) for depth in range(1, len(self.choices))]
        tried += self._all_but_largest()
        tried = sorted(tried, key=self._model.peak)[: self._tries]
        fitting = [chosen for chosen in tried if self._fits(chosen, target)]
        if fitting:
            return min(fitting, key=self._model.seconds)
        return min(tried, key=lambda chosen: self.limit(self._plan(chosen)) or math.inf)

    def _all_but_largest(self) -> Iterator[Chosen]:
        """The depth before the last, in which those blocks that take most have the last one."""
        if len(self.choices) > FEWEST:
            deepest = len(self.choices) - 1
            work = {each.part: each.work for each in self._profiles[-2].stretches if each.part}
            by_work = sorted(work, key=lambda block: -work[block])
            for count in (1, 2, 4):
                largest = by_work[:count]
                yield [deepest - (path not in largest) for path in self._model.paths], Level.CHEAP

    def _faster(self, chosen: Chosen, target: float) -> Chosen:
        """The choice with single blocks changed so that it still fits and takes less time, as far as a few tries go."""
        tries = min(NEIGHBOURS, self._tries)
        while tries and self._fits(chosen, target):
            # With less than half of what is lost now, one that meets more than this would be luck.
            most = target - self._over(chosen) / 2
            likely = (other for other in self._model.faster(chosen) if self._model.peak(other) <= most)
            for neighbour in itertools.islice(likely, tries):
                tries -= 1
                if self._fits(neighbour, target):
                    chosen = neighbour
                    break
            else:
                break
        return chosen

    def _fits(self, chosen: Chosen, target: float) -> bool:
        return (self.limit(self._plan(chosen)) or math.inf) <= target

    def _over(self, chosen: Chosen) -> float:
        """What the smallest limit is above the sum of what is alive."""
        limit = self.limit(self._plan(chosen))
        return 0.0 if limit is None else limit - self._model.peak(chosen)

    def _profile(self, plan: str) -> Profile:
        if plan not in self._known:
            self._known[plan] = profile(self._spec_of(plan), self.blocks, self._rates)
        return self._known[plan]

    def _alike(self, depth: int) -> Chosen:
        return [depth] * len(self._model.paths), _between(depth)

    def _plan(self, chosen: Chosen) -> str:
        depths, between = chosen
        return self._written(dict(zip(self._model.paths, depths, strict=True)), between)

    def _written(self, depths: Mapping[str, int], between: Level) -> str:
        """The plan of these depths; a block that lacks the parts of one is cheap."""
        cheap = self.choices[1]
        chosen = {path: self.choices[n] if path in self._having[n] else cheap for path, n in depths.items()}
        return _text(chosen, between)


def _between(depth: int) -> Level:
    """The level of what is between blocks where all have a depth: it is cheap, unless nothing is recomputed."""
    return Level.CHEAP if depth else Level.KEEP


def _text(choices: Mapping[str, Choice], rest: Level) -> str:
    parts: dict[str, Level] = {}
    for block, choice in choices.items():
        levels = choice.of(block)
        parts |= {path: level for path, level in levels.items() if path != block or level != rest or len(levels) > 1}
    return str(Plan(parts, rest))


def _choices(model: nn.Module, blocks: Sequence[str]) -> Iterator[Choice]:
    """The depths, the first of which keeps everything, and the last of which takes least memory."""
    yield Choice({"": Level.KEEP})
    yield Choice({"": Level.CHEAP})
    if not blocks:
        return
    parts = _parts(model, blocks)
    for part in parts:
        yield Choice({"": Level.CHEAP, part: Level.MOST})
    if len(parts) > 1:
        yield Choice({"": Level.CHEAP, **dict.fromkeys(parts, Level.MOST)})
    for level in (Level.WHOLE, Level.MOST, Level.LEAST):
        yield Choice({"": level})


def _parts(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    """The composite modules that blocks have, such as attention and the perceptron behind it."""
    found: dict[str, int] = {}
    for block in blocks:
        for name, child in model.get_submodule(block).named_children():
            weights = [p for p in child.parameters() if p.ndim > 1]
            if type(child) not in CONTAINERS and len(weights) > 1:
                found[name] = found.get(name, 0) + 1
    common = sorted((name for name in found if 2 * found[name] >= len(blocks)), key=lambda name: -found[name])
    return common[:MOST_PARTS] if len(common) > 1 else []


def _having(model: nn.Module, blocks: Sequence[str], choice: Choice) -> set[str]:
    """The blocks that have the parts of a choice."""
    known = {path for path, _ in model.named_modules()}
    return {block for block in blocks if known.issuperset(choice.of(block))}


class Planner:
    """Finds the plans that `trainer.recompute=auto` and `most` stand for, with the device and factories of a predictor.

    What was found is remembered.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self._searches: dict[str, Search | None] = {}

    def planned(self, config: Config, room: int | None) -> Config:
        """The same settings with a plan that is known.

        For `auto` that is the plan of the least added time that is predicted to fit `room` bytes: none, where the
        update fits as it is. For `most` it is the plan of the least memory. Where the network cannot be traced, both
        are its blocks.
        """
        asked = config.trainer.recompute
        if asked not in PLANNED:
            return config
        plain = with_plan(config, NONE)
        if asked == AUTO and (room is None or self._fits(plain, room)):
            return plain
        search = self._search(plain)
        if search is None:
            return with_plan(config, BLOCKS)
        return with_plan(config, search.fitting(room) if asked == AUTO and room is not None else search.least())

    def added_time(self, config: Config) -> float | None:
        """The predicted time of an update under a plan that is known, over the time without one."""
        search = self._search(with_plan(config, NONE))
        if search is None:
            return None
        with suppress(TraceError):
            return search.seconds(config.trainer.recompute) / search.seconds(NONE)
        return None

    def _fits(self, config: Config, room: int) -> bool:
        least = self.predictor.predict(config).min_capacity_bytes
        return least is not None and MARGIN * least <= room

    def _search(self, plain: Config) -> Search | None:
        key = repr(self.predictor.key(plain))
        if key not in self._searches:
            self._searches[key] = self._begun(plain)
        return self._searches[key]

    def _begun(self, plain: Config) -> Search | None:
        predictor = self.predictor

        def spec_of(plan: str) -> TraceSpec:
            spec = predictor.spec_of(with_plan(plain, plan))
            return replace(spec, micro_batches=spec.micro_batches[:1], eval_batch_size=None, stored_size=0, key=None)

        def limit_of(plan: str) -> int | None:
            return predictor.limit(with_plan(plain, plan))

        with suppress(TraceError, ValueError):
            outline = predictor.networks.outline_or_network(plain)
            return Search(outline, spec_of, limit_of, predictor.spec.rates(plain.trainer.tf32))
        return None
