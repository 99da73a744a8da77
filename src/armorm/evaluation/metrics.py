"""Benchmark metrics as functions of per-group sums, so they can be bootstrapped without re-scoring.

A group is a part of the benchmark and a quantity measured on its items, such as ("llmbar-natural", "right"). A scoring
rule is written once, on sums whose leading axes may be anything: the metric itself, its bootstrap interval and the
difference of two models are computed by the same lines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse

Group = tuple[str, str]
Level = Literal["overall", "sections", "subsets"]
Unit = Literal["share", "gain", "correlation", "raw"]
LEVELS: tuple[Level, ...] = ("overall", "sections", "subsets")


@dataclass(frozen=True)
class GroupValues:
    """Values of one group.

    Attributes:
        rows: (m,) int64, items that were measured.
        values: (m,) float64.
    """

    rows: np.ndarray
    values: np.ndarray


Measurements = dict[Group, GroupValues]


class GroupSums:
    """Sums and counts of groups.

    Args:
        index: column of each group.
        sums, counts: (..., c) float64.
    """

    def __init__(self, index: Mapping[Group, int], sums: np.ndarray, counts: np.ndarray) -> None:
        self.index, self._sums, self._counts = index, sums, counts
        self._zero = np.zeros(sums.shape[:-1])

    def sum(self, *groups: Group) -> np.ndarray:
        """Sum (...) over the rows of the groups; 0 for a group without rows."""
        return sum((self._sums[..., self.index[group]] for group in groups if group in self.index), self._zero)

    def count(self, *groups: Group) -> np.ndarray:
        """Number of rows (...) of the groups."""
        return sum((self._counts[..., self.index[group]] for group in groups if group in self.index), self._zero)

    def mean(self, *groups: Group) -> np.ndarray:
        """Mean (...) over the rows of all the groups together; NaN if there are none."""
        return ratio(self.sum(*groups), self.count(*groups))


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Elementwise quotient; NaN where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, np.float64), denominator)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator != 0)


def group_sums(measurements: Measurements) -> GroupSums:
    """Sums of the data itself, without resampling."""
    index = {group: column for column, group in enumerate(measurements)}
    sums = np.array([measured.values.sum() for measured in measurements.values()], np.float64)
    counts = np.array([len(measured.values) for measured in measurements.values()], np.float64)
    return GroupSums(index, sums, counts)


def cluster_sums(
    measurements: Measurements, index: Mapping[Group, int], clusters: np.ndarray, count: int
) -> tuple[scipy.sparse.csr_array, scipy.sparse.csr_array]:
    """Sums and counts of each cluster in each group, both (count, c).

    Args:
        index: column of each group; groups without a column are ignored.
        clusters: (n,) cluster of each item, 0 <= . < count.
    """
    places, values = [], []
    for group, measured in measurements.items():
        if group in index:
            rows = clusters[measured.rows]
            places.append(np.stack([rows, np.full(len(rows), index[group])]))
            values.append(measured.values)
    shape = (count, len(index))
    if not places:
        return scipy.sparse.csr_array(shape), scipy.sparse.csr_array(shape)
    where = np.concatenate(places, 1)
    sums = scipy.sparse.coo_array((np.concatenate(values), where), shape).tocsr()
    counts = scipy.sparse.coo_array((np.ones(where.shape[1]), where), shape).tocsr()
    return sums, counts


@dataclass(frozen=True)
class Metric:
    """A named number computed from per-group sums.

    Attributes:
        level: `overall`, `sections` or `subsets`.
        name: unique within its level.
        groups: the groups it is computed from.
        value: from sums to (...) float64.
        lacking: parts of the published benchmark that it covers and the data does not have.
        unit: a share (0 to 1), a difference of shares (-1 to 1), a correlation, or raw units (lower is better).
    """

    level: Level
    name: str
    groups: tuple[Group, ...]
    value: Callable[[GroupSums], np.ndarray]
    lacking: tuple[str, ...] = ()
    unit: Unit = "share"

    def on(self, measurements: Measurements) -> float:
        """The value on the data itself; NaN if a required group is absent."""
        return float(self.value(group_sums(measurements)))

    def rows(self, measurements: Measurements) -> np.ndarray:
        """Distinct items that the metric is computed from, ascending int64."""
        rows = [measurements[group].rows for group in self.groups if group in measurements]
        return np.unique(np.concatenate(rows)) if rows else np.empty(0, np.int64)


def mean_metric(level: Level, name: str, *groups: Group, lacking: tuple[str, ...] = ()) -> Metric:
    """The mean over all rows of the groups."""
    return Metric(level, name, groups, lambda sums: sums.mean(*groups), lacking)


def nan_mean(parts: Sequence[np.ndarray], weights: Sequence[float] | None = None) -> np.ndarray:
    """Weighted mean (...) of arrays (...), ignoring NaN; NaN where all are NaN."""
    stacked = np.stack([np.asarray(part, np.float64) for part in parts])
    given = np.ones(len(parts)) if weights is None else np.asarray(weights, np.float64)
    weight = np.where(np.isnan(stacked), 0.0, given.reshape(-1, *[1] * (stacked.ndim - 1)))
    return ratio((np.nan_to_num(stacked) * weight).sum(0), weight.sum(0))


def by_group(
    names: Sequence[str], quantity: str, values: np.ndarray, rows: Sequence[int] | None = None
) -> Measurements:
    """Measurements of one quantity, split by the name of each row.

    Args:
        names, values: (m,).
        rows: (m,) items, 0..m-1 by default.
    """
    at = np.arange(len(names)) if rows is None else np.asarray(rows, np.int64)
    values = np.asarray(values, np.float64)
    distinct, index = np.unique(np.asarray(names, dtype=object).astype(str), return_inverse=True)
    order = np.argsort(index, kind="stable")
    bounds = np.searchsorted(index[order], np.arange(len(distinct) + 1))
    return {
        (str(name), quantity): GroupValues(at[order[a:b]], values[order[a:b]])
        for name, a, b in zip(distinct, bounds, bounds[1:], strict=False)
    }
