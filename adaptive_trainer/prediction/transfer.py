"""What offloaded activations cost in time: they cross the bus twice, beside the computation as far as that takes."""

from __future__ import annotations

from dataclasses import dataclass

GB = 10**9
# Bytes a second that pinned memory is copied at, of generation 3 of PCI Express; each later generation doubles it.
PCIE_3 = {16: 12 * GB, 8: 6 * GB, 4: 3 * GB}  # by lanes
FORWARD = 1 / 3  # share of an update's computation: a backward pass takes about twice as long as a forward pass
HIDES = 0.4  # share of the computation that copies run beside, as few are under way: 0.25 to 0.47 on an H200


@dataclass(frozen=True, slots=True)
class Link:
    """What connects a card with the host's memory."""

    generation: int = 3  # of PCI Express
    lanes: int = 16
    is_known: bool = False  # else these are assumed

    @property
    def rate(self) -> float:
        """Bytes a second in one direction."""
        return PCIE_3[16] * self.lanes / 16 * 2.0 ** (self.generation - 3)

    def __str__(self) -> str:
        """As people call it."""
        return f"PCIe {self.generation} x{self.lanes}{'' if self.is_known else ' (assumed)'}"


USUAL_LINK = Link()


def added_seconds(offloaded_bytes: int, rate: float, compute_seconds: float) -> float:
    """Seconds that offloading adds to an update: what each pass has no time for beside its computation.

    Args:
        offloaded_bytes: that go to the host in the forward pass and come back in the backward pass.
        rate: bytes a second in one direction.
        compute_seconds: that the update takes without offloading, with what it recomputes.
    """
    one_way = offloaded_bytes / rate
    shares = FORWARD, 1 - FORWARD
    return sum(max(0.0, one_way - HIDES * share * compute_seconds) for share in shares)


def update_seconds(compute_seconds: float, offloaded_bytes: int, rate: float) -> float:
    """Seconds of an update, with what offloading adds; as `added_seconds`."""
    return compute_seconds + added_seconds(offloaded_bytes, rate, compute_seconds)
