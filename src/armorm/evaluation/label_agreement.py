"""How far a judge's ratings agree with people's, and which of its errors are systematic.

Of each objective, over replies that both rated:

    Spearman    rank correlation of the judge's ratings with yours
    kappa       Cohen's kappa with quadratic weights, 1 - mean (a - b)^2 / (its mean for independent a and b); unlike a
                correlation it also falls where the judge is more lenient, or uses another part of the scale
    bias        mean of the judge's rating minus yours, raw units
    length      Spearman correlation of that difference with the length of the reply: above 0, the judge overrates long
                replies

and over all replies `judge and length`, the Spearman correlation of its rating with the length. Of comparisons, over
both orders:

    first       share of decided answers that prefer the reply shown first; 0.5 without position bias
    consistent  share of pairs with the same verdict in both orders
    longer      share of decided pairs in which the longer reply wins
    agreement   share of pairs, rated differently by you, whose better reply wins; a tie counts half

Length is in characters. Intervals (95%) are by prompt (`armorm.evaluation.bootstrap`) and need 50 prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from armorm.conversation import Conversation
from armorm.evaluation.benchmarks.ratings import rank_columns, spearman
from armorm.evaluation.bootstrap import Clusters, intervals
from armorm.evaluation.labelling import Labels
from armorm.evaluation.metrics import GroupSums, GroupValues, Measurements, Metric, Unit, group_sums, ratio

Interval = tuple[float, float]
_RANKS = ("x", "y", "xx", "yy", "xy")
_PRODUCTS = ("a", "b", "aa", "bb", "ab")


@dataclass(frozen=True)
class Measured:
    """A figure; NaN if it cannot be measured.

    Attributes:
        name: of the figure, as above.
        count: replies, or pairs, that it is of.
        interval: 95%, None below 50 prompts.
    """

    name: str
    value: float
    count: int
    interval: Interval | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"value": self.value, "n": self.count, "interval": self.interval}


def rating_agreement(
    judged: np.ndarray, own: np.ndarray, conversations: Sequence[Conversation], *, seed: int = 0
) -> list[Measured]:
    """Agreement on one objective.

    Args:
        judged, own: (n,) raw ratings, NaN where missing.
        conversations: (n,).
    """
    length = np.array([len(conversation.response) for conversation in conversations], np.float64)
    both = np.flatnonzero(~np.isnan(judged) & ~np.isnan(own))
    rated = np.flatnonzero(~np.isnan(judged))
    a, b = judged[both], own[both]
    measurements: Measurements = {}
    for name, rows, x, y in (
        ("Spearman", both, a, b),
        ("length", both, a - b, length[both]),
        ("judge and length", rated, judged[rated], length[rated]),
    ):
        if len(rows):
            measurements |= _columns(name, rows, rank_columns(x, y))
    measurements |= _columns("kappa", both, {"a": a, "b": b, "aa": a * a, "bb": b * b, "ab": a * b})
    measurements |= _columns("bias", both, {"difference": a - b})
    metrics = [
        _metric("Spearman", _RANKS, partial(spearman, name="Spearman"), "correlation"),
        _metric("kappa", _PRODUCTS, quadratic_kappa, "correlation"),
        _metric("bias", ("difference",), lambda sums: sums.mean(("bias", "difference")), "raw"),
        _metric("length", _RANKS, partial(spearman, name="length"), "correlation"),
        _metric("judge and length", _RANKS, partial(spearman, name="judge and length"), "correlation"),
    ]
    prompts = [conversation.prompt_key for conversation in conversations]
    return _measured(metrics, measurements, prompts, seed)


def quadratic_kappa(sums: GroupSums) -> np.ndarray:
    """Cohen's kappa with quadratic weights (...) of a and b, from the sums of `kappa`; NaN if both are constant."""
    a, b, aa, bb, ab = (sums.mean(("kappa", column)) for column in _PRODUCTS)
    return 1 - ratio(aa + bb - 2 * ab, aa + bb - 2 * a * b)


def pair_agreement(
    labels: Labels, own: np.ndarray | None, higher: bool, conversations: Sequence[Conversation], *, seed: int = 0
) -> list[Measured]:
    """Position and length bias of comparisons, and their agreement with own ratings.

    Args:
        own: (n,) own ratings, NaN where missing; None if there are none.
        higher: whether a higher rating is better.
        conversations: (n,).
    """
    values: dict[str, list[tuple[int, float]]] = {name: [] for name in ("first", "consistent", "longer", "agreement")}
    pairs = list(labels.verdicts)
    for place, (i, j) in enumerate(pairs):
        first, second = labels.verdicts[i, j]
        # Two items a pair: one of each order.
        values["first"] += [
            (2 * place + order, float(verdict == (1, -1)[order]))
            for order, verdict in enumerate((first, second))
            if verdict
        ]
        if first is None or second is None:
            continue
        values["consistent"].append((2 * place, float(first == second)))
        net = np.sign(first + second)
        longer = np.sign(len(conversations[i].response) - len(conversations[j].response))
        if net and longer:
            values["longer"].append((2 * place, float(net == longer)))
        difference = 0.0 if own is None else np.nan_to_num(own[i] - own[j]) * (1 if higher else -1)
        if difference:
            values["agreement"].append((2 * place, 0.5 + 0.5 * net * np.sign(difference)))
    measurements: Measurements = {}
    for name, found in values.items():
        rows = np.array([row for row, _ in found], np.int64)
        measurements |= _columns(name, rows, {"share": np.array([value for _, value in found], np.float64)})
    metrics = [_metric(name, ("share",), partial(_share, name=name), "share") for name in values]
    prompts = [conversations[i].prompt_key for i, _ in pairs for _ in range(2)]
    return _measured(metrics, measurements, prompts, seed)


def _share(sums: GroupSums, name: str) -> np.ndarray:
    return sums.mean((name, "share"))


def _columns(name: str, rows: np.ndarray, columns: Mapping[str, np.ndarray]) -> Measurements:
    return {(name, column): GroupValues(rows, values) for column, values in columns.items()}


def _metric(name: str, columns: Sequence[str], value: Callable[[GroupSums], np.ndarray], unit: Unit) -> Metric:
    return Metric("overall", name, tuple((name, column) for column in columns), value, unit=unit)


def _measured(
    metrics: Sequence[Metric], measurements: Measurements, prompts: Sequence[str], seed: int
) -> list[Measured]:
    clusters = Clusters.of_items(prompts, [""] * len(prompts))
    held = [metric for metric in metrics if any(len(measurements[g].rows) for g in metric.groups if g in measurements)]
    found = intervals(held, measurements, clusters, seed=seed)
    sums = group_sums(measurements)
    spread = {metric.name: interval for metric, interval in zip(held, found, strict=True)}
    return [
        Measured(
            metric.name,
            float(metric.value(sums)) if metric in held else np.nan,
            max((len(measurements[group].rows) for group in metric.groups if group in measurements), default=0),
            spread.get(metric.name),
        )
        for metric in metrics
    ]
