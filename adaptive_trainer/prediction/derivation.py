"""Traces that follow from known ones, without running anything.

The size of every allocation is affine in the samples and in the samples times the area of an image. So a few traces of
a network give its allocations at other batch and image sizes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from adaptive_trainer.prediction.tracer import Trace, TraceSpec, area_of, trace

STRIDE = 32  # image sizes that are multiples of it keep every feature map in proportion


class Tracer:
    """Traces, and remembers what it traced: known traces of a signature give others without running anything."""

    def __init__(self) -> None:
        self.known: dict[Hashable, list[Trace]] = {}

    def trace(self, spec: TraceSpec) -> Trace:
        """Give the trace of `spec`.

        Raises:
            TraceError: it cannot be made.
        """
        if spec.key is None:
            return trace(spec)
        known = self.known.setdefault(spec.signature, [])
        found = _derived(known, spec)
        if found is None:
            found = trace(spec)
            known.append(found)
        return found


def _derived(known: Sequence[Trace], spec: TraceSpec) -> Trace | None:
    """The trace of `spec` as a weighted sum of known ones, or None where they do not determine it.

    A size is c0 + b * c1 + b * area * c2, with unknown c >= 0. If weights turn the known (1, b, b * area) into those
    asked for, the same weights turn the known sizes into those asked for.
    """
    area = area_of(spec.input_shape)
    same = [t for t in known if t.area == area]
    at_stride = all(side % STRIDE == 0 for side in spec.input_shape[-2:])
    return _combined(same, spec.batches, area) or (_combined(known, spec.batches, area) if at_stride else None)


def _combined(known: Sequence[Trace], batches: tuple[int, ...], area: int) -> Trace | None:
    if not known or len({(t.kinds, t.parts) for t in known}) > 1:
        return None  # only sizes of the same events can be added
    sizes = np.array([t.sizes for t in known], dtype=np.float64)
    parts = np.frombuffer(known[0].parts, dtype=np.uint8)
    result = np.zeros(len(parts))
    for part, samples in enumerate(batches):
        rows = np.array([(1, t.batches[part], t.batches[part] * t.area) for t in known], dtype=np.float64)
        mine = parts == part
        value = _weighted(rows, np.array((1, samples, samples * area), dtype=np.float64), sizes[:, mine])
        # Bytes are whole: a sum that is not shows that the sizes are no such polynomial.
        if value is None or np.abs(value - np.rint(value)).max(initial=0) > 0.01:
            return None
        for term in ((1, 0, 0), (0, 1, 0)):  # a negative term: the sizes grow faster than the area
            constant = _weighted(rows, np.array(term, dtype=np.float64), sizes[:, mine])
            if constant is not None and constant.min(initial=0) < -0.5:
                return None
        result[mine] = np.rint(value)
    return replace(known[0], sizes=tuple(int(n) for n in result), batches=batches, area=area)


def _weighted(rows: Any, wanted: Any, sizes: Any) -> Any:
    """sizes (traces, allocations) -> (allocations,) for the wanted row, or None where rows do not span it."""
    # Columns of like size, for a batch times an area is a million times the constant.
    scale = np.abs(rows).max(axis=0, initial=1)
    weights, *_ = np.linalg.lstsq((rows / scale).T, wanted / scale, rcond=None)
    if np.abs(weights @ (rows / scale) - wanted / scale).max() > 1e-9:
        return None
    return weights @ sizes
