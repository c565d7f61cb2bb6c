"""The record of a run, for people and for programs: result.json, attempts.jsonl, metrics.csv."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from adaptive_trainer.errors import CheckpointError
from adaptive_trainer.ladder.descent import Attempt
from adaptive_trainer.report.earlier import BEST, LAST, failure, is_within, set_aside
from adaptive_trainer.report.listeners import Finished, Listener
from adaptive_trainer.report.result import Result
from adaptive_trainer.utils.files import alone, append, as_csv, as_json, refused_by_disk, write_whole

WRITTEN_WHOLE = (
    "checkpoints/*.pt", "config.yaml", "metrics.csv", "result.json", "evaluation.json", "report.html", "plots/*.png",
)  # fmt: skip
WAIT_SECONDS = 15.0  # torch's data workers look every five seconds whether their run is still there


def _passed_on(name: str) -> Callable[..., None]:
    """A method that calls the method of this name of every listener: the record itself keeps nothing of it."""

    def pass_on(self: Record, *heard: Any) -> None:
        for listener in self.listeners:
            getattr(listener, name)(*heard)

    return pass_on


class Record(Listener):
    """Writes one run's files into its output folder, as things happen, and passes on what it hears.

    Args:
        folder: where the files go.
        listeners: hear of all that happens.
        home: the folder of the whole run, which of several ranks the first writes.

    Attributes:
        has_begun: what is in the folder is this run's, which until then leaves the record of an earlier one alone.
    """

    def __init__(self, folder: Path, listeners: Sequence[Listener] = (), home: Path | None = None) -> None:
        self.folder = folder
        self.home = home or folder
        self.listeners = listeners
        self.attempts: list[Attempt] = []
        self.events: list[str] = []
        self.has_begun = False
        self._written: Result | None = None
        with self._writing():  # now: a folder that cannot be written is found before the data are opened
            folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs out of the folder meanwhile, where the system and the disk have locks.

        Raises:
            CheckpointError: another run goes on working there.
        """
        # the data workers of a killed run live, and hold its lock, for seconds after it: they are waited for
        refused_at = time.monotonic() + WAIT_SECONDS
        with ExitStack() as stack:
            with self._writing():
                is_alone = stack.enter_context(alone(self.folder / ".run", lambda: self._refuse(refused_at)))
                for name in WRITTEN_WHOLE if is_alone else ():
                    for part in self.folder.glob(f"{name}.*.part"):
                        part.unlink(missing_ok=True)  # half of a file, which a killed run leaves
            yield

    def _refuse(self, at: float) -> None:
        if time.monotonic() > at:
            raise CheckpointError(
                f"another run is at work in {self.folder}; wait for its end, or choose another output_dir"
            )

    start, candidate, epoch, sample = map(_passed_on, ("start", "candidate", "epoch", "sample"))
    answers, checkpoint, trained, end = map(_passed_on, ("answers", "checkpoint", "trained", "end"))

    def begin(self, settings: str, goes_on_from: Path | None = None) -> None:
        """Write config.yaml, and the attempts so far; copy the best model of a run that goes on here."""
        self._write("config.yaml", settings)
        self._carry_best(goes_on_from)
        self.start(self.folder, settings)
        self.has_begun = True
        for entry in self.attempts:  # a resumed run is accepted only when a rung has taken the checkpoint
            self._append("attempts.jsonl", as_json(asdict(entry)) + "\n")

    def accept(self, settings: str, goes_on_from: Path | None) -> None:
        """Begin, once nothing of the run is refused any more, and set aside what an earlier run has left."""
        if not self.has_begun:
            if not is_within(goes_on_from, self.folder):  # a run that goes on in its folder keeps its metrics.csv
                self.event(set_aside(self.folder))
            self.begin(settings, goes_on_from)

    def _carry_best(self, goes_on_from: Path | None) -> None:
        if goes_on_from is None or goes_on_from.name != LAST.name or is_within(goes_on_from, self.folder):
            return  # beside a checkpoint of another name it may be of another network
        best, here = goes_on_from.with_name(BEST), self.folder / LAST.parent
        if best.exists():
            with self._writing():
                here.mkdir(exist_ok=True)
                write_whole(here / BEST, best.read_bytes())

    def attempt(self, entry: Attempt) -> None:
        """Keep one attempt and append it to attempts.jsonl, once the run has begun."""
        self.attempts.append(entry)
        if self.has_begun:  # else the line would be among those of an earlier run
            self._append("attempts.jsonl", as_json(asdict(entry)) + "\n")
        for listener in self.listeners:
            listener.attempt(entry)

    def event(self, text: str) -> None:
        """Keep a decision for the result."""
        for listener in self.listeners:
            listener.event(text)
        self.events.append(text)

    def metrics(self, row: dict[str, Any]) -> None:
        """Append one row to metrics.csv."""
        path = self.folder / "metrics.csv"
        is_new = not path.exists() or path.stat().st_size == 0  # `forget_after` may have left it empty
        self._append(path.name, as_csv([row], with_header=is_new))

    def forget_after(self, stage: int, model: str, epoch: int) -> None:
        """Drop rows of metrics.csv that a run resumed in `stage`, with `model`, after `epoch` will write again."""
        path = self.folder / "metrics.csv"
        if not path.exists():
            return
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if None not in row.values()]  # a kill leaves half a row
        # a later stage or a smaller model counts its epochs from 1 again, so the number alone does not say which
        kept = [
            row for row in rows if (int(row["stage"]), row["model"]) != (stage, model) or int(row["epoch"]) <= epoch
        ]
        self._write(path.name, as_csv(kept) if kept else "")

    def result(self, result: Result) -> None:
        """Write result.json, again where more is known."""
        recipes = {"requested": result.requested.reported(), "used": result.used.reported()}
        content = {**asdict(result), **recipes, "accumulation": result.used.accumulation}
        content["world_size"] = result.world_size
        self._write("result.json", as_json(content, indent=2) + "\n")
        self._written = result

    def finish(self, result: Result, finished: Finished) -> None:
        """Pass on the end of a run that has trained."""
        self.trained(result, finished)
        self.end(result.outcome)

    def failure(self, outcome: str, message: str) -> None:
        """Write result.json for a run that did not end well, if it has begun; what has trained stays so."""
        with suppress(Exception):  # disk or memory may be full, and the first error is the one to show
            if self._written is not None:
                said = f"{outcome} after training: {message}".rstrip(": ")  # a KeyboardInterrupt has no text
                outcome = self._written.outcome
                self.result(replace(self._written, events=[*self.events, said]))
            elif self.has_begun:
                self._write("result.json", failure(outcome, message, [asdict(a) for a in self.attempts], self.events))
        with suppress(Exception):  # of its own: the trackers hear of the end though the disk is full
            self.end(outcome)

    def _write(self, name: str, text: str) -> None:
        with self._writing():
            write_whole(self.folder / name, text)

    def _append(self, name: str, text: str) -> None:
        with self._writing():
            append(self.folder / name, text)

    def _writing(self) -> AbstractContextManager[None]:
        return refused_by_disk(CheckpointError, f"cannot write the record of this run in {self.folder}")
