"""Quantile heads: a distribution per objective, around its reward (as QRM has it), from cached features.

In:  features (n, d), mapped ratings (n, k), the rewards (n, k) of rows by weights that never saw their prompt.
Out: `QuantileHead`: for each objective with enough levels, linear quantiles of what the reward leaves open.

    q_tau(x) = reward(x) + a_tau + d_tau^T x,   min over (a, d) of E pinball_tau(r - q_tau(x)) + penalty |d_tau|^2

The reward itself, and with it the score, is untouched. A large penalty gives every response the same spread, and
infinite is one of the choices; the penalty is chosen by prompt folds. Quantiles of one response are sorted, which
never raises the pinball loss (Chernozhukov et al. 2010), so they do not cross.

Ratings come in levels. A quantile of a few levels is one of them, and its loss is flat between; so a rating is
taken as spread evenly over its level's cell (half-way to its neighbours), which is the same as smoothing the pinball
loss by a uniform kernel of that width: convex, differentiable, no random jitter. A quantile then says how much of
the cells lies below it, and coverage is counted so. Objectives of fewer than `MIN_LEVELS` levels (a yes or no is
described by its mean) have no quantiles.
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
_ITERATIONS = 150


@dataclass(frozen=True)
class QuantileReport:
    """What was found for one objective, on held-out folds of prompts.

    Attributes:
        objective: its name.
        ratings: rows rated.
        half_width: half of a level's cell, mapped scale.
        penalty: the chosen one; infinite where every response has the same spread.
        loss: mean pinball loss over the levels.
        constant_loss: the same with one spread for all responses.
        below: share of ratings below each quantile; the levels themselves where calibrated.
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
        reports: one an objective.
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
    """Fit every objective that has levels and ratings enough.

    Args:
        features: (n, d).
        ratings: (n, k) mapped ratings, NaN where missing.
        rewards: (n, k) predictions by weights that never saw the row's prompt, as rewards of new text are.
        folds: (n,) fold of each row's prompt, on which penalties are chosen.
        names: (k,) objectives.
        levels: ascending, each between 0 and 1.

    Raises:
        FitError: for levels that are not ascending in (0, 1), or where no objective has levels and ratings enough.
    """
    levels = tuple(float(level) for level in levels)
    if not levels or not all(0 < a < b < 1 for a, b in zip((1e-12, *levels), (*levels, 1 - 1e-12), strict=True)):
        raise FitError(f"quantile levels {list(levels)}, expected ascending numbers between 0 and 1")
    columns = [column for column in range(len(names)) if has_quantiles(ratings[:, column])]
    if not columns:
        raise FitError(
            f"no objective has {MIN_LEVELS} levels and {MIN_RATINGS} ratings, expected one to fit quantiles of"
        )
    d, q = features.shape[1], len(levels)
    weight, bias = np.zeros((len(columns), q, d)), np.zeros((len(columns), q))
    reports = []
    with progress("quantiles", len(columns), "objectives") as advance:
        for place, column in enumerate(columns):
            rows = np.flatnonzero(~np.isnan(ratings[:, column]))
            open_part = ratings[rows, column] - rewards[rows, column]
            half = half_width(ratings[rows, column])
            x = features[rows].astype(np.float64)
            weight[place], bias[place], report = _fit_one(
                x, open_part, half, folds[rows], np.array(levels), penalties, names[column]
            )
            reports.append(report)
            advance(1)
    return QuantileHead([names[c] for c in columns], np.array(columns), levels, weight, bias, reports)


def has_quantiles(ratings: np.ndarray) -> bool:
    """Whether ratings (n,), NaN where missing, have levels and rows enough for quantiles."""
    rated = ratings[~np.isnan(ratings)]
    return len(rated) >= MIN_RATINGS and len(np.unique(rated)) >= MIN_LEVELS


def half_width(ratings: np.ndarray) -> float:
    """Half of a level's cell; of ratings with many levels, a twentieth of their standard deviation, for smoothness."""
    levels = np.unique(np.round(ratings, 9))
    if len(levels) > MOST_LEVELS:
        return float(_SMOOTHING * ratings.std())
    return float(np.diff(levels).min() / 2)


def share_below(ratings: np.ndarray, quantiles: np.ndarray, half: float) -> np.ndarray:
    """How much of each rating's cell lies below a quantile, 0 to 1; arrays broadcast."""
    return np.clip((quantiles - ratings) / (2 * half) + 0.5, 0.0, 1.0)


def pinball(residual: np.ndarray, level: np.ndarray, half: float) -> np.ndarray:
    """Pinball loss of rating minus quantile, its mean over a cell of half-width `half`; arrays broadcast."""
    inside = residual**2 / (4 * half) + half / 4 + (level - 0.5) * residual
    outside = np.where(residual > 0, level * residual, (level - 1) * residual)
    return np.where(np.abs(residual) < half, inside, outside)


def _fit_one(
    x: np.ndarray,
    open_part: np.ndarray,
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
        start = None
        for index, penalty in enumerate(penalties):
            start = _minimise(scaled[outside], open_part[outside], half, levels, penalty, start)
            predicted[index, inside] = np.sort(scaled[inside] @ start[:, 1:].T + start[:, 0], axis=1)
    losses = [pinball(open_part[:, None] - part, levels, half).mean() for part in predicted]
    best = int(np.argmin(losses))
    fitted = _minimise(scaled, open_part, half, levels, penalties[best], None)
    constant = losses[-1] if np.isinf(penalties[-1]) else float("nan")
    report = QuantileReport(
        objective=name,
        ratings=len(x),
        half_width=half,
        penalty=float(penalties[best]),
        loss=float(losses[best]),
        constant_loss=float(constant),
        below=share_below(open_part[:, None], predicted[best], half).mean(0).tolist(),
    )
    weight = fitted[:, 1:] / scale
    return weight, fitted[:, 0] - weight @ mean, report


def _minimise(
    x: np.ndarray, open_part: np.ndarray, half: float, levels: np.ndarray, penalty: float, start: np.ndarray | None
) -> np.ndarray:
    """Coefficients (q, 1 + d) on standardised features, the intercept first and unpenalised."""
    q, d = len(levels), x.shape[1]
    used = 0 if np.isinf(penalty) else d
    first = np.zeros((q, 1 + used))
    first[:, 0] = np.quantile(open_part, levels)
    if start is not None and used:
        first[:] = start

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        values = flat.reshape(q, 1 + used)
        quantiles = values[:, 0] + (x @ values[:, 1:].T if used else 0.0)
        residual = open_part[:, None] - quantiles
        # The slope of the smoothed loss in the quantile is the share of the cell below it, less the level.
        slope = (np.clip(0.5 - residual / (2 * half), 0.0, 1.0) - levels) / len(x)
        gradient = np.empty_like(values)
        gradient[:, 0] = slope.sum(0)
        total = pinball(residual, levels, half).sum() / len(x)
        if used:
            gradient[:, 1:] = slope.T @ x + 2 * penalty * values[:, 1:]
            total += penalty * (values[:, 1:] ** 2).sum()
        return float(total), gradient.ravel()

    options = {"maxiter": _ITERATIONS, "ftol": 1e-9, "gtol": 1e-7}
    found = minimize(loss, first.ravel(), jac=True, method="L-BFGS-B", options=options)
    return np.hstack([found.x.reshape(q, 1 + used), np.zeros((q, d - used))])
