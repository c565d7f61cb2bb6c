"""Training that steps down a ladder of settings when the GPU runs out of memory, and loses nothing on the way.

Names are imported when they are first used: `import adaptive_trainer` alone does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from adaptive_trainer.utils import kernel_choices

if TYPE_CHECKING:
    from adaptive_trainer.cli.plan import run_plan
    from adaptive_trainer.config.overrides import compose_config
    from adaptive_trainer.errors import (
        AdaptiveTrainerError,
        CheckpointError,
        ConfigError,
        DataError,
        DeviceUnusable,
        DivergedError,
        Interrupted,
        LadderExhausted,
        ModelError,
        OutOfMemory,
        PeerLost,
        Stopped,
        UserError,
    )
    from adaptive_trainer.inference.model import load_model
    from adaptive_trainer.ladder.descent import Attempt, descend
    from adaptive_trainer.ladder.rung import Rung, make_ladder
    from adaptive_trainer.memory.limit import limit_memory
    from adaptive_trainer.memory.usage import clear_gpu_memory, monitor_gpu_memory, print_gpu_memory
    from adaptive_trainer.models.savers.recompute import recompute
    from adaptive_trainer.oom import is_out_of_memory
    from adaptive_trainer.planning.api import predict
    from adaptive_trainer.report.result import Result
    from adaptive_trainer.step.transaction import Transaction
    from adaptive_trainer.training.trainer import Trainer

__version__ = "0.1.0"  # pyproject.toml reads it here

kernel_choices.keep_few()  # now: torch asks once, at its first convolution

# The names are written three times: above for type checkers and editors, which run no code, here for `import *`, and
# below for `__getattr__`.
__all__ = [
    "AdaptiveTrainerError", "Attempt", "CheckpointError", "ConfigError", "DataError", "DeviceUnusable",
    "DivergedError", "Interrupted", "LadderExhausted", "ModelError", "OutOfMemory", "PeerLost", "Result", "Rung",
    "Stopped", "Trainer", "Transaction", "UserError", "__version__", "clear_gpu_memory", "compose_config", "descend",
    "is_out_of_memory", "limit_memory", "load_model", "make_ladder", "monitor_gpu_memory", "predict",
    "print_gpu_memory", "recompute", "run_plan",
]  # fmt: skip

_NAMES = {
    "cli.plan": ("run_plan",),
    "config.overrides": ("compose_config",),
    "errors": (
        "AdaptiveTrainerError", "CheckpointError", "ConfigError", "DataError", "DeviceUnusable", "DivergedError",
        "Interrupted", "LadderExhausted", "ModelError", "OutOfMemory", "PeerLost", "Stopped",
        "UserError",
    ),
    "inference.model": ("load_model",),
    "ladder.descent": ("Attempt", "descend"),
    "ladder.rung": ("Rung", "make_ladder"),
    "memory.limit": ("limit_memory",),
    "memory.usage": ("clear_gpu_memory", "monitor_gpu_memory", "print_gpu_memory"),
    "models.savers.recompute": ("recompute",),
    "oom": ("is_out_of_memory",),
    "planning.api": ("predict",),
    "report.result": ("Result",),
    "step.transaction": ("Transaction",),
    "training.trainer": ("Trainer",),
}  # fmt: skip
_HOME = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:  # Python calls it for names that the module lacks
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])  # notebooks complete what they find here
