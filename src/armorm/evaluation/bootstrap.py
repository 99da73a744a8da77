"""Bootstrap by prompt: confidence intervals of metrics, and paired tests of two models.

Items of one prompt are not independent, so whole prompts are drawn. An interval is the middle 95% of the metric over
resamples with replacement (percentile bootstrap), drawn within each part of the benchmark because the sizes of the
parts are fixed. A difference is tested by exchanging the two models on random prompts (permutation test). Fewer than
`MIN_PROMPTS` prompts give neither interval nor test.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from armorm.evaluation.metrics import Group, GroupSums, Measurements, Metric, cluster_sums

MIN_PROMPTS = 30
RESAMPLES = 1000
PERMUTATIONS = 2000
TAILS = (2.5, 97.5)
_CHUNK = 100
_MOST_UNDEFINED = 0.1
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Clusters:
    """Groups of items that are drawn together.

    Attributes:
        of: (n,) int64, cluster of each item.
        strata: (m,) int64, part of the benchmark that each cluster is drawn within.
    """

    of: np.ndarray
    strata: np.ndarray

    @classmethod
    def of_items(cls, prompts: Sequence[str], subsets: Sequence[str]) -> Clusters:
        """Clusters by prompt, each in the stratum of the subset in which it first occurs."""
        clusters: dict[str, int] = {}
        parts: dict[str, int] = {}
        strata: list[int] = []
        of = np.empty(len(prompts), np.int64)
        for row, (prompt, subset) in enumerate(zip(prompts, subsets, strict=True)):
            part = parts.setdefault(subset, len(parts))
            of[row] = clusters.setdefault(prompt, len(clusters))
            if of[row] == len(strata):
                strata.append(part)
        return cls(of, np.array(strata, np.int64))

    def count(self, metric: Metric, measurements: Measurements) -> int:
        """Number of prompts that a metric is computed from."""
        return len(np.unique(self.of[metric.rows(measurements)]))


def intervals(
    metrics: Sequence[Metric],
    measurements: Measurements,
    clusters: Clusters,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[tuple[float, float] | None]:
    """95% intervals of metrics; None for one of fewer than `MIN_PROMPTS` prompts, or none at all."""
    shown = [i for i, metric in enumerate(metrics) if clusters.count(metric, measurements) >= MIN_PROMPTS]
    results: list[tuple[float, float] | None] = [None] * len(metrics)
    draws = _bootstrap([metrics[i] for i in shown], [measurements], clusters, resamples, seed)
    for place, i in enumerate(shown):
        results[i] = _middle(draws[:, 0, place])
    return results


@dataclass(frozen=True)
class Difference:
    """How one metric of two models differs on the same items.

    Attributes:
        level, name: of the metric.
        first, second: its two values.
        difference: first minus second.
        interval: 95% interval of the difference, None below `MIN_PROMPTS` prompts.
        p: two-sided, None below `MIN_PROMPTS` prompts.
        significant: whether p stays below 0.05 after Holm's correction over the metrics of its level.
        prompts: that it rests on.
        unit: of the metric.
    """

    level: str
    name: str
    first: float
    second: float
    difference: float
    interval: tuple[float, float] | None
    p: float | None
    significant: bool
    prompts: int
    unit: str


def differences(
    metrics: Sequence[Metric],
    first: Measurements,
    second: Measurements,
    clusters: Clusters,
    *,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> list[Difference]:
    """Paired differences of metrics, measured on the same items by two models."""
    values = [(metric.on(first), metric.on(second)) for metric in metrics]
    prompts = [clusters.count(metric, first) for metric in metrics]
    tested = [i for i in range(len(metrics)) if prompts[i] >= MIN_PROMPTS and np.isfinite(values[i]).all()]
    chosen = [metrics[i] for i in tested]
    draws = _bootstrap(chosen, [first, second], clusters, resamples, seed)
    exchanged = _permuted_differences(chosen, first, second, clusters, permutations, seed)
    spread: dict[int, tuple[float, float] | None] = {}
    p: dict[int, float] = {}
    for place, i in enumerate(tested):
        spread[i] = _middle(draws[:, 0, place] - draws[:, 1, place])
        observed = abs(values[i][0] - values[i][1])
        p[i] = float((1 + (np.abs(exchanged[:, place]) >= observed - _ROUNDING).sum()) / (1 + permutations))
    significant = {
        i
        for level in dict.fromkeys(metric.level for metric in metrics)
        for i in holm({i: p[i] for i in tested if metrics[i].level == level})
    }
    return [
        Difference(
            metric.level,
            metric.name,
            *values[i],
            values[i][0] - values[i][1],
            spread.get(i),
            p.get(i),
            i in significant,
            prompts[i],
            metric.unit,
        )
        for i, metric in enumerate(metrics)
    ]


def holm(p: dict[int, float], level: float = 0.05) -> set[int]:
    """Keys of the p-values that stay significant when all of them are looked at (Holm's step-down)."""
    kept: set[int] = set()
    for rank, key in enumerate(sorted(p, key=lambda key: p[key])):
        if p[key] > level / (len(p) - rank):
            break
        kept.add(key)
    return kept


def _bootstrap(
    metrics: Sequence[Metric], measured: Sequence[Measurements], clusters: Clusters, resamples: int, seed: int
) -> np.ndarray:
    """Figures (resamples, models, metrics) over resamples of the prompts, the same ones for every model."""
    result = np.full((resamples, len(measured), len(metrics)), np.nan)
    if not metrics:
        return result
    index = _index(metrics, measured)
    sums = [cluster_sums(measurements, index, clusters.of, len(clusters.strata)) for measurements in measured]
    start = 0
    for weights in _draw_counts(clusters.strata, resamples, seed):
        end = start + len(weights)
        for model, (values, counts) in enumerate(sums):
            drawn = GroupSums(index, weights @ values, weights @ counts)
            for place, metric in enumerate(metrics):
                result[start:end, model, place] = metric.value(drawn)
        start = end
    return result


def _permuted_differences(
    metrics: Sequence[Metric],
    first: Measurements,
    second: Measurements,
    clusters: Clusters,
    permutations: int,
    seed: int,
) -> np.ndarray:
    """Differences (permutations, metrics) after exchanging the two models on random prompts."""
    result = np.full((permutations, len(metrics)), np.nan)
    if not metrics:
        return result
    index = _index(metrics, [first, second])
    (sums_a, counts_a), (sums_b, counts_b) = (
        cluster_sums(measurements, index, clusters.of, len(clusters.strata)) for measurements in (first, second)
    )
    moved_sums, moved_counts = sums_b - sums_a, counts_b - counts_a
    total = [np.asarray(matrix.sum(0)).reshape(-1) for matrix in (sums_a, counts_a, sums_b, counts_b)]
    generator = np.random.default_rng([seed, 1])
    for start in range(0, permutations, _CHUNK):
        end = min(start + _CHUNK, permutations)
        flips = generator.integers(0, 2, (end - start, len(clusters.strata))).astype(np.float64)
        sums, counts = flips @ moved_sums, flips @ moved_counts
        one = GroupSums(index, total[0] + sums, total[1] + counts)
        other = GroupSums(index, total[2] - sums, total[3] - counts)
        for place, metric in enumerate(metrics):
            result[start:end, place] = metric.value(one) - metric.value(other)
    return result


def _draw_counts(strata: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each cluster is drawn, (chunk, m) float64, in chunks."""
    generator = np.random.default_rng([seed, 0])
    members = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    for start in range(0, resamples, _CHUNK):
        rows = min(_CHUNK, resamples - start)
        weights = np.zeros((rows, len(strata)))
        for group in members:
            drawn = group[generator.integers(0, len(group), (rows, len(group)))]
            np.add.at(weights, (np.arange(rows)[:, None], drawn), 1.0)
        yield weights


def _index(metrics: Sequence[Metric], measured: Sequence[Measurements]) -> dict[Group, int]:
    used = dict.fromkeys(group for metric in metrics for group in metric.groups if any(group in c for c in measured))
    return {group: column for column, group in enumerate(used)}


def _middle(draws: np.ndarray) -> tuple[float, float] | None:
    """The middle 95% of draws; None where too many of them are undefined."""
    defined = draws[np.isfinite(draws)]
    if len(defined) < (1 - _MOST_UNDEFINED) * len(draws) or not len(defined):
        return None
    low, high = np.percentile(defined, TAILS)
    return float(low), float(high)
