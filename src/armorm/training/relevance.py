"""Labels of the construct `relevance`: log p(reply | prompt) - log p(reply) by the recipe's backbone.

The backbone is read as it is before any fine-tuning, with its language-model head and all layers, in the recipe's
dtype. Labels are used for training only: the model that is trained predicts them from features. As for measured
objectives, the 1st and 99th percentiles of the training rows are 0 and 1, without clipping.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.encoding import encode_rows
from armorm.backbone.likelihood import load_language_model, reply_log_likelihoods, without_prompt
from armorm.data.constructs import find_construct
from armorm.errors import FitError
from armorm.objectives import Objective, ObjectiveSet
from armorm.progress import progress
from armorm.training.dataset import TrainingData
from armorm.training.recipe import Recipe

LIKELIHOODS = "likelihoods.safetensors"  # in the work folder of a run: log-likelihoods by token ids


def label_relevance(recipe: Recipe, data: TrainingData, cache: Path) -> TrainingData:
    """The data with labels of the constructs that the backbone gives; unchanged without any.

    Rows that are longer than the recipe's limit, and cannot be shortened, keep no label.

    Args:
        cache: file of log-likelihoods that are known from before, which is added to.

    Raises:
        FitError: if the labels do not vary.
        BackboneError: for a backbone without a language-model head.
    """
    names = [report.objective for report in data.constructs if find_construct(report.construct).by_backbone]
    if not names:
        return data
    table, section = data.table, recipe.backbone
    used = np.zeros(len(table), bool)
    used[data.train_rows] = used[data.test_rows] = True
    rows = [i for i in np.flatnonzero(used).tolist() if table.sources[i] in names and table.edits[i]]
    conversations = [table.conversations[i] for i in rows]
    language_model = load_language_model(
        section.model,
        dtype=section.dtype,
        device=section.device,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
    )
    policy = "skip" if section.overflow == "error" else section.overflow
    template, limit = language_model.template, section.max_length
    given, alone = (
        encode_rows(template, some, limit, policy).rows
        for some in (conversations, [without_prompt(conversation) for conversation in conversations])
    )
    pairs: dict[int, tuple[EncodedConversation, EncodedConversation]] = {
        row: (first, second)
        for row, first, second in zip(rows, given, alone, strict=True)
        if first is not None and second is not None
    }
    encoded = [side for sides in zip(*pairs.values(), strict=True) for side in sides]
    with progress("log-likelihoods of replies", sum(map(len, encoded)), "tokens") as advance:
        values = reply_log_likelihoods(language_model, encoded, cache, advance)
    raw = np.full(len(table), np.nan)
    raw[list(pairs)] = values[: len(pairs)] - values[len(pairs) :]

    ratings, objectives = table.ratings.copy(), list(table.objectives)
    sources = np.array(table.sources, object)
    for name in names:
        column = table.objectives.position(name)
        labels = np.where(sources == name, raw, np.nan)
        training = labels[data.train_rows]
        objectives[column] = relevance_objective(name, training[~np.isnan(training)])
        ratings[:, column] = labels
    return replace(data, table=replace(table, ratings=ratings, objectives=ObjectiveSet(objectives)))


def relevance_objective(name: str, training: np.ndarray) -> Objective:
    """The objective of differences of log-likelihoods in nats, scaled by the 1st to 99th percentile of training rows.

    Raises:
        FitError: if they do not vary.
    """
    low, high = (float(q) for q in np.percentile(training, (1, 99))) if len(training) else (0.0, 0.0)
    if not low < high:
        raise FitError(f"constructed objective {name} does not vary over the {len(training)} training rows")
    return Objective(name, "constructed", low, high, high - low, low, "higher")
