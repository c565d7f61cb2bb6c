"""The device that a prediction is for: this machine's card, one that is named, or a simulated one."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch

from adaptive_trainer.config.limit import parse_limit
from adaptive_trainer.config.schema import CardConfig, Config
from adaptive_trainer.errors import ConfigError
from adaptive_trainer.memory.limit import DEFAULT_SIMULATED
from adaptive_trainer.memory.usage import format_bytes
from adaptive_trainer.planning.cache import PlanCache
from adaptive_trainer.prediction.costs import CLOCK, Rates, Speed
from adaptive_trainer.prediction.transfer import USUAL_LINK, Link
from adaptive_trainer.prediction.workspaces import MULTIPROCESSORS
from adaptive_trainer.utils.device import device_of

MiB = 2**20
ASSUMED_CAPABILITY = (8, 6)  # where there is no card and none is named
# What the context, cuBLAS and cuDNN take outside the allocator where it was not measured: 287 to 430 MiB are reported
# for cards up to compute capability 8.9, 770 to 810 MiB were measured on 9.0.
CONTEXT, CONTEXT_SINCE_HOPPER = 450 * MiB, 810 * MiB


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """What is predicted for. Sizes in bytes."""

    description: str
    cuda: bool  # else a simulated card on the CPU
    capability: tuple[int, int]
    capacity: int | None  # that the allocator may reserve; None where that is not known
    context: int = 0  # what a CUDA process takes outside the allocator, which no limit of it counts
    multiprocessors: int = MULTIPROCESSORS
    speed: Speed | None = None  # None: estimated
    link: Link = USUAL_LINK

    def rates(self, tf32: bool | None) -> Rates:
        """What kernels take by, under `trainer.tf32`."""
        capability = (
            self.capability if self.cuda else ASSUMED_CAPABILITY
        )  # a simulated card's figures would be no one's
        speed = self.speed or Speed.of(capability, self.multiprocessors, CLOCK, None)
        return replace(speed.rates(capability, tf32), link=self.link.rate)


def spec_of(config: Config, cache: PlanCache | None = None) -> DeviceSpec:
    """What settings ask about: the card that is named, this machine's card, or the CPU where `device=cpu` says so.

    `memory.limit` caps the allocator, a fraction being one of the card. With neither a card nor a limit, and no CUDA
    here, the capacity is unknown.

    Args:
        cache: knows what a CUDA process was seen to take of this machine's card.

    Raises:
        ConfigError: the limit cannot be read, or is larger than the card; the card or the device makes no sense.
    """
    limit = parse_limit(config.memory.limit)
    if config.card == CardConfig() and config.device.split(":")[0] == "cpu":
        if limit.lifted:
            return DeviceSpec("the CPU, with no limit", False, (0, 0), None)
        size = limit.of(DEFAULT_SIMULATED) or DEFAULT_SIMULATED
        return DeviceSpec(f"a simulated card of {format_bytes(size)} on the CPU", False, (0, 0), size)
    spec = card_of(config.card) or _this_card(config.device, cache)
    memory = None if spec.capacity is None else spec.capacity + spec.context
    if memory is None and limit.fraction is not None:
        raise ConfigError(f"memory.limit={limit.fraction:g} is a fraction of a card: name one with card=...")
    cap = limit.of(memory or 0)
    if cap is None:
        return spec
    if memory is not None and cap > memory:  # of an assumed card, any limit is believed
        raise ConfigError(f"memory.limit is {format_bytes(cap)}, more than all of {spec.description}")
    room = cap if spec.capacity is None else min(cap, spec.capacity)
    return replace(spec, description=f"{spec.description}, limited to {format_bytes(cap)}", capacity=room)


def card_of(card: CardConfig) -> DeviceSpec | None:
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
    name, capability = card.name or "a card", (int(match[1]), int(match[2]))
    if card.memory_mib * MiB <= (context := _usual_context(capability)):
        raise ConfigError(
            f"card={name}: CUDA itself takes {format_bytes(context)}, and the card has {card.memory_mib} MiB"
        )
    spec = _card(name, card.memory_mib * MiB, capability, context, count, _speed(card))
    if card.pcie_generation is None or card.pcie_lanes is None:
        return spec
    if card.pcie_generation < 1 or not 1 <= card.pcie_lanes <= 16:
        raise ConfigError(f"card={name}: pcie_generation is 1 or more, and pcie_lanes is from 1 to 16")
    return replace(spec, link=Link(card.pcie_generation, card.pcie_lanes, is_known=True))


def _speed(card: CardConfig) -> Speed | None:
    if card.bandwidth_gbs is None or card.tflops is None or card.tensor_tflops is None:
        return None
    return Speed(card.bandwidth_gbs * 1e9, card.tflops * 1e12, card.tensor_tflops * 1e12)


def _this_card(name: str, cache: PlanCache | None) -> DeviceSpec:
    if not torch.cuda.is_available():
        text = "a card of compute capability {}.{} (card=... names another)".format(*ASSUMED_CAPABILITY)
        return DeviceSpec(text, True, ASSUMED_CAPABILITY, None, _usual_context(ASSUMED_CAPABILITY))
    about = torch.cuda.get_device_properties(device_of(name))
    capability = (about.major, about.minor)
    context = (cache.context_bytes(about.name) if cache else None) or _usual_context(capability)
    return _card(about.name, about.total_memory, capability, context, about.multi_processor_count, speed_of(about))


def speed_of(about: Any) -> Speed:
    """The speed of this machine's card, from what torch knows of it; what it does not say is estimated."""
    clock = getattr(about, "clock_rate", 0) * 1e3 or CLOCK
    # Two transfers a clock, over the whole bus.
    bandwidth = 2e3 * getattr(about, "memory_clock_rate", 0) * getattr(about, "memory_bus_width", 0) / 8
    return Speed.of((about.major, about.minor), about.multi_processor_count, clock, bandwidth or None)


def _card(
    name: str, memory: int, capability: tuple[int, int], context: int, multiprocessors: int, speed: Speed | None
) -> DeviceSpec:
    room = memory - context
    return DeviceSpec(f"{name}, {format_bytes(memory)}", True, capability, room, context, multiprocessors, speed)


def _usual_context(capability: tuple[int, int]) -> int:
    return CONTEXT_SINCE_HOPPER if capability >= (9, 0) else CONTEXT
