"""Metrics of a finished run for metrics.json: held-out ratings and pairs, debiasing, uncertainty.

Ratings and pairs are scored by the rules of the benchmarks of the same name, on features that the run has in its store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from armorm.correlation import spearman
from armorm.data.preferences import PreferencePair
from armorm.data.ratings import OWN_REPLY
from armorm.evaluation.audits.debiasing import (
    MIN_ROWS,
    prompt_kind,
    quantity_behind,
    reference_bias,
    residual_bias,
)
from armorm.evaluation.audits.uncertainty import uncertainty_audit
from armorm.evaluation.benchmarks import ratings as ratings_benchmark
from armorm.evaluation.benchmarks.pairs import strictly_right
from armorm.evaluation.benchmarks.ratings import comparison_columns
from armorm.evaluation.results import NothingHeldOutError
from armorm.evaluation.runner import evaluate
from armorm.heads.debiasing import Debiasing
from armorm.heads.regression import RegressionHead
from armorm.heads.uncertainty import Uncertainty
from armorm.model.remote_code import GatingNetwork
from armorm.objectives import ObjectiveSet
from armorm.progress import say
from armorm.reward_model import ArmoRM
from armorm.training.construct_sets import ConstructReport
from armorm.training.dataset import TrainingData, group_index
from armorm.training.featurize import Corpus, rating_levels
from armorm.training.stages import RatedSplit


def evaluation_metrics(
    model: ArmoRM, data: TrainingData, rated: RatedSplit, corpus: Corpus, debiasing: Debiasing, folder: Path
) -> dict[str, Any]:
    """Metrics on everything that the recipe evaluates on, and on held-out pairs by source.

    Args:
        folder: of the run; benchmark results are written to `benchmarks` in it.
    """
    metrics: dict[str, Any] = {}
    if data.evaluate_ratings and len(rated.test):
        conversations, objectives = rated.test_conversations, rated.table.objectives
        columns = [model.objectives.position(name) for name in objectives.names]
        rewards = model.score_features(corpus.features(conversations)).rewards[:, columns]
        prompts = [conversation.prompt_key for conversation in conversations]
        metrics["ratings"] = rating_metrics(rewards, rated.table.ratings[rated.test], objectives, prompts)
    if data.constructs:
        metrics["constructs"] = construct_metrics(model, data.constructs, rated, corpus)
    sets = dict(data.evaluations)
    for source in dict.fromkeys(pair.source for pair in data.test_pairs):
        sets[f"{source} (test)"] = [pair for pair in data.test_pairs if pair.source == source]
    if sets:
        metrics["pairs"] = {name: _evaluate_pairs(model, pairs, corpus, debiasing) for name, pairs in sets.items()}
    for name, benchmark, sources in data.benchmarks:
        try:
            results = evaluate(benchmark, model, sources, output=folder / "benchmarks" / f"{name}.json", quiet=True)
        except NothingHeldOutError as error:
            say(f"benchmark {name} is not evaluated: {error}")
            continue
        metrics.setdefault("benchmarks", {})[name] = {
            "counts": dict(results.counts),
            "seen": results.data["seen"],
            "figures": [asdict(metric) for metric in results.metrics],
        }
    return metrics


def construct_metrics(
    model: ArmoRM, constructs: Sequence[ConstructReport], rated: RatedSplit, corpus: Corpus
) -> dict[str, dict[str, Any]]:
    """Accuracy of constructed objectives on test rows, whose prompts and inserted texts occur in no training row.

    Returns:
        by objective: `accuracy` between rows of one prompt with different labels (a tie counts half) and their number
        `pairs`; `edits`: the same for replies as they are against each kind of edit that changes the label.
    """
    table, objectives = rated.table, rated.table.objectives
    metrics = {}
    for report in constructs:
        column = objectives.position(report.objective)
        rows = rated.test[~np.isnan(table.ratings[rated.test, column])].tolist()
        conversations = [table.conversations[i] for i in rows]
        labels, edits = table.ratings[rows, column], np.array([table.edits[i] for i in rows], object)
        prompts = np.array([conversation.prompt_key for conversation in conversations], object)
        rewards = np.zeros(0)
        if rows:
            position = model.objectives.position(report.objective)
            rewards = model.score_features(corpus.features(conversations)).rewards[:, position]
        of = {}
        for edit in sorted({*edits} - {OWN_REPLY}):
            some = (edits == OWN_REPLY) | (edits == edit)
            accuracy, pairs = within_prompt_accuracy(rewards[some], labels[some], prompts[some])
            if pairs:
                of[edit] = {"accuracy": accuracy, "pairs": pairs}
        accuracy, pairs = within_prompt_accuracy(rewards, labels, prompts)
        metrics[report.objective] = {"accuracy": accuracy, "pairs": pairs, "edits": of}
    return metrics


def rating_metrics(
    rewards: np.ndarray, ratings: np.ndarray, objectives: ObjectiveSet, prompts: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Agreement of predicted with given ratings, by objective.

    Args:
        rewards: (n, k) predicted rewards.
        ratings: (n, k) raw ratings, NaN where missing.
        prompts: (n,) prompt of each row.

    Returns:
        by objective: `n`, `prompts`, `spearman`, `mae` (raw units), `within_prompt` (accuracy between responses to one
        prompt) and `within_prompt_pairs`; values are NaN if there are too few rows.
    """
    predicted = objectives.to_raw(rewards)
    metrics = {}
    for column, name in enumerate(objectives.names):
        rows = np.flatnonzero(~np.isnan(ratings[:, column]))
        x, y, groups = predicted[rows, column], ratings[rows, column], [prompts[i] for i in rows.tolist()]
        enough = len(rows) >= ratings_benchmark.MIN_ROWS
        accuracy, pairs = within_prompt_accuracy(x, y, groups)
        metrics[name] = {
            "n": len(rows),
            "prompts": len(set(groups)),
            "spearman": spearman(x, y) if enough else float("nan"),
            "mae": float(np.abs(x - y).mean()) if enough else float("nan"),
            "within_prompt": accuracy,
            "within_prompt_pairs": pairs,
        }
    return metrics


