"""Weights of preference pairs: what each set, each prompt and each pair counts.

    w = weight of its set * capped(prompt) * balance(set),   capped = min(1, prompt_cap / number of pairs of the prompt)

so a prompt with 300 pairs counts as at most `prompt_cap`. With m_s the sum of `capped` over a set, the pairs of a set
together count m_s (`size`), sqrt(m_s) (`root`) or equally (`equal`), up to a common factor that keeps the sum over all
sets. `root` is the compromise that is usual for data sets of different sizes: a set with a hundred times as many pairs
counts ten times as much, so it neither drowns the others nor is ignored.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from armorm.heads.calibration import prompt_capped

Balance = Literal["size", "root", "equal"]
_POWERS: dict[Balance, float] = {"size": 0.0, "root": 0.5, "equal": 1.0}


def pair_weights(
    set_weights: np.ndarray,
    prompts: np.ndarray,
    sources: np.ndarray,
    prompt_cap: float | None,
    balance: Balance = "root",
) -> np.ndarray:
    """Weights (p,) > 0.

    Args:
        set_weights: (p,) > 0, the given weight of each pair's set.
        prompts: (p,) code of each pair's prompt, one for all near-duplicates.
        sources: (p,) code or name of each pair's set.
        prompt_cap: most pairs that a prompt counts as, >= 1; None for no limit.
    """
    capped = prompt_capped(np.ones(len(prompts)), prompts, prompt_cap)
    _, index = np.unique(sources, return_inverse=True)
    sizes = np.bincount(index.ravel(), capped)
    factors = sizes ** -_POWERS[balance]
    factors *= sizes.sum() / (factors * sizes).sum()
    return set_weights * capped * factors[index.ravel()]
