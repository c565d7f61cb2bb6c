"""The card that a prediction is for: this machine's, one that is named, or a simulated one."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from adaptive_trainer.config.schema import CardConfig, Config
from adaptive_trainer.errors import ConfigError
from adaptive_trainer.memory.limit import DEFAULT_SIMULATED, parse_limit
from adaptive_trainer.memory.usage import format_bytes
from adaptive_trainer.planning.cache import PlanCache
from adaptive_trainer.prediction.workspaces import MULTIPROCESSORS
from adaptive_trainer.utils.device import device_of

MiB = 2**20
ASSUMED_CAPABILITY = (8, 6)  # where there is no card and none is named
# What the context, cuBLAS and cuDNN take outside the allocator where it was not measured: 287 to 430 MiB are reported
# for cards up to compute capability 8.9, 770 to 810 MiB were measured on 9.0.
CONTEXT, CONTEXT_SINCE_HOPPER = 450 * MiB, 810 * MiB


@dataclass(frozen=True, slots=True)
class Card:
    """A kind of card, as in `configs/card/`."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    multiprocessors: int = MULTIPROCESSORS


@dataclass(frozen=True, slots=True)
class Target:
    """What is predicted for.

    Attributes:
        description: in words.
        cuda: a CUDA card; else a simulated card on the CPU.
        capability: compute capability of the card.
        capacity: bytes that the allocator may reserve; None where that is not known.
        context: bytes that a CUDA process takes outside the allocator.
        multiprocessors: of the card.
    """

    description: str
    cuda: bool
    capability: tuple[int, int]
    capacity: int | None
    context: int
    multiprocessors: int = MULTIPROCESSORS


def card_of(card: CardConfig) -> Card | None:
    """The card that `card=NAME` chose from `configs/card/`; None where none is named.

    Raises:
        ConfigError: it lacks a figure, or one makes no sense.
    """
    if card == CardConfig():
        return None
    match = re.fullmatch(r"(\d+)\.(\d+)", card.capability or "")
    count = MULTIPROCESSORS if card.multiprocessors is None else card.multiprocessors
    if match is None or card.memory_mib is None or min(card.memory_mib, count) < 1:
        raise ConfigError(
            f"card={card.name}: a card has memory_mib (whole MiB above 0), capability ('8.6') and, if it is known, "
            "multiprocessors (above 0); see configs/card/"
        )
    found = Card(card.name or "a card", card.memory_mib * MiB, (int(match[1]), int(match[2])), count)
    if found.memory_bytes <= context_of(found.capability):
        least = format_bytes(context_of(found.capability))
        raise ConfigError(f"card={found.name}: CUDA itself takes {least}, and the card has {card.memory_mib} MiB")
    return found


def context_of(capability: tuple[int, int]) -> int:
    """Bytes that a CUDA process is expected to take outside the allocator."""
    return CONTEXT_SINCE_HOPPER if capability >= (9, 0) else CONTEXT


def target_of(config: Config, card: Card | None = None, cache: PlanCache | None = None) -> Target:
    """What settings ask about: the card that is named, this machine's card, or the CPU where `device=cpu` says so.

    `memory.limit` caps the allocator, a fraction being one of the card. With neither a card nor a limit, and no CUDA
    here, the capacity is unknown.

    Raises:
        ConfigError: the limit cannot be read, or is larger than the card; the device does not exist.
    """
    limit = parse_limit(config.memory.limit)
    if card is None and config.device.split(":")[0] == "cpu":
        size = None if limit.lifted else limit.of(DEFAULT_SIMULATED) or DEFAULT_SIMULATED
        source = "the CPU, with no limit" if size is None else f"a simulated card of {format_bytes(size)} on the CPU"
        return Target(source, False, (0, 0), size, 0)
    if card is not None:
        context = context_of(card.capability)
        room, source = card.memory_bytes - context, f"{card.name}, {format_bytes(card.memory_bytes)}"
    elif torch.cuda.is_available():
        card, context = _this_card(config.device, cache)
        room, source = card.memory_bytes - context, f"{card.name}, {format_bytes(card.memory_bytes)}"
    else:
        if limit.fraction is not None:
            raise ConfigError(f"memory.limit={limit.fraction:g} is a fraction of a card: name one with card=...")
        context, room = context_of(ASSUMED_CAPABILITY), None
        source = (
            f"a card of compute capability {ASSUMED_CAPABILITY[0]}.{ASSUMED_CAPABILITY[1]} (card=... names another)"
        )
    cap = limit.of(card.memory_bytes if card is not None else 0)
    if cap is not None and card is not None and cap > card.memory_bytes:
        raise ConfigError(f"memory.limit is {format_bytes(cap)}, more than all of {source}")
    if cap is not None:
        room, source = cap if room is None else min(cap, room), f"{source}, limited to {format_bytes(cap)}"
    if card is None:
        return Target(source, True, ASSUMED_CAPABILITY, room, context)
    return Target(source, True, card.capability, room, context, card.multiprocessors)


def _this_card(name: str, cache: PlanCache | None) -> tuple[Card, int]:
    about = torch.cuda.get_device_properties(device_of(name))
    capability = (about.major, about.minor)
    measured = None if cache is None else cache.context_bytes(about.name)
    return Card(about.name, about.total_memory, capability, about.multi_processor_count), measured or context_of(
        capability
    )
