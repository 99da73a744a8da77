"""Objectives: which of them are right alone, which decide, and what the gate's weighing is worth.

In:  the parts of an interpretable model's scores, comparisons, the subset of each item.
Out: accuracy of each objective alone; by subset, how often each is among those that decide wins and
     losses; by source, the gate against its own mean weights there.

What decides (`attribution.deciding`) is found on each item's closest comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from armorm.attribution import deciding
from armorm.evaluation.bootstrap import Clusters, intervals, value_of
from armorm.evaluation.examples import Comparisons
from armorm.evaluation.metrics import Cells, Figure, Measured
from armorm.evaluation.scorers import Parts

ALL = "all"


def alone(parts: Parts, comparisons: Comparisons) -> dict[str, dict[str, float]]:
    """Accuracy of each objective as the only judge: its `reward`, and its `debiased` reward."""
    return {
        name: {
            "reward": comparisons.accuracy(parts.rewards[:, column]),
            "debiased": comparisons.accuracy(parts.debiased[:, column]),
            "mean_weight": float(np.nanmean(parts.weights[:, column])),
        }
        for column, name in enumerate(parts.names)
    }


def decisions(
    parts: Parts, comparisons: Comparisons, scores: np.ndarray, subsets: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """By subset (and of all): wins, losses, and the share of each in which an objective is among the deciding."""
    closest = comparisons.closest(scores)
    mask = deciding(closest.difference(parts.contributions)) if len(closest) else np.zeros((0, len(parts.names)), bool)
    margins = closest.difference(scores)
    groups = np.array([subsets[item] for item in closest.item], dtype=object)
    result: dict[str, dict[str, Any]] = {}
    for subset in (ALL, *sorted({name for name in groups if name})):
        inside = np.ones(len(groups), bool) if subset == ALL else groups == subset
        entry: dict[str, Any] = {}
        for outcome, rows in (("wins", inside & (margins > 0)), ("losses", inside & (margins < 0))):
            shares = mask[rows].mean(0) if rows.any() else np.zeros(len(parts.names))
            ranked = sorted(zip(parts.names, shares.tolist(), strict=True), key=lambda pair: -pair[1])
            entry[outcome] = int(rows.sum())
            entry[f"deciding_{outcome}"] = {name: share for name, share in ranked if share > 0}
        result[subset] = entry
    return result


def gate(
    parts: Parts,
    comparisons: Comparisons,
    scores: np.ndarray,
    subsets: Sequence[str],
    clusters: Clusters,
    rows: Sequence[np.ndarray],
) -> dict[str, dict[str, Any]]:
    """By source (and over all of them): accuracy with the gate, with its mean weights of that source, uniform.

    The mean is over the source's prompts, so the gain says what weighing each prompt by itself adds to knowing
    which source it comes from.

    Args:
        rows: of each item, the row of each response among the scored conversations.
    """
    names = sorted(set(subsets))
    mean_view = np.full(comparisons.items, np.nan)
    weights: dict[str, np.ndarray] = {}
    for name in names:
        items = [item for item, subset in enumerate(subsets) if subset == name]
        weights[name] = _mean_weights(parts, np.concatenate([rows[item] for item in items]))
        here = comparisons.take(np.isin(comparisons.item, items))
        mean_view[items] = here.item_accuracy(parts.debiased @ weights[name])[items]
    uniform = comparisons.item_accuracy(parts.debiased.mean(1))
    accuracy = {"gate": comparisons.item_accuracy(scores), "mean_weights": mean_view, "uniform": uniform}
    cells: Cells = {}
    for name in (ALL, *names):
        inside = np.array([name in (ALL, subset) for subset in subsets], bool)
        for view, values in accuracy.items():
            known = np.flatnonzero(inside & ~np.isnan(values))
            cells[f"source {name}" if name != ALL else ALL, view] = Measured(known, values[known])
    result: dict[str, dict[str, Any]] = {}
    shown = [ALL, *(name for name in names if name or len(names) > 1)]
    groups = {name: ALL if name == ALL else f"source {name}" for name in shown}
    gains = [_gain(group) for group in groups.values()]
    for (name, group), figure, interval in zip(groups.items(), gains, intervals(gains, cells, clusters), strict=True):
        entry: dict[str, Any] = {"prompts": clusters.count(figure, cells)}
        for view in accuracy:
            values = cells[group, view].values
            entry[view] = float(values.mean()) if len(values) else float("nan")
        entry |= {"gain": value_of(figure, cells), "interval": interval}
        if name != ALL:
            entry["weights"] = dict(zip(parts.names, weights[name].tolist(), strict=True))
        result[name] = entry
    return result


def _gain(group: str) -> Figure:
    used = ((group, "gate"), (group, "mean_weights"))
    return Figure("subsets", group, used, lambda totals: totals.mean(used[0]) - totals.mean(used[1]))


def _mean_weights(parts: Parts, rows: np.ndarray) -> np.ndarray:
    """Gating weights (k,) averaged over the distinct prompts of some conversations; NaN where all are refused."""
    rows = rows[rows >= 0]
    rows = rows[parts.prompt_index[rows] >= 0]
    first = np.unique(parts.prompt_index[rows], return_index=True)[1]
    return parts.weights[rows[first]].mean(0) if len(first) else np.full(len(parts.names), np.nan)
