"""Which responses to rate next: those that lower the variance of stage 1's predictions over a pool the most.

One objective, ridge with penalty alpha on rated rows with the Gram matrix G, A = G + alpha I. If ratings have noise
sigma^2 and the weights the prior variance sigma^2 / alpha, the posterior covariance of the weights is sigma^2 B,
B = A^-1, whatever the ratings are. Rating x as well changes it by a rank of one (Sherman-Morrison):

    B' = B - B x x^T B / (1 + h),       h = x^T B x      (the leverage of x as a new row)

so the variance sigma^2 sum_j x_j^T B x_j of the predictions over the pool falls by

    sigma^2 g,    g = sum_j (x_j^T B x)^2 / (1 + h) = x^T B M B x / (1 + h),    M = sum_j x_j x_j^T over the pool

(V-optimal design; active learning by variance reduction, Cohn et al., 1996). The candidate with the largest g is taken,
B is updated, and so on: with x^T B x and x^T B M B x updated along with B, a step costs d^2 + m d for m candidates. The
greedy choice carries no guarantee to be the best set. It differs from two simpler rules: large h alone takes outliers,
which tell little about the rest, and random choice takes the dense parts of the pool again and again. Measured:
`benchmarks/suggest.py`.

Candidates of one prompt share errors (a topic, a rater), which this model does not know. They are taken in turns: no
prompt gets a second candidate before every prompt has one.

With an intercept, x is relative to the mean of the rated rows and gets a last feature 1, whose entry of B is 1 / n.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from armorm.heads.leverage import about
from armorm.heads.statistics import Moments
from armorm.heads.uncertainty import Uncertainty


@dataclass(frozen=True)
class RidgePosterior:
    """Posterior of one objective's weights, in units of the noise sigma.

    Attributes:
        covariance: (q, q) float64, B; q = d, or d + 1 with an intercept.
        center: (d,) subtracted from features.
        intercept: whether a feature 1 is added.
    """

    covariance: np.ndarray
    center: np.ndarray
    intercept: bool

    @classmethod
    def of_moments(cls, moments: Moments, alpha: float, intercept: bool) -> RidgePosterior:
        """From the sums of the rated rows; exact."""
        d = len(moments.feature_sum)
        center = moments.feature_sum / moments.weight if intercept else np.zeros(d)
        inverse = np.linalg.inv(about(moments, center) + alpha * np.eye(d))
        return cls(_with_intercept(inverse, moments.weight if intercept else 0), center, intercept)

    @classmethod
    def of_uncertainty(cls, known: Uncertainty, column: int) -> RidgePosterior:
        """From the leading eigenvectors that a model stores; the rest of the spectrum is one number."""
        group = int(known.groups[column])
        basis, values = known.basis[group].astype(np.float64), known.eigenvalues[group].astype(np.float64)
        lengths = (basis**2).sum(1) > 0.5  # others pad the rank
        basis, values = basis[lengths], values[lengths]
        inside = (basis.T / (values + known.penalties[column])) @ basis
        inverse = inside + known.tail[column] * (np.eye(basis.shape[1]) - basis.T @ basis)
        rows = int(known.rows[group])
        return cls(_with_intercept(inverse, rows), known.center[group].astype(np.float64), rows > 0)

    @classmethod
    def without_ratings(cls, d: int, alpha: float) -> RidgePosterior:
        """Of an objective that nobody has rated."""
        return cls(np.eye(d) / alpha, np.zeros(d), False)

    def rows(self, features: np.ndarray) -> np.ndarray:
        """Features (n, d) as the covariance takes them: (n, q) float64."""
        centred = features.astype(np.float64) - self.center
        return np.column_stack([centred, np.ones(len(centred))]) if self.intercept else centred

    def leverage(self, features: np.ndarray) -> np.ndarray:
        """h (n,) of features (n, d)."""
        rows = self.rows(features)
        leverage: np.ndarray = np.einsum("nq,nq->n", rows @ self.covariance, rows)
        return leverage


@dataclass(frozen=True)
class Design:
    """Candidates in the order in which they are to be rated.

    Attributes:
        chosen: (n,) index of each.
        removed: (n,) share of the pool's variance that is gone once this one, and those before it, are rated.
        leverage: (n,) h of each when it was chosen.
    """

    chosen: np.ndarray
    removed: np.ndarray
    leverage: np.ndarray


def greedy_design(
    posterior: RidgePosterior, features: np.ndarray, count: int, prompts: np.ndarray | None = None
) -> Design:
    """Choose candidates one after the other, each for the largest fall in the variance over all of them.

    Args:
        features: (m, d) of the candidates, which are the pool.
        count: most to choose.
        prompts: (m,) int, prompt of each candidate, of which they are taken in turns; None takes any.
    """
    x = posterior.rows(features)
    covariance = posterior.covariance.copy()
    projected = x @ covariance
    leverage = np.einsum("nq,nq->n", projected, x)
    target = x.T @ x
    gain = np.einsum("nq,nq->n", projected @ target, projected)  # x^T B M B x
    total = float(leverage.sum())
    open_rows, taken = np.ones(len(x), bool), np.zeros(0, np.int64)
    if prompts is not None:
        _, prompts = np.unique(prompts, return_inverse=True)
        taken = np.zeros(int(prompts.max(initial=0)) + 1, np.int64)
    chosen, removed, at_choice = [], [], []
    for _ in range(min(count, len(x))):
        eligible = open_rows if prompts is None else _in_turn(open_rows, prompts, taken)
        fall = np.where(eligible, gain / (1 + leverage), -np.inf)
        best = int(fall.argmax())
        chosen.append(best)
        at_choice.append(leverage[best])
        # One update of B by the outer product of u, and of x^T B x and x^T B M B x with it.
        u = covariance @ x[best] / np.sqrt(1 + leverage[best])
        towards = target @ u
        spread = covariance @ towards
        along, across = x @ u, x @ spread
        gain += along * (float(u @ towards) * along - 2 * across)
        leverage = np.maximum(leverage - along**2, 0.0)
        covariance -= np.outer(u, u)
        removed.append(1 - float(leverage.sum()) / total if total > 0 else 0.0)
        open_rows[best] = False
        if prompts is not None:
            taken[prompts[best]] += 1
    return Design(np.array(chosen, np.int64), np.array(removed), np.array(at_choice))


def _in_turn(open_rows: np.ndarray, prompts: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Mask (m,) of the open rows whose prompt has been taken from the least."""
    fewest = taken[prompts[open_rows]].min()
    mask: np.ndarray = open_rows & (taken[prompts] == fewest)
    return mask


def _with_intercept(inverse: np.ndarray, rows: float) -> np.ndarray:
    if not rows:
        return inverse
    d = len(inverse)
    found = np.zeros((d + 1, d + 1))
    found[:d, :d], found[d, d] = inverse, 1 / rows
    return found
