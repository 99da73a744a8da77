"""Linear Bradley-Terry heads: a reward fitted to preference pairs.

    min_w  weighted mean of -log sigmoid((x_chosen - x_rejected)^T w) + penalty |w|^2

`fit_bradley_terry` is the usual reward model as a baseline: the penalty is chosen on held-out pairs, and features are
scaled to unit deviation first, with the scale folded into the weights.

`fit_preference_objective` is an objective of a model. Its penalty is chosen by cross-validation over folds of prompts,
which also give the weights fitted without each fold, for training the gate. The reward maps the 1st and 99th percentile
of w x over the training responses to 0 and 1; for the weights of a fold, over the responses of the other folds.
Features are divided by one number, so the penalty has the form that `Uncertainty` stores, and the covariance of w is
that of the Laplace approximation: (sum of c p (1 - p) D D^T + alpha I)^-1, with D the differences of features, p the
predicted probabilities and c the weights of the pairs, in which a prompt counts as a few pairs at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from scipy.optimize import minimize
from scipy.special import expit

from armorm.errors import FitError

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
OBJECTIVE_PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
MIN_PAIRS = 20
PERCENTILES = (1.0, 99.0)


@dataclass(frozen=True)
class PreferenceObjective:
    """An objective fitted to pairs; reward = x^T weight + bias.

    Attributes:
        weight, bias: (d,) float64, and a number, of the reward on the 0-1 scale.
        fold_weight, fold_bias: (folds, d) and (folds,), fitted without the pairs of each fold.
        low, high: w x at reward 0 and 1, in log-odds.
        penalty: the chosen one.
        losses: loss on held-out folds for each of `OBJECTIVE_PENALTIES`, nats; log 2 is chance.
        accuracy: weighted share of pairs that are right, out of fold.
        eigenvalues: (d,) descending, of the sum of c p (1 - p) D D^T.
        vectors: (d, d) its eigenvectors, one per row.
        center: (d,) mean response feature; a standard error is that of the difference from it.
        alpha: penalty in the same units.
    """

    weight: np.ndarray
    bias: float
    fold_weight: np.ndarray
    fold_bias: np.ndarray
    low: float
    high: float
    penalty: float
    losses: list[float]
    accuracy: float
    eigenvalues: np.ndarray
    vectors: np.ndarray
    center: np.ndarray
    alpha: float

    @property
    def r2(self) -> float:
        """McFadden's pseudo R^2 on held-out folds: 1 - loss / log 2."""
        return float(1 - min(self.losses) / np.log(2))


def fit_preference_objective(
    chosen: np.ndarray, rejected: np.ndarray, folds: np.ndarray, fold_count: int, weights: np.ndarray
) -> PreferenceObjective:
    """Fit an objective to pairs.

    Args:
        chosen, rejected: (p, d) response features.
        folds: (p,) int, fold of each pair's prompt, below `fold_count`.
        weights: (p,) > 0, what each pair counts.

    Raises:
        FitError: for fewer than `MIN_PAIRS` pairs, pairs of a single fold, or rewards that do not vary.
    """
    present = np.unique(folds)
    if len(chosen) < MIN_PAIRS or len(present) < 2:
        raise FitError(
            f"found {len(chosen)} pairs in {len(present)} folds of prompts, expected at least {MIN_PAIRS} in 2"
        )
    difference = chosen.astype(np.float64) - rejected
    size = float(np.sqrt(np.mean(difference**2))) or 1.0
    scaled, shares = difference / size, weights / weights.sum()
    solved = np.zeros((len(OBJECTIVE_PENALTIES), fold_count, difference.shape[1]))
    margins = np.zeros((len(OBJECTIVE_PENALTIES), len(scaled)))
    for fold in present:
        kept = folds != fold
        start = None
        for index in reversed(range(len(OBJECTIVE_PENALTIES))):  # from the largest penalty, each from the last solution
            start = _minimise(scaled[kept], OBJECTIVE_PENALTIES[index], weights[kept], start)
            solved[index, fold] = start
            margins[index, ~kept] = scaled[~kept] @ start
    losses = np.logaddexp(0, -margins) @ shares
    best = int(losses.argmin())
    full = _minimise(scaled, OBJECTIVE_PENALTIES[best], weights, solved[best, present[0]])
    absent = np.setdiff1d(np.arange(fold_count), present)
    solved[best, absent] = full  # no pair of these folds: the final weights never saw one
    sides, side_folds = np.concatenate([chosen, rejected]).astype(np.float64) / size, np.concatenate([folds, folds])
    low, high = _ends(sides @ full)
    fold_weight, fold_bias = np.zeros((fold_count, len(full))), np.zeros(fold_count)
    for fold in range(fold_count):
        least, most = _ends(sides[side_folds != fold] @ solved[best, fold])
        fold_weight[fold], fold_bias[fold] = solved[best, fold] / size / (most - least), -least / (most - least)
    probability = expit(scaled @ full)
    hessian = (difference * (weights * probability * (1 - probability))[:, None]).T @ difference
    values, vectors = scipy.linalg.eigh(hessian, driver="evd", check_finite=False)
    return PreferenceObjective(
        weight=full / size / (high - low),
        bias=-low / (high - low),
        fold_weight=fold_weight,
        fold_bias=fold_bias,
        low=low,
        high=high,
        penalty=OBJECTIVE_PENALTIES[best],
        losses=losses.tolist(),
        accuracy=float(shares[margins[best] > 0].sum()),
        eigenvalues=np.clip(values[::-1], 0.0, None),
        vectors=vectors[:, ::-1].T,
        center=sides.mean(0) * size,
        alpha=2 * float(weights.sum()) * OBJECTIVE_PENALTIES[best] * size**2,
    )


def _ends(rewards: np.ndarray) -> tuple[float, float]:
    low, high = (float(q) for q in np.percentile(rewards, PERCENTILES))
    if not low < high:
        raise FitError("the rewards fitted to the pairs do not vary over the training responses")
    return low, high


def fit_bradley_terry(chosen: np.ndarray, rejected: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Fit the weights of the baseline.

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


def _minimise(
    difference: np.ndarray, penalty: float, weights: np.ndarray | None = None, start: np.ndarray | None = None
) -> np.ndarray:
    shares = np.full(len(difference), 1 / len(difference)) if weights is None else weights / weights.sum()

    def loss(solution: np.ndarray) -> tuple[float, np.ndarray]:
        margins = difference @ solution
        value = shares @ np.logaddexp(0, -margins) + penalty * solution @ solution
        gradient = -((shares * expit(-margins)) @ difference) + 2 * penalty * solution
        return float(value), gradient

    first = np.zeros(difference.shape[1]) if start is None else start
    solution: np.ndarray = minimize(loss, first, jac=True, method="L-BFGS-B", options={"maxiter": 300}).x
    return solution
