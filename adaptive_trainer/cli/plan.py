"""`task=plan` and `task=memory`: predictions as tables for people and as files for programs."""

from __future__ import annotations

import io
import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from adaptive_trainer.config.overrides import typed
from adaptive_trainer.config.schema import LARGEST, CardConfig, Config
from adaptive_trainer.config.validate import check
from adaptive_trainer.data.datasets import DataSets, build_datasets, described
from adaptive_trainer.data.images.folders import TARGET, check_root
from adaptive_trainer.errors import ConfigError, ModelError
from adaptive_trainer.ladder.resolve import Refuse, resolve, stages, stored_size
from adaptive_trainer.ladder.rung import Rung
from adaptive_trainer.memory.limit import limit_for
from adaptive_trainer.memory.usage import format_bytes
from adaptive_trainer.models.zoo import check_name
from adaptive_trainer.planning import exact
from adaptive_trainer.planning.cache import PlanCache
from adaptive_trainer.planning.concrete import largest_batch, predicted
from adaptive_trainer.planning.device_spec import spec_of
from adaptive_trainer.planning.ladder_plan import Plan, plan
from adaptive_trainer.planning.networks import ASSUMED_CLASSES
from adaptive_trainer.planning.predictor import Predictor
from adaptive_trainer.planning.recomputation import Planner
from adaptive_trainer.planning.refusals import check_names, image_refusal, no_step, refusal
from adaptive_trainer.prediction.estimator import Verdict, verdict
from adaptive_trainer.utils.device import device_of
from adaptive_trainer.utils.files import as_csv, default_folder, refused_by_disk, write_whole
from adaptive_trainer.utils.screen import nearby
from adaptive_trainer.utils.tables import table

log = logging.getLogger(__name__)

MiB = 2**20
LARGEST_PLANNED = 2**20  # samples: a batch is bound by the data, of which a plan opens folders alone
Measure = Callable[[Config, int], tuple[int, int] | None]


def run_plan(cfg: DictConfig, output_dir: str | Path | None = None) -> Plan:
    """Plan the ladder of the settings, log the table, and write `plan.json`; with phases, that of each stage.

    Args:
        cfg: the settings.
        output_dir: where `plan.json` goes; None writes none.

    Returns:
        The plan, of the last stage where there are several.

    Raises:
        ConfigError: settings, card or limit make no sense, or the folder cannot be written.
        DataError: the folder of images that is named cannot be used.
        ModelError: the network is unknown, or refuses the image size that was asked for.
    """
    config = typed(cfg)
    note = _as_in_training(config, device_of(config.device))
    asked = stages(cfg)
    data = _in_folder(typed(asked[0][1]))
    planner = _planner(config, stored_size(typed(settings) for _, settings in asked), data)
    most = LARGEST_PLANNED if data is None else len(data.train)
    made = {name: _plan(settings, planner, most) for name, settings in asked}
    for name, each in made.items():  # only now: a mistake in a later stage is said without the plans above it
        log.info("%s%s", f"stage {name}, " if len(made) > 1 else "", plan_table(each))
    if note:
        log.info("%s", note)
    if data is not None:
        log.info("data: %s", described(data)[0])
    elif cfg.model.num_classes is None:
        log.info("%d classes are assumed; model.num_classes=N for another number", ASSUMED_CLASSES)
    contents = [{"stage": name, **_content(each)} for name, each in made.items()]
    content = contents[0] if len(contents) == 1 else {"stages": contents}
    if output_dir is not None:
        _write(output_dir, {"plan.json": json.dumps(content, indent=2) + "\n"})
    return each


def ladders_of(cfg: DictConfig) -> list[tuple[Planner, Sequence[Rung[Config]]]]:
    """The ladder of each stage of a training, with what predicts it for the memory that it would have here.

    Raises:
        UserError: as `run_plan`.
    """
    config, asked = typed(cfg), stages(cfg)
    device = device_of(config.device)
    config.device = str(device)  # named: without CUDA a limit means the simulated card
    _as_in_training(config, device)
    planner = _planner(config, stored_size(typed(each) for _, each in asked), _in_folder(typed(asked[0][1])))
    return [(planner, _ladder(settings, planner)) for _, settings in asked]


def _as_in_training(config: Config, device: torch.device) -> str:
    """Take the simulated card that training would take; say so where the settings name no device."""
    # Only the demo data is trained on a simulated card: a CPU needs no limit, and a demonstration does.
    limit = limit_for(config, device)
    is_open = config.card == CardConfig() and config.memory.limit is None and config.device == "auto"
    if is_open and limit is None and device.type == "cpu":
        config.device = "cpu"
    if config.device == "cpu":
        config.memory.limit = limit
    if not is_open or device.type != "cpu":
        return ""
    if limit:
        text = "training on your own data takes the CPU, with no limit; card=rtx2060 names a card to plan for"
    else:
        text = "this is the simulated card that training would take; card=rtx2060 names another"
    return f"there is no CUDA here: {text}"


