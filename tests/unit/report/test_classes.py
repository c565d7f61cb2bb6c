"""How classes fare: figures as scikit-learn's, and which class is taken for which."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from adaptive_trainer.report.classes import Confusion, by_class, largest_confusions, matrix
from adaptive_trainer.report.listeners import Answers


def test_figures_are_those_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    labels, answers = random.integers(0, 5, 200), random.integers(1, 6, 200)
    counts: dict[tuple[int, int], int] = {}
    for pair in zip(labels.tolist(), answers.tolist(), strict=True):
        counts[pair] = counts.get(pair, 0) + 1
    heard = Answers(counts, [])
    rows = by_class(heard, list("abcdefg"))
    expected = precision_recall_fscore_support(labels, answers, labels=range(7), zero_division=0)
    found = ([getattr(row, name) for row in rows] for name in ("precision", "recall", "f1", "images"))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs)
    np.testing.assert_array_equal(matrix(heard, 7), confusion_matrix(labels, answers, labels=range(7)))


def test_the_largest_confusions_come_first() -> None:
    heard = Answers({(0, 0): 6, (0, 1): 2, (1, 0): 3, (2, 1): 2, (2, 2): 9}, [])
    assert largest_confusions(heard, ["cat", "dog", "emu"]) == [
        Confusion("dog", "cat", 3, 1.0),
        Confusion("cat", "dog", 2, 0.25),
        Confusion("emu", "dog", 2, 2 / 11),
    ]


def test_many_classes_take_little_memory() -> None:
    many = 100_000  # all pairs would take 80 GB
    heard = Answers({(number, number): 1 for number in range(many)} | {(0, 1): 1}, [])
    names = [str(number) for number in range(many)]
    assert {row.name for row in by_class(heard, names)[:2]} == {"0", "1"}
    assert largest_confusions(heard, names) == [Confusion("0", "1", 1, 0.5)]
