"""What `ladder=exact` would have kept is planned where a test asks for it: it takes longer than a small training."""

from __future__ import annotations

import os
from typing import Any

from adaptive_trainer.planning import exact

ASKED = "PLAN_WHAT_EXACT_KEEPS"  # a variable of the environment, which processes of their own inherit

_first_fit = exact._first_fit


def _first_fit_if_asked(*args: Any) -> Any:
    return _first_fit(*args) if ASKED in os.environ else None


def where_asked() -> None:
    exact._first_fit = _first_fit_if_asked  # type: ignore[assignment]
