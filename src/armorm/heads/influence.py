"""Leaving out rated rows: the exact change of a ridge head, in closed form, without fitting it again.

One objective, rated on n rows x_i (d,) with ratings r_i, penalty alpha, G = X^T X, A = G + alpha I, w = A^-1 X^T r
(`armorm.heads.regression`). With an intercept x is relative to the mean of the rows and 1/n is added to every product
below, which is the same as a constant feature without penalty. For rows i, l and any response x:

    c_il = x_i^T A^-1 x_l      h_i = c_ii      e_i = r_i - prediction      c_x = (x_i^T A^-1 x)_i

Without a set C of rows (penalty, scale of the ratings and start held), by the Woodbury identity:

    reward of x, with minus without C:     c_xC^T (I - H_C)^-1 e_C,      H_C = (c_il), i, l in C
    for one row:                           c_xi e_i / (1 - h_i)
    error of row i by all others:          e_i / (1 - h_i)               (leave-one-out residual)

Above 0 the rows raise the reward. For more rows than features the same sum is solved in d dimensions:
(I - P D P^T)^-1 = I + P (D^-1 - P^T P)^-1 P^T. The penalty keeps 1 - h_i > 0; only an intercept whose rows are all
left out is undefined. Where the fit weights squared errors by row, x_i and e_i are times the root of the weight.

**Standard deviations.** If the errors of ratings have the variance sigma^2, the leave-one-out residual has
sigma^2 (1 + h_i / (1 - h_i)) = sigma^2 / (1 - h_i) (exact without penalty, slightly too large with one), so
e_i / (sigma sqrt(1 - h_i)) is in standard deviations; sigma^2 is the sum of squares of the leave-one-out residuals
divided by the sum of 1 / (1 - h_i).

G is decomposed once (d^3); a row then costs d^2, whatever the number of objectives that are rated on the same rows, and
no matrix is larger than (d, d).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg

from armorm.heads.leverage import about
from armorm.heads.regression import RidgePath
from armorm.heads.statistics import Moments


@dataclass(frozen=True)
class FittedRidge:
    """Ridge heads of j objectives that are rated on the same rows, ready to leave rows out.

    Attributes:
        weight, bias: (j, d) and (j,) float64, solved anew from the sums, so not rounded as the served ones are.
        center: (d,) mean of the rows; zero without an intercept.
        vectors: (d, d) eigenvectors of the Gram matrix about the center, one per column.
        inverse: (d, j) 1 / (eigenvalue + alpha), or (d + 1, j) with 1/n last for an intercept.
    """

    weight: np.ndarray
    bias: np.ndarray
    center: np.ndarray
    vectors: np.ndarray
    inverse: np.ndarray
    intercept: bool

    @classmethod
    def of(cls, moments: Moments, penalties: np.ndarray, intercept: bool) -> FittedRidge:
        """From the sums of all rows; penalties (j,) > 0."""
        center = moments.feature_sum / moments.weight if intercept else np.zeros(len(moments.feature_sum))
        mean = moments.rating_sum / moments.weight if intercept else np.zeros(len(moments.rating_sum))
        values, vectors = scipy.linalg.eigh(about(moments, center), driver="evd", check_finite=False)
        inverse = 1 / (np.clip(values, 0.0, None)[:, None] + penalties)
        cross = moments.cross - moments.weight * np.outer(center, mean)
        weight = (vectors @ (inverse * (vectors.T @ cross))).T
        if intercept:
            inverse = np.vstack([inverse, np.full(len(penalties), 1 / moments.weight)])
        return cls(weight, mean - weight @ center, center, vectors, inverse, intercept)

    def rotated(self, features: np.ndarray) -> np.ndarray:
        """Features (B, d) along the eigenvectors: P (B, d) float64, or (B, d + 1) with an intercept; all products of
        rows are P (D P^T), D = `inverse` of an objective."""
        found = (features.astype(np.float64) - self.center) @ self.vectors
        return np.column_stack([found, np.ones(len(found))]) if self.intercept else found

    def leverage(self, rotated: np.ndarray) -> np.ndarray:
        """h (B, j), 0 to 1, of rotated rows."""
        leverage: np.ndarray = rotated**2 @ self.inverse
        return leverage

    def residuals(self, features: np.ndarray, ratings: np.ndarray) -> np.ndarray:
        """e (B, j) of features (B, d) and mapped ratings (B, j)."""
        return ratings - features.astype(np.float64) @ self.weight.T - self.bias

    def products(self, rotated: np.ndarray, response: np.ndarray) -> np.ndarray:
        """c_x (B, j) of rotated rows and one rotated response (d,) or (d + 1,)."""
        products: np.ndarray = rotated @ (response[:, None] * self.inverse)
        return products


def effect_of_rows(rotated: np.ndarray, inverse: np.ndarray, residuals: np.ndarray, products: np.ndarray) -> float:
    """Reward of a response with, minus without, c rows together, for one objective.

    Args:
        rotated: (c, q) rows, of `FittedRidge.rotated`.
        inverse: (q,) the objective's column of `FittedRidge.inverse`.
        residuals, products: (c,) of the rows.
    """
    count, size = rotated.shape
    if count <= size:
        kept = np.eye(count) - (rotated * inverse) @ rotated.T
        return float(products @ scipy.linalg.solve(kept, residuals, assume_a="sym"))
    kept = np.diag(1 / inverse) - rotated.T @ rotated
    solved = scipy.linalg.solve(kept, rotated.T @ residuals, assume_a="sym")
    return float(products @ (residuals + rotated @ solved))


def reward_of_rest(rest: Moments, penalty: float, intercept: bool, response: np.ndarray) -> float:
    """Reward of a response (d,) by the head of one objective that is fitted to other rows; NaN for an intercept without
    rows."""
    if rest.count == 0:
        return np.nan if intercept else 0.0
    weight, bias = RidgePath(rest, intercept).solve(np.array([penalty]))
    return float(weight[0] @ response + bias[0])


def noise(left_out: np.ndarray, leverage: np.ndarray) -> np.ndarray:
    """sigma (j,) of leave-one-out residuals (n, j) and leverage (n, j)."""
    deviation: np.ndarray = np.sqrt((left_out**2).sum(0) / (1 / (1 - leverage)).sum(0))
    return deviation
