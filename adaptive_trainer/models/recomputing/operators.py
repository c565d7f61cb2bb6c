"""Which operators may run a second time: those that give the same bits again and change nothing else."""

from __future__ import annotations

from enum import Enum
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
KEPT_TAGS = {
    torch.Tag.nondeterministic_seeded,  # draws random numbers: what it drew is kept
    torch.Tag.nondeterministic_bitwise,
    torch.Tag.dynamic_output_shape,  # waits for the device
    torch.Tag.data_dependent_output,
}
# Of a CPU, which torch has no formula for.
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
# They give what the memory held before.
UNFILLED = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
# Operators that count running statistics, with the position of these; training is the argument after them.
BATCH_NORM = {aten.native_batch_norm: 3, aten.cudnn_batch_norm: 3, aten.miopen_batch_norm: 3}


class Kind(Enum):
    """What an operator is to recomputation."""

    KEPT = 0  # its result is kept
    VIEW = 1  # its result lies in the memory of its first argument
    CHEAP = 2
    DEAR = 3


@cache
def kind_of(func: Any) -> Kind:
    """Say what an operator is to recomputation."""
    packet = func._overloadpacket
    if func.namespace != "aten" or packet in UNFILLED or KEPT_TAGS.intersection(func.tags):
        return Kind.KEPT
    if packet in flop_registry or packet is ATTENTION:
        return Kind.DEAR
    return Kind.VIEW if func.is_view else Kind.CHEAP


@cache
def written(func: Any) -> tuple[int, ...]:
    """The positions of the arguments that an operator changes; one that it changes by name is out of place."""
    if not func._schema.is_mutable:
        return ()
    arguments = func._schema.arguments
    return tuple(i for i, each in enumerate(arguments) if each.alias_info is not None and each.alias_info.is_write)


def again(func: Any, args: list[Any]) -> list[Any]:
    """The arguments for a second time: statistics over batches are not counted twice."""
    place = BATCH_NORM.get(func._overloadpacket)
    if place is not None and args[place + 2]:
        args[place : place + 2] = None, None
    return args
