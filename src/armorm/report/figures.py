"""What a report says, as numbers: pure functions on arrays, in float64.

In:  rewards, weights, scores, lengths, prompts, sources of scored conversations.
Out: correlations, mean weights, entropies, extremes, errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

from armorm.heads.debiasing import spearman, within_groups

MIN_ROWS = 3


def correlation_matrix(values: np.ndarray) -> np.ndarray:
    """Spearman correlations (k, k) of the columns of (n, k); NaN where a column does not vary."""
    ranks = np.column_stack([rankdata(column) for column in values.T])
    ranks = ranks - ranks.mean(0)
    norms = np.sqrt((ranks**2).sum(0))
    with np.errstate(divide="ignore", invalid="ignore"):
        matrix = (ranks.T @ ranks) / np.outer(norms, norms)
    return np.where(np.outer(norms, norms) > 0, matrix, np.nan)


def length_correlations(values: np.ndarray, lengths: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """Spearman correlation of each column with the length of the response.

    Args:
        values: (n, j).
        lengths: (n,).
        prompts: (n,) prompt of each row.

    Returns:
        `pooled` and `within` (each prompt's mean taken out; NaN where no prompt has several responses), each (j,).
    """
    pooled = np.array([_correlation(column, lengths) for column in values.T])
    groups = np.unique(np.asarray(prompts), return_inverse=True)[1]
    inside = within_groups(np.column_stack([values, lengths]), groups)
    within = np.array([_correlation(column, inside[:, -1]) for column in inside[:, :-1].T])
    return {"pooled": pooled, "within": within}


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    return spearman(first, second) if len(first) >= MIN_ROWS else float("nan")


def entropies(weights: np.ndarray) -> np.ndarray:
    """Entropy (m,) of gating weights (m, k), nats."""
    weights = np.asarray(weights, np.float64)
    return -(weights * np.log(np.where(weights > 0, weights, 1.0))).sum(1)


def mean_by_group(values: np.ndarray, groups: Sequence[str]) -> dict[str, np.ndarray]:
    """Mean (k,) of the rows (m, k) of each group, in order of appearance."""
    labels = np.asarray(groups, dtype=object)
    return {str(name): values[labels == name].mean(0) for name in dict.fromkeys(groups)}


def extremes(weights: np.ndarray, most: int) -> list[list[int]]:
    """Rows of the largest weights (m, k) of each column, the largest first."""
    return [np.argsort(-column, kind="stable")[:most].tolist() for column in weights.T]


def binned_means(x: np.ndarray, y: np.ndarray, bins: int = 8) -> list[tuple[float, float, int]]:
    """Mean x, mean y and count of rows in bins of equal count along x."""
    order = np.argsort(x, kind="stable")
    parts = [part for part in np.array_split(order, min(bins, max(len(x) // 5, 1))) if len(part)]
    return [(float(x[part].mean()), float(y[part].mean()), len(part)) for part in parts]


def relative_errors(report: dict[str, Any]) -> list[float]:
    """Validation error of each alpha as a share of the ratings' variance: 1 - R^2, 1 for predicting the mean.

    Args:
        report: of one objective, as stage 1 keeps it (`validation_errors`, `r2`).
    """
    errors = [float("nan") if error is None else float(error) for error in report["validation_errors"]]
    known = [error for error in errors if np.isfinite(error)]
    if not known or report.get("r2") is None or report["r2"] >= 1:
        return errors
    variance = min(known) / (1 - report["r2"])  # R^2 is that of the alpha with the least error
    return [error / variance for error in errors]


def thinned(count: int, most: int, seed: int = 0) -> np.ndarray:
    """Rows to draw where there are too many to see, at random with a seed, in order."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))
