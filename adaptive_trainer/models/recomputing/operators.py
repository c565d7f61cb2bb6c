"""Which operators may run a second time: those that give the same bits again and change nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from adaptive_trainer.models.recomputing.trees import tensors

aten = torch.ops.aten
KEPT_TAGS = {
    torch.Tag.nondeterministic_seeded,  # draws random numbers: what it drew is kept
    torch.Tag.nondeterministic_bitwise,
    torch.Tag.dynamic_output_shape,  # waits for the device
    torch.Tag.data_dependent_output,
}
# They give what the memory held before.
UNFILLED = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
KEPT = UNFILLED | {
    # Their results are to be filled, perhaps by code that torch does not see: NumPy, a kernel of one's own.
    *(aten.zeros_like, aten.ones_like, aten.full_like, aten.new_zeros, aten.new_ones, aten.new_full),
    # Where their result lies is counted from the beginning of the memory, which is another for a copy.
    *(aten.as_strided, aten.set_, aten.resize_, aten.resize_as_),
    # They count running statistics, or hold state and weights that are laid out for them.
    *(aten.batch_norm_gather_stats, aten.batch_norm_gather_stats_with_counts, aten.batch_norm_update_stats),
    *(aten.mkldnn_rnn_layer, aten._cudnn_rnn_flatten_weight),
    # On CUDA their sums have no order, as `torch.use_deterministic_algorithms` says; torch has no tag for it.
    *(aten.index_add, aten.index_put, aten._index_put_impl_, aten.put, aten.scatter_add, aten.scatter_reduce),
    *(aten.index_add_, aten.index_put_, aten.put_, aten.scatter_add_, aten.scatter_reduce_, aten.index_reduce),
    *(aten.cumsum, aten.cumsum_, aten.histc, aten.kthvalue, aten.median, aten.nanmedian, aten._embedding_bag),
}
# Operators that count running statistics, with the position of these; training is the argument after them.
BATCH_NORM = {aten.native_batch_norm: 3, aten.cudnn_batch_norm: 3, aten.miopen_batch_norm: 3}
# Others whose schemas do not say what they write, with the position of it.
WRITES = {
    aten.batch_norm_gather_stats: 3,
    aten.batch_norm_gather_stats_with_counts: 3,
    aten.batch_norm_update_stats: 1,
}


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
    if func.namespace != "aten" or packet in KEPT or KEPT_TAGS.intersection(func.tags):
        return Kind.KEPT
    if packet in flop_registry:
        return Kind.DEAR
    return Kind.VIEW if func.is_view else Kind.CHEAP


def changed_by(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operator says that it changes."""
    places = written(func)
    if not places:
        return []
    named = [kwargs.get(each.name) for each in func._schema.arguments if each.kwarg_only and _is_written(each)]
    return tensors([*(args[place] for place in places if place < len(args)), *named])


def counted_by(func: Any, args: Sequence[Any]) -> list[Tensor]:
    """The arguments that an operator changes without saying so."""
    packet = func._overloadpacket
    if func.namespace == "c10d":  # collectives
        return tensors(args)
    place = BATCH_NORM.get(packet)
    if place is not None and not args[place + 2]:
        return []
    place = WRITES.get(packet, place)
    return [] if place is None else tensors(args[place : place + 2])


@cache
def written(func: Any) -> tuple[int, ...]:
    """The positions, by the schema, of the arguments that an operator changes; those by name come last."""
    if not func._schema.is_mutable:
        return ()
    return tuple(i for i, each in enumerate(func._schema.arguments) if _is_written(each))


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def again(func: Any, args: list[Any]) -> list[Any]:
    """The arguments for a second time: statistics over batches are not counted twice."""
    place = BATCH_NORM.get(func._overloadpacket)
    if place is not None and args[place + 2]:
        args[place : place + 2] = None, None
    return args


def surroundings() -> tuple[Any, ...]:
    """What operators read beside their arguments: with the same they choose the same kernels."""
    c = torch._C
    return (
        torch.get_default_dtype(),
        c._get_cudnn_enabled(),
        c._get_cudnn_benchmark(),
        c._get_cudnn_deterministic(),
        c._get_deterministic_algorithms(),
        c._get_mkldnn_enabled(),
        c._get_cublas_allow_fp16_reduced_precision_reduction(),
        c._get_cublas_allow_bf16_reduced_precision_reduction(),
        c._get_fp32_precision_getter("cuda", "conv"),
        c._get_fp32_precision_getter("cuda", "matmul"),
        c._get_fp32_precision_getter("mkldnn", "conv"),
        c._get_fp32_precision_getter("mkldnn", "matmul"),
    )
