"""Stage 1: one linear reward per objective, by ridge regression on rated conversations.

In:  response features X (n, d), mapped ratings R (n, k) with NaN where a rating is missing, a fold per row.
Out: `RegressionHead`: W (k, d) and the intercepts, the alpha of each objective, its validation error.

    min_w  sum over rated rows (x^T w - r)^2 + alpha |w|^2          (paper: linear probing; FIELD 1)

Missing ratings are left out, never imputed. Everything comes from sums: per fold and per set of rows
that objectives share, the Gram matrix X^T X, the products X^T R, and the ratings' own sums, in float64.
From them follow every alpha of every objective, the error on each fold by the others, the final fit on
all rows, and the weights that saw all folds but one (for rewards of rows that stage 1 was trained on).
A Gram matrix is decomposed once, and every alpha costs a scaling. Folds are by prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from armorm.errors import FitError

ALPHAS = tuple(10.0**e for e in range(-4, 5))
MIN_RATINGS = 20
_BLOCK = 8192


@dataclass
class Moments:
    """Sums over a set of rated rows, all float64. They add up: `a + b` are the sums over both sets.

    Attributes:
        count: rows.
        gram: (d, d), X^T X.
        feature_sum: (d,).
        cross: (d, j), X^T R of the j objectives rated on these rows.
        rating_sum: (j,).
        rating_squares: (j,).
    """

    count: int
    gram: np.ndarray
    feature_sum: np.ndarray
    cross: np.ndarray
    rating_sum: np.ndarray
    rating_squares: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray, ratings: np.ndarray) -> Moments:
        """Sums over features (n, d) and ratings (n, j) without missing values."""
        d, j = features.shape[1], ratings.shape[1]
        total = cls(0, np.zeros((d, d)), np.zeros(d), np.zeros((d, j)), np.zeros(j), np.zeros(j))
        for start in range(0, len(features), _BLOCK):
            x = features[start : start + _BLOCK].astype(np.float64)
            r = ratings[start : start + _BLOCK].astype(np.float64)
            total = total + cls(len(x), x.T @ x, x.sum(0), x.T @ r, r.sum(0), (r**2).sum(0))
        return total

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(mine + theirs for mine, theirs in zip(self._parts(), other._parts(), strict=True)))

    def __sub__(self, other: Moments) -> Moments:
        return Moments(*(mine - theirs for mine, theirs in zip(self._parts(), other._parts(), strict=True)))

    def _parts(self) -> tuple:
        return self.count, self.gram, self.feature_sum, self.cross, self.rating_sum, self.rating_squares

    def squared_error(self, weights: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """Sum of squared errors (j,) of weights (j, d) and bias (j,) on these rows."""
        fitted = np.einsum("jd,de,je->j", weights, self.gram, weights, optimize=True)
        linear = np.einsum("jd,dj->j", weights, self.cross) - bias * (weights @ self.feature_sum)
        return fitted - 2 * linear + self.rating_squares - 2 * bias * self.rating_sum + self.count * bias**2


class RidgePath:
    """Ridge solutions for every alpha from one decomposition of the sums.

    Args:
        intercept: centre features and ratings first; the intercept itself is not penalised.
    """

    def __init__(self, moments: Moments, intercept: bool) -> None:
        count = max(moments.count, 1)
        self._mean = moments.feature_sum / count if intercept else np.zeros_like(moments.feature_sum)
        self._rating_mean = moments.rating_sum / count if intercept else np.zeros_like(moments.rating_sum)
        gram = moments.gram - count * np.outer(self._mean, self._mean)
        cross = moments.cross - count * np.outer(self._mean, self._rating_mean)
        values, self._vectors = scipy.linalg.eigh(gram, check_finite=False)
        self._values = np.clip(values, 0.0, None)
        self._rotated = self._vectors.T @ cross

    def solve(self, alphas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights (j, d) and intercepts (j,) for one alpha an objective, alphas (j,) > 0."""
        weights = (self._vectors @ (self._rotated / (self._values[:, None] + alphas))).T
        return weights, self._rating_mean - weights @ self._mean


@dataclass(frozen=True)
class RegressionReport:
    """What stage 1 found for one objective.

    Attributes:
        objective: its name.
        ratings: rows rated.
        alpha: the chosen penalty.
        validation_errors: mean squared error on held-out folds for each alpha, mapped scale.
        r2: 1 - (error on held-out folds at the chosen alpha) / (variance of the ratings).
        warning: why to distrust it, or empty.
    """

    objective: str
    ratings: int
    alpha: float
    validation_errors: list[float]
    r2: float
    warning: str = ""


