"""The victims: small networks with every kind of state that a forward pass is known to change."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS = 6


class Noted(nn.Module):
    """Notes the images that it is trained on, in order: `seen` is another number when one is left out or moved."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def note(self, x: Tensor) -> None:
        if self.training:
            self.seen.mul_(1.0625).add_(x.double().sum())

    def owned(self) -> Any:
        """The generators that the network owns, for a comparison of their states."""
        return ()


class Conv(Noted):
    """BatchNorm with and without momentum, dropout, and stochastic depth from all three global generators."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, 2, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(CHANNELS)
        self.depthwise = nn.Conv2d(CHANNELS, CHANNELS, 3, 1, 1, groups=CHANNELS)
        self.norm2 = nn.BatchNorm2d(CHANNELS, momentum=None)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(CHANNELS, classes)

    def forward(self, x: Tensor) -> Tensor:
        self.note(x)
        x = F.silu(self.norm1(self.stem(x)))
        branch = F.silu(self.norm2(self.depthwise(x)))
        if self.training:
            kept = branch.new_empty((len(x), 1, 1, 1)).bernoulli_(0.8)
            branch = branch * kept * (1 + 0.1 * random.random() + 0.1 * float(np.random.rand()))
        out: Tensor = self.head(self.dropout((x + branch).mean((2, 3))))
        return out


class Body(Noted):
    """A stem, two blocks in a plain container (which `recompute=blocks` recomputes), a head."""

    def __init__(self, classes: int, block: type[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, 2, 1)
        self.blocks = nn.Sequential(block(), block())
        self.head = nn.Linear(CHANNELS, classes)

    def forward(self, x: Tensor) -> Tensor:
        self.note(x)
        out: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return out


class RebindingBlock(nn.Module):
    """Binds a buffer anew in each pass; another is no part of the `state_dict`; a third is made by the first pass."""

    level: Tensor
    passes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(CHANNELS, CHANNELS, 3, 1, 1), nn.BatchNorm2d(CHANNELS)
        self.dropout = nn.Dropout(0.2)
        self.register_buffer("level", torch.zeros(CHANNELS))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.level = 0.9 * self.level + 0.1 * x.detach().float().mean((0, 2, 3))
            self.passes = self.passes + 1
            if "first" not in self._buffers:
                self.register_buffer("first", x.detach().float().mean((0, 2, 3)))
        branch: Tensor = F.silu(self.norm(self.conv(x))) * (1 + 0.01 * self.level.view(1, -1, 1, 1))
        out: Tensor = x + self.dropout(branch)
        return out


class ReshapingBlock(nn.Module):
    """Changes buffers in place in every way that keeps the tensor object: values, size, strides, dtype."""

    history: Tensor
    turned: Tensor
    kind: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, 1, 1)
        self.register_buffer("history", torch.zeros(1))
        self.register_buffer("turned", torch.arange(6.0).view(2, 3))
        self.register_buffer("kind", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean = x.detach().double().mean()
            with torch.no_grad():
                count = len(self.history)
                self.history.resize_(count + 1)
                self.history[count] = mean
                self.turned.data = (self.turned.data * 1.01 + mean.float()).t()
                other = torch.float64 if self.kind.dtype == torch.float32 else torch.float32
                self.kind.data = (self.kind.data.double() * 1.1 + mean).to(other)
        scale = 1 + 0.01 * self.history[-1] + 0.001 * self.turned.sum() + 0.001 * self.kind.sum().float()
        return x + F.silu(self.conv(x)) * scale


class Generators(Noted):
    """Draws from generators of its own: alone, in a list, in a dict within a dict, in a module below."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, CHANNELS, 3, 2, 1), nn.Linear(CHANNELS, classes)
        self.alone = torch.Generator().manual_seed(1)
        self.listed = [random.Random(2), np.random.default_rng(3)]
        self.named: dict[str, Any] = {"deep": {"old": np.random.RandomState(4)}, "torch": torch.Generator()}
        self.named["torch"].manual_seed(5)
        self.stem.own = random.Random(6)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        self.note(x)
        x = F.silu(self.stem(x)).mean((2, 3))
        if self.training:
            noise = torch.rand(x.shape, generator=self.alone) + torch.rand(x.shape, generator=self.named["torch"])
            python, numpy = self.listed
            old = self.named["deep"]["old"]
            drawn = python.random() + float(numpy.random()) + float(old.rand()) + self.stem.own.random()  # type: ignore
            x = x * (1 + 0.1 * noise + 0.1 * drawn)
        out: Tensor = self.head(x)
        return out

    def owned(self) -> Any:
        return [self.alone, self.listed, self.named, self.stem.own]


class Evaluating(Noted):
    """Draws and counts in evaluation: from torch's global generator, from its own, in a buffer."""

    evaluated: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, CHANNELS, 3, 2, 1), nn.BatchNorm2d(CHANNELS)
        self.head = nn.Linear(CHANNELS, classes)
        self.register_buffer("evaluated", torch.zeros((), dtype=torch.int64))
        self.own = random.Random(1)

    def forward(self, x: Tensor) -> Tensor:
        self.note(x)
        x = F.silu(self.norm(self.stem(x))).mean((2, 3))
        if not self.training:
            self.evaluated += 1
            x = x + 0.1 * torch.rand_like(x) + 0.1 * self.own.random() + 0.01 * self.evaluated
        out: Tensor = self.head(F.dropout(x, 0.2))
        return out

    def owned(self) -> Any:
        return [self.own]


def rebinding(classes: int) -> nn.Module:
    return Body(classes, RebindingBlock)


def reshaping(classes: int) -> nn.Module:
    return Body(classes, ReshapingBlock)
