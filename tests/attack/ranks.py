"""Ranks that run out of memory at random operators, each by itself: they stay together, and train as their replay does.

Usage: torchrun --nproc-per-node=N -m tests.attack.ranks FOLDER SEED [SEED ...]

Each seed trains twice: with faults, and without them down the same rungs at the same updates. Every rank writes what it
has come to into FOLDER/SEED-RANK.json: the schedule (rung and samples of each update), a digest of its whole state, the
digest of its replay, and how many faults there were. The first rank prints a line a seed.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_leaves

from adaptive_trainer import Trainer, compose_config
from adaptive_trainer.config.schema import ModelConfig
from adaptive_trainer.errors import LadderExhausted, OutOfMemory
from adaptive_trainer.ladder.descent import Attempt, Outcome
from adaptive_trainer.report.record import Record
from adaptive_trainer.step.update import Update
from adaptive_trainer.training.epochs.loop import Loop
from adaptive_trainer.training.trial import Trial
from adaptive_trainer.utils.modes import unseen
from tests.support.faults import Faults, Net, dump

SETTINGS = [
    "data=fakedata", "data.train.size=52", "data.val.size=19", "data.num_workers=0", "data.image_size=16", "device=cpu",
    "memory.limit=none", "trainer.epochs=2", "trainer.batch_size=12", "trainer.ema_decay=0.9", "trainer.clip_grad=1.0",
    "report=false", "verbosity=quiet",
]  # fmt: skip
LADDER = (
    'ladder.rungs=[{name:b8,overrides:["trainer.batch_size=8"]},{name:b6,overrides:["trainer.batch_size=6"]},'
    '{name:accumulate,overrides:["trainer.micro_batch_size=2"]},{name:b4,overrides:["trainer.batch_size=4"]}]'
)


def make_model(_: ModelConfig, num_classes: int) -> nn.Module:
    net = Net()
    net.head = nn.Linear(net.head.in_features, num_classes)
    return net


SECONDS = 60  # for one seed


class OfMemory(Faults):  # type: ignore[no-untyped-call]
    """Faults of operators that take memory: where one takes none, the next one that does fails.

    Attributes:
        is_answered: a rung is tried or trained, which a failure ends; it is not counted what is done before and after.
    """

    is_answered = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.is_answered:
            return func(*args, **(kwargs or {}))
        number, self.count = self.count, self.count + 1
        out = func(*args, **(kwargs or {}))
        if self.at is not None and number >= self.at and storages(out) - storages((args, kwargs)):
            self._refuse(func)
        return out


def storages(values: Any) -> set[int]:
    return {leaf.untyped_storage()._cdata for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}


class Watch:
    """What happened on this rank: rungs of attempts, samples of updates, and where memory ran out in training."""

    def __init__(self, fail_dry: Counter[str] | None = None, fail_at: dict[int, int] | None = None) -> None:
        self.fail_dry, self.fail_at = fail_dry or Counter[str](), dict(fail_at or {})
        self.attempts: list[tuple[str, str, int]] = []
        self.phases: list[str] = []
        self.schedule: list[tuple[int, int]] = []
        self.digest, self.updates, self.parts = "", 0, dict[str, str]()

    @unseen  # or its copies would be refused too
    def _look(self, update: Update) -> None:
        self.updates = update.state.updates
        self.schedule.append((update.state.updates, update.program.recipe.batch_size))
        # a meter is of this rank; of an epoch that is evaluated again it begins at another update
        state = {k: v for k, v in sorted(dump(update.state).items()) if not k.startswith("meter/")}
        self.digest, self.parts = digest(state), {k: digest({k: v}) for k, v in state.items()}

    @contextmanager
    def watching(self) -> Iterator[None]:
        commit, run, attempt = Update.commit, Update.run, Record.attempt

        def committed(update: Update, position: Any) -> None:
            commit(update, position)
            if not update._is_dry_run:
                self._look(update)

        def ran(update: Update, *args: Any, **how: Any) -> None:
            if not update._is_dry_run and self.fail_at.get(update.state.updates, 0):
                self.fail_at[update.state.updates] -= 1
                raise OutOfMemory("replayed", phase="forward")
            run(update, *args, **how)

        def noted(record: Record, entry: Attempt) -> None:
            attempt(record, entry)
            self.phases.append(entry.phase)
            self.attempts.append(
                (entry.rung, str(entry.outcome), self.updates if "after update" in entry.phase else -1)
            )

        patches = (
            patch.object(Update, "commit", committed), patch.object(Update, "run", ran),
            patch.object(Record, "attempt", noted),
        )  # fmt: skip
        with patches[0], patches[1], patches[2]:
            yield


def digest(facts: dict[str, Any]) -> str:
    found = hashlib.sha256()
    for name, value in facts.items():
        found.update(name.encode())
        found.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
    return found.hexdigest()


def train(folder: Path, watch: Watch, faults: Faults | None) -> str:
    config = compose_config([*SETTINGS, LADDER])
    with watch.watching(), faults or nullcontext():
        try:
            return Trainer(config, model=make_model, output_dir=folder).fit().rung
        except LadderExhausted:
            return "exhausted"


def attacked(folder: Path, seed: int) -> dict[str, Any]:
    draw = random.Random(1000 * seed + dist.get_rank())
    gaps = [int(draw.expovariate(1 / 900)) + 1 for _ in range(draw.randint(0, 5))]
    faults, watch = OfMemory(gaps), Watch()
    dry_run, run = Trial.dry_run, Loop.run

    def answered(work: Callable[..., Any]) -> Callable[..., Any]:
        def done(*args: Any) -> Any:
            faults.is_answered = True
            try:
                return work(*args)
            finally:
                faults.is_answered = False

        return done

    with patch.object(Trial, "dry_run", answered(dry_run)), patch.object(Loop, "run", answered(run)):
        rung = train(folder / f"{seed}-attacked", watch, faults)
    return {
        "rung": rung, "faults": faults.raised, "attempts": watch.attempts, "schedule": watch.schedule,
        "digest": watch.digest, "parts": watch.parts, "phases": watch.phases,
    }  # fmt: skip


def replayed(folder: Path, seed: int, found: dict[str, Any]) -> dict[str, Any]:
    """The same training with nothing but the agreed steps down."""
    at = Counter(updates for _, outcome, updates in found["attempts"] if outcome == Outcome.OOM and updates >= 0)
    watch = Watch(fail_at=dict(at))
    dry = [name for name, outcome, updates in found["attempts"] if outcome == Outcome.OOM and updates < 0]
    with failing_dry_runs(dry):
        rung = train(folder / f"{seed}-replayed", watch, None)
    return {
        "rung": rung,
        "attempts": watch.attempts,
        "schedule": watch.schedule,
        "digest": watch.digest,
        "parts": watch.parts,
    }


@contextmanager
def failing_dry_runs(names: list[str]) -> Iterator[None]:
    dry_run, left = Trial.dry_run, Counter(names)

    def tried(trial: Trial, config: Any) -> int:
        if left[trial._tried.name]:
            left[trial._tried.name] -= 1
            raise OutOfMemory("replayed", phase="dry run")
        return dry_run(trial, config)

    with patch.object(Trial, "dry_run", tried):
        yield


def main() -> None:
    folder, seeds = Path(sys.argv[1]), map(int, sys.argv[2:])
    dist.init_process_group("gloo")
    for seed in seeds:
        faulthandler.dump_traceback_later(SECONDS, exit=True)  # a rank that hangs
        found = attacked(folder, seed)
        found["replay"] = replayed(folder, seed, found)
        (folder / f"{seed}-{dist.get_rank()}.json").write_text(json.dumps(found))
        dist.barrier()
        if dist.get_rank() == 0:
            print(f"seed {seed}: {verdict(folder, seed)}", flush=True)
    dist.destroy_process_group()


def verdict(folder: Path, seed: int) -> str:
    """Whether all ranks have stayed together, and have the bits of their replay; in words."""
    found = [json.loads((folder / f"{seed}-{rank}.json").read_text()) for rank in range(dist.get_world_size())]
    if any((each["rung"], each["schedule"]) != (found[0]["rung"], found[0]["schedule"]) for each in found):
        return "APART"
    kept = ("rung", "schedule", "digest")
    is_equal = all([each[key] for key in kept] == [each["replay"][key] for key in kept] for each in found)
    return f"{sum(each['faults'] for each in found)} faults, {'bits as the replay' if is_equal else 'DIFFER'}"


if __name__ == "__main__":
    main()
