"""Bias audit: does the model prefer more of something (length, Markdown, lists) whether or not it is better?

A model without the bias has the same accuracy where the response with more of it is the better one and where it is the
worse one, and its win rate is the data's own rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from armorm.conversation import Conversation
from armorm.correlation import spearman, within_groups
from armorm.data.measures import list_items, markdown_elements
from armorm.evaluation.examples import LabelledPairs

_MIN_ROWS = 3


def bias_audit(
    quantity: np.ndarray, views: Mapping[str, np.ndarray], pairs: LabelledPairs, prompts: Sequence[str]
) -> dict[str, Any]:
    """Audit of one quantity.

    Args:
        quantity: (n,) of each response.
        views: scores (n,) by view (as served, before debiasing), NaN if unscored.
        prompts: (n,) prompt of each response.

    Returns:
        `examples_more_is_better`, `examples_more_is_worse` and `more_is_better` (the rate in the data), and by view
        `more_is_better`, `more_is_worse` (accuracies), `more_wins`, `correlation`, `correlation_within_prompts`.
    """
    difference = pairs.difference(quantity)
    right, wrong = pairs.take(difference > 0), pairs.take(difference < 0)
    weight_right, weight_wrong = float(right.weight.sum()), float(wrong.weight.sum())
    total = weight_right + weight_wrong
    found: dict[str, Any] = {
        "examples_more_is_better": len(np.unique(right.item)),
        "examples_more_is_worse": len(np.unique(wrong.item)),
        "more_is_better": weight_right / total if total else float("nan"),
        "views": {},
    }
    for view, scores in views.items():
        # The response with more of it wins if it scores higher, whether it is the better one or the worse one.
        wins = float((right.weight * (right.difference(scores) > 0)).sum())
        wins += float((wrong.weight * (wrong.difference(scores) < 0)).sum())
        known = ~np.isnan(scores)
        found["views"][view] = {
            "more_is_better": right.accuracy(scores),
            "more_is_worse": wrong.accuracy(scores),
            "more_wins": wins / total if total else float("nan"),
            "correlation": _correlation(scores[known], quantity[known]),
            "correlation_within_prompts": _within(scores[known], quantity[known], np.asarray(prompts)[known]),
        }
    return found


def _correlation(scores: np.ndarray, quantity: np.ndarray) -> float:
    return spearman(scores, quantity) if len(scores) >= _MIN_ROWS else float("nan")


def _within(scores: np.ndarray, quantity: np.ndarray, prompts: np.ndarray) -> float:
    """Spearman after subtracting each prompt's mean; NaN if no prompt has several responses."""
    if not len(scores):
        return float("nan")
    groups = np.unique(prompts, return_inverse=True)[1]
    both = within_groups(np.column_stack([scores, quantity]), groups)
    return _correlation(both[:, 0], both[:, 1])


def quantities(conversations: Sequence[Conversation]) -> dict[str, np.ndarray]:
    """Characters, Markdown elements and list items of each response, (n,) float64 each."""
    texts = [conversation.response for conversation in conversations]
    return {
        "length": lengths(conversations),
        "markdown": np.array([markdown_elements(text) for text in texts], np.float64),
        "lists": np.array([list_items(text) for text in texts], np.float64),
    }


def lengths(conversations: Sequence[Conversation]) -> np.ndarray:
    """Characters of each response, (n,) float64."""
    return np.array([len(conversation.response) for conversation in conversations], np.float64)
