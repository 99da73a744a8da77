"""Which pairs are held out, and numbers by prompt and source.

In:  content keys of prompts, preference pairs.
Out: masks and indices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from armorm.data.preferences import PreferencePair

HELD_OUT_PAIRS = 0.1


def relative_margins(pairs: Sequence[PreferencePair]) -> np.ndarray:
    """Margin (p,) of each pair over the mean margin of its source, 0 where it has none: sources have scales of their
    own. A negative margin (the data says that rejected is better) counts as 0."""
    margins = np.array([max(pair.margin or 0.0, 0.0) for pair in pairs])
    for source in {pair.source for pair in pairs}:
        rows = np.array([pair.source == source for pair in pairs]) & (margins > 0)
        if rows.any():
            margins[rows] /= margins[rows].mean()
    return margins


def held_out_prompts(prompt_keys: Sequence[str], share: float) -> np.ndarray:
    """Mask of the pairs of some prompts, at least `share` of all pairs; the prompts' content decides which."""
    counts: dict[str, int] = {}
    for key in prompt_keys:
        counts[key] = counts.get(key, 0) + 1
    held: set[str] = set()
    taken = 0
    for key in sorted(counts, key=lambda key: key[8:]):
        if taken >= share * len(prompt_keys):
            break
        held.add(key)
        taken += counts[key]
    return np.array([key in held for key in prompt_keys], bool)


def group_index(keys: Sequence[str]) -> np.ndarray:
    """Number of each key, in order of appearance."""
    rows: dict[str, int] = {}
    return np.array([rows.setdefault(key, len(rows)) for key in keys], np.int64)
