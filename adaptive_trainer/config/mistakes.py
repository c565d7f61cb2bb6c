"""What argparse, Hydra, OmegaConf and YAML have against what was typed, in one line that says what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError
from yaml import MarkedYAMLError, YAMLError

from adaptive_trainer.config import schema
from adaptive_trainer.config.schema import SETTINGS, Config, leaves
from adaptive_trainer.errors import ConfigError, UserError, override, remedy

if TYPE_CHECKING:
    from hydra.errors import MissingConfigException

FIELDS = {name: [each.name for each in fields(kind)] for name, kind in vars(schema).items() if is_dataclass(kind)}
NEAR = 0.6  # of 1, from which two words are similar; difflib's own
OF_SWEEPS = re.compile(r"'hydra/(?:launcher|sweeper)/(joblib|submitit_\w+|optuna)'")  # configs that plugins bring
# What OmegaConf says of a value, and how it is said here of KEY=VALUE.
OF_VALUES = (
    (r"Value '?(?P<value>.*?)'? of type '.*' could not be converted to Integer", "{key}={value} is not a whole number"),
    (r"Value '?(?P<value>.*?)'? of type '.*' could not be converted to Float", "{key}={value} is not a number"),
    (r"Value '(?P<value>.*)' is not a valid bool", "{key}={value} is not true or false"),
    (r"Value '?(?P<value>.*?)'? of type '.*' could not be converted to Boolean", "{key}={value} is not true or false"),
    (r".* is not Optional", "{key}=null: it needs a value"),
)


def options_first(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command line in the order that argparse can take: options, then overrides.

    Raises:
        ConfigError: there is an option that Hydra does not have, or one without its value.
    """
    from hydra._internal.utils import get_args_parser

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{message}; --hydra-help lists the options")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    known, others = parser.parse_known_args(list(arguments))
    for text in others:
        if text.startswith("-"):
            raise ConfigError(_no_option(text, arguments))
    overrides = [text for text in arguments if text in {*known.overrides, *others}]
    for text in overrides:
        if text.startswith("="):
            raise ConfigError(f"{text} names no setting; write KEY=VALUE")
        if text.startswith("~") and _is_needed(needed := text[1:].partition("=")[0]):
            raise ConfigError(f"{text} would remove a setting; give it a value instead: {needed}=...")
    return [*(text for text in arguments if text not in overrides), *overrides]


def _is_needed(key: str) -> bool:
    """Whether a setting, or a group of settings, is read, and so cannot be removed."""
    return key != "card" and any(known == key or known.startswith(f"{key}.") for known in SETTINGS)


def _no_option(option: str, arguments: Sequence[str]) -> str:
    name, _, value = option.lstrip("-").partition("=")
    after = [*arguments, ""][[*arguments].index(option) + 1]
    value = value or ("..." if not after or after.startswith("-") or "=" in after else after)
    near = _near(name.replace("-", "_"))
    example = override(near[0], value) if near else "trainer.epochs=3"
    return f"{option.partition('=')[0]} is no option; settings have no dashes: {example}"


def explain(error: Exception) -> UserError | None:
    """What is wrong with settings or their files, and what to do; None for an error of another kind."""
    if isinstance(error, UserError):
        return error
    line = _line(error)
    if line is not None and (missing := OF_SWEEPS.search(line)):
        line = f"{line}; {missing[1]} comes with pip install 'adaptive-trainer[sweep]'"
    return None if line is None else ConfigError(line)


def _line(error: Exception) -> str | None:
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException

    if isinstance(error, YAMLError | UnicodeDecodeError):
        return f"a YAML file cannot be read: {_place(error)}"
    if isinstance(error, MissingConfigException):
        return _no_choice(error)
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    causes = (error, error.__cause__, error.__context__)  # Hydra names no cause for what a file says
    for cause in causes:
        if isinstance(cause, OmegaConfBaseException):
            file = re.match(r"In '.+': (?=\w+ raised while composing config)", str(error))
            whole = re.match(r"Could not override '(.+?)'", str(error))  # OmegaConf names the first unknown part of it
            return (file[0] if file else "") + _of_omegaconf(cause, whole[1] if whole else "")
    if several := re.match(r"Ambiguous value for argument '(.*?)=(.*)'\n", str(error)):
        key, values = several.groups()
        return f"{key}={values} are several values: {key}=[{values}] is a list, and -m in front trains with each"
    if isinstance(error, HydraException):
        return ". ".join(text for each in causes[:2] if (text := _first_line(each)))
    for cause in causes[:2]:  # a log file that cannot be opened is the cause of another error
        if isinstance(cause, OSError):
            return f"the output folder cannot be written: {cause}. {remedy(cause, 'hydra.run.dir')}"
    if type(error) is ValueError:  # a group that is given no text
        return f"{_first_line(error)}; to choose nothing from a group (card, preset) leave it out"
    return None


