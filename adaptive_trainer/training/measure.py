"""The memory that a recipe really takes on the card that is here."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import torch

from adaptive_trainer import oom
from adaptive_trainer.config.schema import Config
from adaptive_trainer.errors import OutOfMemory
from adaptive_trainer.ladder.resolve import recipe, stored_size
from adaptive_trainer.memory.limit import Capacity, limited
from adaptive_trainer.models.losses import build_loss
from adaptive_trainer.models.zoo import build_model
from adaptive_trainer.step.dry_run import dry_run
from adaptive_trainer.training.session import Parts, enter
from adaptive_trainer.utils.device import device_of
from adaptive_trainer.utils.global_state import private_process_state


def measure(config: Config, num_classes: int) -> tuple[int, int] | None:
    """Peak allocated and reserved bytes of whole updates and one evaluation batch on the CUDA card of the settings.

    None where they do not fit.
    """
    device = device_of(config.device)
    peaks = None
    with (
        private_process_state(deterministic=config.trainer.deterministic, tf32=config.trainer.tf32),
        torch.cuda.device(device),
        limited(device, config.memory.limit) as capacity,
    ):
        capacity.same_kernels = config.trainer.deterministic
        with suppress(OutOfMemory):
            peaks = _peaks(config, num_classes, capacity)  # a call, whose frame and session are gone at its end
        oom.release(device)  # for the next measurement of a table
    return peaks


def _peaks(config: Config, num_classes: int, capacity: Capacity) -> tuple[int, int]:
    used = recipe(config)
    # memory depends on no data: a training set of one batch does
    parts = Parts(build_model, build_loss, "", num_classes, used.batch_size, capacity.device, capacity)
    session = enter(config, parts)
    dry_run(session.update, replace(used, num_classes=num_classes, stored_size=stored_size([config])))
    counted = capacity.usage()
    return counted.peak_allocated, counted.peak_reserved
