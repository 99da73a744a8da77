"""Several models on the same benchmark: one table with intervals, and paired tests against the best.

All models are measured on the examples that their results share. The best model is that of the benchmark's first metric
(of the level `overall`); every other one is compared with it by the paired permutation test of two results
(`bootstrap.py`), with Holm's correction over the models of a metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from armorm.evaluation.bootstrap import PERMUTATIONS, RESAMPLES, Clusters, Difference, differences, holm, intervals
from armorm.evaluation.metrics import Level, Measurements, Metric
from armorm.evaluation.model_comparison import align
from armorm.evaluation.results import Results
from armorm.files import plain
from armorm.progress import progress


@dataclass(frozen=True)
class Entry:
    """One model on one metric.

    Attributes:
        model: its label.
        value: NaN if the data lacks what it needs.
        interval: 95%, None below 50 effective prompts.
        difference: from the best model of the board, which has None; so are the next two.
        difference_interval: 95%.
        p: two-sided, None below 50 prompts.
        significant: whether p stays below 0.05 after Holm's correction over the models.
    """

    model: str
    value: float
    interval: tuple[float, float] | None
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None
    p: float | None = None
    significant: bool = False


@dataclass(frozen=True)
class MetricBoard:
    """A metric with the entries of all models, in the order of the board.

    Attributes:
        level, name, unit: as in `Metric`.
        prompts: that it is computed from.
        lacking: parts of the published benchmark that the data does not have.
        entries: one per model.
    """

    level: str
    name: str
    unit: str
    prompts: int
    lacking: tuple[str, ...]
    entries: Sequence[Entry]


@dataclass(frozen=True)
class Leaderboard:
    """Models on one benchmark, best first.

    Attributes:
        benchmark: its name.
        shared: number of examples that all results have.
        models: labels, best first.
        kinds: of the models.
        only: number of examples of each model that are not shared.
        refused: number of shared examples with a response that each model did not score.
        metrics: requested metrics.
    """

    benchmark: str
    shared: int
    models: Sequence[str]
    kinds: Sequence[str]
    only: Sequence[int]
    refused: Sequence[int]
    metrics: Sequence[MetricBoard]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        found: dict[str, Any] = plain(asdict(self))
        return found


def leaderboards(
    results: Sequence[Results],
    labels: Sequence[str] = (),
    *,
    level: Level = "overall",
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> list[Leaderboard]:
    """A board of each benchmark, in the order in which the benchmarks occur.

    Args:
        labels: of the results; by default the names of the models. Equal ones of one benchmark are numbered.
        level: of the metrics to show.

    Raises:
        DataError: for results of one benchmark that share no examples or objectives.
    """
    names = list(labels) or [str(found.model["name"]) for found in results]
    grouped: dict[str, list[int]] = {}
    for place, found in enumerate(results):
        grouped.setdefault(found.benchmark, []).append(place)
    boards = []
    with progress("paired tests", len(results), "results") as advance:
        for places in grouped.values():
            chosen = [results[place] for place in places]
            distinct = numbered_labels([names[place] for place in places])
            boards.append(_board(chosen, distinct, level, resamples, permutations, seed))
            advance(len(places))
    return boards


def numbered_labels(labels: Sequence[str]) -> list[str]:
    """The labels, the second and later of equal ones with a number."""
    seen: dict[str, int] = {}
    found = []
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
        found.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return found


def _board(
    results: Sequence[Results], labels: Sequence[str], level: Level, resamples: int, permutations: int, seed: int
) -> Leaderboard:
    aligned = align(results)
    every = aligned.benchmark.metrics(aligned.measurements[0])
    order = _order([metric for metric in every if metric.level == "overall"], aligned.measurements)
    shown = [metric for metric in every if metric.level == level]
    measured = [aligned.measurements[place] for place in order]
    ranges = [intervals(shown, m, aligned.clusters, resamples=resamples, seed=seed) for m in measured]
    compared = [
        differences(shown, m, measured[0], aligned.clusters, resamples=resamples, permutations=permutations, seed=seed)
        for m in measured[1:]
    ]
    models = [labels[place] for place in order]
    metrics = [
        _metric(metric, models, measured, [r[i] for r in ranges], [c[i] for c in compared], aligned.clusters)
        for i, metric in enumerate(shown)
    ]
    keys = {item.key for item in aligned.items}
    unscored = [{entry["key"] for entry in results[place].refused} & keys for place in order]
    return Leaderboard(
        benchmark=results[0].benchmark,
        shared=len(aligned.items),
        models=models,
        kinds=[str(results[place].model["kind"]) for place in order],
        only=[len(results[place].examples) - len(aligned.items) for place in order],
        refused=[len(found) for found in unscored],
        metrics=[board for board in metrics if not all(np.isnan(entry.value) for entry in board.entries)],
    )


def _order(overall: Sequence[Metric], measurements: Sequence[Measurements]) -> list[int]:
    """Places of the models, best first by the first metric that has a value; equal ones in the order given."""
    for metric in overall:
        values = np.array([metric.on(found) for found in measurements])
        if np.isfinite(values).any():
            goodness = np.where(np.isnan(values), -np.inf, -values if metric.unit == "raw" else values)
            return [int(place) for place in np.argsort(-goodness, kind="stable")]
    return list(range(len(measurements)))


def _metric(
    metric: Metric,
    models: Sequence[str],
    measured: Sequence[Measurements],
    ranges: Sequence[tuple[float, float] | None],
    compared: Sequence[Difference],
    clusters: Clusters,
) -> MetricBoard:
    kept = holm({place: found.p for place, found in enumerate(compared, 1) if found.p is not None})
    entries = [Entry(model, metric.on(m), span) for model, m, span in zip(models, measured, ranges, strict=True)]
    for place, found in enumerate(compared, 1):
        entries[place] = replace(
            entries[place],
            difference=found.difference,
            difference_interval=found.interval,
            p=found.p,
            significant=place in kept,
        )
    prompts = clusters.count(metric, measured[0])
    return MetricBoard(metric.level, metric.name, metric.unit, prompts, metric.lacking, entries)
