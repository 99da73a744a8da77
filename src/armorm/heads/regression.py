"""Stage 1: one linear reward per objective, by ridge regression on rated conversations.

    min_w  v * sum over rated rows (x^T w - r)^2 + alpha |w|^2          (linear probing; arXiv 2406.12845, section 3.1)

Missing ratings are skipped, never imputed. Everything is computed from sums (`armorm.heads.statistics`): every alpha of
every objective, the error on each fold by the others, the final fit on all rows, and the weights fitted without each
fold (for rewards of rows that stage 1 was trained on). Folds are by prompt.

Objectives that are rated on the same rows share a decomposition. A Cholesky factor serves one alpha; an
eigendecomposition serves all, at the cost of ten to twenty-five factors (9 factors take 0.95 of its time at d = 256,
0.35 at d = 1024). Up to `CHOLESKY_ALPHAS` alphas are solved by Cholesky, more by eigendecomposition, as are matrices
that are not numerically positive definite (more features than rows, and an alpha below the rounding).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import scipy.linalg

from armorm.errors import FitError
from armorm.heads.accumulation import Precision, accumulate, blocks_of
from armorm.heads.statistics import Moments, RatingStatistics

Solver = Literal["auto", "cholesky", "eigen"]
ALPHAS = tuple(10.0**e for e in range(-4, 5))
MIN_RATINGS = 20
FEW_RATINGS = 100
CHOLESKY_ALPHAS = 12


class RidgePath:
    """Ridge solutions for any alpha from the sums.

    Args:
        intercept: centre features and ratings first; the intercept itself is not penalised.
        solver: `eigen` decomposes once and solves any alpha by scaling; `cholesky` factorises for each alpha.
    """

    def __init__(self, moments: Moments, intercept: bool, solver: Literal["cholesky", "eigen"] = "eigen") -> None:
        count = moments.weight or 1.0
        self._mean = moments.feature_sum / count if intercept else np.zeros_like(moments.feature_sum)
        self._rating_mean = moments.rating_sum / count if intercept else np.zeros_like(moments.rating_sum)
        self._gram = moments.gram - count * np.outer(self._mean, self._mean) if intercept else moments.gram
        self._cross = moments.cross - count * np.outer(self._mean, self._rating_mean) if intercept else moments.cross
        if solver == "eigen":
            self._decompose()

    def _decompose(self) -> None:
        values, self._vectors = scipy.linalg.eigh(self._gram, driver="evd", check_finite=False)
        self._values = np.clip(values, 0.0, None)
        self._rotated = self._vectors.T @ self._cross
        self._decomposed = True

    _decomposed = False

    def solve(self, alphas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights (j, d) and intercepts (j,) for one alpha per objective, alphas (j,) > 0."""
        weights = None if self._decomposed else self._by_cholesky(alphas)
        if weights is None:
            if not self._decomposed:
                self._decompose()
            weights = (self._vectors @ (self._rotated / (self._values[:, None] + alphas))).T
        return weights, self._rating_mean - np.einsum("jd,d->j", weights, self._mean)

    def _by_cholesky(self, alphas: np.ndarray) -> np.ndarray | None:
        """Weights (j, d), or None if a matrix is not numerically positive definite."""
        weights = np.empty(self._cross.T.shape)
        for alpha in np.unique(alphas):
            penalised = self._gram.copy()
            np.einsum("ii->i", penalised)[:] += alpha
            try:
                # The matrix is symmetric; LAPACK is column-major and overwrites the transpose in place.
                factor = scipy.linalg.cho_factor(penalised.T, lower=True, overwrite_a=True, check_finite=False)
            except np.linalg.LinAlgError:
                return None
            columns = alphas == alpha
            weights[columns] = scipy.linalg.cho_solve(factor, self._cross[:, columns], check_finite=False).T
        return weights


@dataclass(frozen=True)
class RegressionReport:
    """Result of stage 1 for one objective.

    Attributes:
        objective: its name.
        ratings: rows rated.
        alpha: the chosen penalty.
        validation_errors: mean squared error on held-out folds for each alpha, mapped scale.
        r2: 1 - (error on held-out folds at the chosen alpha) / (variance of the ratings).
        warning: why not to trust it, or empty.
        rater_weights: smallest and largest weight of a row, from the spread of several raters; None without weights.
    """

    objective: str
    ratings: int
    alpha: float
    validation_errors: list[float]
    r2: float
    warning: str = ""
    rater_weights: tuple[float, float] | None = None


@dataclass
class RegressionHead:
    """The fitted regression layer.

    Attributes:
        weight: (k, d) float64; rewards = X weight^T + bias.
        bias: (k,) float64, zero without intercept.
        fold_weight, fold_bias: (folds, k, d) and (folds, k): fitted without that fold.
        reports: one per objective.
    """

    weight: np.ndarray
    bias: np.ndarray
    fold_weight: np.ndarray
    fold_bias: np.ndarray
    reports: list[RegressionReport]

    def rounded(self) -> RegressionHead:
        """The head with its numbers rounded to float32, as they are served."""
        names = ("weight", "bias", "fold_weight", "fold_bias")
        return replace(self, **{name: getattr(self, name).astype(np.float32).astype(np.float64) for name in names})

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Rewards (n, k) float64 of features (n, d)."""
        return features.astype(np.float64) @ self.weight.T + self.bias

    def predict_out_of_fold(self, features: np.ndarray, folds: np.ndarray) -> np.ndarray:
        """Rewards (n, k) by weights fitted without the row's prompt.

        Args:
            folds: (n,) fold of each row; -1 for prompts that stage 1 was not trained on.
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
    precision: Precision = "float32",
    **options: Any,
) -> RegressionHead:
    """Fit every objective on arrays.

    Args:
        features: (n, d).
        ratings: (n, k) mapped ratings, NaN where missing.
        folds: (n,) int, 0 <= fold; rows of one prompt share a fold.
        names: (k,) objective names, for reports and errors.
        precision: of the products of rows, as for `accumulate`.
        options: as for `fit_from_statistics`.
    """
    count = int(folds.max(initial=0)) + 1
    blocks = blocks_of(features, ratings, folds)
    return fit_from_statistics(accumulate(blocks, names, count, features.shape[1], precision=precision), **options)


