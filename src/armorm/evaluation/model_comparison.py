"""Compare two models by their results on the same benchmark, example by example.

Examples pair up by content, so the two files may be in any order, and one may hold more than the other; examples of
only one file are counted and excluded. Both models are scored by the same rule on the shared examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from armorm.errors import DataError
from armorm.evaluation.benchmarks import find_benchmark
from armorm.evaluation.bootstrap import PERMUTATIONS, RESAMPLES, Clusters, Difference, differences
from armorm.evaluation.examples import Item
from armorm.evaluation.metrics import LEVELS
from armorm.evaluation.results import Results, number_array
from armorm.files import plain


@dataclass(frozen=True)
class ModelComparison:
    """Differences of two models.

    Attributes:
        benchmark: its name.
        first, second: names of the models.
        shared: number of examples that both results have.
        only_first, only_second: number of examples of one of them.
        differences: of every metric, first minus second.
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
        found = {name: value for name, value in vars(self).items() if name != "differences"}
        for level in LEVELS:
            found[level] = {
                entry.name: {key: value for key, value in vars(entry).items() if key not in ("level", "name")}
                for entry in self.differences
                if entry.level == level
            }
        return plain(found)


def compare_models(
    first: Results, second: Results, *, resamples: int = RESAMPLES, permutations: int = PERMUTATIONS, seed: int = 0
) -> ModelComparison:
    """Compare the results of two models.

    Raises:
        DataError: for results of different benchmarks, or without shared examples or objectives.
    """
    if first.benchmark != second.benchmark:
        raise DataError(f"found results of {first.benchmark} and of {second.benchmark}, expected the same benchmark")
    entries, others = ({entry["key"]: entry for entry in results.examples} for results in (first, second))
    keys = [key for key in entries if key in others]
    if not keys:
        raise DataError("found no example in both results, expected the same data")
    names = [name for name in first.objectives if name in second.objectives]
    if first.objectives and not names:
        raise DataError("found no objective in both results")
    benchmark = find_benchmark(first.benchmark).of_objectives(names, raw=first.raw and second.raw)
    items = [_item(entries[key], first.objectives, names) for key in keys]
    here, there = (
        benchmark.measure(items, [_scores(held[key], results.objectives, names) for key in keys])
        for results, held in ((first, entries), (second, others))
    )
    clusters = Clusters.of_items([item.prompt for item in items], [item.subset for item in items])
    metrics = [m for m in benchmark.metrics(here) if any(group in here and group in there for group in m.groups)]
    return ModelComparison(
        benchmark=first.benchmark,
        first=str(first.model["name"]),
        second=str(second.model["name"]),
        shared=len(keys),
        only_first=len(entries) - len(keys),
        only_second=len(others) - len(keys),
        differences=differences(
            metrics, here, there, clusters, resamples=resamples, permutations=permutations, seed=seed
        ),
    )


def _item(entry: Mapping[str, Any], objectives: Sequence[str], names: Sequence[str]) -> Item:
    item = Item.from_dict(entry)
    if not names:
        return item
    return replace(item, labels=tuple(item.labels[list(objectives).index(name)] for name in names))


def _scores(entry: Mapping[str, Any], objectives: Sequence[str], names: Sequence[str]) -> np.ndarray:
    values = number_array(entry["scores"])
    return values[[list(objectives).index(name) for name in names]] if names else values
