"""Settings from YAML files and overrides: how they are composed, changed and turned into the schema's dataclasses.

Hydra composes YAML files and overrides into a `DictConfig` checked against the schema; `typed` turns it into the
dataclasses. Hydra is imported by the functions that need it: it takes a third of a second, and a training step that
is used alone does without.
"""

from __future__ import annotations

import os.path
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from adaptive_trainer.config import mistakes
from adaptive_trainer.config.schema import DIGITS, SETTINGS, Config, PhaseConfig, leaves
from adaptive_trainer.errors import ConfigError, explained, quoted, refuse_all

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

PATHS = ("data.root", "model.weights", "output_dir", "resume", "hydra.run.dir", "hydra.sweep.dir")
HYDRA_LOCK = RLock()  # Hydra keeps what it is initialized for in one place for the whole process


@cache  # Hydra would build the schema anew
def register() -> None:
    """Make known to Hydra the schema, which `configs/config.yaml` lists first, and the direction of a search."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="config_schema", node=Config)
    OmegaConf.register_new_resolver("direction", lambda metric: f"{'max' if 'accuracy' in metric else 'min'}imize")


def config_dir() -> str:
    """Absolute path of `configs/`: inside the package (a wheel) or beside it (a checkout, an editable install)."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "config.yaml").is_file():
            return str(folder)
    raise ConfigError(
        f"no configs/config.yaml in {package} or beside it: the installation is not complete, install again"
    )


def compose_config(overrides: Sequence[str] = (), *, config_folder: str | Path | None = None) -> DictConfig:
    """The settings that `python -m adaptive_trainer OVERRIDES` would use, for scripts and notebooks.

    Args:
        overrides: Hydra overrides, as on the command line: `["data=cifar10", "trainer.epochs=3"]`.
        config_folder: a folder with YAML files of your own, as `--config-dir` on the command line.

    Raises:
        ConfigError: an override names no setting, or gives it a value of the wrong type; there is no such folder.
    """
    from hydra import compose
    from hydra.errors import HydraException

    are_texts = isinstance(overrides, Sequence) and all(isinstance(text, str) for text in overrides)
    if isinstance(overrides, str) or not are_texts:
        raise ConfigError(f"overrides are a list of texts, such as ['trainer.epochs=3'], and not {overrides!r}")
    if config_folder is not None and not Path(config_folder).is_dir():
        raise ConfigError(f"config_folder={config_folder} is no folder")
    register()
    extra = [f"hydra.searchpath=[file://{Path(config_folder).resolve()}]"] if config_folder is not None else []
    typed_here = [readable(text) for text in overrides]
    with explained(mistakes.explain, (HydraException, OmegaConfBaseException, ValueError)), _own_hydra():
        cfg = compose("config", overrides=[*typed_here, *extra])
    return with_asked(cfg, typed_here, "".join(extra))


def at_home(override: str) -> str:
    """`data.root=~/photos` with the home folder in place of `~`, which Hydra cannot parse and a shell leaves there."""
    return re.sub(r"(?<=[=,])~[\w.-]*(?=/|,|$)", lambda found: os.path.expanduser(found[0]), override)


def readable(override: str) -> str:
    """An override as Hydra can read it: `~` is the home folder, and a path that its grammar refuses is quoted.

    So `data.root=사진` and `data.root=photos (1)` need no quotes but a shell's. What Hydra can read stays as it is; so
    does what begins with a quote or a bracket, or has a comma: a list or a sweep may be meant, and is not guessed.
    """
    from hydra.errors import OverrideParseException

    override = at_home(override)
    key, has_value, value = override.partition("=")
    if not has_value or key.lstrip("+") not in PATHS or "," in value or value.startswith(("'", '"', "[", "{")):
        return override
    try:
        _parsed(override)
    except OverrideParseException:
        return f"{key}={quoted(value)}"
    return override


@cache
def _schema() -> DictConfig:
    schema: DictConfig = OmegaConf.structured(Config)
    return schema


