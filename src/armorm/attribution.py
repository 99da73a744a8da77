"""Attribution: the score as an exact sum over objectives.

In:  rewards (n, k), gating output (n, k), transform T (k, k).
Out: coefficients, contributions and relative contributions, each (n, k).

    coefficients  = gating_output @ T^T
    contributions = coefficients * rewards                      sum over k is the score
    relative      = coefficients * (rewards - reference mean)   signed, about zero for an average response

What decides a preference is the smallest set of objectives without which it would not hold: those that
speak most for the preferred response, until what is left no longer favours it.
"""

from __future__ import annotations

import numpy as np


def coefficients(gating_output: np.ndarray, transform: np.ndarray) -> np.ndarray:
    """Weight of each objective's own (untransformed) reward in the score, (n, k)."""
    return gating_output @ transform.T


def contributions(coefficient: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """Share of each objective in the score, (n, k); the sum over k is the score exactly."""
    return coefficient * rewards


def relative(coefficient: np.ndarray, rewards: np.ndarray, reference_mean: np.ndarray) -> np.ndarray:
    """Contributions against a response of average rewards, (n, k)."""
    return coefficient * (rewards - reference_mean)


def deciding(differences: np.ndarray) -> np.ndarray:
    """Mask (p, k) of the objectives that decide, of contributions (p, k) of one response minus the other's.

    Each row's sum is its margin. A row whose margin is 0 is decided by none.
    """
    differences = np.atleast_2d(np.asarray(differences, np.float64))
    margin = differences.sum(1)
    support = differences * np.sign(margin)[:, None]
    order = np.argsort(-support, axis=1, kind="stable")
    ranked = np.take_along_axis(support, order, 1)
    before = np.abs(margin)[:, None] - (np.cumsum(ranked, 1) - ranked)  # what is left when those above are gone
    needed = (before > 0) & (ranked > 0)
    mask = np.zeros(differences.shape, bool)
    np.put_along_axis(mask, order, needed, 1)
    return mask