@dataclass
class RegressionHead:
    """The fitted regression layer.

    Attributes:
        weight: (k, d) float64; rewards = X weight^T + bias.
        bias: (k,) float64, zero without intercept.
        fold_weight, fold_bias: (folds, k, d) and (folds, k): fitted without the fold of that number.
        reports: one an objective.
    """

    weight: np.ndarray
    bias: np.ndarray
    fold_weight: np.ndarray
    fold_bias: np.ndarray
    reports: list[RegressionReport]

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Rewards (n, k) float64 of features (n, d)."""
        return features.astype(np.float64) @ self.weight.T + self.bias

    def predict_out_of_fold(self, features: np.ndarray, folds: np.ndarray) -> np.ndarray:
        """Rewards (n, k) by weights that never saw the row's prompt.

        Args:
            folds: (n,) fold of each row; -1 for prompts that stage 1 was not trained on at all.
        """
        rewards = np.empty((len(features), len(self.weight)))
        for fold in np.unique(folds):
            rows = folds == fold
            weight, bias = (self.weight, self.bias) if fold < 0 else (self.fold_weight[fold], self.fold_bias[fold])
            rewards[rows] = features[rows].astype(np.float64) @ weight.T + bias
        return rewards


def fit_regression(
    features: np.ndarray,
    ratings: np.ndarray,
    folds: np.ndarray,
    names: Sequence[str],
    *,
    alphas: Sequence[float] = ALPHAS,
    intercept: bool = False,
    validation_folds: Sequence[int] | None = None,
) -> RegressionHead:
    """Fit every objective.

    Args:
        features: (n, d).
        ratings: (n, k) mapped ratings, NaN where missing.
        folds: (n,) int, 0 <= fold; rows of one prompt share a fold.
        names: (k,) objective names, for reports and refusals.
        validation_folds: folds that count for choosing alpha; None for all (k-fold), (0,) for a single split.

    Raises:
        FitError: naming each objective with fewer than `MIN_RATINGS` ratings, no variance, one fold only, or
            no rating in the validation folds.
    """
    fold_count = int(folds.max(initial=-1)) + 1
    validated = range(fold_count) if validation_folds is None else validation_folds
    _require_learnable(ratings, folds, names, validated)
    k, d = ratings.shape[1], features.shape[1]
    grid = np.asarray(alphas, np.float64)
    weight, bias = np.zeros((k, d)), np.zeros(k)
    fold_weight, fold_bias = np.zeros((fold_count, k, d)), np.zeros((fold_count, k))
    reports: list[RegressionReport | None] = [None] * k
    for columns, rows in shared_patterns(ratings):
        by_fold = [_fold_moments(features, ratings, rows[folds[rows] == fold], columns) for fold in range(fold_count)]
        total = sum(by_fold[1:], by_fold[0])
        paths = [RidgePath(total - part, intercept) for part in by_fold]
        counted = [fold for fold in validated if by_fold[fold].count]
        errors = np.zeros((len(grid), len(columns)))
        for index, alpha in enumerate(grid):
            for fold in counted:
                errors[index] += by_fold[fold].squared_error(*paths[fold].solve(np.full(len(columns), alpha)))
        errors /= sum(by_fold[fold].count for fold in counted)
        chosen = errors.argmin(0)
        weight[columns], bias[columns] = RidgePath(total, intercept).solve(grid[chosen])
        for fold, path in enumerate(paths):
            fold_weight[fold, columns], fold_bias[fold, columns] = path.solve(grid[chosen])
        variance = total.rating_squares / total.count - (total.rating_sum / total.count) ** 2
        for position, column in enumerate(columns):
            r2 = float(1 - errors[chosen[position], position] / variance[position])
            warning = "" if r2 > 0 else "held-out error is no better than always predicting the mean"
            reports[column] = RegressionReport(
                names[column], total.count, float(grid[chosen[position]]), errors[:, position].tolist(), r2, warning
            )
    return RegressionHead(weight, bias, fold_weight, fold_bias, [report for report in reports if report is not None])


def shared_patterns(ratings: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Groups of objectives rated on the very same rows.

    Yields:
        columns (j,) and the rows (n_j,) that rate all of them.
    """
    present = ~np.isnan(ratings)
    groups: dict[bytes, list[int]] = {}
    for column in range(ratings.shape[1]):
        groups.setdefault(np.packbits(present[:, column]).tobytes(), []).append(column)
    for columns in groups.values():
        yield np.array(columns), np.flatnonzero(present[:, columns[0]])


def fold_of(key: str, folds: int) -> int:
    """Fold of a prompt from its content key: the same in every set, run and process."""
    return int(key[:8], 16) % folds


def _fold_moments(features: np.ndarray, ratings: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> Moments:
    return Moments.of(features[rows], ratings[np.ix_(rows, columns)])


def _require_learnable(
    ratings: np.ndarray, folds: np.ndarray, names: Sequence[str], validation_folds: Sequence[int]
) -> None:
    faults = []
    for column, name in enumerate(names):
        rated = ~np.isnan(ratings[:, column])
        count = int(rated.sum())
        if count < MIN_RATINGS:
            faults.append(f"{name} has {count} ratings, expected at least {MIN_RATINGS}")
        elif np.ptp(ratings[rated, column]) == 0:
            faults.append(f"{name} has the same rating on all {count} rows")
        elif len(np.unique(folds[rated])) < 2:
            faults.append(f"{name} is rated in one fold of prompts only, expected prompts enough to hold some out")
        elif not np.isin(folds[rated], list(validation_folds)).any():
            faults.append(f"{name} has no rating in the validation folds, expected some to choose alpha on")
    if faults:
        raise FitError("; ".join(faults))
