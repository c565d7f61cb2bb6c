"""What is compared, bit for bit: all that a training leaves behind, as a flat dict of plain values."""

from __future__ import annotations

import csv
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.attack.networks import Noted

Evidence = dict[str, Any]

STATE = (
    "model",
    "made_buffers",
    "buffers",
    "optimizer",
    "scaler",
    "ema",
    "position",
    "updates",
    "finished_epochs",
    "best",
    "meters",
    "random",
    "stage",
)
OF_THE_MACHINE = ("seconds", "peak_allocated_bytes", "peak_reserved_bytes", "rung")  # columns of metrics.csv


def evidence(folder: Path, network: nn.Module | None) -> Evidence:
    """Everything in the last checkpoint, the best, the metrics, and the network that the Trainer gives back."""
    facts: Evidence = {}
    last = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    facts |= dict(_flat("last", {key: last.get(key) for key in STATE}))
    best = torch.load(folder / "checkpoints" / "best.pt", weights_only=True)
    facts |= dict(_flat("best", {key: best[key] for key in ("model", "best")}))
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if k not in OF_THE_MACHINE} for row in csv.DictReader(file)]
    facts |= dict(_flat("metrics", rows))
    return facts | (_of_network(network) if network is not None else {})


def _of_network(network: nn.Module) -> Evidence:
    """Weights, all buffers, the states of its generators, and what it answers to fixed images."""
    parts: dict[str, Any] = {"weights": dict(network.named_parameters()), "buffers": dict(network.named_buffers())}
    parts["generators"] = list(_states(network.owned())) if isinstance(network, Noted) else []
    facts = dict(_flat("network", parts))
    torch.manual_seed(0)
    with torch.no_grad():
        answers = network.eval()(torch.rand(4, 3, 16, 16))
    return facts | dict(_flat("answers", answers))


def differences(one: Evidence, other: Evidence) -> list[str]:
    """The names of what is not the same, with both values where these are short."""
    found = []
    for key in sorted(one.keys() | other.keys()):
        if key not in one or key not in other:
            found.append(f"{key} only in {'the first' if key in one else 'the second'}")
        elif one[key] != other[key]:
            values = f"{_short(one[key])} and {_short(other[key])}"
            found.append(f"{key}: {values}")
    return found


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of nested containers with their paths; a tensor is its dtype, shape, strides and bytes."""
    if isinstance(value, dict):
        yield f"{name} keys", sorted(map(str, value))
        for key, part in value.items():
            yield from _flat(f"{name}/{key}", part)
    elif isinstance(value, list | tuple):
        yield f"{name} length", len(value)
        for number, part in enumerate(value):
            yield from _flat(f"{name}/{number}", part)
    elif isinstance(value, Tensor):
        values = value.detach().contiguous()
        stride = value.stride() if value.numel() else ()
        yield name, (str(value.dtype), tuple(value.shape), stride, values.view(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, float):
        yield name, value.hex()
    else:
        yield name, value


def _states(owned: Any) -> Iterator[Any]:
    if isinstance(owned, dict):
        yield from (state for part in owned.values() for state in _states(part))
    elif isinstance(owned, list | tuple):
        yield from (state for part in owned for state in _states(part))
    elif isinstance(owned, torch.Generator):
        yield owned.get_state()
    elif isinstance(owned, random.Random):
        yield repr(owned.getstate())
    elif isinstance(owned, np.random.Generator):
        yield repr(owned.bit_generator.state)
    else:
        yield repr(owned.get_state(legacy=False))


def _short(value: Any) -> str:
    if isinstance(value, tuple):  # a tensor
        dtype, shape, stride, content = value
        return f"{dtype}{list(shape)} strides {list(stride)} #{zlib.crc32(content):08x}"
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."
