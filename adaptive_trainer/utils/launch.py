"""What torchrun says of this process, without torch: it sets these variables for every rank."""

from __future__ import annotations

import os

MODULE = "-m adaptive_trainer"
COMMAND = f"python {MODULE}"  # what people type


def world_size() -> int:
    """How many ranks there are; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def command() -> str:
    """What people type to start as many processes again."""
    ranks, here = world_size(), os.environ.get("LOCAL_WORLD_SIZE", "1")
    if ranks == 1:
        return COMMAND
    options = f"--nproc-per-node={here}" if str(ranks) == here else "..."  # of several machines each has its own
    return f"torchrun {options} {MODULE}"


def rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def local_rank() -> int:
    """Which of those on this machine it is, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world_size() > 1 else 0


def restarts() -> int:
    """How often torchrun has started the ranks anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if world_size() > 1 else 0
