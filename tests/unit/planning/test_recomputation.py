"""Plans of recomputation: they fit where they say so, and no plan of a small network is much better."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from statistics import median

import pytest
import torch
from torch import Tensor, nn

from adaptive_trainer.config.overrides import compose_config, typed
from adaptive_trainer.config.schema import Config, ModelConfig
from adaptive_trainer.errors import ConfigError
from adaptive_trainer.ladder.resolve import with_plan
from adaptive_trainer.models.recomputing.plan import NONE, Level, Plan
from adaptive_trainer.planning.concrete import predicted
from adaptive_trainer.planning.device_spec import spec_of
from adaptive_trainer.planning.predictor import Predictor
from adaptive_trainer.planning.recomputation import MARGIN, NEAR, Planner, Search
from adaptive_trainer.prediction.estimator import CAPACITY_STEP

pytestmark = pytest.mark.long

MiB = 2**20


def settings(*overrides: str) -> Config:
    return typed(compose_config(["card=rtx2060", *overrides]))


def planner(config: Config, factory: object = None) -> tuple[Planner, Predictor]:
    predictor = Predictor(spec_of(config), num_classes=10, make_model=factory)  # type: ignore[arg-type]
    return Planner(predictor), predictor


@pytest.fixture(scope="module")
def efficientnet() -> tuple[Config, Planner, Predictor]:
    config = settings("trainer.recompute=auto")
    return config, *planner(config)


@pytest.mark.parametrize("share", [0.7, 0.45])
def test_a_plan_fits_and_what_it_adds_grows(share: float, efficientnet: tuple[Config, Planner, Predictor]) -> None:
    config, found, predictor = efficientnet
    plain = predictor.predict(with_plan(config, NONE)).min_capacity_bytes
    assert plain is not None
    planned = found.planned(config, int(share * plain))
    least = predictor.limit(planned)
    assert least is not None
    assert MARGIN * least <= share * plain
    added, looser = (found.added_time(found.planned(config, int(room * plain))) for room in (share, share + 0.2))
    assert added is not None
    assert looser is not None
    assert 1.0 < looser <= added < 1.4


def test_nothing_is_recomputed_where_it_fits_without(efficientnet: tuple[Config, Planner, Predictor]) -> None:
    config, found, _ = efficientnet
    assert found.planned(config, 2**40).trainer.recompute == NONE
    assert found.planned(config, None).trainer.recompute == NONE


def test_most_is_the_plan_of_least_memory(efficientnet: tuple[Config, Planner, Predictor]) -> None:
    config, found, predictor = efficientnet
    most = found.planned(with_plan(config, "most"), None)
    limits = [predictor.limit(with_plan(config, plan)) for plan in (most.trainer.recompute, "blocks", "cheap", NONE)]
    assert limits[0] is not None
    assert limits[0] <= NEAR * min(filter(None, limits))
    assert found.planned(config, MiB) == most  # what fits nowhere


def test_a_plan_that_is_given_stays(efficientnet: tuple[Config, Planner, Predictor]) -> None:
    config, found, _ = efficientnet
    given = with_plan(config, "cheap:rest+whole:blocks.1.0")
    assert found.planned(given, MiB) is given


class Chain(nn.Module):
    """A few blocks of different widths."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        pairs = itertools.pairwise((3, *widths))
        self.blocks = nn.Sequential(*(self.block(*pair) for pair in pairs))
        self.head = nn.Linear(widths[-1], 10)

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(inputs, 4 * outputs, 3, 1, 1), nn.BatchNorm2d(4 * outputs), nn.SiLU())
            self.project = nn.Sequential(nn.Conv2d(4 * outputs, outputs, 1), nn.BatchNorm2d(outputs))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.project(self.body(x))
            return out

    def block(self, inputs: int, outputs: int) -> nn.Module:
        return self.Block(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(x).mean((2, 3)))
        return out


def all_plans(search: Search) -> Iterator[str]:
    """Every combination of depths."""
    for between in ("keep", "cheap"):
        for depths in itertools.product(("keep", "cheap", "whole", "most", "least"), repeat=len(search.blocks)):
            groups = [f"{depth}:{path}" for depth, path in zip(depths, search.blocks, strict=True)]
            yield str(Plan.parse("+".join([*groups, f"{between}:rest"])))


