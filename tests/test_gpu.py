"""On a real card: real out-of-memories under real caps, and the rung that brute force finds."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import gpu_checks

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("cap", gpu_checks.CAPS)
def test_the_rung_under_a_cap_is_the_one_that_brute_force_finds(cap: int, tmp_path: Path) -> None:
    real = gpu_checks.descend_under(cap, tmp_path / "real", predicting=False)
    predicted = gpu_checks.descend_under(cap, tmp_path / "predicted", predicting=True)
    assert real.rung == predicted.rung == gpu_checks.brute_force(cap)
    assert len({*real.allocated, *predicted.allocated}) == 1, (
        "memory is back to its value before the attempt, every time"
    )
    assert predicted.tried <= 1
    if cap < 2000:
        assert real.tried > 0
