"""Scores to figures: values with intervals, baselines, seen prompts and targets; and the time of an explanation."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from armorm import ArmoRM
from armorm.backbone.encoding import encode_rows
from armorm.conversation import Conversation
from armorm.evaluation import baselines
from armorm.evaluation.audits.bias import lengths
from armorm.evaluation.bootstrap import intervals
from armorm.evaluation.metrics import GroupValues, Measurements, Metric
from armorm.evaluation.runner import distinct
from armorm.evaluation.scorers import ArmoRMScorer
from targets.parts import EVERYDAY, EVERYDAY_TEXTS, HARMLESS, MACRO, ODD, POOLED, SPEARMAN, WITHIN, Part

EXPLAIN_TOKENS, EXPLAIN_TIMES = 300, 7
EXPLAIN = f"explain, {EXPLAIN_TOKENS} tokens (s)"


@dataclass(frozen=True)
class Target:
    """What a figure must reach: `value` or more, or less if `lower`; the interval must lie above `above`, if given."""

    value: float
    above: float | None = None
    lower: bool = False

    def met(self, value: float, interval: Sequence[float] | None = None) -> bool:
        if self.lower:
            return value <= self.value
        return value >= self.value and (self.above is None or (interval is not None and interval[0] > self.above))

    def __str__(self) -> str:
        return f"{'<=' if self.lower else '>='} {self.value:.2f}" + ("" if self.above is None else "*")


TARGETS = {
    SPEARMAN: Target(0.43),
    WITHIN: Target(0.78),
    MACRO: Target(0.60),
    POOLED: Target(0.56, above=0.5),
    ODD: Target(0.55),
    **{name: Target(0.95) for name in ("answers-the-question", "gives-an-answer", "fluent", "courteous")},
    EVERYDAY: Target(0.95),
    HARMLESS: Target(0.75),
    EXPLAIN: Target(1.0, lower=True),
}


@dataclass
class Figures:
    """Figures of one part as rows of the table, with what they are computed from."""

    part: Part
    metrics: list[Metric]
    measurements: Measurements
    rows: list[dict[str, Any]]


def score_parts(rm: ArmoRM, parts: Sequence[Part], store: Path | None = None) -> list[Figures]:
    """Figures of every part; each distinct conversation is scored once, and its features are kept in `store`."""
    unique, at = distinct([example for part in parts for example in part.examples])
    scored = ArmoRMScorer(rm, store).score(unique, at)
    # Row -1 is that of an invalid response, column -1 that of an objective that the model lacks.
    ratings = np.pad(scored.ratings, ((0, 1), (0, 1)), constant_values=np.nan)
    column = {name: i for i, name in enumerate(rm.objectives.names)}
    scores, sizes = np.append(scored.scores, np.nan), lengths(unique)
    seen = np.append(rm.seen.find(unique) > 0, False)
    found, start = [], 0
    for part in parts:
        rows = at[start : start + len(part.examples)]
        start += len(part.examples)
        columns = [column.get(name, -1) for name in part.objectives]
        measurements = part.measure([ratings[places[0], columns] if columns else scores[places] for places in rows])
        longest = baselines.by_length(rows, sizes)
        others = {"longest": part.measure(longest), "shortest": part.measure([-values for values in longest])}
        trained_on = np.array([seen[places].any() for places in rows], bool)
        metrics = part.metrics(measurements)
        entries = _entries(part, metrics, measurements, others, trained_on)
        found.append(Figures(part, metrics, measurements, entries))
    return found


def _entries(
    part: Part,
    metrics: Sequence[Metric],
    measurements: Measurements,
    others: Mapping[str, Measurements],
    seen: np.ndarray,
) -> list[dict[str, Any]]:
    clusters, unseen = part.clusters, _without(measurements, seen)
    entries = []
    for metric, interval in zip(metrics, intervals(metrics, measurements, clusters), strict=True):
        rows, value = metric.rows(measurements), metric.on(measurements)
        entry: dict[str, Any] = {
            "name": metric.name,
            "unit": metric.unit,
            "value": value,
            "interval": interval,
            **{name: metric.on(other) for name, other in others.items()},
            "examples": len(rows),
            "prompts": clusters.count(metric, measurements),
            "seen": int(seen[rows].sum()),
            "without_seen": metric.on(unseen) if seen[rows].any() else None,
        }
        if part.kind == "pairs":
            entry["right"] = int(sum(measurements[group].values.sum() for group in metric.groups))
        target = TARGETS.get(metric.name)
        entries.append(entry | (_judged(target, value, interval) if target else {}))
    return entries


def _without(measurements: Measurements, left_out: np.ndarray) -> Measurements:
    """The measurements of the other examples."""
    kept = {group: ~left_out[found.rows] for group, found in measurements.items()}
    return {group: GroupValues(v.rows[kept[group]], v.values[kept[group]]) for group, v in measurements.items()}


def _judged(target: Target, value: float, interval: Sequence[float] | None = None) -> dict[str, Any]:
    return {"target": target.value, "interval_above": target.above, "met": target.met(value, interval)}


def explanation_time(rm: ArmoRM) -> dict[str, Any]:
    """Median seconds of explaining and printing one conversation of `EXPLAIN_TOKENS` tokens, after a first call."""
    words = (EVERYDAY_TEXTS / "README.md").read_text(encoding="utf-8").split()
    used = tokens = 0
    while tokens < EXPLAIN_TOKENS:
        used += 1
        reply = " ".join(words[place % len(words)] for place in range(used))
        conversation = Conversation.from_prompt("What are these files for?", reply)
        tokens = len(encode_rows(rm.backbone.template, [conversation], None).encoded[0])
    seconds = []
    for _ in range(1 + EXPLAIN_TIMES):
        start = time.perf_counter()
        str(rm.explain(conversation))
        seconds.append(time.perf_counter() - start)
    value = float(np.median(seconds[1:]))
    return {"name": EXPLAIN, "unit": "seconds", "value": value, "tokens": tokens} | _judged(TARGETS[EXPLAIN], value)
