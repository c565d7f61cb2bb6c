"""Which backend runs the updates: the one that `trainer.engine` names, or the faster one."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from adaptive_trainer.step.backends.compiled import Compiled
from adaptive_trainer.step.backends.eager import Eager
from adaptive_trainer.step.backends.ranked import Ranked
from adaptive_trainer.step.backends.recorded import Recorded
from adaptive_trainer.step.backends.timing import TIMED, Timed
from adaptive_trainer.step.update import Update


class Faster(Recorded):
    """Times eager updates and replays of a graph, and keeps the faster."""

    def __init__(self, update: Update, name: str, event: Callable[[str], None]) -> None:
        super().__init__(update, name, event)
        self._eager, self._timed_replays = Timed(self.program.device), Timed(self.program.device)

    def run(self, images: Tensor, labels: Tensor, samples: int) -> Eager:
        """Make one update, timed once it is known that it can be recorded, until one kind is settled on."""
        if self.is_over or not self.is_checked or len(self._timed_replays) == TIMED:
            return super().run(images, labels, samples)
        if len(self._eager) < TIMED:
            with self._eager.one():
                return self._run_kernels(images, labels, samples)
        if self.graph is None and (reason := self.record(images, labels)):
            return self.give_up(reason).run(images, labels, samples)
        if not self.is_recorded_for(images, labels):
            return self._run_kernels(images, labels, samples)  # it says nothing of replays
        with self._timed_replays.one():
            done = self.replay(images, labels, samples)
        return self._settled() if done is self and len(self._timed_replays) == TIMED else done

    def _settled(self) -> Eager:
        eager, graph = self._eager, self._timed_replays
        if graph.is_faster(eager):
            self.announce(f"from here on, {graph.text} an update, against {eager.text} eager (auto)")
            return self
        self.drop()
        self.event(f"engine: eager, {eager.text} an update, against {graph.text} as a CUDA graph (auto)")
        return self.kernels


def _auto(update: Update, name: str, event: Callable[[str], None]) -> Eager:
    return (Faster if update.on_cuda() else Eager)(update, name, event)


def backend(update: Update, name: str, event: Callable[[str], None]) -> Eager:
    """What runs the updates at first; as `Eager`."""
    if update.agreement.peers.size > 1 and name != "eager" and (update.on_cuda() or name != "auto"):
        return Ranked(update, name, event)
    return BACKENDS[name](update, name, event)


# A new way to run updates is a file in this folder and a line here; the settings' schema names what may be asked for.
BACKENDS: dict[str, Callable[[Update, str, Callable[[str], None]], Eager]] = {
    "eager": Eager,
    "graph": Recorded,
    "auto": _auto,
    "compile": Compiled,
}
