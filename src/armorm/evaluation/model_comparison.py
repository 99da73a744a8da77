"""Comparison: two results on the same benchmark, example by example.

In:  two `Results`.
Out: paired differences of every figure over the examples that both have, with intervals and p-values.

Examples pair up by content, so the files may be in any order, and one may hold more than the other; what
only one has is counted and left out. Both sides are scored anew, by the same rule, on the shared examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from armorm.errors import DataError
from armorm.evaluation.bootstrap import PERMUTATIONS, RESAMPLES, Clusters, Difference, differences
from armorm.evaluation.examples import Item
from armorm.evaluation.metrics import LEVELS, Cells
from armorm.evaluation.registry import find_benchmark
from armorm.evaluation.results import Results
from armorm.files import plain


@dataclass(frozen=True)
class Comparison:
    """How two models differ.

    Attributes:
        benchmark: name.
        first, second: names of the models.
        shared: examples that both results have.
        only_first, only_second: examples of one of them.
        differences: of every figure, first minus second.
    """

    benchmark: str
    first: str
    second: str
    shared: int
    only_first: int
    only_second: int
    differences: Sequence[Difference]

    def to_dict(self) -> dict[str, Any]:
        """Plain values; differences by level and name."""
        found: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("benchmark", "first", "second", "shared", "only_first", "only_second")
        }
        for level in LEVELS:
            found[level] = {
                difference.name: {
                    key: getattr(difference, key)
                    for key in ("first", "second", "difference", "interval", "p", "significant", "prompts", "unit")
                }
                for difference in self.differences
                if difference.level == level
            }
        return plain(found)


def compare(
    first: Results, second: Results, *, resamples: int = RESAMPLES, permutations: int = PERMUTATIONS, seed: int = 0
) -> Comparison:
    """Compare two results.

    Raises:
        DataError: for results of different benchmarks, or without a shared example.
    """
    if first.benchmark != second.benchmark:
        raise DataError(f"results of {first.benchmark} and of {second.benchmark} cannot be compared")
    entries, others = ({entry["key"]: entry for entry in results.examples} for results in (first, second))
    keys = [key for key in entries if key in others]
    if not keys:
        raise DataError("the two results share no example, expected the same data")
    names = [name for name in first.objectives if name in second.objectives]
    if first.objectives and not names:
        raise DataError("the two results share no objective")
    benchmark = find_benchmark(first.benchmark, names, raw=first.raw and second.raw)
    items = [_item(entries[key], first.objectives, names) for key in keys]
    cells = []
    for results, held in ((first, entries), (second, others)):
        scores = [_scores(held[key], results.objectives, names) for key in keys]
        cells.append(benchmark.measure(items, scores))
    clusters = Clusters.of_items([item.prompt for item in items], [item.subset for item in items])
    figures = [figure for figure in benchmark.figures(cells[0]) if _same(figure.cells, cells)]
    return Comparison(
        benchmark=first.benchmark,
        first=str(first.model["name"]),
        second=str(second.model["name"]),
        shared=len(keys),
        only_first=len(entries) - len(keys),
        only_second=len(others) - len(keys),
        differences=differences(
            figures, cells[0], cells[1], clusters, resamples=resamples, permutations=permutations, seed=seed
        ),
    )


def _same(used: Sequence[tuple[str, str]], cells: Sequence[Cells]) -> bool:
    """Whether a figure is made of something in both."""
    return any(cell in cells[0] and cell in cells[1] for cell in used)


def _item(entry: Mapping[str, Any], objectives: Sequence[str], names: Sequence[str]) -> Item:
    item = Item.from_dict(entry)
    if not names:
        return item
    return replace(item, labels=tuple(item.labels[list(objectives).index(name)] for name in names))


def _scores(entry: Mapping[str, Any], objectives: Sequence[str], names: Sequence[str]) -> np.ndarray:
    values = np.array([np.nan if score is None else score for score in entry["scores"]], np.float64)
    return values[[list(objectives).index(name) for name in names]] if names else values
