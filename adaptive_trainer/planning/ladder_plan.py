"""What every rung of a ladder will need, and where a descent will land, on a device that need not be here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from typing import Any

from adaptive_trainer.config.schema import Config
from adaptive_trainer.ladder.resolve import recipe
from adaptive_trainer.ladder.rung import Rung
from adaptive_trainer.memory.usage import format_bytes, in_mib
from adaptive_trainer.models.recomputing.plan import NONE
from adaptive_trainer.planning.concrete import is_enough, predicted
from adaptive_trainer.planning.device_spec import DeviceSpec
from adaptive_trainer.planning.recomputation import Planner
from adaptive_trainer.planning.refusals import image_refusal, no_step
from adaptive_trainer.prediction.estimator import Prediction, Verdict, verdict
from adaptive_trainer.recipe import plan_in_words
from adaptive_trainer.utils.tables import html

JUDGED_BY = "a card (card=rtx2060) or a limit (memory.limit=6GiB)"


@dataclass(frozen=True, kw_only=True)
class Row(Prediction):
    """One rung of a plan; the reason may also say why it is skipped.

    Attributes:
        min_card_bytes: `min_capacity_bytes` with what a CUDA process takes outside the allocator.
    """

    rung: str
    verdict: Verdict
    recipe: str
    min_card_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a ladder will need."""

    spec: DeviceSpec
    rows: tuple[Row, ...]
    lands_on: str | None  # name of the first rung that fits; None where none is known to
    perhaps: tuple[str, ...]  # names of the rungs above it that may fit as well
    exact: str = ""  # what `ladder=exact` would keep of what is given up there, in words

    @property
    def landing(self) -> str:
        """Where a descent lands, in words."""
        perhaps = f"; {', '.join(self.perhaps)} may fit and will be tried first" if self.perhaps else ""
        if self.lands_on is not None:
            return f"lands on rung {self.lands_on}{perhaps}"
        if self.spec.capacity is None:
            return f"{JUDGED_BY} says which rung fits"
        needs = [(row.min_capacity_bytes, row.rung) for row in self.rows if row.min_capacity_bytes is not None]
        if self.perhaps or not needs:
            return f"no rung is sure to fit{perhaps}"
        need, name = min(needs)
        lacks = in_mib(need - self.spec.capacity)
        return f"no rung fits: the smallest, {name}, is predicted to need {in_mib(need)}, {lacks} too much"

    def _repr_html_(self) -> str:
        """What a notebook shows: the rung to land on, and what each needs."""
        rows: list[Sequence[object]] = [("rung", "verdict", "allocated", "smallest limit", "smallest card", "recipe")]
        for row in self.rows:
            sizes = (row.allocated_bytes, row.min_capacity_bytes, row.min_card_bytes)
            shown = (None if size is None else format_bytes(size) for size in sizes)
            rows.append((row.rung, row.verdict, *shown, f"{row.recipe} {row.reason}"))
        head = escape(f"for {self.spec.description}: {self.landing}")
        return f"<p><b>{head}</b></p>{html(rows)}"


def highest_common(ladders: Sequence[tuple[Planner, Sequence[Rung[Config]]]]) -> str | None:
    """The name of the highest rung that is predicted to fit on each of these ladders; None where there is none."""
    known = [(planner, {rung.name: rung for rung in ladder}) for planner, ladder in ladders]
    names = [rung.name for rung in ladders[0][1]]
    return next((name for name in names if all(_fits(rungs.get(name), planner) for planner, rungs in known)), None)


def _fits(rung: Rung[Config] | None, planner: Planner) -> bool:
    room = planner.predictor.spec.capacity
    if rung is None or rung.passed_over:
        return False
    return room is None or is_enough(rung.settings, predicted(planner, rung.settings, room)[1], room)


def plan(ladder: Sequence[Rung[Config]], planner: Planner, *, is_found: bool = False) -> Plan:
    """Predict every rung and say where a descent will land.

    Args:
        is_found: rung 0 has the largest batch size that is predicted to fit.
    """
    above, rows = ladder[0], list[Row]()  # a rung is compared with the last one that is not skipped
    for rung in ladder:
        rows.append(_row(rung, planner, above))
        above = above if rows[-1].verdict == Verdict.SKIPPED else rung
    # The largest batch is too near the limit to be sure of, but training finds the one that fits, and lands there.
    room, asked = planner.predictor.spec.capacity, [rung.settings for rung in ladder]
    landed = 0 if is_found else next((i for i, row in enumerate(rows) if is_enough(asked[i], row, room)), None)
    perhaps = (row.rung for row in rows[:landed] if row.verdict in (Verdict.UNSURE, Verdict.UNKNOWN))
    return Plan(planner.predictor.spec, tuple(rows), None if landed is None else rows[landed].rung, tuple(perhaps))


def _row(rung: Rung[Config], planner: Planner, above: Rung[Config]) -> Row:
    spec, networks = planner.predictor.spec, planner.predictor.networks
    named: dict[str, Any] = {"rung": rung.name, "recipe": str(recipe(rung.settings))}
    if passed_over := rung.passed_over or no_step(planner, above.settings, rung.settings):
        return Row(**named, verdict=Verdict.SKIPPED, reason=passed_over)
    config, found = predicted(planner, rung.settings, spec.capacity)
    named["recipe"] = _in_words(config, found, spec)
    # A network that refuses the size cannot be traced either, and says less clearly why.
    if refused := image_refusal(config, networks.classes(config)) if found.reason else "":
        return Row(**named, verdict=Verdict.SKIPPED, seconds=found.seconds, reason=refused)
    capacity, least = spec.capacity, found.min_capacity_bytes
    if capacity is None and not found.reason:
        found = replace(found, reason=f"a verdict needs {JUDGED_BY}")
    with_context = None if least is None else least + spec.context
    return Row(**named, verdict=verdict(found, capacity), min_card_bytes=with_context, **asdict(found))


def _in_words(config: Config, found: Prediction, spec: DeviceSpec) -> str:
    """The recipe, and what is recomputed in it."""
    said = [plan_in_words(found.plan)] if found.plan != NONE else []
    if found.added_time is not None and (said or found.offloaded_bytes):
        link = f" over {spec.link}" if found.offloaded_bytes else ""
        said.append(f"{found.added_time:.2f} times the time{link}")
    return f"{recipe(config)} ({'; '.join(said)})" if said else str(recipe(config))
