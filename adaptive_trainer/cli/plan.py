"""`task=plan` and `task=memory`: predictions as tables for people and as files for programs."""

from __future__ import annotations

import io
import json
import logging
import textwrap
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from adaptive_trainer.config.overrides import typed
from adaptive_trainer.config.schema import LARGEST, CardConfig, Config
from adaptive_trainer.config.validate import check
from adaptive_trainer.errors import ConfigError, ModelError
from adaptive_trainer.ladder.resolve import resolve, stages, stored_size
from adaptive_trainer.ladder.rung import Rung
from adaptive_trainer.memory.limit import limit_for
from adaptive_trainer.memory.usage import format_bytes
from adaptive_trainer.models.zoo import check_name
from adaptive_trainer.planning.cache import PlanCache
from adaptive_trainer.planning.device_spec import DeviceSpec, spec_of
from adaptive_trainer.planning.ladder_plan import ASSUMED_CLASSES, Plan, Planner, check_names, image_refusal, plan
from adaptive_trainer.prediction.estimator import verdict
from adaptive_trainer.utils.device import device_of
from adaptive_trainer.utils.files import as_csv, default_folder, refused_by_disk, write_whole
from adaptive_trainer.utils.screen import nearby, width
from adaptive_trainer.utils.tables import table

log = logging.getLogger(__name__)

MiB = 2**20
LARGEST_PLANNED = 2**20  # samples: a plan does not open the data, which bounds a batch
Measure = Callable[[Config, int], tuple[int, int] | None]


def _planner(config: Config, stored: int | None = None) -> Planner:
    cache = PlanCache(default_folder())
    return Planner(spec_of(config, cache), cache=cache, stored_size=stored)


def run_plan(cfg: DictConfig, output_dir: str | Path) -> Plan:
    """Plan the ladder of the settings, log the table, and write `plan.json`; with phases, that of each stage.

    Returns:
        The plan, of the last stage where there are several.

    Raises:
        ConfigError: settings, card or limit make no sense, or the folder cannot be written.
        ModelError: the network is unknown, or refuses the image size that was asked for.
    """
    config = typed(cfg)
    device, is_open = device_of(config.device), _is_open(config)
    limit = limit_for(config, device)
    if is_open and limit is None and device.type == "cpu":
        config.device = "cpu"  # the simulated card that training would take
    if config.device == "cpu":
        config.memory.limit = limit
    asked, made = stages(cfg), dict[str, Plan]()
    planner = _planner(config, stored_size(typed(settings) for _, settings in asked))
    for name, settings in asked:
        ladder, is_found = _ladder(settings, planner)
        made[name] = plan(ladder, planner, is_found=is_found)
        if made[name].rows[0].verdict == "skipped":
            raise ModelError(made[name].rows[0].reason)
    for name, each in made.items():
        log.info("%s%s", f"stage {name}, " if len(made) > 1 else "", plan_table(each))
    if is_open and device.type == "cpu":
        card = "this is the simulated card that training would take; card=rtx2060 names another"
        none = "training on your own data takes the CPU, with no limit; card=rtx2060 names a card to plan for"
        log.info("there is no CUDA here: %s", none if limit else card)
    if cfg.model.num_classes is None:
        log.info("%d classes are assumed; model.num_classes=N for another number", ASSUMED_CLASSES)
    contents = [{"stage": name, **_content(each)} for name, each in made.items()]
    content = contents[0] if len(contents) == 1 else {"stages": contents}
    _write(output_dir, "plan.json", json.dumps(content, indent=2) + "\n")
    _log_files(output_dir, "plan.json")
    return each


def _is_open(config: Config) -> bool:
    """Whether neither a card nor a limit nor a device is named: what training would take is asked about."""
    return config.card == CardConfig() and config.memory.limit is None and config.device == "auto"


def _ladder(cfg: DictConfig, planner: Planner) -> tuple[tuple[Rung[Config], ...], bool]:
    """The rungs of the settings, and whether rung 0 has the largest batch size that is predicted to fit."""
    ladder, capacity = resolve(cfg), planner.spec.capacity
    check_names(ladder)

    def refuse(_: str, above: Config, settings: Config) -> str:
        return planner.refusal(above, settings) or planner.no_step(above, settings)

    if cfg.trainer.batch_size != LARGEST:
        return resolve(cfg, refuse=refuse), False
    asked = f"trainer.batch_size={LARGEST}"
    if capacity is None:
        raise ConfigError(f"{asked} needs a card (card=rtx2060) or a limit (memory.limit=6GiB), and there is neither")
    size, reason = planner.largest_batch(ladder[0].settings, capacity, LARGEST_PLANNED)
    if size is None:
        raise ConfigError(f"{asked} cannot be planned, because the update cannot be predicted: {reason}")
    room = format_bytes(capacity)
    why = f"the largest that is predicted to fit in {room}; training proves it, or one near it"
    ladder = resolve(cfg, size or 1, why if size else f"not even one sample is predicted to fit in {room}", refuse)
    log.info("%s", "; ".join(ladder[0].notes))
    return ladder, size > 0


def _content(made: Plan) -> dict[str, Any]:
    landing = {"lands_on": made.lands_on, "perhaps": list(made.perhaps)}
    return {**_about(made.spec), **landing, "rungs": [asdict(row) for row in made.rows]}


def _about(spec: DeviceSpec) -> dict[str, Any]:
    return {"target": spec.description, "capacity_bytes": spec.capacity, "context_bytes": spec.context}


