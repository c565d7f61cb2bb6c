"""What argparse, Hydra, OmegaConf and YAML have against what was typed, in one line that says what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn, get_args, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from adaptive_trainer.errors import ConfigError, UserError, override, remedy

if TYPE_CHECKING:
    from hydra.errors import MissingConfigException

KINDS = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}


def options_first(arguments: Sequence[str], schema: type) -> list[str]:
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
            raise ConfigError(_no_option(text, arguments, schema))
    overrides = [text for text in arguments if text in {*known.overrides, *others}]
    for text in overrides:
        if text.startswith("="):
            raise ConfigError(f"{text} names no setting; write KEY=VALUE")
        if text.startswith("~") and (needed := text[1:].partition("=")[0]) in _kept(schema):
            raise ConfigError(f"{text} would remove a setting; give it a value instead: {needed}=...")
    return [*(text for text in arguments if text not in overrides), *overrides]


def _kept(schema: type) -> set[str]:
    """Settings and groups of settings that are read, and so cannot be removed."""
    return {".".join(key.split(".")[:depth]) for key in keys(schema) for depth in (1, 2)} - {"card", "preset"}


def _no_option(option: str, arguments: Sequence[str], schema: type) -> str:
    name, _, value = option.lstrip("-").partition("=")
    after = [*arguments, ""][[*arguments].index(option) + 1]
    value = value or ("..." if not after or after.startswith("-") or "=" in after else after)
    near = _near(name.replace("-", "_"), schema)
    example = override(near[0], value) if near else "trainer.epochs=3"
    return f"{option.partition('=')[0]} is no option; settings have no dashes: {example}"


def explained(error: Exception, schema: type) -> str:
    """The line for an error in settings or their files; empty for an error of another kind.

    Args:
        schema: the dataclass of all settings.
    """
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException

    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, YAMLError | UnicodeDecodeError):
        return f"a YAML file cannot be read: {_place(error)}"
    if isinstance(error, MissingConfigException):
        return _no_choice(error)
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override, schema)
    if file := re.match(r"(In '.+'): \w+ raised while composing config:\n(.*)", str(error)):
        return f"{file[1]}: {_of_file(file[2], schema)}"
    about = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(about, OmegaConfBaseException):
        return _of_omegaconf(about, schema)
    if several := re.match(r"Ambiguous value for argument '(.*?)=(.*)'\n", str(error)):
        key, values = several.groups()
        return f"{key}={values} are several values: {key}=[{values}] is a list, and -m in front trains with each"
    if isinstance(error, HydraException):
        return ". ".join(text for each in (error, error.__cause__) if (text := _first_line(each)))
    disk = error if isinstance(error, OSError) else error.__cause__  # of a log file that cannot be opened
    if isinstance(disk, OSError):
        return f"the output folder cannot be written: {disk}. {remedy(disk, 'hydra.run.dir')}"
    if type(error) is ValueError:  # a group that is given no text
        return f"{_first_line(error)}; to choose nothing from a group (card, preset) leave it out"
    return ""


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


def _unreadable(text: str, schema: type) -> str:
    key, has_value, value = text.partition("=")
    if value.startswith(("[", "{")):
        return f'{text} cannot be read; between brackets, quotes go around each text that is no plain word: ["a.b=1"]'
    if has_value:
        return f"{text} cannot be read; if the value is meant as it stands, quote it: {override(key, value)}"
    near = _near(key, schema)
    return f"{text} has no value; write {near[0] if near else key}=VALUE"


def _of_file(line: str, schema: type) -> str:
    unknown = re.match(r"Key '(.+)' not in '(\w+)'", line)
    if unknown and unknown[2] in _kinds(schema):
        return f"there is no {unknown[1]!r}; allowed are {', '.join(_kinds(schema)[unknown[2]])}"
    return line


def _of_omegaconf(error: OmegaConfBaseException, schema: type) -> str:
    key = str(error.full_key or "")
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        kind = error.object_type
        if not is_dataclass(kind):
            return to_be_added(key, error.parent_node)
        if "[" in key or ("." not in key and kind is not schema):  # of an item of a list
            return f"there is no {key!r}; allowed are {', '.join(field.name for field in fields(kind))}"
        return no_setting(key, schema)
    return _no_value(key, _first_line(error), schema)


def _no_value(key: str, line: str, schema: type) -> str:
    """What OmegaConf says of a value, as one would say it."""
    if (wrong := re.match(r"Value (.*) of type '.*' could not be converted to (\w+)", line)) and wrong[2] in KINDS:
        return f"{key}={wrong[1].strip(chr(39))} is not {KINDS[wrong[2]]}"
    if wrong := re.match(r"Value '(.*)' is not a valid bool", line):
        return f"{key}={wrong[1]} is not {KINDS['Boolean']}"
    if wrong := re.match(r"Invalid type assigned: \w+ is not a subclass of (\w+)\. value: (.*)", line):
        names = _kinds(schema).get(wrong[1], [])
        return f"{key}={wrong[2]}: these are several settings; set one: {', '.join(f'{key}.{name}' for name in names)}"
    if "is not Optional" in line:
        return f"{key}=null: it needs a value"
    return f"{key}: {line}" if key and key not in line else line


@cache
def _kinds(schema: Any) -> dict[str, list[str]]:
    """Names of the dataclasses that settings are made of, and of their fields."""
    found = {schema.__name__: [field.name for field in fields(schema)]}
    for hint in get_type_hints(schema).values():
        for part in (hint, *get_args(hint)):
            if isinstance(part, type) and is_dataclass(part):
                found |= _kinds(part)
    return found


def to_be_added(key: str, node: Any) -> str:
    """How a key gets into a node that takes any, and who is given it."""
    target = OmegaConf.select(node, "_target_", default=None) if OmegaConf.is_dict(node) else None
    if target is None:
        return f"there is no setting {key!r}; to add one to a free-form node write +{key}=..."
    return f"there is no setting {key!r}; +{key}=... hands it to {target}, if that takes it"


def no_setting(key: str, schema: type) -> str:
    """That there is no such setting, and which is meant."""
    near = _near(key, schema, by_whole=False)
    return f"there is no setting {key}" + (f"; did you mean {', '.join(near)}?" if near else "; --help lists them all")


def _near(key: str, schema: type, by_whole: bool = True) -> list[str]:
    """Settings with the same last name, or else a similar one."""
    last = {known: known.rpartition(".")[2] for known in sorted(keys(schema))}
    name = key.rpartition(".")[2]
    if by_whole and (exact := [known for known in last if key in (known, last[known])]):
        return exact
    alike = difflib.get_close_matches(name, set(last.values()))
    return difflib.get_close_matches(key, [known for known in last if last[known] in alike], cutoff=0)


@cache
def keys(schema: type) -> frozenset[str]:
    """The full names of all settings."""
    return keys_of(schema())


def keys_of(settings: Any) -> frozenset[str]:
    """The full names of the settings in an instance, which may have been given more than its schema has."""
    return frozenset(_keys(settings))


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    for name, part in vars(node).items():
        if is_dataclass(part):
            yield from _keys(part, f"{prefix}{name}.")
        else:
            yield prefix + name
