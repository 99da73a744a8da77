"""Debiasing: remove what biased objectives (verbosity, markdown) explain from the other objectives' rewards.

    r_i' = r_i - sum_v lambda_vi r_v,   Corr(r_i', r_v) = 0 for every bias v over the reference data
                                                                                            (arXiv 2406.12845, eq. 3)

The transform T (k, k), R' = R T, is the identity except for the rows of the biases, which hold the negated lambdas. A
bias itself is removed entirely (lambda_vv = 1, T[v, v] = 0), so the gate cannot give weight back to it, as in the
released model. Penalties are two-sided: an objective that dislikes length gets a negative one.

Pearson has an exact solution: the lambdas are the least-squares coefficients of r_i on the biases. Spearman has none.
For one bias, the rank correlation of r_i - lambda r_v with r_v decreases in lambda, in steps; its sign change is
bracketed and bisected, and the side nearer to 0 is used. For several, Broyden's method starts at the Pearson solution.
Remaining correlations are recorded. Biases that almost determine each other are rejected: the split of a correlation
between them would be noise.

`level: pooled` uses all rows together; `within_prompt` subtracts each prompt's mean first, because only differences
within a prompt can change a ranking: biases of opposite sign between and within prompts cancel in the pool.

An objective may keep its correlation with a bias that its meaning includes (an objective "gives an answer" with
refusals): its lambda for that bias is 0, and the others are fitted without it.

`method: published` is the search of the published script, for reproduction only: the first of 24 penalties from 0 to
0.95 whose rank correlation is at most 0.03. It is one-sided, and an objective without such a penalty is removed
entirely (penalty 1); `unmet` lists those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.stats import rankdata

from armorm.correlation import Metric, correlation, pearson, spearman, within_groups
from armorm.errors import FitError

Level = Literal["pooled", "within_prompt"]
Method = Literal["exact", "published"]
MOST_EXPLAINED = 0.98  # of a bias's variance by the other biases
ALMOST_NOTHING_ELSE = 0.8  # share of an objective's variance explained by the biases from which it gets a warning
_PUBLISHED_GRID = np.linspace(0.0, 0.95, 24)
_PUBLISHED_LIMIT = 0.03
_BISECTIONS = 60
_BROYDEN_STEPS = 40
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Debiasing:
    """The transform and its effect on the reference data; b biases.

    Attributes:
        matrix: T (k, k) float64, R' = R T.
        against: columns of the b biases.
        metric, level, method: how correlation was measured and reduced.
        penalties: (b, k) lambda of each objective; of a bias, 1 for itself and 0 for the others.
        before, after: (b, k) correlation with each bias; NaN for biases after the transform.
        explained: (k,) share of each objective's variance that the biases explain (R^2); NaN for the biases.
        unmet: columns for which the published search found no penalty.
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

    def without_biases(self, values: np.ndarray) -> np.ndarray:
        """Values (k,) of the objectives with NaN for the biases, whose weight has no effect."""
        kept = np.array(values, np.float64)
        kept[list(self.against)] = np.nan
        return kept

    def scaled(self, rewards: np.ndarray) -> Debiasing:
        """The transform that also scales debiased rewards (n, k) to unit standard deviation; biases stay removed.

        Correlations do not change; penalties are in units of the rewards before scaling.
        """
        deviation = self.apply(np.asarray(rewards, np.float64)).std(0)
        return replace(self, matrix=self.matrix / np.where(deviation > _ROUNDING, deviation, 1.0))

    def warnings(self, names: Sequence[str]) -> list[str]:
        """Warnings about single objectives."""
        biases = " and ".join(names[i] for i in self.against)
        found = []
        for column, share in enumerate(self.explained):
            if share > ALMOST_NOTHING_ELSE:
                found.append(
                    f"objective {names[column]} is almost entirely explained by {biases}: "
                    f"{share:.0%} of its variance on the reference data"
                )
        for column in self.unmet:
            found.append(
                f"objective {names[column]}: no penalty of the published search reduces its correlation to "
                f"{_PUBLISHED_LIMIT}; it is removed entirely"
            )
        return found


