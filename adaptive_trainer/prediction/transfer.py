"""What offloaded activations cost in time: they cross the bus twice, beside the computation as far as that takes."""

from __future__ import annotations

GB = 10**9
# Bytes a second that pinned memory is copied at, of generation 3 of PCI Express; each later generation doubles it.
PCIE_3 = {16: 12 * GB, 8: 6 * GB, 4: 3 * GB}  # by lanes
FORWARD = 1 / 3  # share of an update's computation: a backward pass takes about twice as long as a forward pass
HIDES = 0.4  # share of the computation that copies run beside, as few are under way: 0.25 to 0.47 on an H200


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
