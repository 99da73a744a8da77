"""Correlation of two vectors, Pearson and Spearman (0 if one is constant), overall or within groups of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from scipy.stats import rankdata

Metric = Literal["spearman", "pearson"]


def correlation(metric: Metric) -> Callable[[np.ndarray, np.ndarray], float]:
    """The function of a metric."""
    return spearman if metric == "spearman" else pearson


def pearson(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson correlation of two vectors (n,), -1 to 1; 0 if one is constant."""
    first, second = first - first.mean(), second - second.mean()
    norm = np.sqrt((first @ first) * (second @ second))
    return float(first @ second / norm) if norm > 0 else 0.0


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman rank correlation of two vectors (n,), ties at their mean rank; 0 if one is constant."""
    return pearson(rankdata(first), rankdata(second))


def within_groups(values: np.ndarray, groups: np.ndarray | Sequence[int]) -> np.ndarray:
    """Rows (n', k) of the groups with more than one row, each minus the mean of its group.

    Args:
        values: (n, k).
        groups: (n,) labels, such as prompts.
    """
    _, index, counts = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), values.shape[1]))
    np.add.at(sums, index, values)
    return (values - (sums / counts[:, None])[index])[counts[index] > 1]
