"""Training that steps down a ladder of settings when the GPU runs out of memory, and loses nothing on the way.

Names are imported when they are first used: `import adaptive_trainer` alone does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptive_trainer.config.overrides import compose_config
    from adaptive_trainer.ladder.descent import Attempt, descend
    from adaptive_trainer.ladder.resolve import Rung, make_ladder
    from adaptive_trainer.memory.usage import clear_gpu_memory, monitor_gpu_memory, print_gpu_memory
    from adaptive_trainer.planning.api import predict
    from adaptive_trainer.report.record import Result
    from adaptive_trainer.training.trainer import Trainer, load_model

__all__ = [
    "Attempt",
    "Result",
    "Rung",
    "Trainer",
    "clear_gpu_memory",
    "compose_config",
    "descend",
    "load_model",
    "make_ladder",
    "monitor_gpu_memory",
    "predict",
    "print_gpu_memory",
]

_HOME = {
    "Attempt": "ladder.descent",
    "Result": "report.record",
    "Rung": "ladder.resolve",
    "Trainer": "training.trainer",
    "clear_gpu_memory": "memory.usage",
    "compose_config": "config.overrides",
    "descend": "ladder.descent",
    "load_model": "training.trainer",
    "make_ladder": "ladder.resolve",
    "monitor_gpu_memory": "memory.usage",
    "predict": "planning.api",
    "print_gpu_memory": "memory.usage",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