def typed(cfg: DictConfig) -> Config:
    """`cfg` with interpolations resolved, as the dataclasses above.

    Raises:
        ConfigError: a value is missing or does not resolve, or there is no such setting.
    """
    with explained(mistakes.explain, (OmegaConfBaseException,)):
        is_typed = OmegaConf.get_type(cfg) is Config  # what Hydra composed is; a merge takes most of the time
        value: Config = OmegaConf.to_object(cfg if is_typed else OmegaConf.merge(_schema(), cfg))  # type: ignore[assignment]
    added = {key for key, *_ in leaves(value)} - set(SETTINGS)  # Hydra lets `+key=value` do so
    refuse_all(map(mistakes.no_setting, sorted(added)))
    return value


def apply_overrides(cfg: DictConfig, overrides: Iterable[str]) -> DictConfig:
    """A copy of `cfg` with Hydra overrides applied: `key=value`, `+key=value`, or `group=choice`.

    A choice of a group replaces that whole node (`optimizer=sgd`), or is laid over the settings where the group's file
    says `@package _global_` (`preset=minimum`). Choices come first, wherever they stand, as they do in Hydra.

    Raises:
        ConfigError: one message that lists every override that cannot be applied, and why.
    """
    from hydra.errors import HydraException

    result: DictConfig = pickle.loads(pickle.dumps(cfg))  # settings are plain values: less than half the time of copy()
    problems = []
    for text in sorted(overrides, key=lambda text: not _is_group(text.lstrip("+").partition("=")[0])):
        try:
            _apply(result, text)
        except (HydraException, OmegaConfBaseException, ConfigError) as error:
            problems.append(f"{text!r}: {mistakes.explain(error)}")
    refuse_all(problems)
    return result


@dataclass(frozen=True)
class Asked:
    """What was typed for a run: settings carry it along, through copies and merges."""

    overrides: tuple[str, ...] = ()
    search_path: str = ""  # the override that names a folder of configs of one's own, if there is one
    composed: str = ""  # the settings as they were then, YAML
    kept: tuple[str, ...] = ()  # what a stage would have set otherwise than was typed, in words


def stage_names(phases: Sequence[PhaseConfig]) -> list[str]:
    """The names of stages; those that have none are numbered, as rungs are."""
    return [phase.name or f"stage-{number}" for number, phase in enumerate(phases, start=1)]


def with_asked(cfg: DictConfig, overrides: Sequence[str], search_path: str = "") -> DictConfig:
    """`cfg`, which remembers the overrides that were typed for it, and whose stages set nothing otherwise.

    What is typed beats what a file says, of a preset as of a stage; stages that are typed are typed themselves.
    """
    parsed = [(_parsed(text).key_or_group, text) for text in overrides]
    parsed = [(key, text) for key, text in parsed if not key.startswith("hydra") and not _parsed(text).is_delete()]
    kept: list[str] = []
    if parsed and not any(key.startswith("phases.") for key, _ in parsed):
        for name, stage in zip(stage_names(cfg.phases.stages), cfg.phases.stages, strict=True):
            beaten = _beaten(cfg, list(stage.overrides), parsed)
            stage.overrides = [*stage.overrides, *beaten]
            kept += [f"stage {name}: {text}, as typed, and not what its file says" for text in beaten]
    cfg._metadata.typed = Asked(  # type: ignore[attr-defined]  # the one place that goes with every copy
        tuple(text for _, text in parsed), search_path, OmegaConf.to_yaml(cfg), tuple(kept)
    )
    return cfg


def _beaten(cfg: DictConfig, said: list[str], parsed: list[tuple[str, str]]) -> list[str]:
    """Those of the typed overrides that a stage, which says these, would undo."""
    beaten: list[str] = []
    for _ in range(2):  # a choice that is made again needs what was typed for its group again
        try:
            stage = apply_overrides(cfg, [*said, *beaten])
        except ConfigError:  # which is reported where the stages are made
            return []
        chosen = {_parsed(text).key_or_group for text in said}
        for key, text in parsed:
            is_undone = key in chosen if _is_group(key) else OmegaConf.select(stage, key) != OmegaConf.select(cfg, key)
            if is_undone and text not in beaten:
                beaten.append(text)
    return beaten


