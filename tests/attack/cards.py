"""Ranks that train by a recipe, each under a limit of its own: what they have come to.

Usage: torchrun --nproc-per-node=N -m tests.attack.cards FOLDER LIMITS [OVERRIDE ...]

LIMITS has one for each rank, with commas; `none` is none, and `5:900MiB` lowers it after update 5. Every rank writes
FOLDER/RANK.json: rung, events, batch size of each update, where memory ran out in training, and a digest of its model.
`fail=N` among the overrides replays: memory runs out on all ranks, once, in the update after N.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from adaptive_trainer import Trainer, compose_config
from adaptive_trainer.config.limit import parse_limit
from adaptive_trainer.errors import OutOfMemory
from adaptive_trainer.step.engine import Engine
from adaptive_trainer.step.update import Update

BASE = (
    "data=fakedata", "data.train.size=240", "data.val.size=50", "data.num_workers=2", "trainer.deterministic=true",
    "trainer.channels_last=false", "report=false", "verbosity=quiet", "trainer.epochs=3", "trainer.batch_size=32",
    "ladder.avoid_thrashing=false",
)  # fmt: skip


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    after, _, limit = sys.argv[2].split(",")[rank].rpartition(":")
    typed = sys.argv[3:]
    failures = Counter(int(each[5:]) for each in typed if each.startswith("fail="))
    schedule: list[int] = []
    commit, run = Update.commit, Engine.run

    def committed(update: Update, position: Any) -> None:
        commit(update, position)
        if not update._is_dry_run:
            schedule.append(update.program.recipe.batch_size)
            if after and update.state.updates == int(after):  # another process takes memory
                torch.cuda.empty_cache()  # what is reserved would stay this process's own
                update.capacity.cap(parse_limit(limit).bytes or 0)

    def ran(engine: Engine, *args: Any, **how: Any) -> None:
        if failures[engine.update.state.updates]:
            failures[engine.update.state.updates] -= 1
            raise OutOfMemory("replayed", phase="forward")
        run(engine, *args, **how)

    asked = [f"memory.limit={'none' if after else limit}", *(each for each in typed if not each.startswith("fail="))]
    trainer = Trainer(compose_config([*BASE, *asked]), output_dir=folder)
    with patch.object(Update, "commit", committed), patch.object(Engine, "run", ran):
        result = trainer.fit()
    assert trainer.model is not None
    digest = hashlib.sha256()
    for value in trainer.model.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    found = {
        "rung": result.rung, "events": result.events, "schedule": schedule, "digest": digest.hexdigest(),
        "parts": [each["part"] for each in result.ranks],
        "failed": [attempt.phase for attempt in result.attempts if "after update" in attempt.phase],
    }  # fmt: skip
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