def _first_line(error: BaseException | None) -> str:
    return "" if error is None else str(error).strip().partition("\n")[0].rstrip(". ")


def _place(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if not isinstance(error, MarkedYAMLError) or mark is None:
        return _first_line(error)
    return f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}: {error.problem}"


def _no_choice(error: MissingConfigException) -> str:
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    options = [str(name) for name in error.options or ()]
    if not options:
        return _first_line(error)
    near = difflib.get_close_matches(choice, options, n=1)
    hint = f"; did you mean {group}={near[0]}?" if near else ""
    return f"Could not find '{group}/{choice}'. Available options in '{group}': {', '.join(options)}{hint}"


def _unreadable(text: str) -> str:
    key, has_value, value = text.partition("=")
    if value.startswith(("[", "{")):
        return f'{text} cannot be read; between brackets, quotes go around each text that is no plain word: ["a.b=1"]'
    if has_value:
        if key in SETTINGS and (refusal := _refusal(key, value)):
            return refusal
        return f"{text} cannot be read; if the value is meant as it stands, quote it: {override(key, value)}"
    if near := _near(key):
        return f"{text} has no value; write {near[0]}=VALUE"
    return f"{text} has no value; write {key}=VALUE, and quotes around a value with a blank: 'data.root=\"my photos\"'"


def _refusal(key: str, text: str) -> str:
    """What a setting has against this text as its value; empty where quotes would make it one."""
    settings = OmegaConf.structured(Config)
    try:
        OmegaConf.update(settings, key, text)
    except ValidationError as error:
        return _no_value(key, _first_line(error))
    rules = next(rules for known, _, rules in leaves(Config()) if known == key)
    return next((f"{key}={text} {said}" for is_allowed, said in rules if not is_allowed(text)), "")


def _of_omegaconf(error: OmegaConfBaseException, typed: str = "") -> str:
    key = str(error.full_key or "")
    if not isinstance(error, ConfigKeyError | ConfigAttributeError):
        return _no_value(key, _first_line(error))
    kind = error.object_type
    if kind is None or not is_dataclass(kind):
        return to_be_added(key, error.parent_node)
    if "[" in key or ("." not in key and kind is not Config):  # of an item of a list
        return f"there is no {key!r}; allowed are {', '.join(FIELDS[kind.__name__])}"
    return no_setting(typed or key)


def _no_value(key: str, line: str) -> str:
    for pattern, text in OF_VALUES:
        if found := re.match(pattern, line):
            return text.format(key=key, **found.groupdict())
    if wrong := re.match(r"Invalid type assigned: \w+ is not a subclass of (\w+)\. value: (.*)", line):
        names = FIELDS.get(wrong[1], [])
        return f"{key}={wrong[2]}: these are several settings; set one: {', '.join(f'{key}.{name}' for name in names)}"
    return f"{key}: {line}" if key and key not in line else line


def to_be_added(key: str, node: Any) -> str:
    """How a key gets into a node that takes any, and who is given it."""
    target = OmegaConf.select(node, "_target_", default=None) if OmegaConf.is_dict(node) else None
    if target is None:
        return f"there is no setting {key!r}; to add one to a free-form node write +{key}=..."
    return f"there is no setting {key!r}; +{key}=... hands it to {target}, if that takes it"


def no_setting(key: str) -> str:
    """That there is no such setting, and which is meant."""
    near = _alike(key)
    return f"there is no setting {key}" + (f"; did you mean {', '.join(near)}?" if near else "; --help lists them all")


def _near(key: str) -> list[str]:
    """The settings that a whole or a last name means, or else similar ones."""
    return [known for known in sorted(SETTINGS) if key in (known, _last(known))] or _alike(key)


def _alike(key: str) -> list[str]:
    """Settings and groups of settings that are similar word by word, the most similar first; else by the last word."""
    words = tuple(key.split("."))
    known = [tuple(setting.split(".")) for setting in SETTINGS]
    names = {parts[: len(words)]: parts[: len(words)] for parts in known if len(parts) >= len(words)}
    if len(words) == 1:  # `epochs` may be short for trainer.epochs
        names |= {parts: parts[-1:] for parts in known}
    scores = {name: min(map(_similarity, words, compared)) for name, compared in names.items()}
    near = [".".join(name) for name in sorted(names, key=lambda name: (-scores[name], name)) if scores[name] >= NEAR]
    return near[:3] or (_alike(_last(key)) if len(words) > 1 else [])


def _similarity(word: str, known: str) -> float:
    return difflib.SequenceMatcher(None, word, known).ratio()


def _last(key: str) -> str:
    return key.rpartition(".")[2]