def test_estimates_are_exact_for_one_depth_and_near_for_several() -> None:
    config = settings("trainer.recompute=auto", "trainer.batch_size=8", "data.image_size=128", "model.name=own")
    found, _ = planner(config, lambda model, classes: Chain((8, 24, 12, 16)))
    search = found._search(with_plan(config, NONE))
    assert search is not None
    estimates, model, draw = search._estimates, search._model, random.Random(0)
    for depth in range(len(search.choices)):
        alike = search._alike(depth)
        alone = estimates.limit(alike)
        assert alone == search.limit(search._plan(alike))
        assert estimates.fits(alike, alone)
        assert not estimates.fits(alike, alone - CAPACITY_STEP)
    errors = []
    for _ in range(12):
        mixed = [draw.randrange(len(search.choices)) for _ in model.paths], Level.CHEAP
        limit = search.limit(search._plan(mixed))
        assert limit is not None
        errors.append(abs(estimates.limit(mixed) / limit - 1))
    assert median(errors) < 0.05
    assert max(errors) < 0.25


def test_most_takes_no_time_for_nothing(efficientnet: tuple[Config, Planner, Predictor]) -> None:
    config, found, _ = efficientnet
    search = found._search(with_plan(config, NONE))
    assert search is not None
    most, deepest = search.least(), search._plan(search._alike(len(search.choices) - 1))
    limits = search.limit(most), search.limit(deepest)
    assert limits[0] is not None
    assert limits[1] is not None
    assert limits[0] <= NEAR * limits[1]
    assert search.seconds(most) < search.seconds(deepest)


@pytest.mark.slow
def test_few_plans_of_all_are_better() -> None:
    over = []  # times the best plan's
    for widths in ((8, 16, 8), (4, 24, 12), (16, 8, 4)):
        config = settings("trainer.recompute=auto", "trainer.batch_size=8", "data.image_size=128", "model.name=own")
        found, _ = planner(config, lambda model, classes, widths=widths: Chain(widths))
        search = found._search(with_plan(config, NONE))
        assert search is not None
        limits = {plan: search.limit(plan) for plan in all_plans(search)}
        smallest, largest = min(filter(None, limits.values())), limits[NONE]
        assert largest is not None
        for share in (0.9, 0.7, 0.5, 0.4):
            room = int(MARGIN * (smallest + share * (largest - smallest)))
            chosen = found.planned(config, room).trainer.recompute
            best = min(search.seconds(plan) for plan, least in limits.items() if least and MARGIN * least <= room)
            over.append(search.seconds(chosen) / best)
    assert median(over) < 1.001
    assert max(over) < 1.25


def test_what_is_kept_is_offloaded_in_as_little_time_as_fits(efficientnet: tuple[Config, Planner, Predictor]) -> None:
    config, found, predictor = efficientnet
    offloading = replace(config, trainer=replace(config.trainer, offload=True))
    plans = NONE, found.planned(with_plan(config, "most"), None).trainer.recompute
    all_kept, most = (with_plan(offloading, plan) for plan in plans)
    times, limits = zip(*((found.added_time(each), predictor.limit(each)) for each in (all_kept, most)), strict=True)
    assert all(times)
    assert all(limits)
    room = int(1.2 * MARGIN * max(limits))
    planned = found.planned(offloading, room)
    added = found.added_time(planned)
    assert planned.trainer.offload
    assert MARGIN * (predictor.limit(planned) or room) <= room
    assert added is not None
    assert 1.0 < added <= min(times)  # both fit too


def test_the_link_to_the_host_decides_what_offloading_takes() -> None:
    config = settings("trainer.recompute=cheap", "trainer.offload=true", "model.name=resnet18")
    times = []
    for lanes in (16, 4):
        narrow = replace(config, card=replace(config.card, pcie_generation=3, pcie_lanes=lanes))
        found = predicted(planner(narrow)[0], narrow, None)[1]
        assert found.offloaded_bytes
        times.append(found.added_time or 0.0)
    assert times[1] > times[0] > 1
    link = spec_of(replace(config, card=replace(config.card, pcie_lanes=8))).link
    assert str(link) == "PCIe 3 x16 (assumed)"
    with pytest.raises(ConfigError, match="pcie_lanes"):
        spec_of(replace(config, card=replace(config.card, pcie_generation=3, pcie_lanes=0)))


def test_a_network_that_cannot_be_traced_has_its_blocks_recomputed() -> None:
    class Looks(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.sum()) > -1e9 else x

    config = settings("trainer.recompute=auto", "model.name=own")
    found, _ = planner(config, lambda model, classes: Looks((4, 4)))
    assert found.planned(config, 100 * MiB).trainer.recompute == "blocks"


def test_planning_draws_no_random_numbers(efficientnet: tuple[Config, Planner, Predictor]) -> None:
    config, *_ = efficientnet
    small = replace(config, model=ModelConfig("resnet18"))
    before = torch.get_rng_state()
    planner(small)[0].planned(small, 400 * MiB)
    assert torch.equal(torch.get_rng_state(), before)
