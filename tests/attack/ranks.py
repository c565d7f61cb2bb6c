"""Ranks that run out of memory at random, each by itself, or are killed: they stay together, and train as their replay.

Usage: python -m tests.attack.ranks FOLDER RANKS SEED [SEED ...]

A seed trains with faults. Where one rank is killed, or can write no checkpoint, the others end, and all go on from what
is saved. At last it trains without a fault, on the rungs that the ranks have agreed on; every update of every rank is
compared with that. A line is printed for each seed. The exit code is 0 where no rank hung and no bit differed.
FOLDER/SEED/ has what each rank has seen and said.
"""

from __future__ import annotations

import faulthandler
import gc
import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.utils._pytree import tree_leaves

from adaptive_trainer import compose_config
from adaptive_trainer.checkpoints import checkpoint, packing
from adaptive_trainer.config.schema import ModelConfig
from adaptive_trainer.data.samples import Samples
from adaptive_trainer.errors import AdaptiveTrainerError, CheckpointError, LadderExhausted, OutOfMemory, PeerLost
from adaptive_trainer.step.program import Program
from adaptive_trainer.step.update import Update
from adaptive_trainer.training.epochs.loop import Loop
from adaptive_trainer.training.rungs import Climbing
from adaptive_trainer.training.trainer import Trainer
from adaptive_trainer.training.trial import Trial
from adaptive_trainer.utils.modes import unseen
from tests.attack.stand_in import stood_in
from tests.support.faults import Faults, Net, dump

RUNGS = {
    "b8": "trainer.batch_size=8", "cheap": "trainer.recompute=cheap", "b6": "trainer.batch_size=6",
    "m3": "trainer.micro_batch_size=3", "m2": "trainer.micro_batch_size=2", "b4": "trainer.batch_size=4",
}  # fmt: skip
LADDER = ",".join(f'{{name:{name},overrides:["{override}"]}}' for name, override in RUNGS.items())
SETTINGS = [
    "data=fakedata", "data.train.size=52", "data.val.size=19", "data.num_workers=0", "data.image_size=16", "device=cpu",
    "memory.limit=none", "trainer.epochs=3", "trainer.batch_size=12", "trainer.ema_decay=0.9", "trainer.clip_grad=1.0",
    "report=false", "verbosity=quiet", "trainer.engine=graph", f"ladder.rungs=[{LADDER}]",
]  # fmt: skip
VARIANTS = {
    "trainer.precision": ("fp32", "bf16", "fp16"),
    "trainer.recompute": ("none", "cheap", '"whole:rest"'),
    "trainer.micro_batch_size": ("null", "4"),
    "trainer.checkpoint_every": ("null", "2"),
    "ladder.climb": ("false", "true"),
}
PLACES = {  # what is called for one sample, one evaluation batch, one checkpoint, and how often at the most
    (Samples, "_draw"): 300, (Program, "evaluate"): 20, (packing, "pack"): 12, (checkpoint, "_write"): 12,
}  # fmt: skip
SAVING = (packing, checkpoint)
EXHAUSTED = "exhausted"
STOPPED = [{code, PeerLost.exit_code} for code in (-signal.SIGKILL, CheckpointError.exit_code)]
ERRORS = (torch.OutOfMemoryError("CUDA out of memory. Injected."), MemoryError())
OPERATORS = 8000  # of one rank, about
SECONDS = 60  # for one training
BOUND = 20  # seconds from the death of a rank to the end of the last other


@dataclass(frozen=True)
class Case:
    """What a seed stands for on all ranks.

    Attributes:
        kill: which rank dies at which of its operators; None: none does.
        is_recorded: updates are replayed as those of CUDA graphs are.
    """

    seed: int
    folder: Path
    settings: list[str]
    has_dropout: bool
    kill: tuple[int, int] | None
    is_recorded: bool

    @classmethod
    def drawn(cls, folder: Path, ranks: int, seed: int) -> Case:
        draw = random.Random(seed)
        settings = [f"{key}={draw.choice(values)}" for key, values in VARIANTS.items()]
        kill = (draw.randrange(ranks), draw.randrange(OPERATORS)) if draw.random() < 0.4 else None
        # in a run that is resumed none, of which other ranks than the first draw anew
        has_dropout = kill is None and draw.random() < 0.5
        return cls(seed, folder / str(seed), settings, has_dropout, kill, draw.random() < 0.5)

    def model(self, _: ModelConfig, num_classes: int) -> nn.Module:
        net = Net()
        net.head = nn.Linear(net.head.in_features, num_classes)
        if not self.has_dropout:
            net.dropout, net.drop_path = nn.Identity(), nn.Identity()  # type: ignore[assignment]
        return net


