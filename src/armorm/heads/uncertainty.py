"""Uncertainty of predicted ratings: how much is due to few ratings (epistemic), how much to disagreement of raters.

For any response feature x (d,), from the sums that stage 1 was fitted on:

    leverage       h = x^T (G + alpha I)^-1 x          distance of x from the rated rows, in the head's own metric
    epistemic std  sigma sqrt(D h)                     what more ratings would reduce
    predictive std sigma sqrt(1 + D h)                 of one rating: mostly noise of raters and features

With an intercept, x is relative to the mean, and 1/n is added to h. The head is linear and the backbone fixed, so h
does not show responses that the backbone itself misreads: a low epistemic std is no guarantee.

**Noise**: errors on held-out folds have the variance sigma^2 (1 + D h), so sigma^2 is their sum of squares divided by
n + D (sum of held-out leverages).

**Design effect** D: ratings of one prompt share errors (its topic, its rater), so n rows tell less than n independent
ones. The sandwich estimator A^-1 (sum of X_c^T e_c e_c^T X_c) A^-1, A = G + alpha I, over clusters c with held-out
errors e_c is the sum of (w - w_c)(w - w_c)^T, w_c fitted without the cluster. With the folds of prompts as clusters
it needs no row. For independent rows its expectation is sigma^2 sum_c (A_c^-1 - A^-1), so the ratio of both traces,
in the metric G, is the factor of the variance. D is that factor times the share of h that is due to noise, plus the
share that is due to the penalty, on average over held-out rows. One number per objective is cheap to store, and
correct on average over responses like the rated ones.

**Stored** is the top-q eigenbasis V of each G and one number for the rest: with r^2 = |x|^2 - |V x|^2,

    h ~ sum_i (v_i x)^2 / (lambda_i + alpha) + t r^2

where t makes the rest exact on average over held-out rows (`armorm.heads.leverage`). The true remainder is between
r^2 / (lambda_{q+1} + alpha) and r^2 / (lambda_d + alpha), so the relative error of a standard deviation is at most
`error_bound` for any x; q is the smallest for which that is below the tolerance, up to `MAX_RANK`. With fewer rows
than features, q = n is exact: all other eigenvalues are 0 and t = 1 / alpha.

**The score** is a sum of coefficients times rewards. Its variance treats the coefficients, and so the gate, as fixed.
Objectives rated on the same rows have correlated errors: their correlation on held-out folds is used, 0 for
objectives without common rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from armorm.heads.accumulation import RatedBlock
from armorm.heads.leverage import FoldedSpectra, about, low_rank_leverage
from armorm.heads.regression import RegressionHead
from armorm.heads.statistics import Moments, RatingStatistics
from armorm.objectives import ObjectiveSet

MAX_RANK = 1024
TOLERANCE = 0.05
LEVELS = (0.5, 0.8, 0.95)
USUAL = 0.99
ENOUGH_LEVELS = 5
_ROWS = 8192
_INTEGERS = ("groups", "rows")
_FLOATS = ("penalties", "noise", "design_effect", "tail", "error_bound", "correlation", "usual_leverage")
_MOST_OF_ERROR = 0.9


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
        design_effect: (k,) D above.
        tail: (k,) t above.
        error_bound: (k,) largest relative error of a standard deviation due to the rest of the spectrum.
        correlation: (k, k) of errors on held-out folds.
        conformal: by level, (k,) half-width of an interval in predictive standard deviations; NaN for objectives
            with fewer than five levels.
        usual_leverage: (k,) the 99th percentile of new rows like the rated ones; empty if it was not measured.
    """

    basis: np.ndarray
    eigenvalues: np.ndarray
    center: np.ndarray
    groups: np.ndarray
    rows: np.ndarray
    penalties: np.ndarray
    noise: np.ndarray
    design_effect: np.ndarray
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
        for group, vectors in enumerate(self.basis):
            columns, values = np.flatnonzero(self.groups == group), self.eigenvalues[group]
            found[:, columns] = low_rank_leverage(
                features - self.center[group], vectors, values, self.penalties[columns], self.tail[columns]
            )
            if self.rows[group]:
                found[:, columns] += 1 / self.rows[group]
        return found

    def epistemic_std(self, leverage: np.ndarray) -> np.ndarray:
        """(n, k), mapped scale, of leverage (n, k)."""
        return self.noise * np.sqrt(self.design_effect * leverage)

    def predictive_std(self, leverage: np.ndarray) -> np.ndarray:
        """(n, k), mapped scale, of one rating."""
        return self.noise * np.sqrt(1 + self.design_effect * leverage)

    def score_std(self, leverage: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        """(n,) epistemic standard deviation of the score, with fixed coefficients (n, k)."""
        parts = coefficients * self.epistemic_std(leverage)
        return np.sqrt(np.maximum(np.einsum("nk,kl,nl->n", parts, self.correlation, parts), 0.0))

    def columns(self, features: np.ndarray, coefficients: np.ndarray) -> dict[str, Any]:
        """The fields of a `ScoreBatch`, float32, of response features (n, d) and coefficients (n, k)."""
        leverage = self.leverage(features)
        found = {
            "uncertainty": self.epistemic_std(leverage),
            "predictive_std": self.predictive_std(leverage),
            "leverage": leverage,
            "score_std": self.score_std(leverage, coefficients),
        }
        return {name: values.astype(np.float32) for name, values in found.items()}

    def intervals(
        self, rewards: np.ndarray, predictive_std: np.ndarray, level: float, objectives: ObjectiveSet
    ) -> np.ndarray:
        """Prediction intervals (n, k, 2) of a conformal level, raw scale, clipped to the ranges of objectives that are
        not measured."""
        half = self.conformal[level] * predictive_std
        ends = np.sort(np.stack([objectives.to_raw(rewards + side * half) for side in (-1, 1)], -1), -1)
        for column, objective in enumerate(objectives):
            if objective.compute is None:
                ends[:, column] = np.clip(ends[:, column], objective.low, objective.high)
        return ends

    def approximate(self, names: Sequence[str]) -> dict[str, float]:
        """The error bounds of objectives, by name (k,), whose standard deviations are stored less exactly than the
        tolerance."""
        return {name: float(e) for name, e in zip(names, self.error_bound, strict=True) if e > TOLERANCE}

    def with_earlier(
        self, earlier: Uncertainty, columns: Mapping[int, int], calibrated: Mapping[int, int]
    ) -> Uncertainty:
        """This uncertainty, with some objectives as they were in that of an earlier model.

        Args:
            columns: for these objectives, by their column here, the column in the earlier one.
            calibrated: the same for others of which only the intervals and the usual leverage are the earlier ones.
        """
        here, there = list(columns), list(columns.values())
        groups = self.groups.copy()
        groups[here] = len(self.basis) + earlier.groups[there]
        used, groups = np.unique(groups, return_inverse=True)
        parts = {name: [*getattr(self, name), *getattr(earlier, name)] for name in ("basis", "eigenvalues")}
        # Directions of length 0, for the same rank, add nothing.
        rank = max(len(parts["eigenvalues"][group]) for group in used)
        padded = {
            name: np.stack([_padded(parts[name][group], rank) for group in used]).astype(np.float32) for name in parts
        }
        values: dict[str, np.ndarray] = {name: getattr(self, name).copy() for name in _FLOATS}
        for name in _FLOATS:
            if name not in ("correlation", "usual_leverage"):
                values[name][here] = getattr(earlier, name)[there]
        values["correlation"][np.ix_(here, here)] = earlier.correlation[np.ix_(there, there)]
        conformal = {level: factors.copy() for level, factors in self.conformal.items()}
        here, there = [*here, *calibrated], [*there, *calibrated.values()]
        values["usual_leverage"][here] = earlier.usual_leverage[there]
        for level, factors in conformal.items():
            factors[here] = earlier.conformal[level][there] if level in earlier.conformal else np.nan
        return Uncertainty(
            **padded,
            **values,
            center=np.concatenate([self.center, earlier.center])[used],
            groups=groups.ravel(),
            rows=np.concatenate([self.rows, earlier.rows])[used],
            conformal=conformal,
        )

    def with_objective(
        self,
        values: np.ndarray,
        vectors: np.ndarray,
        alpha: float,
        noise: float,
        center: np.ndarray,
        features: np.ndarray,
    ) -> Uncertainty:
        """This uncertainty with one more objective, in a row set of its own, whose weights have the covariance
        noise^2 (sum of value_i v_i v_i^T + alpha I)^-1.

        Args:
            values, vectors: (d,) descending eigenvalues, and (d, d) eigenvectors, one per row.
            center: (d,) feature whose reward has no error.
            features: (n, d) of responses, over which the rest of the spectrum is exact on average.
        """
        rank, centred = self.basis.shape[1], features.astype(np.float64) - center
        squares = ((centred @ vectors[rank:].T) ** 2).sum(0)
        total = squares.sum()
        tail = float((squares / (values[rank:] + alpha)).sum() / total) if total > 0 else 1 / alpha
        kept = vectors[:rank].astype(np.float32)
        leverage = low_rank_leverage(centred, kept, values[:rank], np.array([alpha]), np.array([tail]))
        k = len(self.groups)
        correlation = np.eye(k + 1)
        correlation[:k, :k] = self.correlation
        new = {"penalties": alpha, "noise": noise, "design_effect": 1.0, "tail": tail, "rows": 0}
        new |= {"groups": len(self.basis), "error_bound": _error_bound(values[rank:], alpha, tail)}
        if len(self.usual_leverage):
            new["usual_leverage"] = float(np.quantile(leverage, USUAL))
        return replace(
            self,
            basis=np.concatenate([self.basis, kept[None]]),
            eigenvalues=np.concatenate([self.eigenvalues, values[None, :rank].astype(np.float32)]),
            center=np.concatenate([self.center, center[None].astype(np.float32)]),
            correlation=correlation,
            conformal={level: np.append(factors, np.nan) for level, factors in self.conformal.items()},
            **{name: np.append(getattr(self, name), value) for name, value in new.items()},
        )

    def tensors(self) -> dict[str, np.ndarray]:
        """The part that a model stores as tensors."""
        return {"basis": self.basis, "eigenvalues": self.eigenvalues, "center": self.center}

    def settings(self) -> dict[str, Any]:
        """The part that a model stores in its config: plain lists; NaN as None."""
        return {
            "rank": self.basis.shape[1],
            **{name: getattr(self, name).tolist() for name in (*_INTEGERS, *_FLOATS)},
            "usual_leverage": _without_nan(self.usual_leverage),
            "conformal": {str(level): _without_nan(values) for level, values in self.conformal.items()},
        }

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Uncertainty:
        """Inverse of `settings` and `tensors`."""
        settings = {"design_effect": [1.0] * len(settings["groups"]), **settings}  # version 0.1 had none
        integers = {name: np.array(settings[name], np.int64) for name in _INTEGERS}
        floats = {name: np.array(settings[name], np.float64) for name in _FLOATS}
        conformal = {float(level): np.array(v, np.float64) for level, v in settings.get("conformal", {}).items()}
        return cls(**tensors, **integers, **floats, conformal=conformal)


def _without_nan(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def _padded(values: np.ndarray, rank: int) -> np.ndarray:
    return np.concatenate([values, np.zeros((rank - len(values), *values.shape[1:]))])


def fit_uncertainty(
    statistics: RatingStatistics,
    head: RegressionHead,
    blocks: Iterable[RatedBlock],
    intervals: np.ndarray,
    *,
    intercept: bool = False,
    weights: Mapping[str, float] | None = None,
    design_effect: np.ndarray | None = None,
    max_rank: int = MAX_RANK,
    tolerance: float = TOLERANCE,
) -> Uncertainty:
    """Uncertainty of a fitted head.

    Args:
        statistics: of all rows that the head was fitted on.
        blocks: the rated rows again, or those of them on which intervals and usual leverage are calibrated.
        intervals: (k,) bool, objectives with enough levels for an interval.
        intercept, weights: as in the fit.
        design_effect: (k,) D, for a head that was not fitted to ratings alone; by default it is measured.
        max_rank: most eigenvectors stored per Gram matrix.
        tolerance: relative error of standard deviations that fewer may cause.
    """
    k, d = head.weight.shape
    given = weights or {}
    penalties = np.array([report.alpha / given.get(report.objective, 1.0) for report in head.reports])
    groups, spectra = np.zeros(k, np.int64), []
    squares, correlation = held_out_errors(statistics, head)
    noise, measured = np.zeros(k), np.zeros(k)
    for group, columns in enumerate(statistics.row_sets()):
        groups[columns] = group
        parts = [statistics.moments(columns, fold) for fold in range(statistics.folds)]
        spectra.append(FoldedSpectra.of(parts, intercept, min(max_rank, d)))
        moved = _squares_moved(head, columns, parts, spectra[-1].total.center)
        for column, distance in zip(columns, moved, strict=True):
            known = None if design_effect is None else float(design_effect[column])
            noise[column], measured[column] = _noise(spectra[-1], penalties[column], squares[column], distance, known)
    folded = [spectra[group] for group in groups]
    shares = [one.shares(alpha) for one, alpha in zip(folded, penalties, strict=True)]
    tail, bound, rank = np.zeros(k), np.zeros(k), 0
    for rank in _ranks(min(max_rank, d), [one.total.rows for one in spectra]):
        for column in range(k):
            tail[column] = folded[column].tail(penalties[column], rank, shares[column])
            bound[column] = _error_bound(folded[column].total.values[rank:], penalties[column], tail[column])
        if bound.max() <= tolerance:
            break
    spectra = [one.truncated(rank) for one in spectra]
    found = Uncertainty(
        basis=np.stack([one.total.vectors for one in spectra]),
        eigenvalues=np.stack([one.total.values[:rank] for one in spectra]).astype(np.float32),
        center=np.stack([one.total.center for one in spectra]).astype(np.float32),
        groups=groups,
        rows=np.array([one.total.rows if intercept else 0 for one in spectra]),
        penalties=penalties,
        noise=noise,
        design_effect=measured,
        tail=tail,
        error_bound=bound,
        correlation=correlation,
    )
    return _calibrated(found, spectra, shares, head, blocks, intervals)


def _squares_moved(
    head: RegressionHead, columns: Sequence[int], parts: Sequence[Moments], center: np.ndarray
) -> np.ndarray:
    """Sum over folds c of |G^1/2 (w - w_c)|^2, for each column."""
    gram = about(sum(parts[1:], parts[0]), center)
    counted = [fold for fold, part in enumerate(parts) if part.count]
    moved = head.weight[columns] - head.fold_weight[np.ix_(counted, columns)]
    return np.einsum("cjd,de,cje->j", moved, gram, moved, optimize=True)


def _noise(
    spectra: FoldedSpectra, alpha: float, squares: float, moved: float, design_effect: float | None
) -> tuple[float, float]:
    """sigma and D of an objective.

    Args:
        squares: sum of squared errors on held-out folds.
        moved: sum of |G^1/2 (w - w_c)|^2.
        design_effect: D, if it is known.
    """
    n, total = spectra.total.rows, spectra.held_out_sum(alpha)
    due_to_noise = 1 - spectra.penalty_share(alpha)
    intercept = sum((n - one.rows) / one.rows for one in spectra.without.values()) if spectra.intercept else 0.0
    if design_effect is None:
        # Solved for the factor f of the noise: moved = f sigma^2 expected, and
        # squares = sigma^2 (n + total (1 - due_to_noise + f due_to_noise)).
        expected = spectra.expected_moved(alpha)
        slope = moved / (squares * expected)
        factor = slope * (n + total * (1 - due_to_noise)) / (1 - min(slope * total * due_to_noise, _MOST_OF_ERROR))
        design_effect = 1 - due_to_noise + factor * due_to_noise
    return float(np.sqrt(squares / (n + design_effect * (total + intercept)))), design_effect


def _error_bound(values: np.ndarray, alpha: float, tail: float) -> float:
    """Largest relative error of a standard deviation, of descending eigenvalues that t stands for."""
    if not len(values):
        return 0.0
    return float(max(np.sqrt(tail * (values[0] + alpha)) - 1, 1 - np.sqrt(tail * (values[-1] + alpha)), 0.0))


def _ranks(most: int, exact: Sequence[int]) -> list[int]:
    """Ranks to try: in steps of a factor 1.25, and the numbers of rows, with which nothing is left out."""
    ranks = {most, *(rank for rank in exact if rank < most)}
    rank = min(8, most)
    while rank < most:
        ranks.add(rank)
        rank += max(rank // 4, 1)
    return sorted(ranks)


def held_out_errors(statistics: RatingStatistics, head: RegressionHead) -> tuple[np.ndarray, np.ndarray]:
    """Sums of squares (k,) of the objectives' errors on held-out folds, and their correlation (k, k).

    The correlation is of sums of products over common rows, divided by the root of both sums of squares: near 0 for
    objectives with few common rows. If statistics are kept by objective, errors of different row sets count as
    independent.
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
    squares = np.maximum(np.diagonal(products), 1e-300)
    correlation = np.clip(products / np.sqrt(np.outer(squares, squares)), -1.0, 1.0)
    np.fill_diagonal(correlation, 1.0)
    return squares, correlation


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


def _calibrated(
    uncertainty: Uncertainty,
    spectra: Sequence[FoldedSpectra],
    shares: Sequence[Mapping[int, float]],
    head: RegressionHead,
    blocks: Iterable[RatedBlock],
    intervals: np.ndarray,
) -> Uncertainty:
    """Conformal intervals and usual leverage, from the rated rows in a second pass.

    Errors are those of weights fitted without the row's prompt, divided by the predictive standard deviation of the
    same weights; the half-width of a level is their quantile (split conformal prediction, over all folds). Coverage is
    exact for exchangeable rows; rows of one prompt are similar, so with few prompts it is approximate.
    """
    k = len(uncertainty.groups)
    errors, usual = StreamedQuantiles(k), StreamedQuantiles(k)
    for block in blocks:
        rated = ~np.isnan(block.ratings)
        others, new = np.full((2, *block.ratings.shape), np.nan)
        for group, one in enumerate(spectra):
            columns = np.flatnonzero(uncertainty.groups == group)
            for fold in np.unique(block.folds[rated[:, columns].any(1)]):
                rows = np.flatnonzero((block.folds == fold) & rated[:, columns].any(1))
                others[np.ix_(rows, columns)], new[np.ix_(rows, columns)] = one.held_out_leverage(
                    block.features[rows].astype(np.float64),
                    int(fold),
                    uncertainty.penalties[columns],
                    [shares[int(column)] for column in columns],
                )
        predicted = head.predict_out_of_fold(block.features, block.folds)
        errors.add(np.abs(block.ratings - predicted) / uncertainty.predictive_std(others))
        usual.add(np.where(rated, new, np.nan))
    conformal = {level: np.where(intervals, errors.conformal(level), np.nan) for level in LEVELS}
    return replace(uncertainty, conformal=conformal, usual_leverage=usual.conformal(USUAL))
