"""Uncertainty of predicted ratings: how much is due to few ratings (epistemic), how much to disagreement of raters.

For any response feature x (d,), from the sums that stage 1 was fitted on:

    leverage       h = x^T (G + alpha I)^-1 x          distance of x from the rated rows, in the head's own metric
    epistemic std  sigma sqrt(h)                       what more ratings would reduce
    predictive std sqrt(sigma^2 + sigma^2 h)           of one rating: mostly noise of raters and features

sigma is the root mean square error on held-out folds. With an intercept, x is relative to the mean, and 1/n is added to
h. The head is linear and the backbone fixed, so h does not show responses that the backbone itself misreads: a low
epistemic std is no guarantee.

**Stored** is the top-q eigenbasis V of each G and one number for the rest: with r^2 = |x|^2 - |V x|^2,

    h ~ sum_i (v_i x)^2 / (lambda_i + alpha) + t r^2
    t = sum_{i>q} lambda_i / (lambda_i + alpha) / sum_{i>q} lambda_i

which is exact on average over the rated rows. The true remainder is between r^2 / (lambda_{q+1} + alpha) and
r^2 / (lambda_d + alpha), so the relative error of a standard deviation is at most `error_bound` for any x; q is the
smallest for which that is below the tolerance, up to `MAX_RANK`.

**The score** is a sum of coefficients times rewards. Its variance treats the coefficients, and so the gate, as fixed.
Objectives rated on the same rows have correlated errors: their correlation on held-out folds is used, 0 for objectives
without common rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import scipy.linalg

from armorm.heads.accumulation import RatedBlock
from armorm.heads.regression import RegressionHead
from armorm.heads.statistics import RatingStatistics

MAX_RANK = 256
TOLERANCE = 0.05
LEVELS = (0.5, 0.8, 0.95)
USUAL = 0.99
ENOUGH_LEVELS = 5
_ROWS = 8192


@dataclass
class Uncertainty:
    """Uncertainty of the rewards of k objectives, in g sets of objectives that are rated on the same rows.

    Attributes:
        basis: (g, q, d) float32, leading eigenvectors of each Gram matrix, one per row.
        eigenvalues: (g, q) float32, descending.
        center: (g, d) float32, mean feature of the rows, zero without an intercept.
        groups: (k,) row set of each objective.
        rows: (g,) rated rows, for the intercept's term; 0 without an intercept.
        penalties: (k,) alpha.
        noise: (k,) sigma, mapped scale.
        tail: (k,) t above.
        error_bound: (k,) largest relative error of a standard deviation due to the rest of the spectrum.
        correlation: (k, k) of errors on held-out folds.
        conformal: by level, (k,) half-width of an interval in predictive standard deviations; NaN for objectives
            with fewer than five levels.
        usual_leverage: (k,) the 99th percentile over rated rows; empty if it was not measured.
    """

    basis: np.ndarray
    eigenvalues: np.ndarray
    center: np.ndarray
    groups: np.ndarray
    rows: np.ndarray
    penalties: np.ndarray
    noise: np.ndarray
    tail: np.ndarray
    error_bound: np.ndarray
    correlation: np.ndarray
    conformal: dict[float, np.ndarray] = field(default_factory=dict)
    usual_leverage: np.ndarray = field(default_factory=lambda: np.empty(0))

    def leverage(self, features: np.ndarray) -> np.ndarray:
        """h (n, k) float64, >= 0, of features (n, d)."""
        found = np.empty((len(features), len(self.groups)))
        for start in range(0, len(features), _ROWS):
            part = slice(start, start + _ROWS)
            found[part] = self._leverage(features[part].astype(np.float64))
        return found

    def _leverage(self, features: np.ndarray) -> np.ndarray:
        found = np.empty((len(features), len(self.groups)))
        for group in range(len(self.basis)):
            centred = features - self.center[group]
            squares = (centred @ self.basis[group].T.astype(np.float64)) ** 2
            rest = np.maximum((centred**2).sum(1) - squares.sum(1), 0.0)
            columns = np.flatnonzero(self.groups == group)
            inverse = 1 / (self.eigenvalues[group].astype(np.float64)[:, None] + self.penalties[columns])
            found[:, columns] = squares @ inverse + rest[:, None] * self.tail[columns]
            if self.rows[group]:
                found[:, columns] += 1 / self.rows[group]
        return found

    def epistemic_std(self, leverage: np.ndarray) -> np.ndarray:
        """(n, k), mapped scale, of leverage (n, k)."""
        return self.noise * np.sqrt(leverage)

    def predictive_std(self, leverage: np.ndarray) -> np.ndarray:
        """(n, k), mapped scale, of one rating."""
        return self.noise * np.sqrt(1 + leverage)

    def score_std(self, leverage: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        """(n,) epistemic standard deviation of the score, with fixed coefficients (n, k)."""
        parts = coefficients * self.epistemic_std(leverage)
        return np.sqrt(np.maximum(np.einsum("nk,kl,nl->n", parts, self.correlation, parts), 0.0))

    def tensors(self) -> dict[str, np.ndarray]:
        """The part that a model stores as tensors."""
        return {"basis": self.basis, "eigenvalues": self.eigenvalues, "center": self.center}

    def settings(self) -> dict[str, Any]:
        """The part that a model stores in its config: plain lists; NaN as None."""
        lists = ("groups", "rows", "penalties", "noise", "tail", "error_bound", "correlation", "usual_leverage")
        return {
            "rank": self.basis.shape[1],
            **{name: getattr(self, name).tolist() for name in lists},
            "conformal": {
                str(level): [None if np.isnan(value) else float(value) for value in values]
                for level, values in self.conformal.items()
            },
        }

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Uncertainty:
        """Inverse of `settings` and `tensors`."""
        integers = {name: np.array(settings[name], np.int64) for name in ("groups", "rows")}
        lists = ("penalties", "noise", "tail", "error_bound", "correlation", "usual_leverage")
        floats = {name: np.array(settings[name], np.float64) for name in lists}
        conformal = {
            float(level): np.array([np.nan if value is None else value for value in values], np.float64)
            for level, values in settings.get("conformal", {}).items()
        }
        return cls(**tensors, **integers, **floats, conformal=conformal)


def fit_uncertainty(
    statistics: RatingStatistics,
    head: RegressionHead,
    *,
    intercept: bool = False,
    weights: Mapping[str, float] | None = None,
    max_rank: int = MAX_RANK,
    tolerance: float = TOLERANCE,
) -> Uncertainty:
    """Uncertainty of a fitted head.

    Args:
        statistics: those that the head was fitted on.
        intercept, weights: as in the fit.
        max_rank: most eigenvectors stored per Gram matrix.
        tolerance: relative error of standard deviations that fewer may cause.
    """
    k, d = head.weight.shape
    given = weights or {}
    penalties = np.array([report.alpha / given.get(report.objective, 1.0) for report in head.reports])
    row_sets = statistics.row_sets()
    groups, rows = np.zeros(k, np.int64), np.zeros(len(row_sets), np.int64)
    center, spectra = np.zeros((len(row_sets), d)), []
    for group, columns in enumerate(row_sets):
        groups[columns] = group
        parts = [statistics.moments(columns, fold) for fold in range(statistics.folds)]
        total = sum(parts[1:], parts[0])
        gram = total.gram
        if intercept:
            rows[group], center[group] = total.count, total.feature_sum / total.count
            gram = gram - total.count * np.outer(center[group], center[group])
        values, vectors = scipy.linalg.eigh(gram, driver="evd", check_finite=False)
        spectra.append((np.clip(values[::-1], 0.0, None), vectors[:, : -min(max_rank, d) - 1 : -1].T))
    rank = max(
        _rank(spectra[group][0], penalties[groups == group], min(max_rank, d), tolerance)
        for group in range(len(row_sets))
    )
    tail, bound = np.zeros(k), np.zeros(k)
    for column in range(k):
        tail[column], bound[column] = _rest(spectra[groups[column]][0], penalties[column], rank)
    return Uncertainty(
        basis=np.stack([vectors[:rank] for _, vectors in spectra]).astype(np.float32),
        eigenvalues=np.stack([values[:rank] for values, _ in spectra]).astype(np.float32),
        center=center.astype(np.float32),
        groups=groups,
        rows=rows,
        penalties=penalties,
        noise=np.sqrt([min(report.validation_errors) for report in head.reports]),
        tail=tail,
        error_bound=bound,
        correlation=error_correlation(statistics, head),
    )


def _rest(values: np.ndarray, alpha: float, rank: int) -> tuple[float, float]:
    """t and the error bound for the eigenvalues after the first `rank` of descending ones."""
    rest = values[rank:]
    if not len(rest):
        return 0.0, 0.0
    total = rest.sum()
    tail = float((rest / (rest + alpha)).sum() / total) if total > 0 else 1 / alpha
    over, under = np.sqrt(tail * (rest[0] + alpha)) - 1, 1 - np.sqrt(tail * (rest[-1] + alpha))
    return tail, float(max(over, under, 0.0))


def _rank(values: np.ndarray, alphas: np.ndarray, most: int, tolerance: float) -> int:
    """The smallest rank, in steps of a factor 1.25, with a bound within the tolerance for every alpha."""
    rank = min(8, most)
    while rank < most and max(_rest(values, alpha, rank)[1] for alpha in alphas) > tolerance:
        rank = min(most, rank + max(rank // 4, 1))
    return rank


def error_correlation(statistics: RatingStatistics, head: RegressionHead) -> np.ndarray:
    """Correlation (k, k) of the objectives' errors on held-out folds, each over its own rows.

    Sums of products over common rows divided by the root of both sums of squares: near 0 for objectives with few
    common rows. If statistics are kept by objective, errors of different row sets count as independent.
    """
    k = len(head.weight)
    products = np.zeros((k, k))
    for columns in statistics.groups:
        index = np.ix_(columns, columns)
        for fold, part in enumerate(statistics.groups[columns]):
            moved = part.moved(statistics.origin)
            products[index] += moved.residual_products(
                head.fold_weight[fold, list(columns)], head.fold_bias[fold, list(columns)]
            )
    scale = np.sqrt(np.maximum(np.diagonal(products), 1e-300))
    correlation = np.clip(products / np.outer(scale, scale), -1.0, 1.0)
    np.fill_diagonal(correlation, 1.0)
    return correlation


class StreamedQuantiles:
    """Quantiles of k columns of positive numbers that arrive in blocks, to 0.2 percent, in constant memory.

    Values are counted in bins that grow by 0.2 percent; a quantile is the upper end of its bin, so never too small.
    """

    _STEP = np.log(1.002)
    _LOW, _HIGH = np.log(1e-7), np.log(1e7)

    def __init__(self, columns: int) -> None:
        self._counts = np.zeros((columns, int((self._HIGH - self._LOW) / self._STEP) + 2), np.int64)

    def add(self, values: np.ndarray) -> None:
        """Count values (B, k); NaN are skipped, values outside 1e-7 to 1e7 count in the end bins."""
        with np.errstate(divide="ignore"):
            places = np.ceil((np.log(values) - self._LOW) / self._STEP)
        for column, place in enumerate(places.T):
            bins = np.clip(place[~np.isnan(values[:, column])], 0, self._counts.shape[1] - 1).astype(np.int64)
            self._counts[column] += np.bincount(bins, minlength=self._counts.shape[1])

    def conformal(self, level: float) -> np.ndarray:
        """(k,) the ceil((n + 1) * level)-th smallest; NaN for fewer values than that."""
        total = self._counts.sum(1)
        wanted = np.ceil((total + 1) * level).astype(np.int64)
        place = (self._counts.cumsum(1) < wanted[:, None]).sum(1)
        return np.where(wanted <= total, np.exp(self._LOW + self._STEP * place), np.nan)


def calibrate(
    uncertainty: Uncertainty, head: RegressionHead, blocks: Iterable[RatedBlock], intervals: np.ndarray
) -> Uncertainty:
    """Conformal intervals and usual leverage, from the rated rows in a second pass.

    Errors are those of weights fitted without the row's prompt, divided by the predictive standard deviation; the
    half-width of a level is their quantile (split conformal prediction, over all folds). Coverage is exact for
    exchangeable rows; rows of one prompt are similar, so with few prompts it is approximate.

    Args:
        blocks: the rated rows again.
        intervals: (k,) bool, objectives with enough levels for an interval.
    """
    k = len(uncertainty.groups)
    errors, usual = StreamedQuantiles(k), StreamedQuantiles(k)
    for block in blocks:
        leverage = uncertainty.leverage(block.features)
        predicted = head.predict_out_of_fold(block.features, block.folds)
        errors.add(np.abs(block.ratings - predicted) / uncertainty.predictive_std(leverage))
        usual.add(np.where(np.isnan(block.ratings), np.nan, leverage))
    conformal = {level: np.where(intervals, errors.conformal(level), np.nan) for level in LEVELS}
    return replace(uncertainty, conformal=conformal, usual_leverage=usual.conformal(USUAL))
