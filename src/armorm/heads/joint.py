"""Joint training of the regression heads on absolute ratings and preference pairs, from cached features.

    min_W  sum_j (|X w_j - r_j|^2 + alpha_j |w_j|^2) / (n_j Var r_j)  +  beta * weighted mean_p -log sigmoid(m_p)
    m_p  = sum_j c_pj w_j^T (x_chosen - x_rejected)

The first term is stage 1 (each objective's error as a share of its variance), the second the Bradley-Terry loss of the
score with a fixed gate, so the problem is convex, and beta = 0 is stage 1 itself. `beta` is the price of a nat of pair
loss in units of R^2.

The first term is a quadratic around stage 1's solution. With its Hessian H_j = L_j L_j^T and u_j = L_j^T (w_j - w_j0)
it is |u|^2: L-BFGS on u is well conditioned for any features, and ratings enter only by stage 1's solution. Beta is
chosen by the pair loss on held-out folds of prompts, among those that reduce the mean held-out R^2 by at most
`R2_PRICE`: a reward that no longer predicts ratings explains nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.linalg import cholesky, solve_triangular
from scipy.optimize import minimize
from scipy.special import expit

from armorm.errors import FitError
from armorm.heads.accumulation import accumulate, blocks_of
from armorm.heads.regression import RegressionHead
from armorm.heads.statistics import Moments, RatingStatistics
from armorm.progress import progress

PAIR_WEIGHTS = (0.0, 0.1, 0.3, 1.0, 3.0)
R2_PRICE = 0.02
_ITERATIONS = 100
_BLOCK = 8192


@dataclass(frozen=True)
class JointPairs:
    """Preference pairs as the heads see them.

    Attributes:
        differences: (p, d) response features of chosen minus rejected.
        coefficients: (p, k) of the rewards in the score: gating output times transform.
        folds: (p,) fold of each pair's prompt.
        weights: (p,) > 0 in the mean over pairs; None for equal weights.
    """

    differences: np.ndarray
    coefficients: np.ndarray
    folds: np.ndarray
    weights: np.ndarray | None = None

    @property
    def shares(self) -> np.ndarray:
        """(p,) weights that sum to 1."""
        weights = np.ones(len(self.folds)) if self.weights is None else self.weights
        return weights / weights.sum()

    def margins(self, weight: np.ndarray) -> np.ndarray:
        """Score differences (p,) under weights (k, d)."""
        return np.einsum("pk,pk->p", self.differences @ weight.T, self.coefficients)

    def take(self, rows: np.ndarray) -> JointPairs:
        weights = None if self.weights is None else self.weights[rows]
        return JointPairs(self.differences[rows], self.coefficients[rows], self.folds[rows], weights)


@dataclass(frozen=True)
class JointReport:
    """Result of joint training, on held-out folds of prompts.

    Attributes:
        pair_weight: the chosen beta.
        pair_weights, losses, accuracies: every beta, its pair loss (nats) and pair accuracy, weighted means with the
            same gate.
        mean_r2: mean R^2 over objectives for each beta.
        r2_before, r2_after: (k,) R^2 of stage 1, and at the chosen beta.
    """

    pair_weight: float
    pair_weights: list[float]
    losses: list[float]
    accuracies: list[float]
    mean_r2: list[float]
    r2_before: list[float]
    r2_after: list[float]


def fit_joint(
    head: RegressionHead,
    features: np.ndarray,
    ratings: np.ndarray,
    folds: np.ndarray,
    pairs: JointPairs,
    *,
    pair_weights: Sequence[float] = PAIR_WEIGHTS,
    intercept: bool = False,
    weights: Mapping[str, float] | None = None,
    r2_price: float = R2_PRICE,
) -> tuple[RegressionHead, JointReport]:
    """Train the heads on ratings and pairs.

    Args:
        head: stage 1's, fitted on the same rows and folds.
        features: (n, d).
        ratings: (n, k) mapped ratings, NaN where missing.
        folds: (n,) fold of each row's prompt.
        pair_weights: betas to choose from; 0, stage 1 itself, is always included.
        intercept: whether stage 1 had one; it follows the weights.
        weights: of objectives against their penalties, as in stage 1.
        r2_price: largest decrease of the mean held-out R^2.

    Returns:
        the head, with `fold_weight` fitted without ratings and pairs of the fold; and the report.

    Raises:
        FitError: for pairs without a fold, or all in one.
    """
    fold_count = len(head.fold_weight)
    if len(pairs.folds) == 0 or pairs.folds.min() < 0 or pairs.folds.max() >= fold_count:
        raise FitError(f"pairs have folds outside 0..{fold_count - 1}, expected those of the ratings")
    if len(np.unique(pairs.folds)) < 2:
        raise FitError("all pairs are in one fold of prompts, expected some to hold out")
    grid = sorted({0.0, *map(float, pair_weights)})
    alphas = np.array([report.alpha / (weights or {}).get(report.objective, 1.0) for report in head.reports])
    blocks, names = blocks_of(features, ratings, folds), [report.objective for report in head.reports]
    statistics = accumulate(blocks, names, fold_count, features.shape[1], precision="float64")
    curvature = _Curvature(statistics, alphas, intercept)
    pairs = replace(pairs, differences=pairs.differences.astype(np.float32))
    k, d = head.weight.shape
    fold_weights = np.empty((len(grid), fold_count, k, d))
    fold_bias = np.empty((len(grid), fold_count, k))
    margins = np.empty((len(grid), len(pairs.folds)))
    with progress("joint heads", (fold_count + 1) * (len(grid) - 1), "fits") as advance:
        for fold in range(fold_count):
            outside, inside = np.flatnonzero(pairs.folds != fold), np.flatnonzero(pairs.folds == fold)
            problem = _Problem(head.fold_weight[fold], curvature.factors(fold), pairs.take(outside))
            moved = np.zeros((k, d))
            for index, beta in enumerate(grid):
                if beta:
                    moved = problem.solve(beta, moved)
                    advance(1)
                fold_weights[index, fold] = problem.weight(moved)
                fold_bias[index, fold] = curvature.bias(
                    head.fold_bias[fold], fold_weights[index, fold] - head.fold_weight[fold], fold
                )
                margins[index, inside] = pairs.take(inside).margins(fold_weights[index, fold])
        losses = np.logaddexp(0, -margins) @ pairs.shares
        r2 = np.array(
            [_held_out_r2(features, ratings, folds, w, b) for w, b in zip(fold_weights, fold_bias, strict=True)]
        )
        allowed = np.flatnonzero(r2.mean(1) >= r2[0].mean() - r2_price)
        best = int(allowed[losses[allowed].argmin()])
        weight = head.weight
        if grid[best]:
            problem = _Problem(head.weight, curvature.factors(None), pairs)
            weight = problem.weight(problem.solve(grid[best], np.zeros((k, d))))
            advance(len(grid) - 1)
    joint = replace(
        head,
        weight=weight,
        bias=curvature.bias(head.bias, weight - head.weight, None),
        fold_weight=fold_weights[best],
        fold_bias=fold_bias[best],
    )
    return joint, JointReport(
        pair_weight=grid[best],
        pair_weights=grid,
        losses=losses.tolist(),
        accuracies=((margins > 0) @ pairs.shares).tolist(),
        mean_r2=r2.mean(1).tolist(),
        r2_before=r2[0].tolist(),
        r2_after=r2[best].tolist(),
    )


class _Curvature:
    """Hessians of stage 1's loss: (X^T X + alpha I) / (n Var r) of each objective, over all rows or all but a fold."""

    def __init__(self, statistics: RatingStatistics, alphas: np.ndarray, intercept: bool) -> None:
        self._statistics, self._alphas, self._intercept = statistics, alphas, intercept

    def factors(self, without: int | None) -> np.ndarray:
        """Lower Cholesky factors (k, d, d) of the Hessians of all rows except those of a fold."""
        k, d = len(self._alphas), self._statistics.hidden_size
        factors = np.empty((k, d, d))
        for columns, total in self._totals(without):
            gram, count = total.gram, total.weight
            if self._intercept:
                gram = gram - np.outer(total.feature_sum, total.feature_sum) / count
            variances = np.diagonal(total.rating_products) / count - (total.rating_sum / count) ** 2
            for column, variance in zip(columns, variances, strict=True):
                hessian = (gram + self._alphas[column] * np.eye(d)) / (count * variance)
                factors[column] = cholesky(hessian, lower=True)
        return factors

    def bias(self, bias: np.ndarray, moved: np.ndarray, without: int | None) -> np.ndarray:
        """Intercepts (k,) for weights moved by (k, d)."""
        if not self._intercept:
            return bias
        bias = bias.copy()
        for columns, total in self._totals(without):
            bias[columns] -= moved[columns] @ (total.feature_sum / total.weight)
        return bias

    def _totals(self, without: int | None) -> Iterator[tuple[list[int], Moments]]:
        """Sums of each set of objectives that are rated on the same rows."""
        for columns in self._statistics.row_sets():
            folds = (fold for fold in range(self._statistics.folds) if fold != without)
            total = Moments.zero(self._statistics.hidden_size, len(columns))
            for fold in folds:
                total += self._statistics.moments(columns, fold)
            yield columns, total


