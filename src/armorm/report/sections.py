"""Sections of a report: each function returns the values and plots of one part of the page, or None without its data.

Texts of conversations are returned as they are; the page escapes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from markupsafe import Markup
from scipy.special import expit
from scipy.stats import rankdata

from armorm.attribution import turning
from armorm.correlation import spearman, within_groups
from armorm.evaluation.audits.bias import lengths
from armorm.evaluation.benchmarks import BENCHMARKS
from armorm.evaluation.examples import LabelledPairs
from armorm.evaluation.results import seen_in_training
from armorm.explain.verdict import Reason, fold, pair_verdict
from armorm.explain.word_map import word_map
from armorm.heads.regression import ALPHAS
from armorm.report import plots
from armorm.report.evidence import Evidence

MIN_ROWS = 3
POINTS = 400  # drawn in a scatter plot
MISTAKES = 5  # shown of each kind
EXTREMES = 2  # prompts of an objective
EXTREME_OBJECTIVES = 12
MIN_WEIGHT = 0.005  # mean weight of an objective whose extreme prompts are shown
TEXT_LENGTH = 700
MOVED = 2  # objectives of an edit
LEAST_MOVE = 0.005  # of an objective that is shown, standard deviations of the score


def data(evidence: Evidence) -> dict[str, Any] | None:
    """Files, counts, and the number of ratings by objective and file."""
    found: dict[str, Any] = {
        "files": evidence.files,
        "left_out": {**evidence.ratings.skipped, **evidence.pairs.skipped},
        "seen": [f"{BENCHMARKS[kind].title}, {seen_in_training(facts)}" for kind, facts in evidence.seen.items()],
        "conversations": len(evidence.conversations),
        "prompts": len({conversation.prompt_key for conversation in evidence.conversations}),
        "trained": evidence.metrics.get("data") or {},
    }
    if not evidence.files and not evidence.seen and not found["trained"]:
        return None
    examples, names = evidence.ratings.examples, evidence.ratings.names
    files = list(dict.fromkeys(example.origin[0] for example in examples))
    rated = ~np.isnan(np.array([example.item.labels for example in examples]).reshape(len(examples), len(names)))
    number = {file: i for i, file in enumerate(files)}
    origin = np.array([number[example.origin[0]] for example in examples], np.int64)
    rows = np.bincount(origin, minlength=len(files)).tolist()
    found["rated_files"] = files
    found["rated"] = [
        {
            "name": name,
            "cells": list(zip(np.bincount(origin[known], minlength=len(files)).tolist(), rows, strict=True)),
            "missing": float(1 - known.mean()) if len(rated) else 1.0,
        }
        for name, known in zip(names, rated.T, strict=True)
    ]
    found["missing"] = float(1 - rated.mean()) if rated.size else None
    return found


def objectives(evidence: Evidence) -> list[dict[str, Any]]:
    """Each objective: regression report, error by ridge penalty, predicted against given rating."""
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
        if objective.name in evidence.ratings.names and evidence.scored.batch is not None:
            _scatter(entry, evidence, objective.name)
        found.append(entry)
    return found


def _scatter(entry: dict[str, Any], evidence: Evidence, name: str) -> None:
    column, examples = evidence.ratings.names.index(name), evidence.ratings.examples
    given = np.array([example.item.labels[column] for example in examples])
    rows = np.array([at[0] for at in evidence.rows[: len(given)]], np.int64)
    predicted = np.append(evidence.scored.ratings[:, evidence.rm.objectives.position(name)], np.nan)[rows]
    known = ~np.isnan(given) & ~np.isnan(predicted)
    given, predicted = given[known], predicted[known]
    entry["n"] = len(given)
    if len(given) >= MIN_ROWS:
        entry["spearman"] = spearman(predicted, given)
        entry["error"] = float(np.abs(predicted - given).mean())
        drawn, means = thinned(len(given), POINTS), binned_means(predicted, given)
        entry["drawn"] = len(drawn)
        span = (entry["objective"].low, entry["objective"].high)
        entry["cloud"] = plots.predicted_against_given(predicted[drawn], given[drawn], means, span, name)


def correlations(evidence: Evidence) -> dict[str, Any] | None:
    """Spearman correlations of predicted rewards with each other, as predicted and debiased."""
    batch = evidence.scored.batch
    if batch is None or len(evidence.known) < MIN_ROWS:
        return None
    debiased = evidence.scored.debiased[evidence.known] if evidence.scored.is_debiased else None
    return {
        "names": batch.names,
        "n": len(evidence.known),
        "plain": correlation_matrix(batch.rewards[evidence.known]).tolist(),
        "debiased": None if debiased is None else correlation_matrix(debiased).tolist(),
    }


def verbosity(evidence: Evidence) -> dict[str, Any] | None:
    """Correlation of every objective, and of the score, with the length of the response, before and after debiasing."""
    scored, rows = evidence.scored, evidence.known
    biases = evidence.rm.model.config.debiasing.get("against", [])
    if scored.batch is None or len(rows) < MIN_ROWS:
        return None
    sizes = lengths(evidence.conversations)[rows]
    prompts = [evidence.conversations[row].prompt_key for row in rows]
    before, after = (
        length_correlations(np.column_stack([rewards, scores])[rows], sizes, prompts)
        for rewards, scores in ((scored.batch.rewards, scored.before_debiasing), (scored.debiased, scored.scores))
    )
    lines = []
    for place, name in enumerate([*scored.batch.names, "score"]):
        entry: dict[str, Any] = {"name": name, "is_bias": name in biases, "is_score": place == len(scored.batch.names)}
        for level in ("pooled", "within"):
            first = _finite(before[level][place])
            second = None if entry["is_bias"] and scored.is_debiased else _finite(after[level][place])
            entry[level] = {"before": first, "after": second}
        lines.append(entry)
    lines.sort(key=lambda entry: (not entry["is_score"], -abs(entry["pooled"]["before"] or 0.0)))
    found = {"lines": lines, "biases": biases, "debiased": scored.is_debiased, "n": len(rows)}
    return found | {"before": before, "after": after}


def gate(evidence: Evidence) -> dict[str, Any] | None:
    """Mean weights, entropy, weights by kind of prompt, extremes, the learning curve."""
    rm, trained = evidence.rm, evidence.metrics.get("gate") or {}
    reference = rm.reference.get("gating_weights")
    found: dict[str, Any] = {"trained": trained, "curve": None, "prompts": 0}
    found |= {"kinds": {}, "extremes": [], "entropy": None}
    history = [entry for entry in trained.get("history") or [] if entry[2] is not None]
    if len(history) > 1:
        steps, training, held = ([np.nan if row[i] is None else float(row[i]) for row in history] for i in range(3))
        found["curve"] = plots.learning_curve(steps, training, held, float(trained["best_step"]), "the gate")
    names = rm.objectives.names
    if evidence.scored.batch is None or not len(evidence.scored.prompt_rows):
        if reference is None:
            return found if found["curve"] else None
        means = np.array(reference)
    else:
        rows = evidence.scored.prompt_rows
        weights = evidence.scored.batch.gating_weights[rows]
        means = weights.mean(0)
        entropy = entropies(weights)
        most = float(np.log(len(names)))
        found |= {"prompts": len(rows), "weights": weights, "mean_entropy": float(entropy.mean()), "most_entropy": most}
        found["entropy"] = plots.histogram(entropy, (0.0, most), "entropy of the gating weights", "entropy, nats")
        kinds = evidence.prompt_kinds()
        by_kind = mean_by_group(weights, [kinds[row] for row in rows])
        found["kinds"] = {kind: values.tolist() for kind, values in by_kind.items()}
        found["kind_counts"] = {kind: sum(kinds[row] == kind for row in rows) for kind in by_kind}
        found["extremes"] = _extremes(evidence, rows, weights)
    order = np.argsort(-means, kind="stable")
    found["order"] = order.tolist()
    known = rm.objectives.reliability
    found["means"] = [
        {
            "name": names[i],
            "mean": float(means[i]),
            "reference": None if reference is None else float(reference[i]),
            "reliability": _finite(known[i]),
        }
        for i in order
    ]
    return found


def _extremes(evidence: Evidence, rows: np.ndarray, weights: np.ndarray) -> list[dict[str, Any]]:
    used = [i for i in np.argsort(-weights.mean(0), kind="stable") if weights[:, i].mean() >= MIN_WEIGHT]
    texts = [evidence.conversations[row].messages[-2].content[:TEXT_LENGTH] for row in rows]
    found = []
    for column in used[:EXTREME_OBJECTIVES]:
        prompts = [(float(weights[row, column]), texts[row]) for row in extremes(weights, EXTREMES)[column]]
        found.append({"name": evidence.rm.objectives.names[column], "prompts": prompts})
    return found


def perturbations(evidence: Evidence) -> dict[str, Any] | None:
    """Effects of edits of the responses, in two groups, each sorted, with a plot on a common scale."""
    found = evidence.perturbations
    measured = {name: entry for name, entry in found.get("edits", {}).items() if entry["rows"]}
    if not measured:
        return None
    ends = [end for e in measured.values() for end in (e["change"], *(e["of_all"] or ()), *(e["interval"] or ()))]
    low, high = min(-found["tolerance"], *ends), max(found["tolerance"], *ends)
    span = (math.floor(10 * low) / 10, math.ceil(10 * high) / 10)
    groups = []
    for expected, title in (
        ("lower", "Edits that should lower the score"),
        ("no effect", "Edits that should not matter"),
    ):
        entries = {n: e for n, e in measured.items() if e["expected"] == expected}
        entries = dict(sorted(entries.items(), key=lambda item: item[1]["change"]))
        plot = plots.effects(entries, span, found["tolerance"], title) if entries else None
        largest = {
            name: [(o, m) for o, m in entry["objectives"].items() if abs(m["change"]) >= LEAST_MOVE][:MOVED]
            for name, entry in entries.items()
        }
        groups.append({"title": title, "edits": entries, "largest": largest, "plot": plot})
    unscored = sum(entry["unscored"] for entry in found["edits"].values())
    absent = [name for name in found["edits"] if name not in measured]
    return {**found, "groups": groups, "absent": absent, "unscored": unscored}


def scale(evidence: Evidence) -> dict[str, Any]:
    """What one unit of the page's scores, margins and contributions is: `std` and `mean` of the raw scores of `rows`
    reference responses, with their `digest`; a `std` of 1 and nothing else for a model without reference."""
    reference = evidence.rm.reference
    if not reference.get("score_std"):
        return {"std": 1.0, "mean": None, "rows": None, "digest": None}
    return {
        "std": float(reference["score_std"]),
        "mean": float(reference["score_mean"]),
        "rows": reference.get("rows"),
        "digest": reference.get("digest"),
    }


def mistakes(evidence: Evidence) -> dict[str, Any] | None:
    """Pairs ranked wrongly by the largest margins, and ratings with the largest errors."""
    if evidence.scored.batch is None:
        return None
    return {"pairs": _wrong_pairs(evidence), "ratings": _wrong_ratings(evidence)}


def _wrong_pairs(evidence: Evidence) -> list[dict[str, Any]]:
    batch, examples = evidence.scored.batch, evidence.pairs.examples
    assert batch is not None
    pairs = LabelledPairs.of([example.item for example in examples], evidence.rows[len(evidence.ratings.examples) :])
    if not len(pairs):
        return []
    unit = scale(evidence)["std"]
    margins, shares = pairs.difference(evidence.scored.scores) / unit, pairs.difference(batch.contributions) / unit
    chosen = sorted(np.flatnonzero(margins < 0), key=lambda p: margins[p])[:MISTAKES]
    largest = float(np.abs(shares[chosen]).max(initial=0.0)) or 1.0  # all bars are on one scale
    found = []
    for place in chosen:
        rows = (pairs.better[place], pairs.worse[place])
        better, worse = (evidence.conversations[row] for row in rows)
        decides = turning(shares[place])[0]
        shown, folded = fold(shares[place].tolist())
        found.append(
            {
                "place": _place(examples[pairs.item[place]].origin),
                "subset": examples[pairs.item[place]].item.subset,
                "margin": float(margins[place]),
                "verdict": _pair_verdict(evidence, rows, float(margins[place]) * unit, shares[place]),
                "prompt": _shortened(better.messages[-2].content),
                "better": _shortened(better.response),
                "worse": _shortened(worse.response),
                "words": _words(evidence, rows),
                "lengths": (len(better.response), len(worse.response)),
                "shares": [(batch.names[i], float(shares[place][i]), bool(decides[i])) for i in shown],
                "others": (len(folded), float(shares[place][folded].sum())),
                "largest": largest,
            }
        )
    return found


def _pair_verdict(evidence: Evidence, rows: Sequence[int], margin: float, difference: np.ndarray) -> str:
    """The model's verdict on two responses, called A and B."""
    scored, std = evidence.scored, evidence.rm.reference.get("score_std")
    higher = scored.ratings[rows[0]] > scored.ratings[rows[1]]
    names, scale = evidence.rm.objectives.names, scored.margin_scale
    return pair_verdict(
        "A",
        "B",
        margin,
        [Reason(*found) for found in zip(names, difference.tolist(), higher.tolist(), strict=True)],
        probability=None if scale is None else float(expit(scale * margin)),
        margin_in_std=margin / std if std else None,
    )


