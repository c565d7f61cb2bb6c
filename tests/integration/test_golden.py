"""What a refactoring must leave as it is: predicted bytes, order of samples, events, attempts, keys of a checkpoint."""

from __future__ import annotations

import json

import pytest
import timm
import torch

from scripts.golden import EXACT, exact, sha


def test_exact_data_are_as_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python scripts/golden.py exact --write` records them anew; the difference belongs into the commit."""
    monkeypatch.setenv("ADAPTIVE_TRAINER_CACHE", "")
    recorded = json.loads(EXACT.read_text(encoding="utf-8"))
    here = {"torch": torch.__version__.partition("+")[0], "timm": timm.__version__}
    if recorded["versions"] != here:
        pytest.skip(f"recorded with {recorded['versions']}, and here are {here}")
    found = json.loads(json.dumps(exact()))
    for part in ("predicted_bytes", "runs"):
        for name, value in recorded[part].items():
            assert found[part][name] == value, name
    assert found == recorded


def test_the_sum_sees_values_types_shapes_and_order() -> None:
    zeros = torch.zeros(2, 3)
    different = [
        zeros,
        zeros.double(),
        zeros.T,
        zeros + 1e-38,
        [zeros, 1],
        [1, zeros],
        {"a": zeros},
        {"b": zeros},
        1,
        1.0,
    ]
    assert len({sha(value) for value in different}) == len(different)
    assert sha({"a": zeros}) == sha({"a": torch.zeros(2, 3)})
