"""The sections of a report: each a dictionary of what its part of the page shows.

In:  `Evidence`.
Out: figures, ranked and shortened; plots; texts as they are (the page escapes them).

A section whose data is absent is None, and the page says so in a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

from armorm.attribution import deciding
from armorm.conversation import Conversation
from armorm.correlation import spearman
from armorm.evaluation.audits.bias import lengths
from armorm.evaluation.examples import Comparisons
from armorm.evaluation.scorers import Parts
from armorm.heads.debiasing import within_groups
from armorm.heads.regression import ALPHAS
from armorm.report import plots
from armorm.report.evidence import Evidence

POINTS = 400  # drawn of a cloud

MISTAKES = 5

EXTREMES = 2

EXTREME_OBJECTIVES = 12

NEEDED = 0.005  # mean weight from which on an objective's extremes are shown

SHOWN_TEXT = 700


def data(evidence: Evidence) -> dict[str, Any] | None:
    """Files, counts, and which objective is rated in which file."""
    found: dict[str, Any] = {
        "files": evidence.files,
        "left_out": evidence.left_out,
        "conversations": len(evidence.conversations),
        "prompts": len({conversation.prompt_key for conversation in evidence.conversations}),
        "trained": evidence.metrics.get("data") or {},
    }
    if not evidence.files and not found["trained"]:
        return None
    files = list(dict.fromkeys(example.origin[0] for example in evidence.ratings))
    rated = np.array([example.item.labels for example in evidence.ratings]).reshape(
        len(evidence.ratings), len(evidence.names)
    )
    origin = np.array([example.origin[0] for example in evidence.ratings], dtype=object)
    found["rated_files"] = files
    found["rated"] = [
        {
            "name": name,
            "cells": [
                (int((~np.isnan(rated[origin == file, column])).sum()), int((origin == file).sum())) for file in files
            ],
            "missing": float(np.isnan(rated[:, column]).mean()) if len(rated) else 1.0,
        }
        for column, name in enumerate(evidence.names)
    ]
    found["missing"] = float(np.isnan(rated).mean()) if rated.size else None
    return found


def objectives(evidence: Evidence) -> list[dict[str, Any]]:
    """Each objective: training figures, error by penalty, predicted against held-out rating."""
    reports = {entry["objective"]: entry for entry in evidence.metrics.get("regression", [])}
    found = []
    for objective in evidence.rm.objectives:
        report = reports.get(objective.name)
        entry: dict[str, Any] = {"objective": objective, "report": report, "alpha_plot": None, "cloud": None, "n": 0}
        if report:
            errors = relative_errors(report)
            alphas = evidence.alphas or list(ALPHAS)
            if len(alphas) == len(errors) > 1 and np.isfinite(errors).any():
                entry["alpha_plot"] = plots.error_by_alpha(alphas, errors, float(report["alpha"]), objective.name)
        if objective.name in evidence.names and evidence.scored.parts is not None:
            _cloud(entry, evidence, objective.name)
        found.append(entry)
    return found


def _cloud(entry: dict[str, Any], evidence: Evidence, name: str) -> None:
    parts, column = evidence.scored.parts, evidence.names.index(name)
    assert parts is not None
    given = np.array([example.item.labels[column] for example in evidence.ratings])
    rows = np.array([at[0] for at in evidence.rows[: len(given)]], np.int64)
    predicted = np.append(parts.raw[:, parts.names.index(name)], np.nan)[rows]
    known = ~np.isnan(given) & ~np.isnan(predicted)
    given, predicted = given[known], predicted[known]
    entry["n"] = len(given)
    if len(given) >= MIN_ROWS:
        entry["spearman"] = spearman(predicted, given)
        entry["error"] = float(np.abs(predicted - given).mean())
        drawn = thinned(len(given), POINTS)
        entry["drawn"] = len(drawn)
        objective = entry["objective"]
        means = binned_means(predicted, given)
        span = (objective.low, objective.high)
        entry["cloud"] = plots.predicted_against_given(predicted[drawn], given[drawn], means, span, name)


def correlations(evidence: Evidence) -> dict[str, Any] | None:
    """Spearman correlations of predicted rewards with each other, as predicted and debiased."""
    parts = evidence.scored.parts
    if parts is None or len(evidence.known) < MIN_ROWS:
        return None
    found: dict[str, Any] = {"names": parts.names, "n": len(evidence.known)}
    found["plain"] = correlation_matrix(parts.rewards[evidence.known]).tolist()
    debiased = correlation_matrix(parts.debiased[evidence.known]).tolist() if parts.is_debiased else None
    return found | {"debiased": debiased}


def verbosity(evidence: Evidence) -> dict[str, Any] | None:
    """Correlation of every objective, and of the score, with the length of the response, before and after debiasing."""
    parts = evidence.scored.parts
    biases = evidence.rm.model.config.debiasing.get("against", [])
    if parts is None or len(evidence.known) < MIN_ROWS:
        return None
    rows = evidence.known
    sizes = lengths(evidence.conversations)[rows]
    prompts = [evidence.conversations[row].prompt_key for row in rows]
    plain_score = (parts.outputs * parts.rewards).sum(1)
    before = length_correlations(np.column_stack([parts.rewards, plain_score])[rows], sizes, prompts)
    after = length_correlations(np.column_stack([parts.debiased, evidence.scored.scores])[rows], sizes, prompts)
    lines = []
    for place, name in enumerate([*parts.names, "score"]):
        entry: dict[str, Any] = {"name": name, "is_bias": name in biases, "is_score": place == len(parts.names)}
        for level in ("pooled", "within"):
            first = _finite(before[level][place])
            second = None if entry["is_bias"] and parts.is_debiased else _finite(after[level][place])
            entry[level] = {"before": first, "after": second}
        lines.append(entry)
    lines.sort(key=lambda entry: (not entry["is_score"], -abs(entry["pooled"]["before"] or 0.0)))
    return {
        "lines": lines,
        "biases": biases,
        "debiased": parts.is_debiased,
        "n": len(rows),
        "before": before,
        "after": after,
    }


def gate(evidence: Evidence) -> dict[str, Any] | None:
    """Mean weights, entropy, weights by kind of prompt, extremes, the learning curve."""
    rm, trained = evidence.rm, evidence.metrics.get("gate") or {}
    reference = rm.reference.get("gating_weights")
    found: dict[str, Any] = {
        "trained": trained,
        "curve": None,
        "prompts": 0,
        "kinds": {},
        "extremes": [],
        "entropy": None,
    }
    history = [entry for entry in trained.get("history") or [] if entry[2] is not None]
    if len(history) > 1:
        steps, training, held = ([np.nan if row[i] is None else float(row[i]) for row in history] for i in range(3))
        found["curve"] = plots.learning_curve(steps, training, held, float(trained["best_step"]), "the gate")
    names = rm.objectives.names
    if evidence.scored.parts is None or not len(evidence.prompts):
        if reference is None:
            return found if found["curve"] else None
        means = np.array(reference)
    else:
        rows = evidence.prompts
        weights = evidence.scored.parts.weights[rows]
        means = weights.mean(0)
        entropy = entropies(weights)
        most = float(np.log(len(names)))
        found |= {"prompts": len(rows), "weights": weights, "mean_entropy": float(entropy.mean()), "most_entropy": most}
        found["entropy"] = plots.histogram(entropy, (0.0, most), "entropy of the gating weights", "entropy, nats")
        kinds = evidence.kind_of()
        by_kind = mean_by_group(weights, [kinds[row] for row in rows])
        found["kinds"] = {kind: values.tolist() for kind, values in by_kind.items()}
        found["kind_counts"] = {kind: sum(kinds[row] == kind for row in rows) for kind in by_kind}
        found["extremes"] = _extremes(evidence, rows, weights)
    order = np.argsort(-means, kind="stable")
    found["order"] = order.tolist()
    found["means"] = [
        {"name": names[i], "mean": float(means[i]), "reference": None if reference is None else float(reference[i])}
        for i in order
    ]
    return found


def _extremes(evidence: Evidence, rows: np.ndarray, weights: np.ndarray) -> list[dict[str, Any]]:
    names = evidence.rm.objectives.names
    needed = [i for i in np.argsort(-weights.mean(0), kind="stable") if weights[:, i].mean() >= NEEDED]
    chosen = extremes(weights, EXTREMES)
    return [
        {
            "name": names[column],
            "prompts": [
                (float(weights[row, column]), evidence.conversations[rows[row]].messages[-2].content[:SHOWN_TEXT])
                for row in chosen[column]
            ],
        }
        for column in needed[:EXTREME_OBJECTIVES]
    ]


def mistakes(evidence: Evidence) -> dict[str, Any] | None:
    """Pairs that are ranked the wrong way by the widest margins, and ratings that are missed by most."""
    if evidence.scored.parts is None:
        return None
    return {"pairs": _wrong_pairs(evidence, evidence.scored.parts), "ratings": _wrong_ratings(evidence)}


def _wrong_pairs(evidence: Evidence, parts: Parts) -> list[dict[str, Any]]:
    rows = evidence.rows[len(evidence.ratings) :]
    comparisons = Comparisons.of([example.item for example in evidence.pairs], rows)
    if not len(comparisons):
        return []
    margins, shares = comparisons.difference(evidence.scored.scores), comparisons.difference(parts.contributions)
    wrong = sorted((p for p in range(len(margins)) if margins[p] < 0), key=lambda p: margins[p])[:MISTAKES]
    found = []
    for place in wrong:
        example = evidence.pairs[comparisons.item[place]]
        better = evidence.conversations[comparisons.better[place]]
        worse = evidence.conversations[comparisons.worse[place]]
        decides = deciding(shares[place][None])[0]
        ranked = [int(column) for column in np.argsort(-np.abs(shares[place]), kind="stable")[:8]]
        found.append(
            {
                "place": f"{example.origin[0].rpartition('/')[2]}, row {example.origin[1]}",
                "subset": example.item.subset,
                "margin": float(margins[place]),
                "prompt": _shortened(better.messages[-2].content),
                "better": _shortened(better.response),
                "worse": _shortened(worse.response),
                "lengths": (len(better.response), len(worse.response)),
                "shares": [(parts.names[i], float(shares[place][i]), bool(decides[i])) for i in ranked],
                "largest": float(np.abs(shares[place]).max()) or 1.0,
            }
        )
    return found


def _wrong_ratings(evidence: Evidence) -> list[dict[str, Any]]:
    parts = evidence.scored.parts
    assert parts is not None
    worst: list[tuple[float, int, int]] = []
    spans = {o.name: o.high - o.low for o in evidence.rm.objectives}
    for number, example in enumerate(evidence.ratings):
        row = evidence.rows[number][0]
        for column, name in enumerate(evidence.names):
            given = example.item.labels[column]
            if row >= 0 and not np.isnan(given) and not np.isnan(parts.raw[row, 0]):
                error = abs(parts.raw[row, parts.names.index(name)] - given) / spans[name]
                worst.append((float(error), number, column))
    found = []
    for _, number, column in sorted(worst, reverse=True)[:MISTAKES]:
        example, row, name = evidence.ratings[number], evidence.rows[number][0], evidence.names[column]
        conversation: Conversation = evidence.conversations[row]
        found.append(
            {
                "place": f"{example.origin[0].rpartition('/')[2]}, row {example.origin[1]}",
                "name": name,
                "given": float(example.item.labels[column]),
                "predicted": float(parts.raw[row, parts.names.index(name)]),
                "prompt": _shortened(conversation.messages[-2].content),
                "response": _shortened(conversation.response),
            }
        )
    return found


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN_TEXT else f"{text[:SHOWN_TEXT]} …"


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


MIN_ROWS = 3


def correlation_matrix(values: np.ndarray) -> np.ndarray:
    """Spearman correlations (k, k) of the columns of (n, k); NaN where a column does not vary."""
    ranks = np.column_stack([rankdata(column) for column in values.T])
    ranks = ranks - ranks.mean(0)
    norms = np.sqrt((ranks**2).sum(0))
    with np.errstate(divide="ignore", invalid="ignore"):
        matrix = (ranks.T @ ranks) / np.outer(norms, norms)
    return np.where(np.outer(norms, norms) > 0, matrix, np.nan)


def length_correlations(values: np.ndarray, lengths: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """Spearman correlation of each column with the length of the response.

    Args:
        values: (n, j).
        lengths: (n,).
        prompts: (n,) prompt of each row.

    Returns:
        `pooled` and `within` (each prompt's mean taken out; NaN where no prompt has several responses), each (j,).
    """
    pooled = np.array([_correlation(column, lengths) for column in values.T])
    groups = np.unique(np.asarray(prompts), return_inverse=True)[1]
    inside = within_groups(np.column_stack([values, lengths]), groups)
    within = np.array([_correlation(column, inside[:, -1]) for column in inside[:, :-1].T])
    return {"pooled": pooled, "within": within}


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    return spearman(first, second) if len(first) >= MIN_ROWS else float("nan")


def entropies(weights: np.ndarray) -> np.ndarray:
    """Entropy (m,) of gating weights (m, k), nats."""
    weights = np.asarray(weights, np.float64)
    return -(weights * np.log(np.where(weights > 0, weights, 1.0))).sum(1)


def mean_by_group(values: np.ndarray, groups: Sequence[str]) -> dict[str, np.ndarray]:
    """Mean (k,) of the rows (m, k) of each group, in order of appearance."""
    labels = np.asarray(groups, dtype=object)
    return {str(name): values[labels == name].mean(0) for name in dict.fromkeys(groups)}


def extremes(weights: np.ndarray, most: int) -> list[list[int]]:
    """Rows of the largest weights (m, k) of each column, the largest first."""
    return [np.argsort(-column, kind="stable")[:most].tolist() for column in weights.T]


def binned_means(x: np.ndarray, y: np.ndarray, bins: int = 8) -> list[tuple[float, float, int]]:
    """Mean x, mean y and count of rows in bins of equal count along x."""
    order = np.argsort(x, kind="stable")
    parts = [part for part in np.array_split(order, min(bins, max(len(x) // 5, 1))) if len(part)]
    return [(float(x[part].mean()), float(y[part].mean()), len(part)) for part in parts]


def relative_errors(report: dict[str, Any]) -> list[float]:
    """Validation error of each alpha as a share of the ratings' variance: 1 - R^2, 1 for predicting the mean.

    Args:
        report: of one objective, as stage 1 keeps it (`validation_errors`, `r2`).
    """
    errors = [float("nan") if error is None else float(error) for error in report["validation_errors"]]
    known = [error for error in errors if np.isfinite(error)]
    if not known or report.get("r2") is None or report["r2"] >= 1:
        return errors
    variance = min(known) / (1 - report["r2"])  # R^2 is that of the alpha with the least error
    return [error / variance for error in errors]


def thinned(count: int, most: int, seed: int = 0) -> np.ndarray:
    """Rows to draw where there are too many to see, at random with a seed, in order."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))
