"""Leverage of responses with respect to rated rows: x^T (G + alpha I)^-1 x, for rows that are, and are not, among them.

A row that was fitted on pulls the fit towards itself, so its leverage is smaller than that of a new row. Leverage of
held-out rows is computed exactly, from the Gram matrix of the other folds. It is that of fewer rows, n_1 < n, though.
At n rows it is

    rho x^T (G_1 + rho alpha I)^-1 x,   rho so that G_1 at rho alpha has the degrees of freedom of G at alpha

(degrees of freedom: tr G (G + alpha I)^-1). Both resolvents are then close to the same function of the covariance
(deterministic equivalent: alpha (G + alpha I)^-1 ~ (tau/alpha Sigma + I)^-1, and the degrees of freedom fix tau/alpha),
whether rows are independent or come several to a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg
from scipy.optimize import brentq

from armorm.heads.statistics import Moments

_LEAST_SHARE = 1e-4  # rho if the rows of the other folds cannot have so many degrees of freedom


@dataclass(frozen=True)
class Spectrum:
    """Eigendecomposition of the Gram matrix of rows, about their mean if there is an intercept.

    Attributes:
        values: (d,) descending, >= 0; exactly 0 beyond the number of rows.
        vectors: (q, d) float32, the leading eigenvectors, one per row.
        center: (d,) mean of the rows; zero without an intercept.
        rows: number of rows.
        held_out: (d,) sum of squares of held-out rows, relative to `center`, along every eigenvector; empty if none.
    """

    values: np.ndarray
    vectors: np.ndarray
    center: np.ndarray
    rows: int
    held_out: np.ndarray


def spectrum(moments: Moments, intercept: bool, most: int, total: Moments | None = None) -> Spectrum:
    """Decompose the Gram matrix of rows.

    Args:
        moments: of the rows.
        most: eigenvectors to keep.
        total: moments of these and the held-out rows.
    """
    count, d = moments.count, len(moments.feature_sum)
    center = moments.feature_sum / (moments.weight or 1.0) if intercept else np.zeros(d)
    values, vectors = scipy.linalg.eigh(about(moments, center), driver="evd", check_finite=False)
    values, vectors = np.clip(values[::-1], 0.0, None), vectors[:, ::-1]
    values[max(count - intercept, 0) :] = 0.0  # rounding; divided by a small alpha it would not be small
    held_out = np.empty(0)
    if total is not None:
        both = np.einsum("dq,dq->q", vectors, about(total, center) @ vectors)
        held_out = np.clip(both - values, 0.0, None)
    return Spectrum(values, np.ascontiguousarray(vectors[:, :most].T, np.float32), center, count, held_out)


def about(moments: Moments, center: np.ndarray) -> np.ndarray:
    """Gram matrix (d, d) of the features relative to a center (d,)."""
    if not center.any():
        return moments.gram
    outer = np.outer(moments.feature_sum, center)
    return moments.gram - outer - outer.T + moments.weight * np.outer(center, center)


def low_rank_leverage(
    features: np.ndarray, vectors: np.ndarray, values: np.ndarray, penalties: np.ndarray, tails: np.ndarray
) -> np.ndarray:
    """sum_i (v_i x)^2 / (lambda_i + alpha) + t (|x|^2 - |V x|^2) for each of j penalties alpha and tails t, (B, j).

    Args:
        features: (B, d) float64, relative to the center.
        vectors, values: (q, d) and (q,).
        penalties, tails: (j,).
    """
    squares = (features @ vectors.T.astype(np.float64)) ** 2
    rest = np.maximum((features**2).sum(1) - squares.sum(1), 0.0)
    return squares @ (1 / (values.astype(np.float64)[:, None] + penalties)) + rest[:, None] * tails


@dataclass(frozen=True)
class FoldedSpectra:
    """Spectra of the rows of a row set: all n of them, and without each fold.

    Attributes:
        total: of all rows.
        without: by fold that has rows, of the other rows; the fold is held out.
        intercept: whether leverage has the term 1 / (number of rows).
    """

    total: Spectrum
    without: dict[int, Spectrum]
    intercept: bool

    @classmethod
    def of(cls, folds: Sequence[Moments], intercept: bool, most: int) -> FoldedSpectra:
        """From the moments of each fold; `most` eigenvectors are kept."""
        total = sum(folds[1:], folds[0])
        without = {
            fold: spectrum(total - part, intercept, most, total) for fold, part in enumerate(folds) if part.count
        }
        return cls(spectrum(total, intercept, most), without, intercept)

    def truncated(self, rank: int) -> FoldedSpectra:
        """With fewer eigenvectors."""
        first, *rest = (replace(one, vectors=one.vectors[:rank].copy()) for one in (self.total, *self.without.values()))
        return replace(self, total=first, without=dict(zip(self.without, rest, strict=True)))

    def shares(self, alpha: float) -> dict[int, float]:
        """rho by fold."""
        found, target = {}, alpha * (1 / (self.total.values + alpha)).sum()
        for fold, one in self.without.items():

            def missing(log_share: float, values: np.ndarray = one.values) -> float:
                penalty = alpha * np.exp(log_share)
                return float((penalty / (values + penalty)).sum() - target)

            # Where rounding of the Gram matrices is larger than alpha, there may be no solution between the ends.
            ends = (np.log(_LEAST_SHARE), 0.0)
            low, high = map(missing, ends)
            log_share = ends[0] if low >= 0 else ends[1] if high <= 0 else brentq(missing, *ends)
            found[fold] = float(np.exp(log_share))
        return found

    def held_out_sum(self, alpha: float) -> float:
        """Sum over all rows of their leverage with respect to the other folds, without the intercept's term."""
        return float(sum((one.held_out / (one.values + alpha)).sum() for one in self.without.values()))

    def expected_moved(self, alpha: float) -> float:
        """sum_c tr G (A_c^-1 - A^-1), A = G + alpha I, A_c without fold c, from tr G A_c^-1 = held-out + own traces."""
        traces = [((one.held_out + one.values) / (one.values + alpha)).sum() for one in self.without.values()]
        return float(sum(traces) - len(traces) * (self.total.values / (self.total.values + alpha)).sum())

    def penalty_share(self, alpha: float) -> float:
        """Share of alpha x^T (G + alpha I)^-2 x, which is due to the penalty and not to noise, in the leverage of new
        rows."""
        above, below = 0.0, 0.0
        for fold, rho in self.shares(alpha).items():
            one, penalty = self.without[fold], rho * alpha
            above += rho * float((one.held_out * penalty / (one.values + penalty) ** 2).sum())
            below += rho * float((one.held_out / (one.values + penalty)).sum())
        return above / below if below > 0 else 0.0

    def tail(self, alpha: float, rank: int, shares: Mapping[int, float] | None = None) -> float:
        """t for the eigenvalues after the first `rank`: exact on average over held-out rows.

        Args:
            shares: rho by fold, for the leverage of n rows; None for that of the other folds.
        """
        above, below = 0.0, 0.0
        for fold, one in self.without.items():
            rho = shares[fold] if shares else 1.0
            above += rho * float((one.held_out[rank:] / (one.values[rank:] + rho * alpha)).sum())
            below += float(one.held_out[rank:].sum())
        return above / below if below > 0 else 1 / alpha

    def held_out_leverage(
        self, features: np.ndarray, fold: int, penalties: np.ndarray, shares: Sequence[Mapping[int, float]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Leverage (B, j) of rows of a fold with respect to the other folds, and as rows that are not among n rows.

        Args:
            features: (B, d) float64.
            penalties: (j,).
            shares: rho by fold for each penalty.
        """
        one, rho = self.without[fold], np.array([share[fold] for share in shares])
        rank, j = len(one.vectors), len(penalties)
        own = np.array([self.tail(alpha, rank) for alpha in penalties])
        full = np.array([self.tail(alpha, rank, share) for alpha, share in zip(penalties, shares, strict=True)])
        both = low_rank_leverage(
            features - one.center,
            one.vectors,
            one.values[:rank],
            np.concatenate([penalties, rho * penalties]),
            np.concatenate([own, full / rho]),
        )
        terms = (1 / one.rows, 1 / self.total.rows) if self.intercept else (0.0, 0.0)
        return both[:, :j] + terms[0], rho * both[:, j:] + terms[1]
