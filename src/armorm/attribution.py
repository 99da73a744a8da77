"""Attribution: the score as an exact sum over objectives.

In:  rewards (n, k), gating output (n, k), transform T (k, k).
Out: coefficients, contributions and relative contributions, each (n, k).

    coefficients  = gating_output @ T^T
    contributions = coefficients * rewards                      sum over k is the score
    relative      = coefficients * (rewards - reference mean)   signed, about zero for an average response
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
