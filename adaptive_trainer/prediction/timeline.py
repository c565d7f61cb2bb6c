"""The memory of one update, operator by operator, with the layers that hold the most at its peak."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adaptive_trainer.prediction.recorder import Kind, Recorder
from adaptive_trainer.prediction.tracer import Trace, TraceSpec, trace
from adaptive_trainer.report.listeners import Timeline

MOST_POINTS = 600
MOST_LAYERS = 10
WEIGHTS, REST = "weights, and what the optimizer keeps", "batch, loss and optimizer step"


def timeline(spec: TraceSpec) -> Timeline:
    """Trace an update, as any after the first, whose optimizer has its state already.

    Raises:
        TraceError: it cannot be traced.
    """
    found: list[_Watched] = []

    @contextmanager
    def watch(model: nn.Module, recorder: Recorder) -> Iterator[None]:
        watched = _Watched(model, recorder)  # of the last try to trace, in the end
        found[:] = [watched]
        with watched:
            yield

    return _line(trace(spec, watch), found[0])


class _Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Which operator runs, and in which layer, at each of the recorder's events.

    Attributes:
        starts: the recorder's events before each operator.
        names: of the operators, with the layer that each runs for; empty where none does.
    """

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.starts: list[int] = []
        self.names: list[tuple[str, str]] = []
        self.backward = self.step = 0
        self._recorder = recorder
        self._inside = [""]
        for path, module in model.named_modules():
            if path:
                module.register_forward_pre_hook(lambda *_, path=path: self._inside.append(path))
                module.register_forward_hook(lambda _, given, result, path=path: self._left(path, result))
        model.register_forward_hook(self._forward_ended)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the operator and run it."""
        if self._recorder.in_step and not self.step:
            self.step, self._inside = len(self.starts), [""]
        self.starts.append(len(self._recorder.kinds))
        self.names.append((func._overloadpacket.__name__, self._inside[-1]))
        return func(*args, **(kwargs or {}))

    def _left(self, path: str, result: Any) -> None:
        self._inside.pop()
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _: self._backward_of(path))  # type: ignore[no-untyped-call]

    def _backward_of(self, path: str) -> None:
        self._inside = [path]

    def _forward_ended(self, *_: Any) -> None:
        self._inside = [""]
        self.backward = self.backward or len(self.starts)  # of the first micro-batch


def _line(made: Trace, watched: _Watched) -> Timeline:
    count, start = made.evaluation_start, made.update_start
    born = np.full(len(made.sizes), count)
    died = np.full(len(made.sizes), count)
    for event, (kind, number) in enumerate(zip(made.kinds[:count], made.numbers[:count], strict=True)):
        if kind == Kind.BORN:
            born[number] = event
        elif kind == Kind.DIED:
            died[number] = event
    is_made = born < count
    stays = is_made & (died == count)
    begun, born = born, np.where(stays, 0, born)  # the state that the first update makes is there in the second
    change = np.zeros(count + 1, np.int64)
    sizes = np.array(made.sizes)
    np.add.at(change, born[is_made], sizes[is_made])
    np.add.at(change, died[is_made], -sizes[is_made])
    live = np.cumsum(change)[start:count]
    operators = np.searchsorted(watched.starts, np.arange(start, count), side="right") - 1
    peak = int(live.argmax())
    at_peak = is_made & (born <= start + peak) & (died > start + peak)
    held: Counter[str] = Counter()
    for number in np.flatnonzero(at_peak).tolist():
        operator = -1 if begun[number] < start else int(operators[begun[number] - start])
        is_kept = operator < 0 or (bool(stays[number]) and operator >= watched.step)
        owner = WEIGHTS if is_kept else watched.names[operator][1] or REST
        held[owner] += int(sizes[number])
    highest = np.zeros(len(watched.starts), np.int64)
    np.maximum.at(highest, np.maximum(operators, 0), live)
    name, layer = watched.names[max(0, int(operators[peak]))]
    return Timeline(
        _thinned(_filled(highest)),
        len(watched.starts),
        watched.backward,
        watched.step,
        held.most_common(MOST_LAYERS),
        len(held),
        f"{name} of {layer or REST}",
    )


def _filled(highest: Any) -> Any:
    """An operator without an event has what there was before."""
    last = np.maximum.accumulate(np.where(highest > 0, np.arange(len(highest)), 0))
    return highest[last]


def _thinned(values: Any) -> list[int]:
    """The most of each group of neighbours."""
    groups = np.array_split(values, min(len(values), MOST_POINTS))
    return [int(group.max()) for group in groups]
