"""Metrics of margins, with bootstrap intervals over prompts and paired tests against one method.

Margins are (seeds, e) per method. A pair counts as correct if its margin is above 0 (a tie is wrong), averaged over
seeds. `own sets` is the mean over the sources of the training pairs that have at least `MIN_PROMPTS` held-out prompts.
p-values are from exchanging the two methods on random prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ablations.methods import Bench
from armorm.evaluation.bootstrap import MIN_PROMPTS, Clusters, differences, intervals
from armorm.evaluation.metrics import Measurements, Metric, by_group, mean_metric, nan_mean

GATE = "gate"
OWN = "own sets"
LONGER = "picks the longer"


def figures(bench: Bench) -> list[Metric]:
    """Accuracy on the own sets, on every benchmark, and how often the longer response is picked."""
    own = list(dict.fromkeys(bench.corpus.test_pairs.sources.tolist()))
    prompts = {name: len(set(bench.tests.prompts[bench.sets == name].tolist())) for name in own}
    large = [name for name in own if prompts[name] >= MIN_PROMPTS] or own
    cells = tuple((name, "right") for name in large)
    benchmarks = list(bench.corpus.benchmarks)
    return [
        Metric("overall", OWN, cells, lambda totals: nan_mean([totals.mean(cell) for cell in cells])),
        *(mean_metric("overall", name, (name, "right")) for name in benchmarks),
        mean_metric("overall", LONGER, *((name, "longer") for name in dict.fromkeys([*large, *benchmarks]))),
    ]


def cells(bench: Bench, margins: np.ndarray) -> Measurements:
    """Per-pair results of one method with margins (seeds, e)."""
    right = (margins > 0).mean(0)
    longer = ((margins > 0) == (bench.tests.longer > 0)).mean(0)
    unequal = np.flatnonzero(bench.tests.longer != 0)
    return by_group(bench.sets.tolist(), "right", right) | by_group(
        bench.sets[unequal].tolist(), "longer", longer[unequal], unequal.tolist()
    )


def measure(bench: Bench, margins: Mapping[str, np.ndarray], against: str) -> dict[str, Any]:
    """All metrics of every method, and their differences from the method `against`."""
    wanted = figures(bench)
    clusters = Clusters.of_items(bench.tests.prompts.tolist(), bench.sets.tolist())
    measured = {name: cells(bench, values) for name, values in margins.items()}
    table: dict[str, Any] = {}
    for name, values in margins.items():
        spread = intervals(wanted, measured[name], clusters)
        entry: dict[str, Any] = {
            figure.name: {
                "value": figure.on(measured[name]),
                "interval": interval,
                "seeds": [figure.on(cells(bench, values[seed : seed + 1])) for seed in range(len(values))],
            }
            for figure, interval in zip(wanted, spread, strict=True)
        }
        if name != against:
            found = differences(wanted, measured[name], measured[against], clusters)
            entry["against"] = {d.name: {"difference": d.difference, "interval": d.interval, "p": d.p} for d in found}
        table[name] = entry
    return table


def measure_domains(bench: Bench, table: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy by source and method with intervals, and the difference of both gates from uniform weights."""
    result = {}
    for source, entry in table.items():
        rows = entry["rows"]
        clusters = Clusters.of_items(bench.tests.prompts[rows].tolist(), [source] * len(rows))
        figure = mean_metric("overall", source, (source, "right"))
        measured = {
            way: by_group([source] * len(rows), "right", np.asarray(right, np.float64))
            for way, right in entry["right"].items()
        }
        found: dict[str, Any] = {
            way: {"value": figure.on(part), "interval": intervals([figure], part, clusters)[0]}
            for way, part in measured.items()
        }
        for way in ("gate", "gate that never saw it"):
            d = differences([figure], measured[way], measured["uniform weights"], clusters)[0]
            found[way]["over_uniform"] = {"difference": d.difference, "interval": d.interval, "p": d.p}
        result[source] = {
            "pairs": len(rows),
            "prompts": len(clusters.strata),
            **found,
            "weights": entry["weights"],
        }
    return result
