"""Quantile heads: a distribution of ratings per objective, around its reward (as in QRM, arXiv 2409.10164).

    q_tau(x) = reward(x) + a_tau + d_tau^T x,   min over (a, d) of E pinball_tau(r - q_tau(x)) + penalty |d_tau|^2

The reward itself, and so the score, does not change. With a large penalty every response has the same spread, and
infinity is one of the choices; the penalty is chosen by prompt folds. Quantiles of one response are sorted, which never
increases the pinball loss (Chernozhukov et al. 2010), so they do not cross.

Ratings have levels. A quantile of a few levels is one of them, and its loss is flat in between; so a rating is treated
as uniform over the cell of its level (half-way to its neighbours), which equals smoothing the pinball loss by a uniform
kernel of that width: convex, differentiable, without random jitter. A quantile then states how much of the cells is
below it, and coverage is counted so. Objectives with fewer than `MIN_LEVELS` levels (a yes or no is described by its
mean) have no quantiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from armorm.errors import FitError
from armorm.progress import progress

LEVELS = (0.025, 0.1, 0.25, 0.5, 0.75, 0.9, 0.975)
PENALTIES = (1e-3, 1e-2, 1e-1, float("inf"))
MIN_LEVELS = 5
MIN_RATINGS = 100
MOST_LEVELS = 50
_SMOOTHING = 0.05
_CONSTANT = 1e-6
_DENSITY_WIDTH = 0.1  # of the residuals' standard deviation
_ITERATIONS = 150


@dataclass(frozen=True)
class QuantileReport:
    """Result for one objective, on held-out folds of prompts.

    Attributes:
        objective: its name.
        ratings: rows rated.
        half_width: half of a level's cell, mapped scale.
        penalty: the chosen one; infinite if every response has the same spread.
        loss: mean pinball loss over the levels.
        constant_loss: the same with one spread for all responses.
        below: share of ratings below each quantile; equal to the levels if calibrated.
    """

    objective: str
    ratings: int
    half_width: float
    penalty: float
    loss: float
    constant_loss: float
    below: list[float]


@dataclass
class QuantileHead:
    """Fitted quantiles of j objectives at q levels.

    Attributes:
        objectives: (j,) names.
        columns: (j,) their columns among the k objectives.
        levels: (q,) ascending, between 0 and 1.
        weight: (j, q, d) float64, applied to plain features.
        bias: (j, q).
        reports: one per objective.
    """

    objectives: list[str]
    columns: np.ndarray
    levels: tuple[float, ...]
    weight: np.ndarray
    bias: np.ndarray
    reports: list[QuantileReport]

    def predict(self, features: np.ndarray, rewards: np.ndarray) -> np.ndarray:
        """Quantiles (n, j, q), ascending along the last axis.

        Args:
            features: (n, d).
            rewards: (n, k) of the same rows.
        """
        residual = np.einsum("nd,jqd->njq", features.astype(np.float64), self.weight, optimize=True) + self.bias
        return np.sort(rewards[:, self.columns, None] + residual, axis=2)


def fit_quantiles(
    features: np.ndarray,
    ratings: np.ndarray,
    rewards: np.ndarray,
    folds: np.ndarray,
    names: Sequence[str],
    *,
    levels: Sequence[float] = LEVELS,
    penalties: Sequence[float] = PENALTIES,
) -> QuantileHead:
    """Fit every objective with enough levels and ratings.

    Args:
        features: (n, d).
        ratings: (n, k) mapped ratings, NaN where missing.
        rewards: (n, k) predictions by weights fitted without the row's prompt, like rewards of new text.
        folds: (n,) fold of each row's prompt, for choosing penalties.
        names: (k,) objectives.
        levels: ascending, each between 0 and 1.

    Raises:
        FitError: for levels that are not ascending in (0, 1), or if no objective has enough levels and ratings.
    """
    levels = tuple(float(level) for level in levels)
    if not levels or not all(0 < a < b < 1 for a, b in zip((1e-12, *levels), (*levels, 1 - 1e-12), strict=True)):
        raise FitError(f"quantile levels {list(levels)}, expected ascending numbers between 0 and 1")
    columns = [column for column in range(len(names)) if has_quantiles(ratings[:, column])]
    if not columns:
        raise FitError(f"no objective has {MIN_LEVELS} levels and {MIN_RATINGS} ratings, expected at least one")
    d, q = features.shape[1], len(levels)
    weight, bias = np.zeros((len(columns), q, d)), np.zeros((len(columns), q))
    reports = []
    with progress("quantiles", len(columns), "objectives") as advance:
        for place, column in enumerate(columns):
            rows = np.flatnonzero(~np.isnan(ratings[:, column]))
            residuals = ratings[rows, column] - rewards[rows, column]
            half = half_width(ratings[rows, column])
            x = features[rows].astype(np.float64)
            weight[place], bias[place], report = _fit_one(
                x, residuals, half, folds[rows], np.array(levels), penalties, names[column]
            )
            reports.append(report)
            advance(1)
    return QuantileHead([names[c] for c in columns], np.array(columns), levels, weight, bias, reports)


def has_quantiles(ratings: np.ndarray) -> bool:
    """Whether ratings (n,), NaN where missing, have enough levels and rows for quantiles."""
    rated = ratings[~np.isnan(ratings)]
    return len(rated) >= MIN_RATINGS and len(np.unique(rated)) >= MIN_LEVELS


def half_width(ratings: np.ndarray) -> float:
    """Half of a level's cell; for ratings with many levels, a twentieth of their standard deviation."""
    levels = np.unique(np.round(ratings, 9))
    if len(levels) > MOST_LEVELS:
        return float(_SMOOTHING * ratings.std())
    return float(np.diff(levels).min() / 2)


