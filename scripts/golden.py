"""The guard of refactorings: what a change that changes nothing must leave as it is.

    python scripts/golden.py exact            # compare with tests/golden.json; --write makes it anew
    python scripts/golden.py bits             # train small runs and print sha256 of everything they end with
    python scripts/golden.py compare BASE     # `bits` in a work tree of the revision BASE and in this one, compared

Only the public names of the package are used, so that the same script runs in an older tree.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from adaptive_trainer import Trainer, compose_config, predict

ROOT = Path(__file__).parents[1]
EXACT = ROOT / "tests" / "golden.json"
DEVICES = ("rtx2060", "h200", "cpu")
# Twelve recipes: convolutions of every kind, attention, precisions, optimizers, micro-batches, memory formats.
RECIPES: dict[str, tuple[str, ...]] = {
    "efficientnet_b0": (),
    "efficientnet_b0 fp16, micro-batches of 8": ("trainer.precision=fp16", "trainer.micro_batch_size=8"),
    "efficientnet_b0 recomputed": ("trainer.recompute=blocks",),
    "resnet18 sgd": ("model.name=resnet18", "optimizer=sgd"),
    "resnet50 bf16 channels_last": ("model.name=resnet50", "trainer.precision=bf16", "trainer.channels_last=true"),
    "mobilenetv3_large_100 lion": ("model.name=mobilenetv3_large_100", "optimizer=lion"),
    "mobilenetv3_small_100 average": ("model.name=mobilenetv3_small_100", "trainer.ema_decay=0.999"),
    "vit_tiny_patch16_224": ("model.name=vit_tiny_patch16_224",),
    "convnext_atto": ("model.name=convnext_atto", "trainer.clip_grad=1"),
    "regnety_002 8@160": ("model.name=regnety_002", "trainer.batch_size=8", "data.image_size=160"),
    "torchvision/mobilenet_v2": ("model.name=torchvision/mobilenet_v2",),
    "test_resnet 8@64": ("model.name=test_resnet", "trainer.batch_size=8", "data.image_size=64"),
}
BASE = (
    "ladder=none", "data.num_workers=0", "data.image_size=32", "data.transforms=none", "trainer.batch_size=8",
    "trainer.epochs=2", "memory.limit=none", "trainer.log_every=2",
)  # fmt: skip
HALF = """{name: half, overrides: ["trainer.batch_size=4"]}"""
SECONDS = re.compile(r"in \d+\.\d s")  # what decoding takes depends on the machine's load
SMALL = """{name: small, overrides: ["data.image_size=16"]}"""
FIRST = """{name: first, overrides: ["trainer.epochs=1"]}"""
SECOND = """{name: second, overrides: ["optimizer.lr=1e-4"]}"""


class Images(Dataset[Any]):
    """Random images of 32 x 32 in three classes, which notes in what order they are asked for."""

    classes = ("a", "b", "c")

    def __init__(self, size: int) -> None:
        self.size = size
        self.order: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        self.order.append(index)
        pixels = np.random.RandomState(index).randint(0, 256, (32, 32, 3), dtype=np.uint8)
        return Image.fromarray(pixels), index % 3


def resnet(config: Any, classes: int) -> nn.Module:
    """A small network with BatchNorm and dropout.

    Args:
        config: the model settings, of which the name alone is looked at.
        classes: width of the head.
    """
    return timm.create_model("test_resnet" if "tiny" not in config.name else "test_vit", num_classes=classes)


class RunsOut(nn.CrossEntropyLoss):
    """Cross entropy that runs out of memory from its `at`-th call in training on, as long as a batch has 8 samples."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.calls = at, [0]

    def forward(self, output: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of scores (N, classes) and labels (N,)."""
        self.calls[0] += output.requires_grad and output.device.type != "meta"
        if self.calls[0] >= self.at and output.requires_grad and len(labels) == 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Injected by the golden guard.")
        return super().forward(output, labels)


# name: overrides, and the call of the loss that runs out of memory (0: none)
RUNS: dict[str, tuple[tuple[str, ...], int]] = {
    "adamw": ((), 0),
    "sgd": (("optimizer=sgd", "optimizer.lr=0.05"), 0),
    "lion": (("optimizer=lion",), 0),
    "bf16": (("trainer.precision=bf16",), 0),
    "fp16": (("trainer.precision=fp16",), 0),
    "micro": (("trainer.micro_batch_size=3", "trainer.clip_grad=1"), 0),
    "average": (("trainer.ema_decay=0.9",), 0),
    "smoothing": (("trainer.label_smoothing=0.1", "schedule.warmup_epochs=0.5"), 0),
    "recomputed": (("trainer.recompute=blocks",), 0),
    "augmented": (("data.transforms=timm",), 0),
    "cached": (("data.cache=ram", "data.transforms=torchvision"), 0),
    "descent": ((f"ladder.rungs=[{HALF}, {SMALL}]",), 6),
    "phases": ((f"phases.stages=[{FIRST}, {SECOND}]",), 0),
    "resumed": (("trainer.checkpoint_every=1",), 0),
}
RECORDED = ("adamw", "fp16", "micro", "average", "augmented", "cached", "descent", "phases")


def train(name: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[int]]:
    """Result, last checkpoint and order of the samples of one run."""
    overrides, at = RUNS[name]
    loss = RunsOut(at) if at else None
    data = Images(20)

    def fit(*more: str) -> Any:
        settings = compose_config([*BASE, *overrides, *more])
        parts: dict[str, Any] = {"model": resnet, "train_data": data, "val_data": Images(6), "output_dir": folder}
        return Trainer(settings, loss=loss, **parts).fit()

    result = fit("trainer.epochs=1") if name == "resumed" else fit()
    if name == "resumed":
        result = fit(f"resume={folder / 'checkpoints' / 'last.pt'}")
    saved = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    return asdict(result), saved, data.order


def sha(value: Any) -> str:
    """sha256 of tensors, numbers, texts and what holds them, in order, with dtypes and shapes."""
    digest = hashlib.sha256()
    _feed(value, digest.update)
    return digest.hexdigest()[:16]


def _feed(value: Any, update: Callable[[bytes], Any]) -> None:
    if isinstance(value, Tensor):
        update(f"{value.dtype} {tuple(value.shape)}".encode())
        update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key in value:
            update(repr(key).encode())
            _feed(value[key], update)
    elif isinstance(value, list | tuple):
        for item in value:
            _feed(item, update)
    else:
        update(repr(value).encode())


def keys(value: Any, path: str = "") -> list[str]:
    """The paths of a checkpoint's content, without the names of single weights."""
    if not isinstance(value, dict) or path in (".model", ".ema", ".buffers", ".optimizer", ".config", ".requested"):
        return [f"{path[1:]}: {type(value).__name__}"]
    return [line for key in value for line in keys(value[key], f"{path}.{key}")]


def exact() -> dict[str, Any]:
    """What is the same on every machine with the same versions."""
    predicted = {}
    for name, overrides in RECIPES.items():
        for device in DEVICES:
            found = predict(compose_config(list(overrides)), device=device)
            sizes = (found.live_bytes, found.allocated_bytes, found.reserved_bytes, found.min_capacity_bytes)
            predicted[f"{name}, {device}"] = list(sizes)
    runs = {}
    for name in RECORDED:
        with tempfile.TemporaryDirectory() as folder:
            result, saved, order = train(name, Path(folder) / "run")
            attempts = [
                {key: entry[key] for key in ("rung", "outcome", "phase", "reason", "predicted_bytes")}
                for entry in result["attempts"]
            ]
            runs[name] = {
                "rung": result["rung"],
                "attempts": attempts,
                "events": [SECONDS.sub("in SECONDS s", text.replace(folder, "FOLDER")) for text in result["events"]],
                "changes": result["changes"],
                "order": order,
                "checkpoint": keys(saved),
            }
    versions = {"torch": torch.__version__.partition("+")[0], "timm": timm.__version__}
    return {"versions": versions, "predicted_bytes": predicted, "runs": runs}


def bits(names: Sequence[str] = ()) -> dict[str, str]:
    """By run and part, sha256 of what a training ends with on this machine."""
    found = {}
    for name in names or RUNS:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        with tempfile.TemporaryDirectory() as folder:
            result, saved, order = train(name, Path(folder) / "run")
        rows = {key: value for key, value in result["metrics"].items() if key != "seconds" and "bytes" not in key}
        parts = {key: saved[key] for key in ("model", "ema", "optimizer", "scaler", "buffers", "meters", "random")}
        for part, value in {**parts, "metrics": rows, "order": order}.items():
            found[f"{name}.{part}"] = sha(value)
    return found


def compare(base: str) -> int:
    """Print what differs between the revision `base` and this tree; the number of differences."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, base], cwd=ROOT, check=True)
        try:
            before, now = _bits_of(tree), _bits_of(ROOT)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)
    differing = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    print("\n".join(f"{key}: {before.get(key)} -> {now.get(key)}" for key in differing))
    print(f"{len(now) - len(differing)} of {len(now)} parts are equal to those of {base}")
    return len(differing)


def _bits_of(tree: Path) -> dict[str, str]:
    env = {**os.environ, "PYTHONPATH": str(tree), "ADAPTIVE_TRAINER_CACHE": ""}
    command = [sys.executable, str(Path(__file__).resolve()), "bits"]
    ended = subprocess.run(command, cwd=tree, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(ended.stdout))


def main() -> int:
    """0 where nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("exact", "bits", "compare"))
    parser.add_argument("base", nargs="?", default="HEAD~1", help="revision to compare with")
    parser.add_argument("--write", action="store_true", help="make tests/golden.json anew")
    asked = parser.parse_args()
    logging.disable(logging.WARNING)  # `bits` prints its JSON where a run prints its lines
    torch.set_num_threads(1)  # the order of sums must not depend on the machine's load
    if asked.what == "compare":
        return 1 if compare(asked.base) else 0
    if asked.what == "bits":
        print(json.dumps(bits(), indent=1))
        return 0
    found = json.loads(json.dumps(exact()))
    if asked.write:
        EXACT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return 0
    is_equal = found == json.loads(EXACT.read_text(encoding="utf-8"))
    print("equal" if is_equal else "tests/golden.json differs; --write, then git diff")
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
