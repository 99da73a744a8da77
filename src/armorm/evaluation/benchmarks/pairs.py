"""Preference pairs of any kind: how often the better response scores strictly higher.

In:  scores of items with two or more labelled responses.
Out: accuracy of each subset and of all pairs. A tie is wrong; so is a refused response (NaN).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from armorm.evaluation.examples import Item
from armorm.evaluation.metrics import Cells, Figure, by_group, mean_figure

RIGHT = "right"
ALL = "all pairs"


def strictly_right(better: np.ndarray, worse: np.ndarray) -> np.ndarray:
    """1.0 where the better response scores strictly higher, else 0.0, a tie and NaN included."""
    return (np.asarray(better, np.float64) > np.asarray(worse, np.float64)).astype(np.float64)


def measure(items: Sequence[Item], scores: Sequence[np.ndarray]) -> Cells:
    """`right` of every item, by subset and of all; the first response is the better one."""
    both = np.array([values[:2] for values in scores], np.float64).reshape(-1, 2)
    return _cells(items, strictly_right(both[:, 0], both[:, 1]))


def chance(items: Sequence[Item]) -> Cells:
    """What a random order of the responses comes to."""
    return _cells(items, np.full(len(items), 0.5))


def figures(cells: Cells) -> list[Figure]:
    """Accuracy of all pairs and of each named subset."""
    subsets = sorted({subset for subset, column in cells if column == RIGHT and subset not in ("", ALL)})
    return [
        mean_figure("overall", "accuracy", (ALL, RIGHT)),
        *(mean_figure("subsets", subset, (subset, RIGHT)) for subset in subsets),
    ]


def _cells(items: Sequence[Item], right: np.ndarray) -> Cells:
    return by_group([item.subset for item in items], RIGHT, right) | by_group([ALL] * len(items), RIGHT, right)