def no_debiasing(k: int) -> Debiasing:
    """The identity transform."""
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
    keep: Mapping[int, Sequence[int]] | None = None,
) -> Debiasing:
    """Find the penalties on reference data.

    Args:
        rewards: (n, k) predicted rewards, n >= 3.
        against: column or columns to debias against.
        groups: (n,) prompt of each row; needed at level `within_prompt`.
        method: `published` for reproduction only, against one bias, Spearman, pooled.
        keep: of a column, biases with which its correlation is not removed.

    Raises:
        FitError: if a bias does not vary on the reference data, or the others nearly determine it.
    """
    rewards = np.asarray(rewards, np.float64)
    biases = (against,) if isinstance(against, int) else tuple(against)
    if method == "published" and (len(biases) > 1 or metric != "spearman" or level != "pooled"):
        raise FitError("method published requires one bias, metric spearman and level pooled")
    if level == "within_prompt" and groups is None:
        raise FitError("level within_prompt needs the prompt of each reference row")
    values = rewards if groups is None or level == "pooled" else within_groups(rewards, groups)
    index = list(biases)
    # The size of the rewards, not their spread, bounds what rounding can leave of a constant bias.
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
            continue
        removed = [place for place, bias in enumerate(biases) if bias not in (keep or {}).get(column, ())]
        if method == "published":
            found = _published_penalty(values[:, column], bias_values[:, 0]) if removed else 0.0
            penalties[0, column] = 1.0 if found is None else found
            unmet += [column] if found is None else []
        elif metric == "pearson":
            penalties[removed, column] = _pearson_penalties(values[:, column], bias_values[:, removed])
        elif len(removed) == 1:
            penalties[removed, column] = _spearman_penalty(values[:, column], bias_values[:, removed[0]])
        elif removed:
            penalties[removed, column] = _spearman_penalties(values[:, column], bias_values[:, removed])
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
    """Reject biases (n, b) if the others explain one almost entirely."""
    for place, column in enumerate(columns):
        others = np.delete(biases, place, 1)
        share = _explained(biases[:, place], others) if others.shape[1] else 0.0
        if share > MOST_EXPLAINED:
            raise FitError(
                f"the biases are nearly collinear: the others explain {share:.1%} of the variance of the one in column "
                f"{column} on the reference data, expected at most {MOST_EXPLAINED:.0%}; remove one of them"
            )


def _explained(values: np.ndarray, biases: np.ndarray) -> float:
    """R^2 of values (n,) on biases (n, b)."""
    centred = values - values.mean()
    total = centred @ centred
    rest = centred - (biases - biases.mean(0)) @ _pearson_penalties(values, biases)
    return float(1 - rest @ rest / total) if total > 0 else 0.0


def _pearson_penalties(reward: np.ndarray, biases: np.ndarray) -> np.ndarray:
    """Lambdas (b,) for zero correlation of reward (n,) with each bias (n, b)."""
    centred = biases - biases.mean(0)
    return np.linalg.lstsq(centred, reward - reward.mean(), rcond=None)[0]


def _published_penalty(reward: np.ndarray, bias: np.ndarray) -> float | None:
    met = (float(p) for p in _PUBLISHED_GRID if spearman(reward - p * bias, bias) <= _PUBLISHED_LIMIT)
    return next(met, None)


def _spearman_penalties(reward: np.ndarray, biases: np.ndarray) -> np.ndarray:
    """Lambdas (b,) for the least rank correlation that Broyden's method reaches from the Pearson solution."""
    ranks = [rankdata(bias) for bias in biases.T]

    def left(penalties: np.ndarray) -> np.ndarray:
        ranked = rankdata(reward - biases @ penalties)
        return np.array([pearson(ranked, bias_ranks) for bias_ranks in ranks])

    penalties = _pearson_penalties(reward, biases)
    centred = biases - biases.mean(0)
    rest = reward - biases @ penalties
    # Initial inverse Jacobian: that of the correlations of values instead of ranks.
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

    Bisection ends between two neighbouring numbers, never at zero itself, where tied rewards stay tied; so zero is
    tried as well.
    """
    bias_ranks = rankdata(bias)

    def left(penalty: float) -> float:
        return pearson(rankdata(reward - penalty * bias), bias_ranks)

    start = float(_pearson_penalties(reward, bias[:, None])[0])
    first_step = max(abs(start), float(reward.std() / bias.std()), 1e-12)
    low = high = start
    step = first_step
    while left(low) < 0:
        low, step = low - step, 2 * step
    step = first_step
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