def asked(cfg: DictConfig) -> Asked:
    """What was asked for in these settings: what was typed, and what the caller has set in them since.

    Of settings that no `compose_config` made it is all that differs from the defaults.
    """
    memory: Asked | None = getattr(cfg._metadata, "typed", None)
    if memory is None:
        memory = asked(compose_config())
    before = flat(OmegaConf.to_container(OmegaConf.create(memory.composed)))
    now = flat(OmegaConf.to_container(cfg))
    since = [f"++{key}={literal(value)}" for key, value in now.items() if key not in before or before[key] != value]
    return replace(memory, overrides=(*memory.overrides, *since))


def names_data(cfg: DictConfig) -> bool:
    """Whether somebody has chosen what these settings train on, the digits too."""
    keys = [text.lstrip("+").partition("=")[0] for text in asked(cfg).overrides]
    is_named = any(key in ("data", "data.root") or key.startswith("data.train") for key in keys)
    return is_named or cfg.data.train.get("_target_") != DIGITS


def literal(value: Any) -> str:
    """A value as Hydra's overrides have it."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(literal, value)) + "]"
    if isinstance(value, str):
        return quoted(value)
    return "null" if value is None else str(value).lower()


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts by their full names; an empty dict is one."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _parsed(text: str) -> Override:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_overrides([text])[0]


def _apply(cfg: DictConfig, text: str) -> None:
    override = _parsed(text)
    if override.is_sweep_override():
        raise ConfigError("is a sweep; give one value")
    if override.is_delete():
        raise ConfigError("removes a key; give it a value instead")
    key, value = override.key_or_group, override.value()
    if isinstance(value, str) and _is_group(key):
        _choose(cfg, key, value)
    elif override.is_add() or override.is_force_add():
        with open_dict(cfg):
            OmegaConf.update(cfg, key, value)
    else:
        if not _exists(cfg, key):
            raise ConfigError(mistakes.to_be_added(key, OmegaConf.select(cfg, key.rpartition(".")[0])))
        OmegaConf.update(cfg, key, value)


def _is_group(key: str) -> bool:
    return (Path(config_dir()) / key).is_dir()


def _exists(cfg: DictConfig, key: str) -> bool:
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    if OmegaConf.is_list(node):
        return last.isdigit() and int(last) < len(node)
    return OmegaConf.is_dict(node) and last in node


def _choose(cfg: DictConfig, group: str, choice: str) -> None:
    if Path(choice).is_absolute() or ".." in choice:  # between quotes too, which the name of a part would hide
        raise ConfigError("is no name of a file in a folder of configs")
    memory: Asked = getattr(cfg._metadata, "typed", Asked())
    content = _compose_alone(f"+{group}={choice}", memory.search_path)
    if set(content) == {group} and group in cfg:
        OmegaConf.update(cfg, group, OmegaConf.structured(Config)[group], merge=False)
    for name in content:
        OmegaConf.update(cfg, str(name), content[name], merge=True)


def _compose_alone(override: str, search_path: str) -> DictConfig:
    from hydra import compose

    if is_running_ours():
        return compose(overrides=[override])  # with the folders of the command line
    with _own_hydra():
        return compose(overrides=[override, *([search_path] if search_path else [])])


def is_running_ours() -> bool:
    """Whether this is the command line, where Hydra runs with the configs of this package."""
    from hydra.core.global_hydra import GlobalHydra

    hydra = GlobalHydra.instance()
    if not hydra.is_initialized():
        return False
    folders = [source.path.removeprefix("file://") for source in hydra.config_loader().get_search_path().get_path()]
    return config_dir() in folders


@contextmanager
def _own_hydra() -> Iterator[None]:
    """Hydra on this package's configs, whatever program around it has initialized Hydra for; one thread at a time."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    with HYDRA_LOCK:
        around = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(config_dir(), version_base="1.3"):
                yield
        finally:
            GlobalHydra.instance().hydra = around
