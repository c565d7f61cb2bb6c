"""Measure one command from its start to its end: imports, settings, data, plan, network, dry run, update, exit.

Usage: python scripts/benchmark_start.py [--rounds N] [--against FOLDER] [OVERRIDE ...]

Every round trains once in a process of its own, on files that are made up unless an override `data=...` names others.
`--against` names another checkout, whose runs alternate with those of this one. The files of the packages are in
the page cache after a round that is not counted. Stages end at lines of the log at level DEBUG, so what works beside
another stage counts nowhere. On a card the first update is launched, and not finished, when its line is written.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from scripts.timing import alternating, heading, row, table

ROOT = Path(__file__).resolve().parents[1]
IMAGES, CLASSES, SIDE = 240, 4, 256
# What a stage ends with, in the order of a run; of an update the first line counts, and the last.
STAGES = {
    "interpreter and settings": "the settings are composed",
    "imports": "the packages are imported",
    "data": "the data is listed",
    "plan": "rung .* is entered",
    "network and weights": "the network is built",
    "dry run": r"rung .+:? fits",
    "first update": "update 1 is made",
}
LAST = re.compile(r"update \d+ is made")
TO_FIRST, TRAINING, TO_EXIT = "command to first update", "training", "last update to exit"
Figures = dict[str, float]


def photos(folder: Path) -> Path:
    """Write JPEG files of noise, which take longer to decode than photos."""
    draw = np.random.default_rng(0)
    for number in range(IMAGES):
        path = folder / f"class-{number % CLASSES}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
    return folder


def command(checkout: Path, overrides: list[str]) -> Figures:
    """Run it once; seconds of every stage, and of the CPU: the process and its data workers.

    Raises:
        SystemExit: the run fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"output_dir={folder}/run", f"hydra.run.dir={folder}", "hydra.verbose=[adaptive_trainer]"]
        before, begun = os.times(), time.time()
        ended = subprocess.run(
            [sys.executable, "-m", "adaptive_trainer", *overrides, *outputs],
            env={**os.environ, "PYTHONPATH": str(checkout)}, cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        end, after = time.time(), os.times()
        if ended.returncode:
            raise SystemExit(f"the run in {checkout} failed:\n{ended.stdout}{ended.stderr}")
        log = Path(folder, "adaptive_trainer.log").read_text(encoding="utf-8")
    used = sum(after[2:4]) - sum(before[2:4])  # of children that were waited for
    return {**stages(list(times(log)), begun, end), "CPU": used}


def times(log: str) -> Iterator[tuple[float, str]]:
    """The time of every line of a log, and its text."""
    for when, text in re.findall(r"^\[([\d :,-]+)\]\[[\w.]+\]\[\w+\] - (.*)$", log, flags=re.MULTILINE):
        yield datetime.strptime(when, "%Y-%m-%d %H:%M:%S,%f").timestamp(), text


def stages(lines: list[tuple[float, str]], begun: float, end: float) -> Figures:
    """Seconds of every stage of a run."""
    found, last = {}, begun
    for name, text in STAGES.items():
        at = next(when for when, line in lines if re.match(text, line))
        found[name], last = at - last, at
    last_update = max(when for when, line in lines if LAST.match(line))
    return {**found, TO_FIRST: last - begun, TRAINING: last_update - last, TO_EXIT: end - last_update}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="of the command, behind those of the script")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout")
    arguments = parser.parse_args()
    size = 224 if torch.cuda.is_available() else 64
    checkouts = {"here": ROOT, **({"there": arguments.against.resolve()} if arguments.against else {})}
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"data.image_size={size}", *arguments.overrides]
        if not any(text.startswith("data=") for text in overrides):
            overrides = ["data=imagefolder", f"data.root={photos(Path(folder))}", *overrides]
        for checkout in checkouts.values():
            command(checkout, overrides)  # bytecode is written, files are read, the plan is kept
        blocks = {name: partial(command, checkout, overrides) for name, checkout in checkouts.items()}
        found = alternating(blocks, arguments.rounds)
    print(heading(f"Seconds of a command, median of {arguments.rounds}"))
    print(f"\n`python -m adaptive_trainer {' '.join(overrides)}`\n")
    print("\n".join(rows(found)))


def rows(found: dict[str, list[Figures]]) -> Iterator[str]:
    """The table; with two checkouts, the ratio of the second to the first."""
    yield from table("stage", *found, *(["there / here"] if len(found) > 1 else []))
    for name in found["here"][0]:
        medians = [statistics.median(each[name] for each in figures) for figures in found.values()]
        ratios = [f"{medians[1] / max(medians[0], 1e-3):.2f}"] if len(medians) > 1 else []
        yield row(name, *(f"{seconds:.2f}" for seconds in medians), *ratios)


if __name__ == "__main__":
    main()
