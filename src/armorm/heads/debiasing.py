"""Debiasing: take what biased objectives (verbosity, markdown) explain out of the others.

In:  rewards (n, k) on reference data, the columns of the biases, a metric, a level.
Out: `Debiasing`: the transform T (k, k) with R' = R T, the penalties, correlations before and after.

    r_i' = r_i - sum_v lambda_vi r_v,   Corr(r_i', r_v) = 0 for every bias v over the reference data      (paper: eq. 3)

T is the identity but for the rows of the biases, which hold the negated lambdas. A bias itself is taken out whole
(lambda_vv = 1, T[v, v] = 0), so the gate cannot give weight back to it, as in the released model (FIELD 1).
Penalties are two-sided: an objective that dislikes length gets a negative one.

Pearson is solved exactly: the lambdas are the least-squares coefficients of r_i on the biases. Spearman has no such
form. For one bias the rank correlation of r_i - lambda r_v with r_v falls in lambda, but in steps; its sign change
is bracketed and bisected to the end and the nearer side is taken. For several, Broyden's method goes from the
Pearson solution. What is left is recorded either way. Biases that almost determine each other are refused: how
a correlation is shared out between them would be noise.

`level: pooled` takes all rows together; `within_prompt` takes each prompt's mean out first, because only differences
within a prompt can move a ranking: biases of opposite sign between prompts and within them cancel in the pool.

`method: published` is the search of the published script, for reproduction only: the first of 24 penalties from
0 to 0.95 whose rank correlation is at most 0.03. It is one-sided, and an objective that never meets it is taken out
whole (penalty 1); `unmet` names those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.stats import rankdata

from armorm.correlation import Metric, correlation, pearson, spearman
from armorm.errors import FitError

Level = Literal["pooled", "within_prompt"]

Method = Literal["exact", "published"]

MOST_EXPLAINED = 0.98

ALMOST_NOTHING_ELSE = 0.8

_PUBLISHED_GRID = np.linspace(0.0, 0.95, 24)

_PUBLISHED_LIMIT = 0.03

_BISECTIONS = 60

_BROYDEN_STEPS = 40

_ROUNDING = 1e-12


@dataclass(frozen=True)
class Debiasing:
    """The transform and what it does on the reference data; b biases.

    Attributes:
        matrix: T (k, k) float64, R' = R T.
        against: columns of the b biases.
        metric, level, method: how correlation was measured and brought down.
        penalties: (b, k) lambda of each objective; of a bias, 1 for itself and 0 for the others.
        before, after: (b, k) correlation with each bias; NaN for biases after the transform.
        explained: (k,) share of each objective's variance that the biases explain (R^2); NaN for the biases.
        unmet: columns for which the published search found nothing.
    """

    matrix: np.ndarray
    against: tuple[int, ...]
    metric: Metric
    level: Level
    penalties: np.ndarray
    before: np.ndarray
    after: np.ndarray
    explained: np.ndarray
    method: Method = "exact"
    unmet: tuple[int, ...] = ()

    def apply(self, rewards: np.ndarray) -> np.ndarray:
        """Debiased rewards (n, k)."""
        return rewards @ self.matrix

    def scaled(self, rewards: np.ndarray) -> Debiasing:
        """The transform that also brings debiased rewards (n, k) to unit standard deviation; the biases stay out.

        Correlations, and so penalties in units of the rewards before it, are as they were.
        """
        deviation = self.apply(np.asarray(rewards, np.float64)).std(0)
        return replace(self, matrix=self.matrix / np.where(deviation > _ROUNDING, deviation, 1.0))

    def warnings(self, names: Sequence[str]) -> list[str]:
        """What a reader should know about single objectives, by name."""
        biases = " and ".join(names[i] for i in self.against)
        found = []
        for column, share in enumerate(self.explained):
            if share > ALMOST_NOTHING_ELSE:
                found.append(
                    f"objective {names[column]} is almost nothing but {biases}: "
                    f"they explain {share:.0%} of its variance on the reference data"
                )
        for column in self.unmet:
            found.append(
                f"objective {names[column]}: no penalty of the published search brings its correlation to "
                f"{_PUBLISHED_LIMIT}; it is taken out whole"
            )
        return found


def no_debiasing(k: int) -> Debiasing:
    """The identity: nothing is taken out."""
    nothing = np.empty((0, k))
    return Debiasing(np.eye(k), (), "pearson", "pooled", nothing, nothing, nothing, np.full(k, np.nan))


def fit_debiasing(
    rewards: np.ndarray,
    against: int | Sequence[int],
    *,
    metric: Metric = "spearman",
    level: Level = "pooled",
    groups: np.ndarray | None = None,
    method: Method = "exact",
) -> Debiasing:
    """Find the penalties on reference data.

    Args:
        rewards: (n, k) predicted rewards, n >= 3.
        against: column or columns to debias against.
        groups: (n,) prompt of each row; needed at level `within_prompt`.
        method: `published` for reproduction only, against one bias, Spearman, pooled.

    Raises:
        FitError: where a bias does not vary on the reference data, or the others nearly determine it.
    """
    rewards = np.asarray(rewards, np.float64)
    biases = (against,) if isinstance(against, int) else tuple(against)
    if method == "published" and (len(biases) > 1 or metric != "spearman" or level != "pooled"):
        raise FitError("method published goes with one bias, metric spearman and level pooled")
    values = _at_level(rewards, level, groups)
    index = list(biases)
    # (Reward sizes, not their spread, say what rounding can leave of a bias that does not vary.)
    size = np.abs(rewards[:, index]).max(0, initial=0.0)
    if len(values) < 3 or (np.ptp(values[:, index], axis=0) <= _ROUNDING * size).any():
        raise FitError(f"the objective to debias against does not vary over the {len(values)} reference rows")
    bias_values = values[:, index]
    _require_apart(bias_values, biases)
    k, b = values.shape[1], len(biases)
    penalties, unmet = np.zeros((b, k)), []
    for column in range(k):
        if column in biases:
            penalties[biases.index(column), column] = 1.0
        elif method == "published":
            found = _published_penalty(values[:, column], bias_values[:, 0])
            penalties[0, column] = 1.0 if found is None else found
            unmet += [column] if found is None else []
        elif metric == "pearson":
            penalties[:, column] = _pearson_penalties(values[:, column], bias_values)
        elif b == 1:
            penalties[0, column] = _spearman_penalty(values[:, column], bias_values[:, 0])
        else:
            penalties[:, column] = _spearman_penalties(values[:, column], bias_values)
    matrix = np.eye(k)
    matrix[index] -= penalties
    measure = correlation(metric)
    transformed = values @ matrix
    before = np.array([[measure(values[:, i], values[:, v]) for i in range(k)] for v in biases])
    after = np.array(
        [[np.nan if i in biases else measure(transformed[:, i], values[:, v]) for i in range(k)] for v in biases]
    )
    explained = np.array([np.nan if i in biases else _explained(values[:, i], bias_values) for i in range(k)])
    return Debiasing(matrix, biases, metric, level, penalties, before, after, explained, method, tuple(unmet))


def _require_apart(biases: np.ndarray, columns: Sequence[int]) -> None:
    """Refuse biases (n, b) of which the others explain one almost wholly."""
    for place, column in enumerate(columns):
        others = np.delete(biases, place, 1)
        share = _explained(biases[:, place], others) if others.shape[1] else 0.0
        if share > MOST_EXPLAINED:
            raise FitError(
                f"the biases are nearly collinear: the others explain {share:.1%} of the variance of the one in column "
                f"{column} on the reference data, expected at most {MOST_EXPLAINED:.0%}; leave one of them out"
            )


def _explained(values: np.ndarray, biases: np.ndarray) -> float:
    """R^2 of values (n,) on biases (n, b)."""
    centred = values - values.mean()
    total = centred @ centred
    rest = centred - (biases - biases.mean(0)) @ _pearson_penalties(values, biases)
    return float(1 - rest @ rest / total) if total > 0 else 0.0


def _pearson_penalties(reward: np.ndarray, biases: np.ndarray) -> np.ndarray:
    """Lambdas (b,) that leave no correlation of reward (n,) with any of the biases (n, b)."""
    centred = biases - biases.mean(0)
    return np.linalg.lstsq(centred, reward - reward.mean(), rcond=None)[0]


def _published_penalty(reward: np.ndarray, bias: np.ndarray) -> float | None:
    for penalty in _PUBLISHED_GRID:
        if spearman(reward - penalty * bias, bias) <= _PUBLISHED_LIMIT:
            return float(penalty)
    return None


def _spearman_penalties(reward: np.ndarray, biases: np.ndarray) -> np.ndarray:
    """Lambdas (b,) that leave as little rank correlation as Broyden's method reaches from the Pearson solution."""
    ranks = [rankdata(bias) for bias in biases.T]

    def left(penalties: np.ndarray) -> np.ndarray:
        ranked = rankdata(reward - biases @ penalties)
        return np.array([pearson(ranked, bias_ranks) for bias_ranks in ranks])

    penalties = _pearson_penalties(reward, biases)
    centred = biases - biases.mean(0)
    rest = reward - biases @ penalties
    # How the rank correlations would fall if ranks were values: the first guess of the Jacobian, inverted.
    spread = max(float(rest.std()), _ROUNDING * float(np.abs(reward).max()), 1e-300)
    inverse = -np.linalg.pinv(centred.T @ centred / len(centred) / (biases.std(0)[:, None] * spread))
    found = left(penalties)
    best, least = penalties, np.abs(found).max()
    for _ in range(_BROYDEN_STEPS):
        step = -inverse @ found
        moved = left(penalties + step)
        if np.abs(moved).max() < least:
            best, least = penalties + step, np.abs(moved).max()
        change = inverse @ (moved - found)
        scale = step @ change
        if least == 0 or not np.any(step) or abs(scale) < 1e-300:
            break
        inverse += np.outer(step - change, step @ inverse) / scale
        penalties, found = penalties + step, moved
    return best


def _spearman_penalty(reward: np.ndarray, bias: np.ndarray) -> float:
    """Lambda at which the rank correlation of reward - lambda * bias with bias changes sign.

    Bisection ends between two neighbouring numbers, but around zero it never ends at zero itself, where
    tied rewards stay tied: that one is tried as well.
    """
    bias_ranks = rankdata(bias)

    def left(penalty: float) -> float:
        return pearson(rankdata(reward - penalty * bias), bias_ranks)

    start = float(_pearson_penalties(reward, bias[:, None])[0])
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
