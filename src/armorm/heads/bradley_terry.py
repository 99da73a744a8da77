"""Linear Bradley-Terry head: the reward model that is usually trained from preference pairs, as a baseline.

    min_w  mean of -log sigmoid((x_chosen - x_rejected)^T w) + penalty |w|^2

The penalty is chosen on held-out pairs. Features are scaled to unit deviation first, and the scale is folded into the
weights.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from armorm.errors import FitError

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)


def fit_bradley_terry(chosen: np.ndarray, rejected: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Fit the weights.

    Args:
        chosen, rejected: (p, d) response features.
        held_out: (p,) bool, pairs (of whole prompts) on which the penalty is chosen.

    Returns:
        weights (d,) float64, refitted on all pairs.

    Raises:
        FitError: if no pair is held out, or all are.
    """
    if held_out.all() or not held_out.any():
        raise FitError(f"{int(held_out.sum())} of {len(held_out)} pairs are held out, expected some but not all")
    difference = chosen.astype(np.float64) - rejected
    scale = np.sqrt(np.mean(difference**2, axis=0)).clip(1e-9)
    scaled = difference / scale
    losses = []
    for penalty in PENALTIES:
        weights = _minimise(scaled[~held_out], penalty)
        losses.append(np.logaddexp(0, -scaled[held_out] @ weights).mean())
    return _minimise(scaled, PENALTIES[int(np.argmin(losses))]) / scale


def _minimise(difference: np.ndarray, penalty: float) -> np.ndarray:
    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margins = difference @ weights
        value = np.logaddexp(0, -margins).mean() + penalty * weights @ weights
        gradient = -(expit(-margins) @ difference) / len(difference) + 2 * penalty * weights
        return float(value), gradient

    return minimize(loss, np.zeros(difference.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 300}).x
