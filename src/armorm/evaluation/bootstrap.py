"""Bootstrap by prompt: confidence intervals of metrics, and paired tests of two models.

Items of one prompt are not independent, so whole prompts are drawn, within each subset of the benchmark because the
sizes of the subsets are fixed. A subset of fewer than `SMALL_SUBSET` prompts says nothing about its own spread (one
prompt drawn from one has none), so its draws come from all small subsets together.

A share (an accuracy) gets a Wilson interval at its effective number of prompts: how many prompts of equal weight would
have the same variance. With equal weights that is their number; a mean of subsets weighted by fixed counts has fewer,
many independent items per prompt have more. The percentile bootstrap alone covers 75% instead of 95% at an accuracy of
0.95 and 30 prompts. Differences, correlations and raw errors get the percentile bootstrap. `benchmarks/coverage.py`
measures the coverage.

A difference is tested by exchanging the two models on random prompts (permutation test). Fewer than `MIN_PROMPTS`
prompts, or effective prompts, give neither interval nor test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from armorm.evaluation.metrics import Group, GroupSums, Measurements, Metric, cluster_sums, group_sums

MIN_PROMPTS = 50
SMALL_SUBSET = 8
RESAMPLES = 1000
PERMUTATIONS = 2000
TAILS = (2.5, 97.5)
_CHUNK = 100
_NORMAL = 1.959963984540054  # 97.5% quantile of the standard normal distribution
# Minority events below which the design effect is mostly taken as 1: a variance estimated from few events is noise.
_ENOUGH_EVENTS = 10
_DESIGN_ERROR = 0.1  # of the measured number of effective prompts, at 1,000 resamples
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
    """95% intervals of metrics; None for a metric of fewer than `MIN_PROMPTS` effective prompts."""
    shown = [i for i, metric in enumerate(metrics) if clusters.count(metric, measurements) >= MIN_PROMPTS]
    chosen = [metrics[i] for i in shown]
    bootstrap = _Bootstrap(chosen, [measurements], clusters, seed)
    design = bootstrap.design_prompts(resamples)
    draws = bootstrap.draws(resamples)[:, 0]
    prompts = [clusters.count(metric, measurements) for metric in chosen]
    sums = group_sums(measurements)
    results: list[tuple[float, float] | None] = [None] * len(metrics)
    for place, i in enumerate(shown):
        if design[place] < (1 - _DESIGN_ERROR) * MIN_PROMPTS:
            continue
        value = float(metrics[i].value(sums))
        if metrics[i].unit == "share":
            items = len(metrics[i].rows(measurements))
            effective = design[place] if np.isfinite(design[place]) else prompts[place]
            results[i] = _share_interval(value, draws[:, place], effective, items)
        else:
            results[i] = _middle(draws[:, place])
            if metrics[i].unit == "gain":
                results[i] = _widened(results[i], value, prompts[place])
    return results


def wilson(share: float, prompts: float) -> tuple[float, float]:
    """95% Wilson score interval of a share, 0 to 1, of a possibly fractional number of prompts."""
    share, square = min(max(share, 0.0), 1.0), _NORMAL**2 / prompts
    half = _NORMAL * np.sqrt(share * (1 - share) / prompts + square / (4 * prompts))
    low, high = ((share + square / 2 + side * half) / (1 + square) for side in (-1, 1))
    return max(float(low), 0.0), min(float(high), 1.0)


def _share_interval(share: float, draws: np.ndarray, design: float, items: int) -> tuple[float, float] | None:
    """Wilson interval at the number of prompts that the design gives, corrected by the variance of the draws.

    The correction (design effect) is shrunk to 1, on a log scale, if few items are in the minority.
    """
    if not np.isfinite(share) or np.isfinite(draws).mean() < 1 - _MOST_UNDEFINED:
        return None
    spread = share * (1 - share)
    effect = 1.0
    if spread > 0:
        trust = 4 * items * spread / (4 * items * spread + _ENOUGH_EVENTS)
        effect = max(float(np.nanvar(draws)) * design / spread, 1 - trust) ** trust
    return wilson(share, design / effect)


def _widened(interval: tuple[float, float] | None, gain: float, prompts: int) -> tuple[float, float] | None:
    """Interval of a paired difference of shares, at least as wide as if half a prompt more differed in either way.

    (The pseudo-counts of Agresti and Min, 2005: where two models agree on every prompt, resampling shows no spread.)
    """
    if interval is None:
        return None
    half = _NORMAL / (prompts + 2)
    return max(min(interval[0], gain - half), -1.0), min(max(interval[1], gain + half), 1.0)


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

    @property
    def is_worse(self) -> bool:
        """Whether the first is worse beyond the interval, and significantly after Holm's correction."""
        if self.interval is None or not self.significant:
            return False
        return self.interval[0] > 0 if self.unit == "raw" else self.interval[1] < 0


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
    sums = group_sums(first), group_sums(second)
    values = [(float(metric.value(sums[0])), float(metric.value(sums[1]))) for metric in metrics]
    prompts = [clusters.count(metric, first) for metric in metrics]
    finite = [i for i in range(len(metrics)) if prompts[i] >= MIN_PROMPTS and np.isfinite(values[i]).all()]
    design = _Bootstrap([metrics[i] for i in finite], [first, second], clusters, seed).design_prompts(resamples)
    tested = [i for i, number in zip(finite, design, strict=True) if number >= (1 - _DESIGN_ERROR) * MIN_PROMPTS]
    chosen = [metrics[i] for i in tested]
    draws = _Bootstrap(chosen, [first, second], clusters, seed).draws(resamples)
    exchanged = _permuted_differences(chosen, first, second, clusters, permutations, seed)
    spread: dict[int, tuple[float, float] | None] = {}
    p: dict[int, float] = {}
    for place, i in enumerate(tested):
        spread[i], observed = _middle(draws[:, 0, place] - draws[:, 1, place]), values[i][0] - values[i][1]
        if metrics[i].unit == "share":
            spread[i] = _widened(spread[i], observed, prompts[i])
        p[i] = float((1 + (np.abs(exchanged[:, place]) >= abs(observed) - _ROUNDING).sum()) / (1 + permutations))
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


