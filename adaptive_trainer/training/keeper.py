"""What a phase leaves in the folder of its run: the last state, the best model, and what larger models have learned."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from adaptive_trainer.checkpoints import checkpoint, packing
from adaptive_trainer.distributed.peers import peers
from adaptive_trainer.training.run import Run
from adaptive_trainer.training.session import Session

# what load_model needs, and where it is from; no optimizer, which may be twice as large
KEPT_WITH_THE_BEST = ("config", "rung", "stage", "num_classes", "classes", "split", "best", "made_buffers")


@dataclass
class Keeper:
    """Writes checkpoints, and the figures of epochs.

    Attributes:
        number: which phase of the run it is, from 0.
        requested: what decides the memory that the request needs.
        largest: the batch size that `max` has come to, or None where a number was asked for.
        metrics: the figures of the last epoch.
    """

    run: Run
    number: int
    requested: dict[str, Any] = field(default_factory=dict)
    largest: int | None = None
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where the checkpoints are."""
        return self.run.record.folder / "checkpoints"

    def figures(self, row: dict[str, Any], session: Session) -> dict[str, Any]:
        """Write the figures of an epoch; return the row as it is in metrics.csv."""
        self.metrics = row
        row = {"stage": self.number, **row, "model": self.run.parts.recipe(session.config).model}
        self.run.record.metrics(row)
        return row

    def save(self, session: Session, *, is_best: bool = False) -> None:
        """Write last.pt, and best.pt where these are the best weights so far; of several ranks the first does."""
        if not peers().is_first:
            return
        content = self.content(session)
        if is_best:  # first: once last.pt is there, a resumed run takes this one for saved
            about = {key: content[key] for key in KEPT_WITH_THE_BEST}
            self._write("best.pt", {**about, "model": content["ema"] or content["model"], "ema": None})
        self._write("last.pt", content)

    def content(self, session: Session) -> dict[str, Any]:
        """The content of a checkpoint.

        Raises:
            CheckpointError: there is no memory to put it together.
        """
        parts, split = self.run.parts, self.run.data.split
        # all of it is put together before a byte is written: where memory runs out, the file before is untouched
        return checkpoint.retried(self.folder / "last.pt", lambda: {
            **packing.pack(session.state, parts.device),
            "rung": session.rung,
            "stage": self.number,
            "config": asdict(session.config),
            "request": parts.request,
            "requested": self.requested,  # a resumed run that asks for more, or has more room, begins further up
            "largest_batch": self.largest,
            "capacity": parts.capacity.size,
            "cards": peers().cards,  # the ranks of a resumed run may be in another order
            "metrics": self.metrics,
            "num_classes": parts.num_classes,
            "classes": list(self.run.data.classes),  # labels are their places: a new folder would shift them
            "split": None if split is None else asdict(split),
        })  # fmt: skip

    def start_anew(self, larger: str, smaller: str, learned: dict[str, Any] | None) -> None:
        """Keep what a larger model has learned, the content of a checkpoint, before a smaller one begins."""
        self.run.record.event(f"model {larger} -> {smaller}: the new model starts from epoch 1")
        if learned is not None:
            name = f"before-{smaller.replace('/', '-')}.pt"  # names of hf-hub have slashes
            self._write(name, learned)
            self.run.record.event(f"what {larger} has learned is kept in checkpoints/{name}")
        self.keep_best(larger)
        self.metrics = {}

    def keep_best(self, owner: str) -> None:
        """Move the best model to a name of its own, before what is to come has a best."""
        best, name = self.folder / "best.pt", f"best-{owner.replace('/', '-')}.pt"
        if best.exists():  # in one step: however it ends, there is one of the two
            best.replace(self.folder / name)
            self.run.record.event(f"the best of {owner} is kept in checkpoints/{name}")

    def _write(self, name: str, content: dict[str, Any]) -> None:
        checkpoint.save(self.folder / name, content)
        self.run.record.checkpoint(self.folder / name)
