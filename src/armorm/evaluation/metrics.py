"""Cells and figures: every number of a benchmark is a function of a few sums, so all can be resampled alike.

In:  measured values of items, sorted into cells such as ("llmbar-natural", "right").
Out: `Totals`, sums and counts of the cells, for the data as it is or for many resamples at once; and
     `Figure`, which turns totals into a number of the report.

A scoring rule is written once, on totals whose leading axes may be anything: the figure itself, its
interval, and the difference of two models come from the same lines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse

Cell = tuple[str, str]
Level = Literal["overall", "sections", "subsets"]
Unit = Literal["share", "correlation", "raw"]
LEVELS: tuple[Level, ...] = ("overall", "sections", "subsets")


@dataclass(frozen=True)
class Measured:
    """What was measured in one cell.

    Attributes:
        rows: (m,) int64, items it was measured on.
        values: (m,) float64.
    """

    rows: np.ndarray
    values: np.ndarray


Cells = dict[Cell, Measured]


class Totals:
    """Sums and counts of cells.

    Args:
        index: column of each cell.
        sums, counts: (..., c) float64.
    """

    def __init__(self, index: Mapping[Cell, int], sums: np.ndarray, counts: np.ndarray) -> None:
        self.index, self._sums, self._counts = index, sums, counts
        self._zero = np.zeros(sums.shape[:-1])

    def sum(self, *cells: Cell) -> np.ndarray:
        """Sum (...) over the rows of some cells; 0 for a cell without rows."""
        return sum((self._sums[..., self.index[cell]] for cell in cells if cell in self.index), self._zero)

    def count(self, *cells: Cell) -> np.ndarray:
        """Rows (...) of some cells."""
        return sum((self._counts[..., self.index[cell]] for cell in cells if cell in self.index), self._zero)

    def mean(self, *cells: Cell) -> np.ndarray:
        """Mean (...) over the rows of some cells together; NaN where there are none."""
        return ratio(self.sum(*cells), self.count(*cells))


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Element by element; NaN where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, np.float64), denominator)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator != 0)


def totals(cells: Cells) -> Totals:
    """Totals of the data as it is."""
    index = {cell: column for column, cell in enumerate(cells)}
    sums = np.array([measured.values.sum() for measured in cells.values()], np.float64)
    counts = np.array([len(measured.values) for measured in cells.values()], np.float64)
    return Totals(index, sums, counts)


def cluster_sums(
    cells: Cells, index: Mapping[Cell, int], clusters: np.ndarray, count: int
) -> tuple[scipy.sparse.csr_array, scipy.sparse.csr_array]:
    """Sums and counts of each cluster in each cell, both (count, c).

    Args:
        index: column of each cell; cells that are not in it are left out.
        clusters: (n,) cluster of each item, 0 <= . < count.
    """
    places, values = [], []
    for cell, measured in cells.items():
        if cell in index:
            rows = clusters[measured.rows]
            places.append(np.stack([rows, np.full(len(rows), index[cell])]))
            values.append(measured.values)
    shape = (count, len(index))
    if not places:
        return scipy.sparse.csr_array(shape), scipy.sparse.csr_array(shape)
    where = np.concatenate(places, 1)
    sums = scipy.sparse.coo_array((np.concatenate(values), where), shape).tocsr()
    counts = scipy.sparse.coo_array((np.ones(where.shape[1]), where), shape).tocsr()
    return sums, counts


@dataclass(frozen=True)
class Figure:
    """One number of a report.

    Attributes:
        level: `overall`, `sections` or `subsets`.
        name: within its level.
        cells: what it is made of.
        value: from totals to (...) float64.
        lacking: what the full benchmark has in this figure and the data has not.
        unit: a share (0 to 1), a correlation, or raw units, of which less is better.
    """

    level: Level
    name: str
    cells: tuple[Cell, ...]
    value: Callable[[Totals], np.ndarray]
    lacking: tuple[str, ...] = ()
    unit: Unit = "share"


def mean_figure(level: Level, name: str, *cells: Cell, lacking: tuple[str, ...] = ()) -> Figure:
    """The mean over all rows of some cells."""
    return Figure(level, name, cells, lambda totals: totals.mean(*cells), lacking)


def mean_of(parts: Sequence[np.ndarray], weights: Sequence[float] | None = None) -> np.ndarray:
    """Weighted mean of values (...); those that are NaN leave it, NaN where none is left."""
    stacked = np.stack([np.asarray(part, np.float64) for part in parts])
    given = np.ones(len(parts)) if weights is None else np.asarray(weights, np.float64)
    weight = np.where(np.isnan(stacked), 0.0, given.reshape(-1, *[1] * (stacked.ndim - 1)))
    return ratio((np.nan_to_num(stacked) * weight).sum(0), weight.sum(0))


def by_group(groups: Sequence[str], column: str, values: np.ndarray, rows: Sequence[int] | None = None) -> Cells:
    """Cells of one column, one a group.

    Args:
        groups, values: (m,).
        rows: (m,) items, 0..m-1 by default.
    """
    at = np.arange(len(groups)) if rows is None else np.asarray(rows, np.int64)
    values = np.asarray(values, np.float64)
    names, index = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    order = np.argsort(index, kind="stable")
    bounds = np.searchsorted(index[order], np.arange(len(names) + 1))
    return {
        (str(name), column): Measured(at[order[a:b]], values[order[a:b]])
        for name, a, b in zip(names, bounds, bounds[1:], strict=False)
    }
