"""The trace of an update whose stretches have different depths, put together from traces of one depth each.

What happens within a stretch depends on its own depth. So its events are taken from the trace of that depth. An
allocation that outlives its stretch, such as an output or a gradient, has a counterpart in each trace: the one of the
same size that is born in the same place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace

from adaptive_trainer.prediction.recorder import Kind
from adaptive_trainer.prediction.tracer import Trace

Event = tuple[int, Hashable, int]  # its kind, what it is about, bytes


class Sections:
    """A trace in sections: the forward pass of each stretch in order, then the backward pass of each, from the last on.

    Args:
        trace: of an update of a single micro-batch, without evaluation.
        running: the stretch that each event is of.
        forward_end: the event with which the backward pass begins.
        count: of stretches.

    Attributes:
        stretches: of each section.
        events: of each section.
        ends: the section in which each allocation dies that is born and dies in the update, by name.
    """

    def __init__(self, trace: Trace, running: Sequence[int], forward_end: int, count: int) -> None:
        self.trace = trace
        self.stretches = [*range(count), *reversed(range(count))]
        self.events: list[list[Event]] = [[] for _ in self.stretches]
        section, born, died = 0, dict[int, int](), dict[int, int]()
        of_update = range(trace.update_start, trace.evaluation_start)
        sections = []
        for event in of_update:
            stretch = running[event]
            # A stretch to which the pass comes back for a few events is not entered again.
            section = max(section, stretch if event < forward_end else 2 * count - 1 - stretch)
            sections.append(section)
            if trace.kinds[event] == Kind.BORN:
                born[trace.numbers[event]] = section
            elif trace.kinds[event] == Kind.DIED:
                died[trace.numbers[event]] = section
        names = self._names(born, died)
        self.ends = {names[number]: section for number, section in died.items() if number in born}
        for event, section in zip(of_update, sections, strict=True):
            number = trace.numbers[event]
            self.events[section].append((trace.kinds[event], names.get(number, number), trace.sizes[number]))

    def _names(self, born: dict[int, int], died: dict[int, int]) -> dict[int, Hashable]:
        """What allocations are called: within a stretch as nothing in another trace, else as their counterparts."""
        counts = Counter[tuple[int, int]]()
        names: dict[int, Hashable] = {}
        for number, section in born.items():
            end = died.get(number)
            if end is not None and self.stretches[end] == self.stretches[section]:
                names[number] = id(self), number
            else:
                place = section, self.trace.sizes[number]
                names[number] = *place, counts[place]
                counts[place] += 1
        return names


def splice(traces: Sequence[Sections], depths: Sequence[int]) -> Trace:
    """The update in which each stretch has the depth that is given: an index into `traces`."""
    first = traces[0].trace
    start = first.update_start
    kinds, numbers = bytearray(first.kinds[:start]), list(first.numbers[:start])
    sizes = list(first.sizes[: 1 + max(numbers, default=-1)])
    of_section = [depths[stretch] for stretch in traces[0].stretches]
    ends = _ends(traces, of_section)
    alive: dict[Hashable, int] = {}
    due: list[list[Hashable]] = [[] for _ in of_section]

    def happens(kind: int, number: int) -> None:
        kinds.append(kind)
        numbers.append(number)

    for section, depth in enumerate(of_section):
        for kind, name, size in traces[depth].events[section]:
            if kind != Kind.DIED:
                happens(kind, len(sizes))
                if kind == Kind.BORN:
                    alive[name] = len(sizes)
                    if name not in ends and name in traces[depth].ends:
                        due[traces[depth].ends[name]].append(name)
                sizes.append(size)
            elif name in alive and ends.get(name) == section:
                happens(kind, alive.pop(name))
        for name in due[section]:
            happens(Kind.DIED, alive.pop(name))
    return replace(
        first, kinds=bytes(kinds), numbers=tuple(numbers), sizes=tuple(sizes), parts=bytes(len(sizes)),
        evaluation_start=len(kinds), copies=(0, 0),
    )  # fmt: skip


def _ends(traces: Sequence[Sections], depths: Sequence[int]) -> dict[Hashable, int]:
    """The last section that ends each allocation in the trace of that section's depth."""
    found: dict[Hashable, int] = {}
    for depth in set(depths):
        for name, section in traces[depth].ends.items():
            if depths[section] == depth:
                found[name] = max(section, found.get(name, 0))
    return found
