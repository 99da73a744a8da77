"""Comparisons: every better response against every worse one of its item.

In:  items with their labels, the row of each response among the scored conversations.
Out: `Comparisons`: rows of better and worse responses, the item and weight of each.

A weight of one over the comparisons of its item lets every item count once, whether it compares two
responses or thirty-two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from armorm.evaluation.examples import Item


@dataclass(frozen=True)
class Comparisons:
    """Pairs of scored responses of which the label prefers the first.

    Attributes:
        better, worse: (p,) int64, rows of the scored conversations; -1 for a response that is no conversation.
        item: (p,) int64.
        weight: (p,) float64, summing to 1 over each item.
        items: number of items in all.
    """

    better: np.ndarray
    worse: np.ndarray
    item: np.ndarray
    weight: np.ndarray
    items: int

    @classmethod
    def of(cls, items: Sequence[Item], rows: Sequence[np.ndarray]) -> Comparisons:
        """All comparisons of items.

        Args:
            rows: of each item, the row of each response.
        """
        better, worse, item, weight = [], [], [], []
        for place, (entry, at) in enumerate(zip(items, rows, strict=True)):
            labels = np.asarray(entry.labels)
            if len(labels) != len(at):
                continue  # a rated row: its labels are objectives
            first, second = np.nonzero(labels[:, None] > labels[None, :])
            better.append(at[first])
            worse.append(at[second])
            item.append(np.full(len(first), place))
            weight.append(np.full(len(first), 1.0 / max(len(first), 1)))
        first, second, number = (np.concatenate([np.empty(0, np.int64), *parts]) for parts in (better, worse, item))
        return cls(first, second, number, np.concatenate([np.empty(0), *weight]), len(items))

    def __len__(self) -> int:
        return len(self.item)

    def take(self, chosen: np.ndarray) -> Comparisons:
        """Some of them, by mask or index, with their weights as they are."""
        return Comparisons(self.better[chosen], self.worse[chosen], self.item[chosen], self.weight[chosen], self.items)

    def difference(self, values: np.ndarray) -> np.ndarray:
        """Better minus worse (p, ...) of values (n, ...); NaN where one was refused."""
        padded = np.concatenate([values, np.full((1, *values.shape[1:]), np.nan)])  # row -1 is the last one
        return padded[self.better] - padded[self.worse]

    def accuracy(self, values: np.ndarray) -> float:
        """Weighted share in which the better one has strictly more; NaN without comparisons."""
        total = self.weight.sum()
        return float((self.weight * (self.difference(values) > 0)).sum() / total) if total else float("nan")

    def item_accuracy(self, values: np.ndarray) -> np.ndarray:
        """The same of each item, (items,); NaN for one without comparisons."""
        right = np.bincount(self.item, self.weight * (self.difference(values) > 0), self.items)
        total = np.bincount(self.item, self.weight, self.items)
        return np.divide(right, total, out=np.full(self.items, np.nan), where=total > 0)

    def closest(self, scores: np.ndarray) -> Comparisons:
        """Of each item the lowest better against the highest worse response, where both are scored."""
        margins = self.difference(scores)
        known = np.flatnonzero(~np.isnan(margins))
        order = known[np.lexsort((margins[known], self.item[known]))]
        first = np.unique(self.item[order], return_index=True)[1] if len(order) else np.empty(0, np.int64)
        chosen = self.take(order[first])
        return Comparisons(chosen.better, chosen.worse, chosen.item, np.ones(len(chosen)), self.items)