def _words(evidence: Evidence, rows: Sequence[int]) -> list[Markup]:
    """Maps of the words of two responses; empty for a model that reads the last token alone (it takes too long)."""
    rm, batch = evidence.rm, evidence.scored.batch
    if batch is None or rm.backbone.readout.pooling == "last":
        return []
    conversations = [evidence.conversations[row] for row in rows]
    explained = rm.explanations(rm.score(conversations, same_prompt=True), conversations, same_prompt=True)
    titles = ("A: how the score adds up", "B: how the score adds up")
    parts = [(of.tokens, title) for of, title in zip(explained, titles, strict=True) if of.tokens is not None]
    unit = scale(evidence)["std"]
    return [word_map(replace(tokens, coefficients=tokens.coefficients / unit), title) for tokens, title in parts]


def _wrong_ratings(evidence: Evidence) -> list[dict[str, Any]]:
    examples, names, objectives = evidence.ratings.examples, evidence.ratings.names, evidence.rm.objectives
    if not examples:
        return []
    given = np.array([example.item.labels for example in examples])
    rows = np.array([at[0] for at in evidence.rows[: len(examples)]], np.int64)
    columns = [objectives.position(name) for name in names]
    predicted = np.where(rows[:, None] >= 0, evidence.scored.ratings[rows][:, columns], np.nan)
    spans = np.array([objectives[column].high - objectives[column].low for column in columns])
    errors = np.nan_to_num(np.abs(predicted - given) / spans, nan=-1.0)
    found = []
    for number, column in largest_errors(errors, MISTAKES):
        conversation = evidence.conversations[rows[number]]
        found.append(
            {
                "place": _place(examples[number].origin),
                "name": names[column],
                "given": float(given[number, column]),
                "predicted": float(predicted[number, column]),
                "prompt": _shortened(conversation.messages[-2].content),
                "response": _shortened(conversation.response),
            }
        )
    return found


