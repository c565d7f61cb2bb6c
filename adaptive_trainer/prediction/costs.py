"""The time that operators take on a device, from what they compute and what they move.

An operator takes the longer of two times: its floating-point operations at the device's rate, or the bytes of its
tensors at the bandwidth of the memory (the roofline model: Williams et al., 2009, doi 10.1145/1498765.1498785).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from adaptive_trainer.models.recomputing.trees import tensors
from adaptive_trainer.prediction.transfer import USUAL_LINK

aten = torch.ops.aten
CONVOLUTIONS = {aten.convolution, aten.convolution_backward}
# No kernel of an update: those of the last two run once, where the optimizer makes its state.
NO_WORK = {torch.ops.prim.device, aten.empty, aten.empty_like, aten.empty_strided, aten.zeros, aten.zeros_like}
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward
LAUNCH = 2e-6  # seconds from one kernel of a graph to the next


@dataclass(frozen=True, slots=True)
class Kernels:
    """What kernels of a kind reach of a device's best, as measured on an H200 (docs/prediction.md)."""

    of_rate: float  # share of the rate of operations
    of_bandwidth: float  # share of the bandwidth
    passes: float = 1.0  # over the tensors


ELEMENTWISE = Kernels(0.6, 0.75)
PRODUCT = Kernels(0.6, 0.75)
SUM = Kernels(0.6, 0.3)
NORM, NORM_BACKWARD = Kernels(0.6, 0.4, 1.5), Kernels(0.6, 0.4, 1.7)  # which read twice what they write once
CONVOLUTION, CONVOLUTION_BACKWARD = Kernels(0.35, 0.4), Kernels(0.3, 0.25)
# In groups, and of each channel by itself: of the rate without tensor cores.
GROUPED, GROUPED_BACKWARD = Kernels(0.09, 0.4), Kernels(0.04, 0.25)
DEPTHWISE, DEPTHWISE_BACKWARD = Kernels(0.06, 0.4), Kernels(0.015, 0.25)
SCALAR = (GROUPED, GROUPED_BACKWARD, DEPTHWISE, DEPTHWISE_BACKWARD)
BY_OPERATOR = {
    aten.convolution: CONVOLUTION,
    aten.convolution_backward: CONVOLUTION_BACKWARD,
    aten.native_batch_norm: NORM,
    aten.native_layer_norm: NORM,
    aten.native_group_norm: NORM,
    aten.native_batch_norm_backward: NORM_BACKWARD,
    aten.native_layer_norm_backward: NORM_BACKWARD,
    aten.native_group_norm_backward: NORM_BACKWARD,
    aten.sum: SUM,
    aten.mean: SUM,
}


@dataclass(frozen=True, slots=True)
class Rates:
    """Rates of a device: bytes and floating-point operations a second, at its best."""

    bandwidth: float
    vector: float  # without tensor cores
    convolution: float  # in fp32, by TF32 where that is allowed
    product: float  # matrix product in fp32, likewise
    half: float  # convolution and product in fp16 and bf16
    link: float = USUAL_LINK.rate  # to the host's memory, and from it


@dataclass(frozen=True, slots=True)
class Speed:
    """What a card does at its best, as its maker says: bytes and floating-point operations a second."""

    bandwidth: float
    vector: float  # in fp32, without tensor cores
    tensor: float  # in fp16 with sums in fp32

    def rates(self, capability: tuple[int, int], tf32: bool | None) -> Rates:
        """The rates of kernels under `trainer.tf32`."""
        # By TF32, which tensor cores have from 8.0 on, they do half of what they do in fp16.
        fast = self.tensor / 2 if capability >= (8, 0) else self.vector
        convolution = self.vector if tf32 is False else fast  # torch's own choice: convolutions alone
        return Rates(self.bandwidth, self.vector, convolution, fast if tf32 else self.vector, self.tensor)

    @classmethod
    def of(cls, capability: tuple[int, int], multiprocessors: int, clock: float, bandwidth: float | None) -> Speed:
        """Estimate it from a card's multiprocessors and their clock in Hz."""
        cores, tensor = next((c, t) for least, c, t in UNITS if capability >= least)
        vector = 2 * cores * multiprocessors * clock
        return cls(bandwidth or vector * BYTES_PER_OPERATION, vector, 2 * tensor * multiprocessors * clock)


