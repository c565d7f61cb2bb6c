"""Which parts of a network are recomputed, and how deeply: a plan, and how it is written in settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from torch import nn

from adaptive_trainer.errors import ConfigError

CONTAINERS = (nn.Sequential, nn.ModuleList)
NONE = "none"
REST = "rest"  # in a plan: all that is in no other part


class Level(StrEnum):
    """What is recomputed of a part of the network.

    Convolutions, matrix products and attention are dear: recomputing them takes about the time of a forward pass. All
    else is cheap: it takes the time to read and write its tensors.
    """

    KEEP = "keep"  # nothing: every activation is kept
    CHEAP = "cheap"  # what is cheap, up to the next dear operator
    WHOLE = "whole"  # everything, from the part's input
    MOST = "most"  # everything, and what is cheap once more
    LEAST = "least"  # everything, for each activation anew: the least memory, and the most time


LEVELS = ", ".join(Level)


@dataclass(frozen=True)
class Plan:
    """The level of each part of a network, by the module's path; `rest` is that of all else."""

    parts: Mapping[str, Level]
    rest: Level = Level.KEEP

    @property
    def is_empty(self) -> bool:
        """Whether nothing is recomputed."""
        return all(level == Level.KEEP for level in (self.rest, *self.parts.values()))

    def __str__(self) -> str:
        """As it is written in settings, such as `most:blocks.0|blocks.1+cheap:rest`; an empty one is `none`."""
        if self.is_empty:
            return NONE
        paths = {level: [path for path, its in self.parts.items() if its == level] for level in Level}
        paths[self.rest].append(REST)
        used = {level: found for level, found in paths.items() if found and (level, found) != (Level.KEEP, [REST])}
        return "+".join(f"{level}:{'|'.join(found)}" for level, found in used.items())

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read what `str` has written.

        Raises:
            ConfigError: it is no plan.
        """
        levels: dict[str, Level] = {}
        if text == NONE:
            return cls({})
        for group in text.split("+"):
            level, colon, paths = group.partition(":")
            if level not in list(Level) or not colon or not all(paths.split("|")):
                raise ConfigError(
                    f"trainer.recompute={text!r}: {group!r} is no part of a plan; write LEVEL:PATH|PATH+LEVEL:PATH, "
                    f"with a level of {LEVELS}, and paths of modules or {REST!r} for all others"
                )
            levels |= dict.fromkeys(paths.split("|"), Level(level))
        return cls({path: level for path, level in levels.items() if path != REST}, levels.get(REST, Level.KEEP))


def blocks_of(model: nn.Module) -> list[str]:
    """The paths of the network's blocks: the composite modules in a plain container, or two of a kind side by side."""
    return list(_blocks(model, ""))


def _blocks(module: nn.Module, prefix: str) -> Iterator[str]:
    kinds = Counter(type(child) for child in _composites(module))
    for name, child in module.named_children():
        stands = type(module) in CONTAINERS or kinds[type(child)] > 1
        if type(child) not in CONTAINERS and stands and _is_composite(child) and not _is_stage(child):
            yield f"{prefix}{name}"
        else:
            yield from _blocks(child, f"{prefix}{name}.")


def _is_composite(module: nn.Module) -> bool:
    """Whether it has parts with parameters."""
    return any(True for child in module.children() for _ in child.parameters())


def _composites(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if type(child) not in CONTAINERS and _is_composite(child)]


def _is_stage(module: nn.Module) -> bool:
    """Whether there are several blocks in it: modules of one kind side by side, whose parts are composite."""
    for inner in module.modules():
        found = Counter(type(child) for child in _composites(inner) if any(map(_is_composite, child.children())))
        if any(count > 1 for count in found.values()):
            return True
    return False
