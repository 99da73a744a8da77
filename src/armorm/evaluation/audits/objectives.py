"""Objective audits: which objectives are right alone, which decide, and how much the gate adds to fixed weights.

What decides (`attribution.deciding`) is determined on the pair of each item with the smallest margin.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from armorm.attribution import deciding
from armorm.evaluation.bootstrap import Clusters, intervals
from armorm.evaluation.examples import LabelledPairs
from armorm.evaluation.metrics import GroupValues, Measurements, Metric, group_sums
from armorm.evaluation.scorer import Scored

ALL = "all"


def accuracy_alone(scored: Scored, pairs: LabelledPairs) -> dict[str, dict[str, float]]:
    """Accuracy of each objective used as the only score: its `reward`, and its `debiased` reward.

    A tie counts half. NaN for one that is the same in every pair, as a debiased bias objective is: it prefers nothing.
    """
    assert scored.batch is not None
    found = {}
    for column, name in enumerate(scored.batch.names):
        views = {"reward": scored.batch.rewards[:, column], "debiased": scored.debiased[:, column]}
        found[name] = {
            view: float("nan") if pairs.ties(values) == 1 else pairs.accuracy(values, tie=0.5)
            for view, values in views.items()
        }
        found[name]["mean_weight"] = float(np.nanmean(scored.batch.gating_weights[:, column]))
    return found


def decisions(scored: Scored, pairs: LabelledPairs, subsets: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By subset, and of all: wins, losses, and the share of each in which an objective is among the deciding ones."""
    assert scored.batch is not None
    names = scored.batch.names
    closest = pairs.closest(scored.scores)
    margins = closest.difference(scored.scores)
    mask = deciding(closest.difference(scored.batch.contributions)) if len(closest) else np.zeros((0, len(names)), bool)
    inside = _positions([subsets[item] for item in closest.item])
    inside[ALL] = np.arange(len(closest))
    result: dict[str, dict[str, Any]] = {}
    for subset in (ALL, *sorted(name for name in inside if name not in ("", ALL))):
        within = inside[subset]
        result[subset] = {}
        for outcome, rows in (("wins", within[margins[within] > 0]), ("losses", within[margins[within] < 0])):
            shares = mask[rows].mean(0) if len(rows) else np.zeros(len(names))
            ranked = sorted(zip(names, shares.tolist(), strict=True), key=lambda pair: -pair[1])
            result[subset][outcome] = len(rows)
            result[subset][f"deciding_{outcome}"] = {name: share for name, share in ranked if share > 0}
    return result


def gate(
    scored: Scored, pairs: LabelledPairs, subsets: Sequence[str], clusters: Clusters, rows: Sequence[np.ndarray]
) -> dict[str, dict[str, Any]]:
    """By source, and over all: accuracy with the gate, with its mean weights of that source, and with equal weights.

    The mean is over the source's prompts, so the gain is that of weighting each prompt individually over knowing only
    its source.

    Args:
        subsets: source of each item.
        rows: of each item, the row of each response among the scored conversations.
    """
    assert scored.batch is not None
    items_of = _positions(subsets)
    pairs_of = _positions([subsets[item] for item in pairs.item])
    names = sorted(items_of)
    by_mean = np.full(pairs.items, np.nan)
    weights: dict[str, np.ndarray] = {}
    for name in names:
        weights[name] = _mean_weights(scored, np.concatenate([rows[item] for item in items_of[name]]))
        if name in pairs_of:
            by_mean[items_of[name]] = _accuracy_under(scored, weights[name], pairs.take(pairs_of[name]), items_of[name])
    uniform = pairs.item_accuracy(scored.debiased.mean(1))
    accuracy = {"gate": pairs.item_accuracy(scored.scores), "mean_weights": by_mean, "uniform": uniform}
    groups = {name: ALL if name == ALL else f"source {name}" for name in (ALL, *names)}
    measurements: Measurements = {}
    for name, group in groups.items():
        items = np.arange(pairs.items) if name == ALL else items_of[name]
        for view, values in accuracy.items():
            known = items[~np.isnan(values[items])]
            measurements[group, view] = GroupValues(known, values[known])
    sums = group_sums(measurements)
    shown = [ALL, *(name for name in names if name or len(names) > 1)]
    gains = [_gain(groups[name]) for name in shown]
    result: dict[str, dict[str, Any]] = {}
    for name, gain, interval in zip(shown, gains, intervals(gains, measurements, clusters), strict=True):
        entry: dict[str, Any] = {"prompts": clusters.count(gain, measurements)}
        for view in accuracy:
            values = measurements[groups[name], view].values
            entry[view] = float(values.mean()) if len(values) else float("nan")
        entry |= {"gain": float(gain.value(sums)), "interval": interval}
        if name != ALL:
            entry["weights"] = dict(zip(scored.batch.names, weights[name].tolist(), strict=True))
        result[name] = entry
    return result


def _gain(group: str) -> Metric:
    used = ((group, "gate"), (group, "mean_weights"))
    return Metric("subsets", group, used, lambda sums: sums.mean(used[0]) - sums.mean(used[1]), unit="gain")


def _positions(names: Sequence[str]) -> dict[str, np.ndarray]:
    """Positions of each name, ascending. Sorted once: a search for each name takes too long with thousands of them."""
    number: dict[str, int] = {}
    codes = np.array([number.setdefault(name, len(number)) for name in names], np.int64)
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(len(number) + 1)).tolist()
    return {name: order[low:high] for name, (low, high) in zip(number, pairwise(bounds), strict=True)}


def _mean_weights(scored: Scored, rows: np.ndarray) -> np.ndarray:
    """Gating weights (k,) averaged over the distinct prompts of some conversations; NaN if all are unscored."""
    assert scored.batch is not None and scored.batch.prompt_index is not None
    known = rows[rows >= 0]
    known = known[scored.batch.prompt_index[known] >= 0]
    first = known[np.unique(scored.batch.prompt_index[known], return_index=True)[1]]
    weights = scored.batch.gating_weights
    return weights[first].mean(0) if len(first) else np.full(weights.shape[1], np.nan)


def _accuracy_under(scored: Scored, weights: np.ndarray, pairs: LabelledPairs, items: np.ndarray) -> np.ndarray:
    """Accuracy of some items (ascending) on their pairs, as of `item_accuracy`, under the same weights (k,) for all."""
    used, local = np.unique(np.concatenate([pairs.better, pairs.worse]), return_inverse=True)
    # Row by row, so that equal rewards have equal scores: a matrix product may round its last rows differently.
    values = np.where(used >= 0, (scored.debiased[used] * weights).sum(1), np.nan)
    better, worse = local[: len(pairs)], local[len(pairs) :]
    inside = LabelledPairs(better, worse, np.searchsorted(items, pairs.item), pairs.weight, len(items))
    return inside.item_accuracy(values)
