"""The one gate for saved settings: what a checkpoint, or the settings beside it, may name to be called or loaded.

Whoever can write a checkpoint could else run any code: `data.train._target_` names a function, which Hydra calls. What
this package names in its own configs is called, and what the user has named for this very run; all else is refused.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from adaptive_trainer.config.overrides import apply_overrides, asked, config_dir, literal, typed, with_asked
from adaptive_trainer.config.schema import CardConfig, Config
from adaptive_trainer.errors import CheckpointError, ConfigError, explained, override
from adaptive_trainer.ladder.resolve import resolve, stages

TARGET = "_target_"
REFERENCE = re.compile(r"(?<!\\)\$\{[\w.-]*\}")  # to another setting; one with a colon in it calls a resolver
CALL = re.compile(r"\$\\*\{")  # escaped too: each time that settings are read takes an escape away
LOADS = ("checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay")  # of timm.create_model
RENAMED = {
    r"\bcheckpoint_activations(: |=)true": r"recompute\1blocks",
    r"\bcheckpoint_activations(: |=)false": r"recompute\1none",
}  # settings of earlier versions
Names = dict[tuple[str, str], str]  # by the setting and what it names: what to type to allow it


def trusted(text: Any, source: Path, cfg: DictConfig) -> DictConfig:
    """Saved settings with what `cfg` asks for on top.

    Args:
        text: YAML.
        source: the file that it is from.
        cfg: the settings of this very run, whose `task`, `resume` and `output_dir` stay.

    Raises:
        CheckpointError: these are no settings, or they name what may not be called or loaded.
        ConfigError: what is asked for does not suit them.
    """
    wanted, own = asked(cfg), OmegaConf.to_container(cfg)
    saved = with_asked(_read(text, source, own), (), wanted.search_path)
    # what is wrong with the saved settings by themselves is said of these, the rest of what was typed
    with explained(lambda error: _blamed(saved, source) or ConfigError(str(error)), (ConfigError,)):
        made = apply_overrides(saved, wanted.overrides)
        made.task, made.resume, made.output_dir = cfg.task, cfg.resume, cfg.output_dir
        made = with_asked(made, wanted.overrides, wanted.search_path)
        named = _named_by(made)
    here = _names(asdict(typed(cfg)))  # typed for this very run: whoever can do that needs no checkpoint to run code
    targets = _shipped() | {value for place, value in here if _last(place) == TARGET}
    unknown = [name for name in named if name not in here]
    # a function that is allowed may be named at any place; anything else only where it was typed
    _refuse(source, {name: named[name] for name in unknown if _last(name[0]) != TARGET or name[1] not in targets})
    return made


def check_model(model: dict[str, Any], source: Path) -> None:
    """Refuse the model settings of a checkpoint whose network is made of other files, or calls what they name.

    Raises:
        CheckpointError: it is.
    """
    if named := _names({"model": model}):  # load_model has no settings in which a name could be allowed
        raise CheckpointError(
            f"{source} names {', '.join(f'{place}={value}' for place, value in named)}, and whoever made that file "
            "could have named anything; if you know it, give load_model a factory that makes the network"
        )


def frozen(cfg: DictConfig) -> str:
    """The settings as YAML, with values in place of resolvers (`${oc.env:HOME}`), which are not called again."""
    return OmegaConf.to_yaml(_without_calls(OmegaConf.to_container(cfg), OmegaConf.to_container(cfg, resolve=True)))


def _without_calls(raw: Any, resolved: Any) -> Any:
    if isinstance(raw, dict):
        return {key: _without_calls(value, resolved[key]) for key, value in raw.items()}
    if isinstance(raw, list):
        return [_without_calls(*pair) for pair in zip(raw, resolved, strict=True)]
    return resolved if isinstance(raw, str) and "${" in _beside(raw.replace("\\${", "")) else raw


def _renamed(text: str) -> str:
    """The settings of an earlier version as this one names them."""
    for then, now in RENAMED.items():
        text = re.sub(then, now, text)
    return text


def _read(text: Any, source: Path, own: Any) -> DictConfig:
    """Saved settings, checked by the schema, of which nothing is resolved yet."""
    problem, saved = "it is no YAML of settings", None
    try:
        plain = OmegaConf.to_container(OmegaConf.create(_renamed(text))) if isinstance(text, str) else None
        if isinstance(plain, dict) and plain:
            _refuse(source, _calls(plain, own))  # before the merge: reading a value of it would call the resolver
            saved = OmegaConf.merge(OmegaConf.structured(Config), plain)
            saved.card = CardConfig()  # a training has none
    except (OmegaConfBaseException, YAMLError, TypeError, AttributeError, RecursionError) as error:
        problem, saved = str(error).splitlines()[0], None
    if not isinstance(saved, DictConfig):
        raise CheckpointError(f"the settings in {source} cannot be read: {problem}; start anew with resume=null")
    return saved


def _blamed(saved: DictConfig, source: Path) -> CheckpointError | None:
    try:
        _named_by(saved)
    except ConfigError as error:
        return CheckpointError(f"the settings in {source} cannot be used: {error}; start anew with resume=null")
    return None


def _named_by(cfg: DictConfig) -> Names:
    """What is named by everything that these settings can come to: each stage, its rungs, each override of a rung."""
    named: Names = {}

    def note(_: str, before: Config, after: Config) -> str:
        named.update(_names(asdict(after)))
        return "each is looked at alone"  # as the network may refuse those that hide another in the rung

    for _, settings in stages(cfg):  # the rungs as well: a name may hide in an override that only a descent comes to
        for rung in (*resolve(settings), *resolve(settings, refuse=note)):
            named |= _names(asdict(rung.settings))
    return named


def _names(tree: Any) -> Names:
    """What settings name to be called or loaded."""
    leaves = list(_leaves(tree))
    targets = {place: str(value) for place, value, _ in leaves if _last(place) == TARGET}
    return {(place, str(value)): how for place, value, how in leaves if _is_name(place, value, targets)}


def _is_name(place: str, value: Any, targets: dict[str, str]) -> bool:
    parent, _, last = place.rpartition(".")
    if place.startswith("model.kwargs."):
        # the key itself or within it: timm loads, and unpickles, whatever these arguments point to
        if place.split(".")[2].partition("[")[0] in LOADS and value is not None:
            return True
    elif place == "model.name":
        return ":" in str(value)  # hf-hub:NAME, local-dir:FOLDER
    # hydra.utils.get_method and its like call, or hand on, what another argument names
    return last == TARGET or (targets.get(f"{parent}.{TARGET}", "").startswith("hydra.") and isinstance(value, str))


def _refuse(source: Path, named: Names) -> None:
    if named:
        what = ", ".join(f"{place}={value}" for place, value in named)
        raise CheckpointError(
            f"the settings in {source} name what may run any code, and what this package does not ship: {what}. If you "
            f"know it, allow it for this run by typing it too: {' '.join(dict.fromkeys(named.values()))}"
        )


@cache  # dozens of files, which do not change while the program runs
def _shipped() -> frozenset[str]:
    return frozenset(
        str(value)
        for file in Path(config_dir()).rglob("*.yaml")
        for place, value, _ in _leaves(OmegaConf.to_container(OmegaConf.load(file)))
        if _last(place) == TARGET
    )


def _calls(saved: Any, own: Any) -> Names:
    """What calls a resolver, or may come to do so, or is a name that a rung could change; but for what is one's own."""
    # Overrides have escapes of their own (`$\\{`), and Hydra resolves once more what it instantiates: so a dollar of
    # one setting that a second one joins to the text of a third is a call too.
    known, names = {value for _, value, _ in _leaves(own)}, _names(saved)
    texts = [leaf for leaf in _leaves(saved) if isinstance(leaf[1], str) and leaf[1] not in known]
    has_dollar = any("$" in _beside(str(value)) for tree in (saved, own) for _, value, _ in _leaves(tree))
    return {
        (place, value): how
        for place, value, how in texts
        if CALL.search(_beside(value))
        or (has_dollar and REFERENCE.search(value) and not REFERENCE.fullmatch(value))
        or ("$" in value and (place, value) in names)
    }


def _beside(text: str) -> str:
    return REFERENCE.sub("", text)  # plain references are harmless: what they come to is looked at once resolved


def _last(place: str) -> str:
    return place.rpartition(".")[2]


def _leaves(tree: Any, place: str = "", how: str = "") -> Iterator[tuple[str, Any, str]]:
    """Full name and value of each setting, and what sets it when it is typed: of one in a list, the whole list."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{place}.{key}" if place else str(key), how)
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            whole = how or shlex.quote(f"++{place}={literal(tree)}")
            yield from _leaves(value, f"{place}[{number}]", whole)
    else:
        yield place, tree, how or override(f"++{place}", tree)