class _Bootstrap:
    """Metrics over resamples of whole prompts, the same prompts for every model."""

    def __init__(
        self, metrics: Sequence[Metric], measured: Sequence[Measurements], clusters: Clusters, seed: int
    ) -> None:
        self.metrics, self.seed, self.clusters = metrics, seed, len(clusters.strata)
        self.index = _index(metrics, measured)
        self.sums = [cluster_sums(measurements, self.index, clusters.of, self.clusters) for measurements in measured]
        order = np.argsort(clusters.strata, kind="stable")
        subsets = np.split(order, np.flatnonzero(np.diff(clusters.strata[order])) + 1)
        self.large = [rows for rows in subsets if len(rows) >= SMALL_SUBSET]
        small = [rows for rows in subsets if 0 < len(rows) < SMALL_SUBSET]
        self.pools = self._pools(small, self._groups(clusters.strata)) if small else []

    def _pools(self, subsets: Sequence[np.ndarray], held: Mapping[int, list[Group]]) -> list[_Pool]:
        """Small subsets whose groups hold the same quantities, pooled; one alone is drawn like a large one."""
        groups_of = [held.get(int(rows[0]), []) for rows in subsets]
        names = [{group[0] for group in groups} for groups in groups_of]
        common = set.intersection(*names) if len(names) > 1 else set()
        alike: dict[tuple[Group, ...], list[tuple[np.ndarray, list[int]]]] = {}
        for rows, groups in zip(subsets, groups_of, strict=True):
            # Groups under the subset's own name are told apart by their quantity alone.
            kinds = tuple(group if group[0] in common else ("", group[1]) for group in groups)
            alike.setdefault(kinds, []).append((rows, [self.index[group] for group in groups]))
        self.large += [members[0][0] for members in alike.values() if len(members) == 1]
        return [_Pool(self.sums, members) for members in alike.values() if len(members) > 1]

    def _groups(self, strata: np.ndarray) -> dict[int, list[Group]]:
        """The groups that each subset has items in, sorted, by the subset's first prompt."""
        pairs = np.concatenate(
            [
                np.stack([np.repeat(strata, np.diff(counts.indptr)), counts.indices.astype(np.int64)])
                for _, counts in self.sums
            ],
            1,
        )
        _, firsts = np.unique(strata, return_index=True)
        first_of = dict(zip(strata[firsts].tolist(), firsts.tolist(), strict=True))
        names = list(self.index)
        found: dict[int, list[Group]] = {}
        for stratum, column in np.unique(pairs, axis=1).T.tolist():
            found.setdefault(first_of[stratum], []).append(names[column])
        return {first: sorted(groups) for first, groups in found.items()}

    def draws(self, resamples: int) -> np.ndarray:
        """Metrics (resamples, models, metrics)."""
        result = np.full((resamples, len(self.sums), len(self.metrics)), np.nan)
        generator = np.random.default_rng([self.seed, 0])
        for start in range(0, resamples if self.metrics else 0, _CHUNK):
            size = min(_CHUNK, resamples - start)
            counts = np.zeros((size, self.clusters))
            for rows in self.large:
                drawn = rows[generator.integers(0, len(rows), (size, len(rows)))]
                np.add.at(counts, (np.arange(size)[:, None], drawn), 1.0)
            totals = [[counts @ part for part in pair] for pair in self.sums]
            for pool in self.pools:
                pool.add_draws(totals, size, generator)
            for model, (values, rows) in enumerate(totals):
                sums = GroupSums(self.index, values, rows)
                for place, metric in enumerate(self.metrics):
                    result[start : start + size, model, place] = metric.value(sums)
        return result

    def design_prompts(self, resamples: int) -> np.ndarray:
        """(metrics,) number of prompts of equal weight at which a share would vary as much as this metric does.

        Measured by replacing every prompt's values by a fair coin, whose share of n prompts has variance 1 / (4 n);
        infinite for a metric that coins do not change, such as a quotient of two sums.
        """
        counts = self.sums[0][1]
        total = np.asarray(counts.sum(0)).reshape(1, -1)
        generator = np.random.default_rng([self.seed, 2])
        found = []
        for start in range(0, resamples if self.metrics else 0, _CHUNK):
            coins = generator.integers(0, 2, (min(_CHUNK, resamples - start), self.clusters)).astype(np.float64)
            sums = GroupSums(self.index, coins @ counts, np.repeat(total, len(coins), 0))
            values = [np.broadcast_to(metric.value(sums), len(coins)) for metric in self.metrics]
            found.append(np.stack(values, 1))
        if not found:
            return np.empty(0)
        variance = np.concatenate(found).var(0)
        return np.divide(0.25, variance, out=np.full(len(variance), np.inf), where=variance > 0)


class _Pool:
    """Small subsets drawn from together: a prompt drawn for one takes the place of one of its own."""

    def __init__(self, sums: Sequence[tuple[Any, Any]], members: Sequence[tuple[np.ndarray, list[int]]]) -> None:
        self.targets = [(np.array(columns), len(rows)) for rows, columns in members]
        self.values = [
            [np.concatenate([part[rows].toarray()[:, columns] for rows, columns in members]) for part in pair]
            for pair in sums
        ]

    def add_draws(self, totals: list[list[np.ndarray]], size: int, generator: np.random.Generator) -> None:
        """Add what is drawn for every subset to the totals (size, c) of each model."""
        for columns, count in self.targets:
            drawn = generator.integers(0, len(self.values[0][0]), (size, count))
            for model, pair in enumerate(self.values):
                for kind, values in enumerate(pair):
                    totals[model][kind][:, columns] += values[drawn].sum(1)


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
