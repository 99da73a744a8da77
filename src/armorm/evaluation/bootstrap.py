"""Resampling by prompt: intervals of figures, and whether two models differ.

In:  figures, measured cells, the prompt of each item.
Out: 95% intervals, and paired differences with p-values.

Items of one prompt are no independent evidence, so whole prompts are drawn. An interval is the middle
95% of figures over resamples with replacement (percentile bootstrap), drawn within the part of the
benchmark that a prompt stands in, since the sizes of the parts are fixed. A difference is tested by
exchanging the two models on random prompts, which is exact where they are alike. Fewer than
`MIN_PROMPTS` prompts carry neither interval nor test.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from armorm.evaluation.metrics import Cell, Cells, Figure, Totals, cluster_sums, totals

MIN_PROMPTS = 30
RESAMPLES = 1000
PERMUTATIONS = 2000
TAILS = (2.5, 97.5)
_CHUNK = 100
_MOST_UNDEFINED = 0.1
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Clusters:
    """Which items stand together.

    Attributes:
        of: (n,) int64, cluster of each item.
        strata: (m,) int64, part of the benchmark that each cluster is drawn within.
    """

    of: np.ndarray
    strata: np.ndarray

    @classmethod
    def of_items(cls, prompts: Sequence[str], subsets: Sequence[str]) -> Clusters:
        """Clusters by prompt, each in the stratum of the subset that it occurs in first."""
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

    def count(self, figure: Figure, cells: Cells) -> int:
        """Prompts that a figure rests on."""
        rows = rows_of(figure, cells)
        return len(np.unique(self.of[rows])) if len(rows) else 0


def rows_of(figure: Figure, cells: Cells) -> np.ndarray:
    """Items that a figure rests on."""
    rows = [cells[cell].rows for cell in figure.cells if cell in cells]
    return np.unique(np.concatenate(rows)) if rows else np.empty(0, np.int64)


def value_of(figure: Figure, cells: Cells) -> float:
    """A figure on the data as it is; NaN where it lacks what it needs."""
    return float(figure.value(totals(cells)))


def intervals(
    figures: Sequence[Figure], cells: Cells, clusters: Clusters, *, resamples: int = RESAMPLES, seed: int = 0
) -> list[tuple[float, float] | None]:
    """95% intervals of figures; None for one of fewer than `MIN_PROMPTS` prompts, or none at all."""
    shown = [i for i, figure in enumerate(figures) if clusters.count(figure, cells) >= MIN_PROMPTS]
    results: list[tuple[float, float] | None] = [None] * len(figures)
    draws = _figure_draws([figures[i] for i in shown], [cells], clusters, resamples, seed)
    for place, i in enumerate(shown):
        results[i] = _middle(draws[:, 0, place])
    return results


@dataclass(frozen=True)
class Difference:
    """How one figure of two models differs on the same items.

    Attributes:
        level, name: of the figure.
        first, second: its two values.
        difference: first minus second.
        interval: 95% interval of the difference, None below `MIN_PROMPTS` prompts.
        p: two-sided, None below `MIN_PROMPTS` prompts.
        significant: whether p stays below 0.05 after Holm's correction over the figures of its level.
        prompts: that it rests on.
        unit: of the figure.
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
    figures: Sequence[Figure],
    first: Cells,
    second: Cells,
    clusters: Clusters,
    *,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> list[Difference]:
    """Paired differences of figures, measured on the same items by two models."""
    values = [(value_of(figure, first), value_of(figure, second)) for figure in figures]
    prompts = [clusters.count(figure, first) for figure in figures]
    tested = [i for i in range(len(figures)) if prompts[i] >= MIN_PROMPTS and np.isfinite(values[i]).all()]
    chosen = [figures[i] for i in tested]
    draws = _figure_draws(chosen, [first, second], clusters, resamples, seed)
    exchanged = _exchanged_differences(chosen, first, second, clusters, permutations, seed)
    spread: dict[int, tuple[float, float] | None] = {}
    p: dict[int, float] = {}
    for place, i in enumerate(tested):
        spread[i] = _middle(draws[:, 0, place] - draws[:, 1, place])
        observed = abs(values[i][0] - values[i][1])
        p[i] = float((1 + (np.abs(exchanged[:, place]) >= observed - _ROUNDING).sum()) / (1 + permutations))
    significant = {
        i
        for level in dict.fromkeys(figure.level for figure in figures)
        for i in holm({i: p[i] for i in tested if figures[i].level == level})
    }
    return [
        Difference(
            figure.level,
            figure.name,
            *values[i],
            values[i][0] - values[i][1],
            spread.get(i),
            p.get(i),
            i in significant,
            prompts[i],
            figure.unit,
        )
        for i, figure in enumerate(figures)
    ]