# By compute capability: fp32 cores of a multiprocessor, and what its tensor cores multiply and add in a clock in fp16
# (CUDA C++ Programming Guide, arithmetic instructions; NVIDIA's papers on Volta to Blackwell).
UNITS = (
    ((12, 0), 128, 256),
    ((10, 0), 128, 2048),
    ((9, 0), 128, 2048),
    ((8, 6), 128, 256),
    ((8, 0), 64, 1024),
    ((7, 5), 64, 256),
    ((7, 0), 64, 512),
    ((0, 0), 128, 128),
)
CLOCK = 1.7e9  # Hz, where it is not known
BYTES_PER_OPERATION = 0.025  # of memory and of fp32: 0.015 to 0.07 in `configs/card/`


class Costs:
    """Adds up the time of operators.

    Args:
        events: of a recorder, among which they stand.

    Attributes:
        seconds: of each operator, in order.
        marks: where each stands among the events of a recorder, by `place`.
    """

    def __init__(self, rates: Rates, events: bytearray) -> None:
        self.rates = rates
        self.seconds: list[float] = []
        self.marks: list[int] = []
        self._events = events

    def add(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Count an operator that has run."""
        if not func.is_view and func._overloadpacket not in NO_WORK:
            self.seconds.append(self._time(func, args, kwargs, out))
            self.marks.append(len(self._events))

    def _time(self, func: Any, args: Any, kwargs: Any, out: Any) -> float:
        found = tensors((args, kwargs, out))
        moved = sum({id(tensor): tensor.nbytes for tensor in found}.values())
        flops = _operations(func, args, kwargs, out)
        kernels = _kernels(func, args)
        rate = self._rate(func, found, kernels) * kernels.of_rate
        bandwidth = self.rates.bandwidth * kernels.of_bandwidth
        return LAUNCH + max(moved * kernels.passes / bandwidth, flops / rate)

    def _rate(self, func: Any, found: list[Tensor], kernels: Kernels) -> float:
        if kernels in SCALAR:
            return self.rates.vector
        if found and found[0].dtype in (torch.float16, torch.bfloat16):
            return self.rates.half
        return self.rates.convolution if func._overloadpacket in CONVOLUTIONS else self.rates.product


def _kernels(func: Any, args: Any) -> Kernels:
    packet = func._overloadpacket
    if packet is aten.convolution and args[8] > 1:
        return DEPTHWISE if args[8] == args[0].shape[1] else GROUPED
    if packet is aten.convolution_backward and args[9] > 1:
        return DEPTHWISE_BACKWARD if args[9] == args[1].shape[1] else GROUPED_BACKWARD
    return BY_OPERATOR.get(packet, PRODUCT if packet in flop_registry else ELEMENTWISE)


def _operations(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    packet = func._overloadpacket
    if packet is ATTENTION:
        return float(sdpa_flop_count(*(each.shape for each in args[:3])))  # type: ignore[no-untyped-call]
    if packet is ATTENTION_BACKWARD:
        shapes = (each.shape for each in args[:4])
        return float(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]
    if packet is aten.convolution:  # torch's formulas leave out that channels may be in groups
        return float(2 * out.numel() * _taps(args[1]))
    if packet is aten.convolution_backward:
        return float(2 * args[0].numel() * _taps(args[2]) * sum(args[10][:2]))
    formula = flop_registry.get(packet)
    return 0.0 if formula is None else float(formula(*args, **kwargs, out_val=out))


def _taps(weight: Tensor) -> int:
    """Values of a weight that one of its results is made by."""
    return weight.numel() // len(weight)
