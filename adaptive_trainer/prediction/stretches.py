"""What each stretch of a network keeps for the backward pass, takes while it runs, and costs, found by one trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from adaptive_trainer.prediction.costs import Costs, Rates
from adaptive_trainer.prediction.recorder import Kind, Recorder
from adaptive_trainer.prediction.splicing import Sections
from adaptive_trainer.prediction.tracer import Trace, TraceSpec, trace


@dataclass(frozen=True)
class Stretch:
    """A stretch of the forward pass: a part of the network, or what lies between two parts.

    Attributes:
        part: the path of the module; empty between two.
        kept: bytes that it keeps for the backward pass.
        work: most bytes that are alive while it runs, forward or backward, beside what those before it keep.
        seconds: of its forward and backward pass.
        moved: bytes that it offloads to the host.
    """

    part: str
    kept: int
    work: int
    seconds: float
    moved: int = 0


@dataclass(frozen=True)
class Profile:
    """One update under one plan.

    Attributes:
        stretches: in the order of the forward pass.
        seconds: of the whole update, without what offloading adds.
        peak: most bytes that are alive.
        operators: that have run.
        sections: the trace, by stretch.
    """

    stretches: tuple[Stretch, ...]
    seconds: float
    peak: int
    operators: int
    sections: Sections

    @property
    def moved(self) -> int:
        """Bytes that the update offloads to the host."""
        return sum(stretch.moved for stretch in self.stretches)


def profile(spec: TraceSpec, parts: Sequence[str], rates: Rates) -> Profile:
    """Trace an update of a single micro-batch and divide it by parts of the network.

    Args:
        parts: paths of modules, none within another.

    Raises:
        TraceError: it cannot be traced.
    """
    found: list[_Marks] = []

    @contextmanager
    def watch(model: nn.Module, recorder: Recorder) -> Iterator[None]:
        marks = _Marks(model, parts, recorder, rates)  # of the last try to trace, in the end
        found[:] = [marks]
        recorder.seen = marks.costs.add
        yield
        recorder.seen = None

    made = trace(spec, watch)
    return _divided(made, found[0])


class _Marks:
    """Where among the recorder's events each part begins and ends, and the costs of all operators.

    Attributes:
        names: of the stretches; the parts stand at odd places.
        begins: each event with which another stretch begins to run, forward and then backward.
    """

    def __init__(self, model: nn.Module, parts: Sequence[str], recorder: Recorder, rates: Rates) -> None:
        self.costs = Costs(rates, recorder.kinds)
        self.names = [""]
        self.begins: list[tuple[int, int]] = [(0, 0)]
        self.forward_end = 0
        self._events = recorder.kinds
        self._results: set[int] = set()  # of the last part: their addresses
        for part in parts:
            module = model.get_submodule(part)
            module.register_forward_pre_hook(partial(self._entered, part), with_kwargs=True)
            module.register_forward_hook(self._left)
        model.register_forward_hook(self._ended)

    def _entered(self, part: str, _: nn.Module, *given: Any) -> None:
        own = [leaf for leaf in tree_leaves(given) if id(leaf) not in self._results]  # else the part before is next
        self._when_differentiated(own, len(self.names) - 1)
        self.names += [part, ""]
        self._run(len(self.names) - 2)

    def _left(self, _: nn.Module, given: Any, result: Any) -> None:
        self._when_differentiated(result, len(self.names) - 2)
        self._results = set(map(id, tree_leaves(result)))
        self._run(len(self.names) - 1)

    def _ended(self, *_: Any) -> None:
        self.forward_end = len(self._events)

    def _when_differentiated(self, tensors: Any, stretch: int) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _: self._run(stretch))  # type: ignore[no-untyped-call]

    def _run(self, stretch: int) -> None:
        self.begins.append((len(self._events), stretch))


def _divided(made: Trace, marks: _Marks) -> Profile:
    count, names = made.evaluation_start, marks.names
    starts, stretches = (np.array(each) for each in zip(*marks.begins, strict=True))
    running = stretches[np.searchsorted(starts, np.arange(count), side="right") - 1]
    live, kept = _lives(made, running, len(names), marks.forward_end)
    before = np.concatenate([[0], np.cumsum(kept)[:-1]])
    above = (live - live[made.update_start - 1] - before[running])[made.update_start :]
    work = [int(above[running[made.update_start :] == i].max(initial=0)) for i in range(len(names))]
    seconds = np.zeros(len(names))
    np.add.at(seconds, running[np.minimum(marks.costs.marks, count - 1)], marks.costs.seconds)
    moved = np.zeros(len(names), np.int64)
    marks_of_moves = [event for event, kind in enumerate(made.kinds[:count]) if kind == Kind.MOVED]
    np.add.at(moved, running[marks_of_moves], [made.sizes[made.numbers[event]] for event in marks_of_moves])
    found = zip(names, kept.tolist(), work, seconds.tolist(), moved.tolist(), strict=True)
    stretched = tuple(Stretch(*each) for each in found)
    sections = Sections(made, running.tolist(), marks.forward_end, len(names))
    return Profile(stretched, sum(marks.costs.seconds), int(live.max()), len(marks.costs.seconds), sections)


def _lives(made: Trace, running: Any, stretches: int, forward_end: int) -> tuple[Any, Any]:
    """Bytes alive after each event, and what each stretch leaves alive where the forward pass ends."""
    count = made.evaluation_start
    deltas, kept = np.zeros(count + 1, np.int64), np.zeros(stretches, np.int64)
    died = {n: i for i, (kind, n) in enumerate(zip(made.kinds, made.numbers, strict=True)) if kind == Kind.DIED}
    for event in range(count):
        if made.kinds[event] != Kind.BORN:
            continue
        number = made.numbers[event]
        end, size = min(died.get(number, count), count), made.sizes[number]
        deltas[event] += size
        deltas[end] -= size
        if made.update_start <= event < forward_end <= end:
            kept[running[event]] += size
    return np.cumsum(deltas)[:count], kept