def _place(origin: tuple[str, int]) -> str:
    return f"{origin[0].rpartition('/')[2]}, row {origin[1]}"


def _shortened(text: str) -> str:
    return text if len(text) <= TEXT_LENGTH else f"{text[:TEXT_LENGTH]} …"


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def correlation_matrix(values: np.ndarray) -> np.ndarray:
    """Spearman correlations (k, k) of the columns of (n, k); NaN if a column is constant."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.atleast_2d(np.corrcoef(rankdata(values, axis=0), rowvar=False))


def length_correlations(values: np.ndarray, lengths: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """Spearman correlation (j,) of each column of (n, j) with the lengths (n,) of the responses, NaN for too few rows.

    Returns:
        `pooled`, and `within` the prompts (n,): each prompt's mean is subtracted, and only prompts with several
        responses count.
    """
    every = np.column_stack([values, lengths])
    inside = within_groups(every, np.unique(np.asarray(prompts), return_inverse=True)[1])
    return {
        level: np.array([spearman(c, rows[:, -1]) if len(c) >= MIN_ROWS else np.nan for c in rows[:, :-1].T])
        for level, rows in (("pooled", every), ("within", inside))
    }


def entropies(weights: np.ndarray) -> np.ndarray:
    """Entropy (m,) of gating weights (m, k), nats."""
    weights = np.asarray(weights, np.float64)
    return -(weights * np.log(np.where(weights > 0, weights, 1.0))).sum(1)


def mean_by_group(values: np.ndarray, groups: Sequence[str]) -> dict[str, np.ndarray]:
    """Mean (k,) of the rows (m, k) of each group, in order of appearance."""
    labels = np.asarray(groups, dtype=object)
    return {str(name): values[labels == name].mean(0) for name in dict.fromkeys(groups)}


def extremes(weights: np.ndarray, most: int) -> list[list[int]]:
    """Rows with the largest weights (m, k) of each column, largest first."""
    return [np.argsort(-column, kind="stable")[:most].tolist() for column in weights.T]


def largest_errors(errors: np.ndarray, most: int) -> list[tuple[int, int]]:
    """Row and column of the largest non-negative errors (n, k), largest first; of equal errors the last cell first."""
    flat = errors.ravel()
    if flat.size > most:  # only cells that may be among them are sorted, since there are as many as ratings
        least = np.partition(flat, -most)[-most]
        above = np.flatnonzero(flat > least)
        cells = np.concatenate([above, np.flatnonzero(flat == least)[len(above) - most :]]).tolist()
    else:
        cells = list(range(flat.size))
    cells = sorted((cell for cell in cells if flat[cell] >= 0), key=lambda cell: (flat[cell], cell), reverse=True)
    return [divmod(cell, errors.shape[1]) for cell in cells]


def binned_means(x: np.ndarray, y: np.ndarray, bins: int = 8) -> list[tuple[float, float, int]]:
    """Mean x, mean y and count of rows in bins of equal count along x."""
    order = np.argsort(x, kind="stable")
    parts = [part for part in np.array_split(order, min(bins, max(len(x) // 5, 1))) if len(part)]
    return [(float(x[part].mean()), float(y[part].mean()), len(part)) for part in parts]


def relative_errors(report: dict[str, Any]) -> list[float]:
    """Validation error of each alpha divided by the variance of the ratings (1 - R^2); 1 for predicting the mean."""
    errors = [float("nan") if error is None else float(error) for error in report["validation_errors"]]
    known = [error for error in errors if np.isfinite(error)]
    if not known or report.get("r2") is None or report["r2"] >= 1:
        return errors
    variance = min(known) / (1 - report["r2"])  # R^2 belongs to the alpha with the smallest error
    return [error / variance for error in errors]


def thinned(count: int, most: int, seed: int = 0) -> np.ndarray:
    """Rows to draw: all, or a seeded random sample of `most`, ascending."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))