def share_below(ratings: np.ndarray, quantiles: np.ndarray, half: float) -> np.ndarray:
    """Share of each rating's cell below a quantile, 0 to 1; arrays broadcast."""
    return np.clip((quantiles - ratings) / (2 * half) + 0.5, 0.0, 1.0)


def pinball(residual: np.ndarray, level: np.ndarray, half: float) -> np.ndarray:
    """Pinball loss of rating minus quantile, averaged over a cell of half-width `half`; arrays broadcast."""
    inside = residual**2 / (4 * half) + half / 4 + (level - 0.5) * residual
    outside = np.where(residual > 0, level * residual, (level - 1) * residual)
    return np.where(np.abs(residual) < half, inside, outside)


def _fit_one(
    x: np.ndarray,
    residuals: np.ndarray,
    half: float,
    folds: np.ndarray,
    levels: np.ndarray,
    penalties: Sequence[float],
    name: str,
) -> tuple[np.ndarray, np.ndarray, QuantileReport]:
    """Weights (q, d), biases (q,) and the report of one objective."""
    mean, deviation = x.mean(0), x.std(0)
    scale = np.where(deviation > _CONSTANT, deviation, np.inf)
    scaled = (x - mean) / scale
    predicted = np.empty((len(penalties), len(x), len(levels)))
    for fold in np.unique(folds):
        outside, inside = folds != fold, folds == fold
        variances, axes = _principal_axes(scaled[outside])
        rotated, new, start = scaled[outside] @ axes, scaled[inside] @ axes, None
        for index, penalty in enumerate(penalties):
            start = _minimise(rotated, variances, residuals[outside], half, levels, penalty, start)
            predicted[index, inside] = np.sort(new @ start[:, 1:].T + start[:, 0], axis=1)
    losses = [pinball(residuals[:, None] - part, levels, half).mean() for part in predicted]
    best = int(np.argmin(losses))
    variances, axes = _principal_axes(scaled)
    fitted = _minimise(scaled @ axes, variances, residuals, half, levels, penalties[best], None)
    constant = losses[-1] if np.isinf(penalties[-1]) else float("nan")
    report = QuantileReport(
        objective=name,
        ratings=len(x),
        half_width=half,
        penalty=float(penalties[best]),
        loss=float(losses[best]),
        constant_loss=float(constant),
        below=share_below(residuals[:, None], predicted[best], half).mean(0).tolist(),
    )
    weight = fitted[:, 1:] @ axes.T / scale
    return weight, fitted[:, 0] - weight @ mean, report


def _principal_axes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variances (d,) of centred features along orthonormal axes (d, d), which are the columns."""
    variances, axes = np.linalg.eigh(x.T @ x / len(x))
    return variances.clip(0), axes


def _minimise(
    x: np.ndarray,
    variances: np.ndarray,
    residuals: np.ndarray,
    half: float,
    levels: np.ndarray,
    penalty: float,
    start: np.ndarray | None,
) -> np.ndarray:
    """Coefficients (q, 1 + d), the intercept first and unpenalised.

    The Hessian of the loss is about the density of the residuals at the quantile times the variances, so L-BFGS runs on
    coefficients scaled by its root: on plain ones, correlated features take thousands of iterations.

    Args:
        x: (n, d) features along their principal axes, and their variances.
    """
    q, d = len(levels), len(variances)
    used = 0 if np.isinf(penalty) else d
    constant = np.quantile(residuals, levels)
    near = max(half, _DENSITY_WIDTH * float(residuals.std()))
    density = (1 + (np.abs(residuals[:, None] - constant) < near).sum(0)) / len(x) / (2 * near)
    scale = np.ones((q, 1 + used))
    scale[:, 0] = 1 / np.sqrt(density)
    first = np.zeros((q, 1 + used))
    first[:, 0] = constant
    if used:
        scale[:, 1:] = 1 / np.sqrt(density[:, None] * variances + 2 * penalty)
        first = first if start is None else start

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        values = flat.reshape(scale.shape) * scale
        quantiles = values[:, 0] + (x @ values[:, 1:].T if used else 0.0)
        residual = residuals[:, None] - quantiles
        # The derivative of the smoothed loss by the quantile is the share of the cell below it, minus the level.
        slope = (np.clip(0.5 - residual / (2 * half), 0.0, 1.0) - levels) / len(x)
        gradient = np.empty_like(values)
        gradient[:, 0] = slope.sum(0)
        total = pinball(residual, levels, half).sum() / len(x)
        if used:
            gradient[:, 1:] = slope.T @ x + 2 * penalty * values[:, 1:]
            total += penalty * (values[:, 1:] ** 2).sum()
        return float(total), (gradient * scale).ravel()

    options = {"maxiter": _ITERATIONS, "ftol": 1e-9, "gtol": 1e-7}
    found = minimize(loss, (first / scale).ravel(), jac=True, method="L-BFGS-B", options=options)
    return np.hstack([found.x.reshape(scale.shape) * scale, np.zeros((q, d - used))])
