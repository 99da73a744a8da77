"""Debiasing: take what a biased objective (verbosity) explains out of the others.

In:  rewards (n, k) on reference data, the column of the bias, a metric, a level.
Out: `Debiasing`: the transform T (k, k) with R' = R T, the penalties, correlations before and after.

    r_i' = r_i - lambda_i r_v,   Corr(r_i', r_v) = 0 over the reference data          (paper: eq. 3)

T is the identity with row v reduced by the lambdas; lambda_v = 1, so T[v, v] = 0 and the gate cannot
give weight back to the bias itself, as in the released model (FIELD 1). Penalties are two-sided: an
objective that dislikes length gets a negative one.

Pearson: lambda_i = Cov(r_i, r_v) / Var(r_v). Spearman: the rank correlation of r_i - lambda r_v with
r_v falls in lambda, but in steps; its sign change is bracketed and bisected to the end, the nearer side
is taken, and the residual is recorded. `level: pooled` takes all rows together; `within_prompt` takes
each prompt's mean out first, because only differences within a prompt can move a ranking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import rankdata

from armorm.errors import FitError

Metric = Literal["spearman", "pearson"]
Level = Literal["pooled", "within_prompt"]
_BISECTIONS = 60
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Debiasing:
    """The transform and what it does on the reference data.

    Attributes:
        matrix: T (k, k) float64, R' = R T.
        against: columns of the biases.
        metric, level: how correlation was measured.
        penalties: (k,) lambda of each objective; 1 for the bias itself.
        before, after: (k,) correlation with the bias; NaN for the bias after the transform.
    """

    matrix: np.ndarray
    against: tuple[int, ...]
    metric: Metric
    level: Level
    penalties: np.ndarray
    before: np.ndarray
    after: np.ndarray

    def apply(self, rewards: np.ndarray) -> np.ndarray:
        """Debiased rewards (n, k)."""
        return rewards @ self.matrix


def no_debiasing(k: int) -> Debiasing:
    """The identity: nothing is taken out."""
    empty = np.full(k, np.nan)
    return Debiasing(np.eye(k), (), "pearson", "pooled", np.zeros(k), empty, empty)


def fit_debiasing(
    rewards: np.ndarray,
    bias: int,
    *,
    metric: Metric = "spearman",
    level: Level = "pooled",
    groups: np.ndarray | None = None,
) -> Debiasing:
    """Find the penalties on reference data.

    Args:
        rewards: (n, k) predicted rewards, n >= 3.
        bias: column to debias against.
        groups: (n,) prompt of each row; needed at level `within_prompt`.

    Raises:
        FitError: where the bias does not vary on the reference data.
    """
    rewards = np.asarray(rewards, np.float64)
    values = _at_level(rewards, level, groups)
    verbosity = values[:, bias]
    if len(values) < 3 or np.ptp(verbosity) <= _ROUNDING * np.abs(rewards[:, bias]).max():
        raise FitError(f"the objective to debias against does not vary over the {len(values)} reference rows")
    k = values.shape[1]
    penalties = np.zeros(k)
    for column in range(k):
        if column == bias:
            penalties[column] = 1.0
        elif metric == "pearson":
            penalties[column] = _pearson_penalty(values[:, column], verbosity)
        else:
            penalties[column] = _spearman_penalty(values[:, column], verbosity)
    matrix = np.eye(k)
    matrix[bias] -= penalties
    measure = correlation(metric)
    before = np.array([measure(values[:, i], verbosity) for i in range(k)])
    transformed = values @ matrix
    after = np.array([np.nan if i == bias else measure(transformed[:, i], verbosity) for i in range(k)])
    return Debiasing(matrix, (bias,), metric, level, penalties, before, after)


def correlation(metric: Metric):
    """The correlation of two vectors by that metric; 0 where one does not vary."""
    return spearman if metric == "spearman" else pearson


def pearson(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson correlation, -1 to 1; 0 where one side is constant."""
    first, second = first - first.mean(), second - second.mean()
    norm = np.sqrt((first @ first) * (second @ second))
    return float(first @ second / norm) if norm > 0 else 0.0


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman rank correlation, ties at their mean rank; 0 where one side is constant."""
    return pearson(rankdata(first), rankdata(second))


def _pearson_penalty(reward: np.ndarray, bias: np.ndarray) -> float:
    centred = bias - bias.mean()
    return float(centred @ reward / (centred @ centred))


def _spearman_penalty(reward: np.ndarray, bias: np.ndarray) -> float:
    """Lambda at which the rank correlation of reward - lambda * bias with bias changes sign.

    Bisection ends between two neighbouring numbers, but around zero it never ends at zero itself, where
    tied rewards stay tied: that one is tried as well.
    """
    bias_ranks = rankdata(bias)

    def left(penalty: float) -> float:
        return pearson(rankdata(reward - penalty * bias), bias_ranks)

    start = _pearson_penalty(reward, bias)
    step = max(abs(start), float(reward.std() / bias.std()), 1e-12)
    low = high = start
    while left(low) < 0:
        low, step = low - step, 2 * step
    step = max(abs(start), float(reward.std() / bias.std()), 1e-12)
    while left(high) > 0:
        high, step = high + step, 2 * step
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if left(middle) >= 0:
            low = middle
        else:
            high = middle
    candidates = (low, high, 0.0) if low < 0 < high else (low, high)
    return min(candidates, key=lambda penalty: abs(left(penalty)))


def _at_level(rewards: np.ndarray, level: Level, groups: np.ndarray | None) -> np.ndarray:
    if level == "pooled":
        return rewards
    if groups is None:
        raise FitError("level within_prompt needs the prompt of each reference row")
    return within_groups(rewards, groups)


def within_groups(values: np.ndarray, groups: np.ndarray | Sequence[int]) -> np.ndarray:
    """Rows of prompts that have several, with each prompt's mean taken out."""
    _, index, counts = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), values.shape[1]))
    np.add.at(sums, index, values)
    return (values - (sums / counts[:, None])[index])[counts[index] > 1]
