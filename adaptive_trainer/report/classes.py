"""How the classes fare in an evaluation: precision and recall of each, and which one is taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaptive_trainer.report.listeners import Answers
from adaptive_trainer.report.result import OfClass

MOST_CONFUSIONS = 40  # that are listed
MOST_CLASSES = 200  # that are listed; of more, those with the least F1


@dataclass(frozen=True, slots=True)
class Confusion:
    """A class that is taken for another.

    Attributes:
        images: how many are.
        share: of the images of the class.
    """

    name: str
    answer: str
    images: int
    share: float


def matrix(answers: Answers, classes: int) -> Any:
    """Counts of images (classes, classes): labels down, answers across."""
    counts = np.zeros((classes, classes), np.int64)
    for (label, answer), images in answers.counts.items():
        counts[label, answer] = images
    return counts


def largest_confusions(answers: Answers, names: Sequence[str]) -> list[Confusion]:
    """The pairs of classes that are confused the most, those of the most images first."""
    wrong = [(images, pair) for pair, images in answers.counts.items() if pair[0] != pair[1]]
    of_label = _totals(answers, len(names))[0]
    return [
        Confusion(names[label], names[answer], images, images / of_label[label])
        for images, (label, answer) in sorted(wrong, key=lambda each: (-each[0], each[1]))[:MOST_CONFUSIONS]
    ]


def by_class(answers: Answers, names: Sequence[str]) -> list[OfClass]:
    """Precision, recall and F1 of each class, in order; of many classes those with the least F1, the least first."""
    # Three divisions, where scikit-learn would take a second to import and want each label again.
    of_label, of_answer, right = _totals(answers, len(names))
    precision, recall = right / np.maximum(of_answer, 1), right / np.maximum(of_label, 1)
    columns = (of_label, precision, recall, 2 * right / np.maximum(of_label + of_answer, 1))
    rows = [OfClass(*row) for row in zip(names, *(column.tolist() for column in columns), strict=True)]
    return rows if len(rows) <= MOST_CLASSES else sorted(rows, key=lambda row: row.f1)[:MOST_CLASSES]


def _totals(answers: Answers, classes: int) -> Any:
    """Images (3, classes) with this label, with this answer, and with both."""
    totals = np.zeros((3, classes), np.int64)
    for (label, answer), images in answers.counts.items():
        totals[0, label] += images
        totals[1, answer] += images
        totals[2, label] += images if label == answer else 0
    return totals
