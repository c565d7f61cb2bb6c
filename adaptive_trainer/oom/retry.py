"""Try, sort the error, free what the failed work held, try again: one loop for everything that can be repeated."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import TypeVar

import torch

from adaptive_trainer.oom.classify import Failure, Kind, describe
from adaptive_trainer.oom.release import release

log = logging.getLogger(__name__)

T = TypeVar("T")
OF_MEMORY = frozenset({Kind.DEVICE, Kind.HOST, Kind.WORKER})


def attempt(
    work: Callable[[], T],
    *,
    kinds: Collection[Kind] = frozenset({Kind.DEVICE}),
    pressure: Callable[[], bool] | None = None,
) -> T | Failure:
    """Run the work; return what it returns, or how it ran out of memory.

    When the failure is returned, no error is being handled any more: nothing holds the work's frames and tensors.

    Args:
        kinds: the kinds of failure that are returned. Every other error is raised, unchanged.
        pressure: as for `describe`.
    """
    try:
        return work()
    except Exception as error:
        failure = describe(error, pressure=pressure)
        if failure.kind not in kinds:
            raise
    return failure


def retry(
    work: Callable[[], T],
    device: torch.device,
    what: str = "",
    *,
    kinds: Collection[Kind] = frozenset({Kind.DEVICE}),
    pressure: Callable[[], bool] | None = None,
) -> T | Failure:
    """Run the work, and once more where memory runs out: an out-of-memory can be spurious.

    After each failure, what the work held is released.

    Args:
        what: names the work in a warning before the second try; empty: nothing is logged.

    Returns:
        What the work returns, or the failure of the second try; of the first, where it is exact and would come again.
    """
    for is_last in (False, True):
        done = attempt(work, kinds=kinds, pressure=pressure)
        if not isinstance(done, Failure):
            return done
        release(device)
        if done.exact or is_last:
            break
        if what:
            log.warning("out of memory in %s (%s): once more", what, done.text)
    return done