def _in_folder(config: Config) -> DataSets | None:
    """The folder of images that would be trained on; None where no folder is named."""
    check_root(config.data)
    is_folder = config.data.root is not None and config.data.train.get("_target_") == TARGET
    return build_datasets(config) if is_folder else None


def _planner(config: Config, stored: int | None = None, data: DataSets | None = None) -> Planner:
    cache = PlanCache(default_folder())
    classes, val_size = (None, None) if data is None else (data.num_classes, len(data.val))
    spec = spec_of(config, cache)
    return Planner(Predictor(spec, num_classes=classes, cache=cache, stored_size=stored, val_size=val_size))


def _ladder(cfg: DictConfig, planner: Planner) -> tuple[Rung[Config], ...]:
    """The ladder of settings with a batch size, without what its networks refuse."""
    check_names(resolve(cfg))  # with no network asked: mistakes in names come before seconds of predictions
    return resolve(cfg, refuse=_refuse(planner))


def _refuse(planner: Planner) -> Refuse:
    def refuse(_: str, above: Config, settings: Config) -> str:
        return refusal(planner.predictor.networks, above, settings) or no_step(planner, above, settings)

    return refuse


def _plan(cfg: DictConfig, planner: Planner, most: int) -> Plan:
    refuse, size = _refuse(planner), None
    if cfg.trainer.batch_size == LARGEST:
        asked = resolve(cfg)
        check_names(asked)
        size, why = _largest(asked[0], planner, most)
        ladder = resolve(cfg, size or 1, why, refuse)
    else:
        ladder = _ladder(cfg, planner)
    if size is not None:
        log.info("%s", "; ".join(ladder[0].notes))
    made = plan(ladder, planner, is_found=bool(size))
    if made.rows[0].verdict == Verdict.SKIPPED and not ladder[0].passed_over:
        raise ModelError(made.rows[0].reason)
    landed = next((rung.settings for rung in ladder if rung.name == made.lands_on), None)
    return replace(made, exact=exact.kept(cfg, landed, planner, made.spec.capacity, refuse))


def _largest(asked: Rung[Config], planner: Planner, most: int) -> tuple[int, str]:
    """The largest batch size that is predicted to fit, 0 where none is, and why it is this one."""
    capacity, key = planner.predictor.spec.capacity, f"trainer.batch_size={LARGEST}"
    if capacity is None:
        raise ConfigError(f"{key} needs a card (card=rtx2060) or a limit (memory.limit=6GiB), and there is neither")
    size, reason = largest_batch(planner, asked.settings, capacity, most)
    if size is None:
        raise ConfigError(f"{key} cannot be planned, because the update cannot be predicted: {reason}")
    room = format_bytes(capacity)
    if not size:  # the ladder is planned all the same, from a single sample down
        return 0, f"not even one sample is predicted to fit in {room}"
    return size, f"the largest that is predicted to fit in {room}; training proves it, or one near it"


def _content(made: Plan) -> dict[str, Any]:
    return {
        "target": made.spec.description,
        "capacity_bytes": made.spec.capacity,
        "context_bytes": made.spec.context,
        "lands_on": made.lands_on,
        "perhaps": list(made.perhaps),
        "exact": made.exact,
        # the names first, for people
        "rungs": [{"rung": row.rung, "verdict": row.verdict, "recipe": row.recipe, **asdict(row)} for row in made.rows],
    }


def plan_table(made: Plan) -> str:
    """A plan as text: a line for each rung, and where a descent lands."""
    head = ("rung", "verdict", "live", "allocated", "reserved", "smallest limit", "smallest card", "recipe")
    lines: list[Sequence[str]] = [head]
    for number, row in enumerate(made.rows):
        sizes = (row.live_bytes, row.allocated_bytes, row.reserved_bytes, row.min_capacity_bytes, row.min_card_bytes)
        what = f"{row.recipe} ({row.reason})" if row.reason and (row.live_bytes is None or number == 0) else row.recipe
        lines.append((row.rung, row.verdict, *map(_mib, sizes), what))
    spec = made.spec
    room = "" if spec.capacity is None else f"; {format_bytes(spec.capacity)} for tensors"
    outside = f", {format_bytes(spec.context)} for the CUDA context" if spec.context else ""
    title = f"for {spec.description}{room}{outside} (sizes in MiB)"
    parts = (title, table(lines, left=(0, 1)), made.landing, made.exact)
    return "\n".join(filter(None, parts))


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / MiB:.0f}"


@dataclass(frozen=True, slots=True)
class Cell:
    """One batch size at one image size: the columns of `memory.csv`. None where a size is not known or not measured."""

    batch: int
    size: int
    verdict: Verdict
    allocated_bytes: int | None
    reserved_bytes: int | None
    min_capacity_bytes: int | None
    measured_allocated_bytes: int | None = None
    measured_reserved_bytes: int | None = None
    reason: str = ""