def within_prompt_accuracy(
    prediction: np.ndarray, rating: np.ndarray, prompts: Sequence[Any] | np.ndarray
) -> tuple[float, int]:
    """Accuracy between responses to one prompt with different ratings (NaN without any), and the number of such pairs;
    a tie of predictions counts half."""
    right, compared = (values.sum() for values in comparison_columns(prediction, rating, list(prompts)))
    return (float(right / compared) if compared else float("nan")), int(compared)


def _evaluate_pairs(
    model: ArmoRM, pairs: Sequence[PreferencePair], corpus: Corpus, debiasing: Debiasing
) -> dict[str, Any]:
    corpus = corpus.of_pairs
    scored = np.array([pair.chosen in corpus and pair.rejected in corpus for pair in pairs], bool)
    margins = np.full(len(pairs), np.nan)
    reward_margins = np.full((len(pairs), len(model.objectives)), np.nan)
    lengths = np.zeros(len(pairs))
    if scored.any():
        usable = corpus.usable(pairs)
        sides = [pair.chosen for pair in usable], [pair.rejected for pair in usable]
        chosen, rejected = (model.score_features(corpus.features(side)) for side in sides)
        margins[scored] = chosen.scores.astype(np.float64) - rejected.scores
        reward_margins[scored] = debiasing.apply(chosen.rewards.astype(np.float64) - rejected.rewards)
        tokens = [np.array(corpus.response_tokens(side)) for side in sides]
        lengths[scored] = tokens[0] - tokens[1]
    return pair_metrics(margins, reward_margins, lengths, pairs, model.objectives.names)


