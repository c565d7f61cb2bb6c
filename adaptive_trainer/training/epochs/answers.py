"""What a network answers in an evaluation: counts by class, and the mistakes that it was most sure of."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from adaptive_trainer.data.loader import Batch
from adaptive_trainer.report.listeners import Answers, Wrong

MOST_MISTAKES = 12


class Gathered:
    """Gathers the answers of one evaluation, batch by batch."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor] | None = None
        self._counts: Counter[tuple[int, int]] = Counter()
        self._worst: list[tuple[float, int, int, int]] = []  # a heap: probability, index, label, answer

    @classmethod
    def of(cls, parts: Sequence[Gathered]) -> Gathered:
        """What the parts have gathered together."""
        if len(parts) == 1:
            return parts[0]
        whole = cls()
        for part in parts:
            whole._counts.update(part._counts)
        whole._worst = heapq.nlargest(MOST_MISTAKES, (each for part in parts for each in part._worst))
        return whole

    def see(self, scores: Tensor, labels: Tensor) -> None:
        """Take a batch's scores (N, classes) and labels (N,); of a batch that comes again, those of the last time."""
        self._last = scores.detach().cpu(), labels.cpu()  # what stays on the device may lie in a graph's memory

    def keep(self, batch: Batch, first: int) -> None:
        """Count the batch that was seen; `first` is the place of its first sample in the data set."""
        seen, self._last = self._last, None
        if seen is None:
            return
        scores, labels = seen
        sure, answers = scores.float().softmax(1).max(1)
        rows = list(zip(labels.tolist(), answers.tolist(), strict=True))
        self._counts.update(row for row in rows if 0 <= row[0] < scores.shape[1])  # else the loss ignores it
        if batch.skipped:  # which places the others have is not known
            return
        for place, (row, probability) in enumerate(zip(rows, sure.tolist(), strict=True), start=first):
            if row[0] != row[1] and 0 <= row[0] < scores.shape[1]:
                heapq.heappush(self._worst, (probability, place, *row))
                if len(self._worst) > MOST_MISTAKES:
                    heapq.heappop(self._worst)

    def answers(self) -> Answers | None:
        """What was gathered; None of a network that gives no scores by class."""
        worst = sorted(self._worst, reverse=True)
        mistakes = [Wrong(place, label, answer, probability) for probability, place, label, answer in worst]
        return Answers(dict(self._counts), mistakes) if self._counts else None