def holm(p: dict[int, float], level: float = 0.05) -> set[int]:
    """Keys of the p-values that stay significant when all of them are looked at (Holm's step-down)."""
    kept: set[int] = set()
    for rank, key in enumerate(sorted(p, key=lambda key: p[key])):
        if p[key] > level / (len(p) - rank):
            break
        kept.add(key)
    return kept


def _figure_draws(
    figures: Sequence[Figure], measured: Sequence[Cells], clusters: Clusters, resamples: int, seed: int
) -> np.ndarray:
    """Figures (resamples, models, figures) over resamples of the prompts, the same ones for every model."""
    result = np.full((resamples, len(measured), len(figures)), np.nan)
    if not figures:
        return result
    index = _index(figures, measured)
    sums = [cluster_sums(cells, index, clusters.of, len(clusters.strata)) for cells in measured]
    start = 0
    for weights in _resamples(clusters.strata, resamples, seed):
        end = start + len(weights)
        for model, (values, counts) in enumerate(sums):
            drawn = Totals(index, weights @ values, weights @ counts)
            for place, figure in enumerate(figures):
                result[start:end, model, place] = figure.value(drawn)
        start = end
    return result


def _exchanged_differences(
    figures: Sequence[Figure], first: Cells, second: Cells, clusters: Clusters, permutations: int, seed: int
) -> np.ndarray:
    """Differences (permutations, figures) after exchanging the two models on random prompts."""
    result = np.full((permutations, len(figures)), np.nan)
    if not figures:
        return result
    index = _index(figures, [first, second])
    (sums_a, counts_a), (sums_b, counts_b) = (
        cluster_sums(cells, index, clusters.of, len(clusters.strata)) for cells in (first, second)
    )
    moved_sums, moved_counts = sums_b - sums_a, counts_b - counts_a
    total = [np.asarray(matrix.sum(0)).reshape(-1) for matrix in (sums_a, counts_a, sums_b, counts_b)]
    generator = np.random.default_rng([seed, 1])
    for start in range(0, permutations, _CHUNK):
        end = min(start + _CHUNK, permutations)
        flips = generator.integers(0, 2, (end - start, len(clusters.strata))).astype(np.float64)
        sums, counts = flips @ moved_sums, flips @ moved_counts
        one = Totals(index, total[0] + sums, total[1] + counts)
        other = Totals(index, total[2] - sums, total[3] - counts)
        for place, figure in enumerate(figures):
            result[start:end, place] = figure.value(one) - figure.value(other)
    return result


def _resamples(strata: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
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


def _index(figures: Sequence[Figure], measured: Sequence[Cells]) -> dict[Cell, int]:
    used = dict.fromkeys(cell for figure in figures for cell in figure.cells if any(cell in c for c in measured))
    return {cell: column for column, cell in enumerate(used)}


def _middle(draws: np.ndarray) -> tuple[float, float] | None:
    """The middle 95% of draws; None where too many of them are undefined."""
    defined = draws[np.isfinite(draws)]
    if len(defined) < (1 - _MOST_UNDEFINED) * len(draws) or not len(defined):
        return None
    low, high = np.percentile(defined, TAILS)
    return float(low), float(high)