def run_memory(cfg: DictConfig, output_dir: str | Path, measure: Measure | None = None) -> list[Cell]:
    """Predict batch by image size for the model of the settings; log the table; write it as text, CSV and PNG.

    Args:
        cfg: the settings, with `batch` and `size`.
        output_dir: where `memory.txt`, `memory.csv` and `memory.png` go.
        measure: really trains under (settings, number of classes) and returns peak allocated and reserved bytes; None
            where they do not fit. Given where there is a card.

    Raises:
        ConfigError: a batch or image size that is no whole number above 0.
        ModelError: the network is unknown.
    """
    check_name(cfg.model.name)
    planner = _planner(typed(cfg))
    places = itertools.product(_numbers(cfg, "batch"), _numbers(cfg, "size"))
    cells = [_cell(typed(cfg), *place, planner, measure) for place in places]
    head = f"{cfg.model.name}, {cfg.trainer.precision}, for {planner.predictor.spec.description}"
    seen = " [measured]" if any(cell.measured_allocated_bytes is not None for cell in cells) else ""
    text = f"{head}; peak allocated MiB{seen}\n{memory_table(cells)}"
    if any(cell.verdict in MARKS for cell in cells):
        text += "\n! does not fit, ? too near the limit to say"
    log.info("%s", text)
    table_file = as_csv([asdict(cell) for cell in cells])
    _write(output_dir, {"memory.txt": text + "\n", "memory.csv": table_file, "memory.png": _drawn(cells, head)})
    return cells


def _numbers(cfg: DictConfig, key: str) -> list[int]:
    numbers = [int(number) for number in cfg[key]]
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"{key}={numbers} is no list of whole numbers above 0, such as {key}=[8,16,24]")
    return numbers


def _cell(asked: Config, batch: int, size: int, planner: Planner, measure: Measure | None) -> Cell:
    config = deepcopy(asked)
    config.trainer.batch_size, config.data.image_size = batch, size
    config.trainer.micro_batch_size = min(batch, asked.trainer.micro_batch_size or batch)
    check(config)
    predictor = planner.predictor
    config, found = predicted(planner, config, predictor.spec.capacity)
    classes = predictor.networks.classes(config)
    # A refused image size is the reason that a person can mend; the trace fails somewhere inside the network.
    reason = (image_refusal(config, classes) or found.reason) if found.reason else ""
    seen = measure(config, classes) if measure is not None and not reason else None
    allocated, reserved = (None, None) if seen is None else seen
    sizes = found.allocated_bytes, found.reserved_bytes, found.min_capacity_bytes
    return Cell(batch, size, verdict(found, predictor.spec.capacity), *sizes, allocated, reserved, reason)


MARKS = {Verdict.HOPELESS: " !", Verdict.UNSURE: " ?"}


def memory_table(cells: Sequence[Cell]) -> str:
    """Cells as text: predicted peak allocated MiB, a row for each batch size; measured ones in brackets beside them."""
    sizes = list(dict.fromkeys(cell.size for cell in cells))
    by_place = {(cell.batch, cell.size): cell for cell in cells}
    lines = [["batch", *(f"{size} px" for size in sizes), ""]]
    for batch in dict.fromkeys(cell.batch for cell in cells):
        row = [by_place[batch, size] for size in sizes]
        notes = "; ".join(dict.fromkeys(cell.reason for cell in row if cell.reason))
        lines.append([str(batch), *map(_shown, row), notes])
    return table(lines)


def _shown(cell: Cell) -> str:
    measured = "" if cell.measured_allocated_bytes is None else f" [{_mib(cell.measured_allocated_bytes)}]"
    return f"{_mib(cell.allocated_bytes)}{measured}{MARKS.get(cell.verdict, '')}"


def _drawn(cells: Sequence[Cell], title: str) -> bytes:
    """A PNG with a line for each image size over the batch size."""
    from matplotlib.figure import Figure  # most of a second, which a plan does without

    # Without pyplot, which would look for a screen.
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for size in dict.fromkeys(cell.size for cell in cells):  # a set would lose the order that was asked for
        mine = [cell for cell in cells if cell.size == size]
        known = [(c.batch, c.allocated_bytes / MiB) for c in mine if c.allocated_bytes is not None]
        seen = [(c.batch, c.measured_allocated_bytes / MiB) for c in mine if c.measured_allocated_bytes is not None]
        (line,) = axes.plot([x for x, _ in known], [y for _, y in known], "o-", label=f"{size} px")
        axes.plot([x for x, _ in seen], [y for _, y in seen], "x", color=line.get_color())
    axes.set(xlabel="batch size", ylabel="peak allocated, MiB (x: measured)", title=title, ylim=(0, None))
    axes.title.set_fontsize("small")
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    return picture.getvalue()


def _write(output_dir: str | Path, files: Mapping[str, str | bytes]) -> None:
    folder = Path(output_dir)
    with refused_by_disk(ConfigError, f"cannot write in {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_whole(folder / name, content)
    log.info("written: %s in %s", ", ".join(files), nearby(folder.absolute()))