def plan_table(made: Plan) -> str:
    """A plan as text: a line for each rung, and where a descent lands."""
    head = ("rung", "verdict", "live", "allocated", "reserved", "smallest limit", "smallest card", "recipe")
    lines: list[Sequence[str]] = [head]
    for row in made.rows:
        sizes = (row.live_bytes, row.allocated_bytes, row.reserved_bytes, row.min_capacity_bytes, row.min_card_bytes)
        what = f"{row.recipe} ({row.reason})" if row.reason and row.live_bytes is None else row.recipe
        lines.append((row.rung, row.verdict, *(_mib(size) for size in sizes), what))
    spec = made.spec
    room = "" if spec.capacity is None else f"; {format_bytes(spec.capacity)} for tensors"
    outside = f", {format_bytes(spec.context)} for the CUDA context" if spec.context else ""
    title = f"for {spec.description}{room}{outside} (sizes in MiB)"
    return "\n".join((*textwrap.wrap(title, width()), table(lines, left=(0, 1)), _landing(made)))


def _landing(made: Plan) -> str:
    perhaps = f"; {', '.join(made.perhaps)} may fit and will be tried first" if made.perhaps else ""
    if made.lands_on is not None:
        return f"lands on rung {made.lands_on}{perhaps}"
    if made.spec.capacity is None:
        return "name a card (card=rtx2060) or a limit (memory.limit=6GiB) to see which rung fits"
    return f"no rung is sure to fit{perhaps}"


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / MiB:.0f}"


@dataclass(frozen=True, slots=True)
class Cell:
    """One batch size at one image size. Sizes in bytes, None where they are not known or were not measured."""

    batch: int
    size: int
    verdict: str
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
    cells = [
        _cell(typed(cfg), batch, size, planner, measure)
        for batch in _numbers(cfg, "batch")
        for size in _numbers(cfg, "size")
    ]
    head = f"{cfg.model.name}, {cfg.trainer.precision}, for {planner.spec.description}"
    seen = " [measured]" if any(cell.measured_allocated_bytes is not None for cell in cells) else ""
    text = f"{head}; peak allocated MiB{seen}\n{memory_table(cells)}"
    if any(cell.verdict in ("hopeless", "unsure") for cell in cells):
        text += "\n! does not fit, ? too near the limit to say"
    log.info("%s", text)
    _write(output_dir, "memory.txt", text + "\n")
    _write(output_dir, "memory.csv", as_csv([asdict(cell) for cell in cells]))
    _draw(cells, head, Path(output_dir) / "memory.png")
    _log_files(output_dir, "memory.txt", "memory.csv", "memory.png")
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
    found = planner.predict(config)
    capacity = planner.spec.capacity
    answer = "unknown" if capacity is None or found.reason else verdict(found, capacity)
    reason = (image_refusal(config, planner.classes(config)) or found.reason) if found.reason else ""
    seen = measure(config, planner.classes(config)) if measure is not None and not reason else None
    allocated, reserved = (None, None) if seen is None else seen
    return Cell(
        batch,
        size,
        answer,
        found.allocated_bytes,
        found.reserved_bytes,
        found.min_capacity_bytes,
        allocated,
        reserved,
        reason,
    )


def memory_table(cells: Sequence[Cell]) -> str:
    """Cells as text: predicted peak allocated MiB, a row for each batch size; measured ones in brackets beside them."""
    sizes = list(dict.fromkeys(cell.size for cell in cells))
    by_place = {(cell.batch, cell.size): cell for cell in cells}
    lines = [["batch", *(f"{size} px" for size in sizes), ""]]
    for batch in dict.fromkeys(cell.batch for cell in cells):
        row = [by_place[batch, size] for size in sizes]
        notes = "; ".join(dict.fromkeys(cell.reason for cell in row if cell.reason))
        lines.append([str(batch), *(_shown(cell) for cell in row), notes])
    return table(lines)


def _shown(cell: Cell) -> str:
    measured = "" if cell.measured_allocated_bytes is None else f" [{_mib(cell.measured_allocated_bytes)}]"
    return f"{_mib(cell.allocated_bytes)}{measured}" + {"hopeless": " !", "unsure": " ?"}.get(cell.verdict, "")


def _draw(cells: Sequence[Cell], title: str, path: Path) -> None:
    """A line for each image size over the batch size; nothing but a message where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.warning("matplotlib is not installed, so there is no picture (pip install matplotlib)")
        return
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for size in dict.fromkeys(cell.size for cell in cells):
        known = [cell for cell in cells if cell.size == size and cell.allocated_bytes is not None]
        (line,) = axes.plot(
            [c.batch for c in known], [(c.allocated_bytes or 0) / MiB for c in known], "o-", label=f"{size} px"
        )
        seen = [cell for cell in known if cell.measured_allocated_bytes is not None]
        axes.plot(
            [c.batch for c in seen],
            [(c.measured_allocated_bytes or 0) / MiB for c in seen],
            "x",
            color=line.get_color(),
        )
    axes.set(xlabel="batch size", ylabel="peak allocated, MiB (x: measured)", title=title, ylim=(0, None))
    axes.title.set_fontsize("small")
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format=path.suffix.removeprefix("."))
    _write(path.parent, path.name, picture.getvalue())


def _log_files(output_dir: str | Path, *names: str) -> None:
    written = [name for name in names if (Path(output_dir) / name).exists()]
    log.info("written: %s in %s", ", ".join(written), nearby(Path(output_dir).absolute()))


def _write(output_dir: str | Path, name: str, content: str | bytes) -> None:
    folder = Path(output_dir)
    with refused_by_disk(ConfigError, f"cannot write in {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / name, content)