def fit_from_statistics(
    statistics: RatingStatistics,
    *,
    alphas: Sequence[float] = ALPHAS,
    intercept: bool = False,
    validation_folds: Sequence[int] | None = None,
    weights: Mapping[str, float] | None = None,
    solver: Solver = "auto",
) -> RegressionHead:
    """Fit every objective from the sums of its rows.

    Args:
        alphas: penalties to choose from, > 0.
        validation_folds: folds for choosing alpha; None for all (k-fold), (0,) for a single split.
        weights: v of an objective's squared errors against its penalty, > 0, by name; 1 for the others. Every
            objective has its own weights and alpha, so v only shifts the grid of its alphas.
        solver: `auto` chooses by the number of alphas.

    Raises:
        FitError: naming each objective with fewer than `MIN_RATINGS` ratings, no variance, one fold only, or
            no rating in the validation folds.
    """
    names, d, fold_count = statistics.names, statistics.hidden_size, statistics.folds
    validated = list(range(fold_count)) if validation_folds is None else list(validation_folds)
    _require_learnable(statistics, validated)
    grid, k = np.asarray(alphas, np.float64), len(names)
    method: Literal["cholesky", "eigen"]
    method = ("cholesky" if len(grid) <= CHOLESKY_ALPHAS else "eigen") if solver == "auto" else solver
    scale = np.array([(weights or {}).get(name, 1.0) for name in names])
    weight, bias = np.zeros((k, d)), np.zeros(k)
    fold_weight, fold_bias = np.zeros((fold_count, k, d)), np.zeros((fold_count, k))
    reports: list[RegressionReport | None] = [None] * k
    variances = statistics.variances()
    for columns in statistics.row_sets():
        by_fold = [statistics.moments(columns, fold) for fold in range(fold_count)]
        total = sum(by_fold[1:], by_fold[0])
        counted = [fold for fold in validated if by_fold[fold].count]
        errors = np.zeros((len(grid), len(columns)))
        solved = np.zeros((fold_count, len(grid), len(columns), d + 1))
        for fold in counted:
            path = RidgePath(total - by_fold[fold], intercept, method)
            for index, alpha in enumerate(grid):
                solved[fold, index, :, :d], solved[fold, index, :, d] = path.solve(alpha / scale[columns])
            errors += by_fold[fold].squared_error(solved[fold, :, :, :d], solved[fold, :, :, d])
        errors = np.maximum(errors, 0.0) / sum(by_fold[fold].weight for fold in counted)
        chosen = errors.argmin(0)
        penalties = grid[chosen] / scale[columns]
        weight[columns], bias[columns] = RidgePath(total, intercept, "cholesky").solve(penalties)
        for fold in range(fold_count):
            if fold in counted:
                both = solved[fold, chosen, np.arange(len(columns))]
                fold_weight[fold, columns], fold_bias[fold, columns] = both[:, :d], both[:, d]
            elif by_fold[fold].count:
                path = RidgePath(total - by_fold[fold], intercept, "cholesky")
                fold_weight[fold, columns], fold_bias[fold, columns] = path.solve(penalties)
            else:  # no row of this fold: the final weights never saw it
                fold_weight[fold, columns], fold_bias[fold, columns] = weight[columns], bias[columns]
        for position, column in enumerate(columns):
            r2 = float(1 - errors[chosen[position], position] / variances[column])
            reports[column] = RegressionReport(
                names[column],
                total.count,
                float(grid[chosen[position]]),
                errors[:, position].tolist(),
                r2,
                _doubts(total.count, r2, chosen[position] == len(grid) - 1 > 0),
            )
    return RegressionHead(weight, bias, fold_weight, fold_bias, [report for report in reports if report is not None])


def _doubts(ratings: int, r2: float, at_the_end: bool) -> str:
    doubts = []
    if not r2 > 0:
        doubts.append("held-out error is no better than always predicting the mean")
    elif at_the_end:
        doubts.append("the largest alpha is the best one; a larger one may be better")
    if ratings < FEW_RATINGS:
        doubts.append(f"has only {ratings} ratings")
    return "; ".join(doubts)


def fold_of(key: str, folds: int) -> int:
    """Fold of a prompt from its content key: the same in every set, run and process."""
    return int(key[:8], 16) % folds


def _require_learnable(statistics: RatingStatistics, validation_folds: Sequence[int]) -> None:
    faults = []
    counts, variances = statistics.counts(), statistics.variances()
    for name, by_fold, variance in zip(statistics.names, counts, variances, strict=True):
        count = int(by_fold.sum())
        if count < MIN_RATINGS:
            faults.append(f"{name} has {count} ratings, expected at least {MIN_RATINGS}")
        elif variance == 0:
            faults.append(f"{name} has the same rating on all {count} rows")
        elif (by_fold > 0).sum() < 2:
            faults.append(f"{name} is rated in only one fold of prompts, expected enough prompts to hold some out")
        elif not by_fold[list(validation_folds)].any():
            faults.append(f"{name} has no rating in the validation folds, expected some to choose alpha on")
    if faults:
        raise FitError("; ".join(faults))
