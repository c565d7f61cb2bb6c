"""Which parts of a network to recompute, and how deeply: the least added time with which an update fits.

A trace of the update under each depth, used for all blocks alike, says what each block keeps, takes while it runs, and
costs. Dynamic programming (`depths`) chooses a depth for each block: the least time under which no block meets more
bytes than there are. That is done for many rooms, since what is lost where memory is divided depends on the plan: it is
estimated from a replay of a trace that is put together (`estimates`). What seems best is traced, until one fits.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial

from torch import nn

from adaptive_trainer.config.schema import Config
from adaptive_trainer.ladder.resolve import with_plan, without_savers
from adaptive_trainer.models.recomputing.plan import CONTAINERS, NONE, Level, Plan, blocks_of
from adaptive_trainer.models.savers.recompute import AUTO, BLOCKS, PLANNED
from adaptive_trainer.planning.depths import Chosen, Depths
from adaptive_trainer.planning.estimates import Estimates
from adaptive_trainer.planning.predictor import Predictor
from adaptive_trainer.prediction.costs import Rates
from adaptive_trainer.prediction.estimator import CAPACITY_STEP
from adaptive_trainer.prediction.stretches import Profile, profile
from adaptive_trainer.prediction.tracer import TraceError, TraceSpec
from adaptive_trainer.prediction.transfer import update_seconds
from adaptive_trainer.prediction.workspaces import Workspaces

MARGIN = 1.04  # of the smallest limit: predictions are not exact
NEAR = 1.01  # times the least limit that is found: what is taken for it, where it saves time
SHARES = (1.05, 1.01, 0.98, 0.95, 0.92)  # of the memory there is, that an estimate is to keep to: it is not exact
ROOMS = 48  # from the least that can be alive up to what is alive without recomputation, for which depths are sought
MOST_TRACES = 6  # after which none is begun with: a trace takes up to a second
CHECKED = 2  # choices that seem to need the least memory, and are traced to see whether they do
WORK = 200_000  # events that are replayed for choices that differ in one block from a good one
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

    def __init__(
        self, outline: nn.Module, spec_of: SpecOf, limit_of: LimitOf, rates: Rates, workspaces: Workspaces
    ) -> None:
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
        self._model = Depths(self._profiles, self._having, rates.link)
        self._estimates = Estimates(self._model, self._profiles, workspaces, spec_of(NONE))
        self._tries = WORK // len(self._profiles[0].sections.trace.kinds)
        cheap = self._alike(1)
        alone = self._estimates.limit(cheap)
        self._estimates.further = (self.limit(self._plan(cheap)) or alone) - alone

    def fitting(self, room: int) -> str:
        """The plan of the least time that is predicted to fit `room` bytes; where none does, as `least`."""
        target = room / MARGIN
        found = self._fastest(target)
        if found is None and self._fits(self._smallest, target):
            found = self._smallest
        return self.least() if found is None else self._plan(found)

    def least(self) -> str:
        """A plan that is predicted to need about the least memory, and of these, the one of the least time."""
        return self._plan(self._least)

    def seconds(self, plan: str) -> float:
        """The time of an update under a plan."""
        return _seconds(self._profile(plan), self._rates)

    def limit(self, plan: str) -> int | None:
        """The smallest limit under a plan."""
        if plan not in self._limits:
            self._limits[plan] = self._limit_of(plan)
        return self._limits[plan]

    @cached_property
    def _candidates(self) -> list[Chosen]:
        """The fastest choices in several rooms, and those that are alike in all blocks, the fastest first."""
        model, alike = self._model, [self._alike(depth) for depth in range(len(self.choices))]
        lowest, highest = model.peak(model.least()), model.peak(self._alike(0))
        solved = [model.solve(lowest * (highest / lowest) ** (step / ROOMS)) for step in range(ROOMS)]
        found = {self._plan(each): each for each in (*alike, model.least(), *filter(None, solved))}
        return sorted(found.values(), key=model.seconds)

    def _fastest(self, target: float) -> Chosen | None:
        """The fastest choice that is found to fit, from those that seem to need a little more on."""
        found, most = list[Chosen](), len(self._limits) + MOST_TRACES
        for share in SHARES:
            seems = partial(self._estimates.fits, limit=target * share)
            first = next(filter(seems, self._candidates), None)
            if first is None or len(self._limits) >= most:
                break
            ways = self._ways(first, target * share)
            if self._fits(ways[-1], target):
                found.append(ways[-1])
                break
            if self._fits(first, target):
                found.append(self._last(ways, target))
        return min(found, key=self._model.seconds, default=None)

    def _ways(self, chosen: Chosen, target: float) -> list[Chosen]:
        """A choice, and others that seem to fit and take less time, with blocks changed one by one."""
        ways, tries = [chosen], self._tries
        while tries > 0:
            for other in itertools.islice(self._likely(ways[-1], target), tries):
                tries -= 1
                if self._estimates.fits(other, target):
                    ways.append(other)
                    break
            else:
                break
        return ways

    def _last(self, ways: Sequence[Chosen], target: float) -> Chosen:
        """The last that fits, where the first does: by halves, as if each took more memory than the one before."""
        return ways[bisect_left(ways, True, 1, key=lambda each: not self._fits(each, target)) - 1]

    def _likely(self, chosen: Chosen, target: float) -> Iterator[Chosen]:
        """Choices that differ in one block, take less time and may fit, the fastest first."""
        model, limit = self._model, self._model.seconds(chosen)
        # With less than half of what is lost now, one that meets more than this would be luck.
        most = target - (self._estimates.limit(chosen) - model.peak(chosen)) / 2
        faster = itertools.takewhile(lambda each: model.seconds(each) < limit, model.neighbours(chosen))
        return (each for each in faster if model.peak(each) <= most)

    @cached_property
    def _least(self) -> Chosen:
        least, limit = self._smallest, self.limit(self._plan(self._smallest))
        if limit is None:
            return least
        return self._last(self._ways(least, self._estimates.limit(least) * NEAR), limit * NEAR)

    @cached_property
    def _smallest(self) -> Chosen:
        """The choice of the least memory that is found."""
        estimates, tight = self._estimates, sorted(self._candidates, key=self._model.peak)
        found = [tight[0]]

        def improve(others: Sequence[Chosen]) -> None:
            for other in others:
                if estimates.fits(other, estimates.limit(found[-1]) - CAPACITY_STEP):
                    found.append(other)

        improve(tight[1:])
        improve(self._model.neighbours(found[-1])[: self._tries])
        return min(found[-CHECKED:], key=lambda chosen: self.limit(self._plan(chosen)) or math.inf)

    def _fits(self, chosen: Chosen, target: float) -> bool:
        return (self.limit(self._plan(chosen)) or math.inf) <= target

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


def _seconds(found: Profile, rates: Rates) -> float:
    return update_seconds(found.seconds, found.moved, rates.link)


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
        self._times: dict[str, float] = {}

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
        # Where what is kept is offloaded, to keep as much as fits takes most time rather than least.
        if asked == AUTO and (room is None or (self._fits(plain, room) and not plain.trainer.offload)):
            return plain
        search = self._search(plain)
        if search is None:
            return with_plan(config, BLOCKS)
        return with_plan(config, search.fitting(room) if asked == AUTO and room is not None else search.least())

    def added_time(self, config: Config) -> float | None:
        """The predicted time of an update under a known plan, over that with all activations kept on the device."""
        with suppress(TraceError):
            return self.seconds(config) / self.seconds(without_savers(config))
        return None

    def seconds(self, config: Config) -> float:
        """The predicted time of the first micro-batch of an update under a known plan.

        Raises:
            TraceError: the network cannot be traced.
        """
        key = repr(self.predictor.key(config))
        if key not in self._times:
            rates = self.predictor.spec.rates(config.trainer.tf32)
            self._times[key] = _seconds(profile(self._spec_of(config), (), rates), rates)
        return self._times[key]

    def _fits(self, config: Config, room: int) -> bool:
        least = self.predictor.predict(config).min_capacity_bytes
        return least is not None and MARGIN * least <= room

    def _search(self, plain: Config) -> Search | None:
        key = repr(self.predictor.key(plain))
        if key not in self._searches:
            self._searches[key] = self._begun(plain)
        return self._searches[key]

    def _spec_of(self, config: Config) -> TraceSpec:
        """The update of a single micro-batch."""
        spec = self.predictor.spec_of(config)
        return replace(spec, micro_batches=spec.micro_batches[:1], eval_batch_size=None, stored_size=0, key=None)

    def _begun(self, plain: Config) -> Search | None:
        predictor = self.predictor

        def spec_of(plan: str) -> TraceSpec:
            return self._spec_of(with_plan(plain, plan))

        def limit_of(plan: str) -> int | None:
            return predictor.limit(with_plan(plain, plan))

        with suppress(TraceError, ValueError):
            outline = predictor.networks.outline_or_network(plain)
            return Search(outline, spec_of, limit_of, predictor.spec.rates(plain.trainer.tf32), predictor.workspaces)
        return None