class OfMemory(Faults):  # type: ignore[no-untyped-call]
    """Faults of operators that take memory: where one takes none, the next one that does fails.

    Attributes:
        is_answered: a rung is tried or trained, which a failure ends; it is not counted what is done before and after.
        dies_at: the operator at which the process is killed.
    """

    is_answered = False
    dies_at = -1
    operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        if self.operators == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if not self.is_answered:
            return func(*args, **(kwargs or {}))
        number, self.count = self.count, self.count + 1
        out = func(*args, **(kwargs or {}))
        if self.at is not None and number >= self.at and storages(out) - storages((args, kwargs)):
            self._refuse(func)
        return out

    def answered(self, work: Callable[..., Any], *args: Any) -> Any:
        self.is_answered = True
        try:
            return work(*args)
        finally:
            self.is_answered = False

    def failing(self, numbers: set[int], error: Exception) -> Callable[..., Any]:
        """Work of which the calls with these numbers fail."""

        def called(work: Callable[..., Any], *args: Any) -> Any:
            nonlocal numbers
            if self.is_answered:
                numbers = {number - 1 for number in numbers}
            if -1 in numbers and self.is_answered:
                self.raised += 1
                raise error
            return work(*args)

        return called


def storages(values: Any) -> set[int]:
    return {leaf.untyped_storage()._cdata for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}


def around(owner: Any, name: str, by: Callable[..., Any]) -> AbstractContextManager[Any]:
    """Inside, `by` is called with what was there before and its arguments."""
    before = getattr(owner, name)
    return patch.object(owner, name, lambda *args, **how: by(before, *args, **how))


@contextmanager
def attacked(case: Case, life: int, rank: int) -> Iterator[OfMemory]:
    """Faults of one rank, drawn for each life of a training; in the first it may be killed too."""
    draw = random.Random(f"{case.seed}, {life}, {rank}")
    faults = OfMemory([int(draw.expovariate(1 / 1000)) + 1 for _ in range(draw.randint(0, 5))])
    if case.kill and not life and case.kill[0] == rank:
        faults.dies_at = case.kill[1]
    with ExitStack() as stack:
        for (owner, name), calls in PLACES.items():
            first, is_twice = draw.randrange(3 * calls), draw.random() < 0.3  # most are never called as often
            numbers = {first, first + 1} if is_twice else {first}
            if owner not in SAVING or not case.has_dropout:
                stack.enter_context(around(owner, name, faults.failing(numbers, draw.choice(ERRORS))))
        if case.is_recorded:
            stack.enter_context(stood_in())
        stack.enter_context(around(Trial, "dry_run", faults.answered))
        stack.enter_context(around(Loop, "run", faults.answered))
        stack.enter_context(around(Climbing, "_has_grown", lambda *_: True))
        stack.enter_context(faults)
        yield faults


@dataclass
class Watch:
    """What each update of a rank was, and what it left.

    Attributes:
        plan: the rung of each update, which a replay follows; empty: what comes.
        seen: of each update: its number, its rung, digests of all parts of the state.
    """

    plan: dict[int, str] = field(default_factory=dict)
    rung: str = ""
    seen: list[tuple[int, str, dict[str, str]]] = field(default_factory=list)

    @contextmanager
    def watching(self) -> Iterator[None]:
        with (
            around(Update, "commit", self._commit), around(Update, "run", self._run),
            around(Trial, "dry_run", self._dry_run),
            around(Climbing, "is_due", self._is_due) if self.plan else nullcontext(),
        ):  # fmt: skip
            yield

    def _follow(self, rung: str, updates: int) -> None:
        if self.plan.get(updates + 1, rung) != rung:
            raise OutOfMemory("replayed", phase="replay")

    def _commit(self, commit: Callable[..., None], update: Update, position: Any) -> None:
        commit(update, position)
        if not update._is_dry_run:
            self._look(update)

    @unseen  # or its copies would be refused too
    def _look(self, update: Update) -> None:
        # a meter is of this rank; of an epoch that is evaluated again it begins at another update
        state = {k: digest(v) for k, v in sorted(dump(update.state).items()) if not k.startswith("meter/")}
        self.seen.append((update.state.updates, self.rung, state))

    def _run(self, run: Callable[..., None], update: Update, *args: Any, **how: Any) -> None:
        if not update._is_dry_run:
            self._follow(self.rung, update.state.updates)
        run(update, *args, **how)

    def _dry_run(self, dry_run: Callable[..., int], trial: Trial, config: Any) -> int:
        self._follow(trial._tried.name, trial.session.state.updates if trial.session else 0)
        done = dry_run(trial, config)
        self.rung = trial._tried.name
        return done

    def _is_due(self, _: Any, climbing: Climbing, rung: Any, __: int) -> bool:
        names = [each.name for each in climbing._rungs.ladder] + [EXHAUSTED]
        climbing.target = names.index(self.plan.get(self.seen[-1][0] + 1, rung.name))
        return climbing.target < names.index(rung.name)


def digest(value: Any) -> str:
    content = value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def train(case: Case, name: str, watch: Watch, attack: AbstractContextManager[Any], file: Path) -> int:
    """Train on this rank; write what was seen; return the exit code."""
    config, code, rung = compose_config([*SETTINGS, *case.settings]), 0, ""
    with watch.watching(), attack as faults:
        try:
            rung = Trainer(config, model=case.model, output_dir=case.folder / name).fit().rung
        except LadderExhausted:
            rung = EXHAUSTED
        except AdaptiveTrainerError as error:
            print(error)
            code = error.exit_code
    file.write_text(json.dumps({"rung": rung, "faults": faults.raised if faults else 0, "seen": watch.seen}))
    return code


