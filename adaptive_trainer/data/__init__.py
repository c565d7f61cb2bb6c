"""From files to batches: the same samples in the same order, whatever the workers and the batch sizes.

`digits` and `image_folder` are what configs name, so they keep these paths.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name not in ("digits", "image_folder"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from adaptive_trainer.data import datasets  # which loads torchvision, that most rooms do not need

    return getattr(datasets, name)
