"""Attribution: the score as an exact sum over objectives.

    coefficients  = gating_output @ T^T
    contributions = coefficients * rewards                      sum over k is the score
    relative      = coefficients * (rewards - reference mean)   signed, about zero for an average response

The deciding objectives of a preference are the smallest set without which it would not hold: the strongest for the
preferred response, until the remaining ones no longer favour it. A turning objective is one without which alone it
would not hold.
"""

from __future__ import annotations

import numpy as np


def coefficients(gating_output: np.ndarray, transform: np.ndarray) -> np.ndarray:
    """Weight of each objective's own (untransformed) reward in the score, (n, k)."""
    return gating_output @ transform.T


def contributions(coefficient: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """Share of each objective in the score, (n, k); the sum over k is exactly the score."""
    return coefficient * rewards


def relative(coefficient: np.ndarray, rewards: np.ndarray, reference_mean: np.ndarray) -> np.ndarray:
    """Contributions against a response of average rewards, (n, k)."""
    return coefficient * (rewards - reference_mean)


def deciding(differences: np.ndarray) -> np.ndarray:
    """Mask (p, k) of deciding objectives, from contributions (p, k) of one response minus the other's.

    The sum of a row is its margin; a row with margin 0 has none.
    """
    differences = np.atleast_2d(np.asarray(differences, np.float64))
    margin = differences.sum(1)
    support = differences * np.sign(margin)[:, None]
    order = np.argsort(-support, axis=1, kind="stable")
    ranked = np.take_along_axis(support, order, 1)
    before = np.abs(margin)[:, None] - (np.cumsum(ranked, 1) - ranked)  # margin without the stronger ones
    needed = (before > 0) & (ranked > 0)
    mask = np.zeros(differences.shape, bool)
    np.put_along_axis(mask, order, needed, 1)
    return mask


def turning(differences: np.ndarray) -> np.ndarray:
    """Mask (p, k) of the objectives without which alone a preference would not hold; arguments as of `deciding`."""
    differences = np.atleast_2d(np.asarray(differences, np.float64))
    margin = differences.sum(1, keepdims=True)
    mask: np.ndarray = (differences * np.sign(margin) >= np.abs(margin)) & (margin != 0)
    return mask