@dataclass
class Ended:
    """How the ranks of one training have ended: exit codes, seconds from the first end to the last, what each saw."""

    codes: list[int | None]
    seconds: float
    found: list[dict[str, Any] | None]


def launch(case: Case, ranks: int, life: int, plan: dict[int, str] | None = None) -> Ended:
    """Train on so many ranks, as torchrun would start them; a `life` after the first goes on from what is saved."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    name = "attacked" if plan is None else "replayed"
    files = [case.folder / f"{name}-{life}-{rank}.json" for rank in range(ranks)]
    pids = {}
    for rank in range(ranks):
        if pid := os.fork():
            pids[pid] = rank
            continue
        with files[rank].with_suffix(".log").open("w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        code = 1
        try:
            faulthandler.dump_traceback_later(SECONDS)  # of a rank that hangs
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": str(life),
            }  # fmt: skip
            attack = attacked(case, life, rank) if plan is None else nullcontext()
            code = train(case, name, Watch(plan or {}), attack, files[rank])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    codes, times = waited(pids)
    found = [json.loads(file.read_text()) if file.exists() else None for file in files]
    return Ended([codes[rank] for rank in range(ranks)], max(times) - min(times), found)


def waited(pids: dict[int, int]) -> tuple[dict[int, int | None], list[float]]:
    """The exit code of each rank, None of one that hangs, and when each has ended."""
    codes: dict[int, int | None] = dict.fromkeys(pids.values())
    times, end, left = [], time.monotonic() + SECONDS + 10, set(pids)
    while left and time.monotonic() < end:
        for pid in [*left]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                left.remove(pid)
                codes[pids[pid]] = os.waitstatus_to_exitcode(status)
                times.append(time.monotonic())
        time.sleep(0.005)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return codes, times or [0.0]


def examined(case: Case, ranks: int, said: list[str]) -> str:
    """Train, go on after a kill, replay; what is wrong, or empty. Facts for people are added to `said`."""
    case.folder.mkdir(parents=True)
    lives = [launch(case, ranks, 0)]
    while set(lives[-1].codes) in STOPPED:
        first = next(code for code in lives[-1].codes if code != PeerLost.exit_code)
        said.append(f"exit code {first} of one, the last {lives[-1].seconds:.1f} s later")
        if lives[-1].seconds > BOUND:
            return "LATE"
        lives.append(launch(case, ranks, len(lives)))
    if set(lives[-1].codes) != {0}:
        return f"FAILED: exit codes {lives[-1].codes}; None is a rank that hangs"
    said.append(f"{sum(each['faults'] for life in lives for each in life.found if each)} faults")
    last = {each["rung"] for each in lives[-1].found if each}
    seen = [merged([life.found[rank] for life in lives]) for rank in range(ranks)]
    plan = dict(sorted((number, rung) for each in seen for number, (rung, _) in each.items()))
    said.append(f"rungs {', '.join(name for name, _ in groupby(plan.values()))}, at last {', '.join(last)}")
    if len(last) > 1 or any(rung != plan[number] for each in seen for number, (rung, _) in each.items()):
        return "APART"
    replay = launch(case, ranks, 0, plan | ({len(plan) + 1: EXHAUSTED} if last == {EXHAUSTED} else {}))
    for rank, each in enumerate(seen):
        again = merged([replay.found[rank]])
        if again.keys() != plan.keys():
            return f"DIFFERENT: rank {rank} makes the updates {[*plan]}, and {[*again]} in the replay"
        # of a run that was resumed they are saved of the first rank alone
        own = ("buffer/", "ema", "rng") if lives[1:] and rank else ()
        for number, (_, state) in each.items():
            differing = [k for k in state if not k.startswith(own) and state[k] != again[number][1].get(k)]
            if differing or again[number][0] != plan[number]:
                return f"DIFFERENT: rank {rank}, update {number} on {plan[number]}, {again[number][0]}: {differing}"
    return ""


def merged(lives: list[dict[str, Any] | None]) -> dict[int, tuple[str, dict[str, str]]]:
    """Rung and digests of each update of a rank, by its number; the later life has what both have."""
    found: dict[int, tuple[str, dict[str, str]]] = {}
    for life in lives:
        if life and life["seen"]:
            found = {number: each for number, each in found.items() if number < life["seen"][0][0]}
            found |= {number: (rung, state) for number, rung, state in life["seen"]}
    return found


def main() -> None:
    folder, ranks, is_well = Path(sys.argv[1]), int(sys.argv[2]), True
    torch.set_num_threads(1)
    gc.freeze()
    for seed in map(int, sys.argv[3:]):
        case, began = Case.drawn(folder, ranks, seed), time.monotonic()
        said = [*case.settings, f"dropout={case.has_dropout}"]
        wrong = examined(case, ranks, said)
        print(f"seed {seed}: {wrong or 'well'} ({', '.join(said)}, {time.monotonic() - began:.0f} s)", flush=True)
        is_well &= not wrong
    sys.exit(not is_well)


if __name__ == "__main__":
    main()