class _Problem:
    """The joint loss in coordinates in which stage 1's loss is a sum of squares."""

    def __init__(self, start: np.ndarray, factors: np.ndarray, pairs: JointPairs) -> None:
        self._start, self._factors, self._pairs = start, factors, pairs
        self._coefficients = pairs.coefficients.astype(np.float32)
        self._margins, self._shares = pairs.margins(start).astype(np.float64), pairs.shares

    def weight(self, moved: np.ndarray) -> np.ndarray:
        """Weights (k, d) of coordinates (k, d)."""
        return self._start + np.stack(
            [solve_triangular(f, u, lower=True, trans="T") for f, u in zip(self._factors, moved, strict=True)]
        )

    def loss(self, flat: np.ndarray, beta: float) -> tuple[float, np.ndarray]:
        moved = flat.reshape(self._start.shape)
        step = (self.weight(moved) - self._start).astype(np.float32)
        margins = self._margins + np.einsum("pk,pk->p", self._pairs.differences @ step.T, self._coefficients)
        value = float((moved**2).sum() + beta * self._shares @ np.logaddexp(0, -margins))
        slope = (-beta * self._shares * expit(-margins)).astype(np.float32)
        towards = ((slope[:, None] * self._coefficients).T @ self._pairs.differences).astype(np.float64)
        gradient = 2 * moved + np.stack(
            [solve_triangular(f, g, lower=True) for f, g in zip(self._factors, towards, strict=True)]
        )
        return value, gradient.ravel()

    def solve(self, beta: float, moved: np.ndarray) -> np.ndarray:
        """Coordinates (k, d) of the minimum, from a start."""
        options = {"maxiter": _ITERATIONS, "ftol": 1e-10, "gtol": 1e-7}
        found = minimize(self.loss, moved.ravel(), args=(beta,), jac=True, method="L-BFGS-B", options=options)
        return found.x.reshape(self._start.shape)


def _held_out_r2(
    features: np.ndarray, ratings: np.ndarray, folds: np.ndarray, weight: np.ndarray, bias: np.ndarray
) -> np.ndarray:
    """R^2 (k,) of fold weights (folds, k, d) on the rows of their own fold."""
    squares = np.zeros(ratings.shape[1])
    for fold in range(len(weight)):
        rows = np.flatnonzero(folds == fold)
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            error = features[block].astype(np.float64) @ weight[fold].T + bias[fold] - ratings[block]
            squares += np.nansum(error**2, axis=0)
    return 1 - squares / (~np.isnan(ratings)).sum(0) / np.nanvar(ratings, axis=0)
