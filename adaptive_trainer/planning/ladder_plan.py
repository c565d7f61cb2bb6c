"""What every rung of a ladder will need, and where a descent will land, on a device that need not be here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from adaptive_trainer.config.schema import Config
from adaptive_trainer.ladder.resolve import recipe
from adaptive_trainer.ladder.rung import Rung
from adaptive_trainer.planning.device_spec import DeviceSpec
from adaptive_trainer.planning.predictor import Predictor
from adaptive_trainer.planning.refusals import image_refusal, no_step
from adaptive_trainer.prediction.estimator import Verdict, verdict


@dataclass(frozen=True, slots=True)
class Row:
    """One rung of a plan. Sizes in bytes, None where they are not known.

    Attributes:
        reason: why it is unknown or skipped.
        min_capacity_bytes: the smallest limit on the allocator under which it still trains.
        min_card_bytes: the same with what a CUDA process takes outside the allocator.
        seconds: what predicting it took.
    """

    rung: str
    verdict: Verdict
    recipe: str
    live_bytes: int | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    min_capacity_bytes: int | None = None
    min_card_bytes: int | None = None
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a ladder will need.

    Attributes:
        lands_on: name of the first rung that fits; None where none is known to.
        perhaps: names of the rungs above it that may fit as well.
    """

    spec: DeviceSpec
    rows: tuple[Row, ...]
    lands_on: str | None
    perhaps: tuple[str, ...]


def plan(ladder: Sequence[Rung[Config]], predictor: Predictor, *, is_found: bool = False) -> Plan:
    """Predict every rung and say where a descent will land.

    Args:
        is_found: rung 0 has the largest batch size that is predicted to fit. It is too near the limit to be sure of,
            but training looks for the one that fits: it lands there, whatever the number turns out to be.
    """
    above, rows = ladder[0], list[Row]()  # a rung is compared with the last one that is not skipped
    for rung in ladder:
        rows.append(_row(rung, predictor, above))
        above = above if rows[-1].verdict == Verdict.SKIPPED else rung
    landed = 0 if is_found else next((i for i, row in enumerate(rows) if row.verdict == Verdict.FITS), None)
    perhaps = (row.rung for row in rows[:landed] if row.verdict in (Verdict.UNSURE, Verdict.UNKNOWN))
    return Plan(predictor.spec, tuple(rows), None if landed is None else rows[landed].rung, tuple(perhaps))


def _row(rung: Rung[Config], predictor: Predictor, above: Rung[Config]) -> Row:
    used = str(recipe(rung.settings))
    if passed_over := rung.passed_over or no_step(predictor, above.settings, rung.settings):
        return Row(rung.name, Verdict.SKIPPED, used, reason=passed_over)
    found = predictor.predict(rung.settings)
    # A network that refuses the size cannot be traced either, and says less clearly why.
    if refused := image_refusal(rung.settings, predictor.networks.classes(rung.settings)) if found.reason else "":
        return Row(rung.name, Verdict.SKIPPED, used, seconds=found.seconds, reason=refused)
    capacity, least = predictor.spec.capacity, found.min_capacity_bytes
    row = asdict(found)
    if capacity is None and not found.reason:
        row["reason"] = "no card and no memory.limit to judge by"
    with_context = None if least is None else least + predictor.spec.context
    return Row(rung.name, verdict(found, capacity), used, min_card_bytes=with_context, **row)
