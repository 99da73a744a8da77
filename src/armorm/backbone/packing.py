"""Batches: which conversations go through the backbone together.

In:  token lengths.
Out: batches of indices, each at most `budget` tokens with its padding counted.

Conversations are sorted by length and cut into batches, so neighbours in a batch are of nearly one
length; the padding left is a few percent on real data. The longest batch comes first: if memory does
not suffice, that shows at once. The plan depends on the lengths alone, so it is the same on every run.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def length_sorted_batches(lengths: Sequence[int] | np.ndarray, budget: int) -> list[np.ndarray]:
    """Cut conversations into batches of similar length.

    Args:
        lengths: (n,) tokens of each conversation.
        budget: most tokens of a batch, rows times its longest length; a longer conversation stands alone.

    Returns:
        Index arrays that together hold each of 0..n-1 once, longest first.
    """
    lengths = np.asarray(lengths, np.int64)
    order = np.argsort(-lengths, kind="stable")
    batches: list[np.ndarray] = []
    start = 0
    while start < len(order):
        rows = max(1, budget // max(1, int(lengths[order[start]])))
        batches.append(order[start : start + rows])
        start += rows
    return batches


def padding_share(lengths: Sequence[int] | np.ndarray, batches: Sequence[np.ndarray]) -> float:
    """Share of computed tokens that are padding, 0 to 1."""
    lengths = np.asarray(lengths, np.int64)
    computed = sum(int(lengths[batch].max()) * len(batch) for batch in batches)
    return 1.0 - float(lengths.sum()) / computed if computed else 0.0
