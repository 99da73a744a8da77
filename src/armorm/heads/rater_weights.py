"""Weights of rows in stage 1 from the ratings of several people: a mean of raters who agree counts more.

Cell i is the mean of m_i ratings with sample standard deviation s_i. Rater j says f(x_i) + u_i + e_ij: u_i is what the
linear head cannot say about the response, of variance tau^2, and e_ij is the rater's own, of variance sigma_i^2. Around
f(x_i) the mean has the variance

    v_i = tau^2 + sigma_i^2 / m_i

and the best linear unbiased estimate weights squared errors by 1 / v_i (generalised least squares). tau^2 is a floor:
more or more unanimous raters make a rating at most as certain as the head can be about the response.

sigma_i^2 from two or three ratings is itself noise (three raters who happen to agree have s_i = 0), so it is shrunk to
the pooled variance of all cells, which a cell with one rater has alone:

    pooled = sum (m_i - 1) s_i^2 / sum (m_i - 1)
    sigma_i^2 = (nu pooled + (m_i - 1) s_i^2) / (nu + m_i - 1),      nu = 4 (a prior of five raters)

tau^2 is the mean squared error on held-out folds of the unweighted fit, minus the mean of sigma_i^2 / m_i, and at least
a fifth of that error. Weights have mean 1 over the rows of an objective, so penalties mean what they meant. An
objective without `ENOUGH` cells of several raters has no weights, nor has one whose cells all have the same variance.
"""

from __future__ import annotations

import numpy as np

PRIOR_RATERS = 4.0
LEAST_SHARE = 0.2  # of the held-out error that is not the raters'
ENOUGH = 20  # cells with several raters
_EQUAL = 1e-6


def rater_weights(
    raters: np.ndarray, spreads: np.ndarray, rated: np.ndarray, held_out_error: float
) -> np.ndarray | None:
    """Weights (n,) > 0 of the rows of one objective, 1 where it is not rated; None if it has none.

    Args:
        raters: (n,) number of raters.
        spreads: (n,) sample standard deviation between them, mapped scale; NaN for fewer than two.
        rated: (n,) bool.
        held_out_error: mean squared error of the unweighted fit, mapped scale.
    """
    several = rated & (raters > 1) & ~np.isnan(spreads)
    if several.sum() < ENOUGH:
        return None
    freedom = np.where(several, raters - 1.0, 0.0)
    squares = freedom * np.where(several, spreads, 0.0) ** 2
    pooled = squares.sum() / freedom.sum()
    own = (PRIOR_RATERS * pooled + squares) / (PRIOR_RATERS + freedom) / np.maximum(raters, 1)
    rest = max(held_out_error - float(own[rated].mean()), LEAST_SHARE * held_out_error)
    weights = np.where(rated, 1 / (rest + own), 1.0)
    weights[rated] /= weights[rated].mean()
    return None if np.ptp(weights[rated]) < _EQUAL else weights