def pair_metrics(
    margins: np.ndarray,
    reward_margins: np.ndarray,
    length_differences: np.ndarray,
    pairs: Sequence[PreferencePair],
    names: Sequence[str],
) -> dict[str, Any]:
    """Accuracy on p preference pairs; a tie is wrong, and so is a rejected pair.

    Args:
        margins: (p,) score of chosen minus score of rejected; NaN for a pair that was rejected.
        reward_margins: (p, k) debiased rewards of chosen minus rejected.
        length_differences: (p,) response tokens of chosen minus rejected.
        names: (k,) objectives.

    Returns:
        `accuracy`, `pairs`, `prompts`, `refused`, `ties`; `baselines` (uniform weights, the longer response);
        `objectives` (of each alone, ties half right); `longer_right` and `longer_wrong` (accuracy where the longer
        response is the chosen, or the rejected one); `subsets`.
    """
    right = strictly_right(margins, np.zeros(len(margins)))
    subsets = np.array([pair.subset for pair in pairs], object)

    def accuracy(mask: np.ndarray) -> dict[str, Any]:
        return {"accuracy": _mean(right[mask]), "pairs": int(mask.sum())}

    return {
        "accuracy": _mean(right),
        "pairs": len(pairs),
        "prompts": len({pair.prompt_key for pair in pairs}),
        "refused": int(np.isnan(margins).sum()),
        "ties": int((margins == 0).sum()),
        "baselines": {
            "uniform_weights": _mean(reward_margins.mean(1) > 0),
            "longer_response": _mean(length_differences > 0),
        },
        "objectives": {name: _alone(reward_margins[:, column]) for column, name in enumerate(names)},
        "longer_right": accuracy(length_differences > 0),
        "longer_wrong": accuracy(length_differences < 0),
        "subsets": {name: accuracy(subsets == name) for name in sorted(set(subsets)) if name},
    }


def _alone(margins: np.ndarray) -> float:
    """Accuracy of one objective, as in the audit: a tie counts half, NaN for one that is the same in every pair."""
    return float("nan") if (margins == 0).all() else _mean((margins > 0) + 0.5 * (margins == 0))


def _mean(right: np.ndarray) -> float:
    return float(right.mean()) if len(right) else float("nan")


def debiasing_metrics(
    debiasing: Debiasing, rated: RatedSplit, corpus: Corpus, head: RegressionHead, network: GatingNetwork
) -> dict[str, Any] | None:
    """Correlation with the biases before and after, on reference data and on the test rows; None without debiasing."""
    if not debiasing.against:
        return None
    table, test = rated.table, rated.natural_test
    conversations = [table.conversations[i] for i in test]
    metrics = reference_bias(debiasing, table.objectives.names)
    if len(conversations) >= MIN_ROWS:
        tokens = corpus.response_tokens(conversations)
        features = corpus.features(conversations)
        with torch.no_grad():
            output = network(torch.from_numpy(features.prompt)).double().numpy()[features.prompt_index]
        metrics["stability"] = residual_bias(
            debiasing,
            head.predict(features.response),
            output,
            [quantity_behind(table.objectives[i], conversations, tokens) for i in debiasing.against],
            table.objectives.names,
            group_index([conversation.prompt_key for conversation in conversations]),
            [table.sources[i] for i in test],
            [prompt_kind(conversation) for conversation in conversations],
        )
    return metrics


def uncertainty_metrics(
    uncertainty: Uncertainty | None, rated: RatedSplit, corpus: Corpus, head: RegressionHead
) -> dict[str, Any] | None:
    """Calibration of the uncertainty on the test rows; None without uncertainty."""
    if uncertainty is None:
        return None
    features = corpus.responses(rated.test_conversations)
    return uncertainty_audit(
        uncertainty,
        head.predict(features),
        features,
        rated.table.ratings[rated.test],
        rating_levels(rated.table.ratings[rated.train]),
        rated.table.objectives,
        [rated.table.sources[i] for i in rated.test],
    )
