"""From files to batches: the same samples in the same order, whatever the workers and the batch sizes.

Configs and saved settings name `adaptive_trainer.data.digits` and `adaptive_trainer.data.image_folder`.
"""

from __future__ import annotations

import importlib
from typing import Any

HOME = {"digits": "datasets", "image_folder": "images.files"}


def __getattr__(name: str) -> Any:
    if name not in HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOME[name]}"), name)
