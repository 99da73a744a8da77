"""Compare two models by their results on the same benchmark, example by example.

Examples pair up by content, so the two files may be in any order, and one may hold more than the other; examples of
only one file are counted and excluded. Both models are scored by the same rule on the shared examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from armorm.errors import ArmormError, DataError
from armorm.evaluation.benchmarks import find_benchmark
from armorm.evaluation.benchmarks.base import Benchmark
from armorm.evaluation.bootstrap import MIN_PROMPTS, PERMUTATIONS, RESAMPLES, Clusters, Difference, differences
from armorm.evaluation.examples import Item
from armorm.evaluation.metrics import LEVELS, Measurements
from armorm.evaluation.results import Results, number_array
from armorm.files import plain


class WorseError(ArmormError):
    """A model that is worse than the one it is compared with."""


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

    @property
    def worse(self) -> list[Difference]:
        """Metrics in which the first model is worse, as of `Difference.is_worse`."""
        return [entry for entry in self.differences if entry.is_worse]

    def to_dict(self) -> dict[str, Any]:
        """Plain values; differences by level and name; `worse` lists `level/name`."""
        found = {name: value for name, value in vars(self).items() if name != "differences"}
        found["worse"] = [f"{entry.level}/{entry.name}" for entry in self.worse]
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
    aligned = align([first, second])
    here, there = aligned.measurements
    groups = set(here) & set(there)
    metrics = [m for m in aligned.benchmark.metrics(here) if any(group in groups for group in m.groups)]
    return ModelComparison(
        benchmark=first.benchmark,
        first=str(first.model["name"]),
        second=str(second.model["name"]),
        shared=len(aligned.items),
        only_first=len(first.examples) - len(aligned.items),
        only_second=len(second.examples) - len(aligned.items),
        differences=differences(
            metrics, here, there, aligned.clusters, resamples=resamples, permutations=permutations, seed=seed
        ),
    )


def require_not_worse(comparisons: Sequence[ModelComparison]) -> None:
    """Check that a model is worse than none of the others in any metric.

    Raises:
        DataError: for a comparison that has no interval, because there are fewer than `MIN_PROMPTS` prompts.
        WorseError: listing each metric that is worse, with both values and the interval of the difference.
    """
    for comparison in comparisons:
        if all(entry.interval is None for entry in comparison.differences):
            raise DataError(
                f"nothing can be checked: found fewer than {MIN_PROMPTS} shared prompts in every metric, expected more",
                file=comparison.second,
            )
    faults = []
    for comparison in comparisons:
        for entry in comparison.worse:
            low, high = entry.interval or (np.nan, np.nan)
            faults.append(
                f"{entry.level} {entry.name} {entry.first:.4f} against {entry.second:.4f} of {comparison.second} "
                f"(95% interval of the difference {low:+.4f} to {high:+.4f})"
            )
    if faults:
        raise WorseError(f"worse: {'; '.join(faults)}")


@dataclass(frozen=True)
class Aligned:
    """Results of several models on the examples that they share.

    Attributes:
        benchmark: of the shared objectives, if its items are rated.
        items: the shared examples.
        measurements: of each model, by the benchmark's rule.
        clusters: prompts of the items.
    """

    benchmark: Benchmark
    items: Sequence[Item]
    measurements: Sequence[Measurements]
    clusters: Clusters


def align(results: Sequence[Results]) -> Aligned:
    """Measure several models on the examples that all results have.

    Raises:
        DataError: for results of different benchmarks, or without shared examples or objectives.
    """
    first = results[0]
    for other in results[1:]:
        if other.benchmark != first.benchmark:
            raise DataError(f"found results of {first.benchmark} and of {other.benchmark}, expected the same benchmark")
    held = [{entry["key"]: entry for entry in found.examples} for found in results]
    keys = [key for key in held[0] if all(key in entries for entries in held[1:])]
    if not keys:
        raise DataError(f"found no example in {_all(results)} results, expected the same data")
    names = [name for name in first.objectives if all(name in found.objectives for found in results[1:])]
    if first.objectives and not names:
        raise DataError(f"found no objective in {_all(results)} results")
    benchmark = find_benchmark(first.benchmark).of_objectives(names, raw=all(found.raw for found in results))
    columns = [[found.objectives.index(name) for name in names] for found in results]
    items = [_item(held[0][key], columns[0]) for key in keys]
    measurements = [
        benchmark.measure(items, [_scores(entries[key], chosen) for key in keys])
        for entries, chosen in zip(held, columns, strict=True)
    ]
    clusters = Clusters.of_items([item.prompt for item in items], [item.subset for item in items])
    return Aligned(benchmark, items, measurements, clusters)


def _all(results: Sequence[Results]) -> str:
    return "both" if len(results) == 2 else f"all {len(results)}"


def _item(entry: Mapping[str, Any], columns: list[int]) -> Item:
    """An item with its labels of some objectives; without columns, of an item that is not rated, with all."""
    item = Item.from_dict(entry)
    return replace(item, labels=tuple(item.labels[column] for column in columns)) if columns else item


def _scores(entry: Mapping[str, Any], columns: list[int]) -> np.ndarray:
    values = number_array(entry["scores"])
    return values[columns] if columns else values
