"""Figures of merit: pure functions on arrays.

In:  scores, rewards, ratings, prompts.
Out: numbers, each with the count it rests on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from armorm.correlation import spearman
from armorm.objectives import ObjectiveSet

MIN_ROWS = 3


def pair_accuracy(margins: np.ndarray) -> float:
    """Share of pairs whose chosen side scores strictly higher; a tie is wrong. NaN without pairs."""
    return float((np.asarray(margins) > 0).mean()) if len(margins) else float("nan")


def within_prompt_accuracy(prediction: np.ndarray, rating: np.ndarray, prompts: np.ndarray) -> tuple[float, int]:
    """How often two responses to one prompt with different ratings are put in the right order.

    Args:
        prediction, rating: (n,).
        prompts: (n,) prompt of each row, numbers or text.

    Returns:
        accuracy (a tie of predictions counts half; NaN without pairs), and the number of pairs.
    """
    right, count = 0.0, 0
    order = np.argsort(prompts, kind="stable")
    grouped = prompts[order]
    bounds = np.flatnonzero(grouped[1:] != grouped[:-1]) + 1
    for rows in np.split(order, bounds):
        better = rating[rows][:, None] > rating[rows][None, :]
        if not better.any():
            continue
        difference = (prediction[rows][:, None] - prediction[rows][None, :])[better]
        right += float((difference > 0).sum() + 0.5 * (difference == 0).sum())
        count += len(difference)
    return (right / count if count else float("nan")), count


def rating_figures(
    rewards: np.ndarray, ratings: np.ndarray, objectives: ObjectiveSet, prompts: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Figures of each objective on held-out rated rows.

    Args:
        rewards: (n, k) predicted rewards.
        ratings: (n, k) raw ratings, NaN where missing.
        prompts: (n,) prompt of each row.

    Returns:
        by objective: `n`, `prompts`, `spearman`, `mae` (raw units), `within_prompt` and its `within_prompt_pairs`;
        values are NaN where there are too few rows.
    """
    raw = objectives.to_raw(rewards)
    figures: dict[str, dict[str, Any]] = {}
    for column, objective in enumerate(objectives):
        rows = np.flatnonzero(~np.isnan(ratings[:, column]))
        entry: dict[str, Any] = {
            "n": len(rows),
            "prompts": len(np.unique(prompts[rows])),
            "spearman": float("nan"),
            "mae": float("nan"),
        }
        if len(rows) >= MIN_ROWS:
            # Raw predictions rise with raw ratings whatever the direction, so signs need no care.
            entry["spearman"] = spearman(raw[rows, column], ratings[rows, column])
            entry["mae"] = float(np.abs(raw[rows, column] - ratings[rows, column]).mean())
        accuracy, pairs = within_prompt_accuracy(raw[rows, column], ratings[rows, column], prompts[rows])
        entry["within_prompt"], entry["within_prompt_pairs"] = accuracy, pairs
        figures[objective.name] = entry
    return figures


def pair_figures(
    margins: np.ndarray,
    reward_margins: np.ndarray,
    length_differences: np.ndarray,
    subsets: Sequence[str],
    prompts: Sequence[str],
    names: Sequence[str],
) -> dict[str, Any]:
    """Figures on preference pairs.

    Args:
        margins: (p,) score of chosen minus score of rejected; NaN for a pair that was refused (it counts as wrong).
        reward_margins: (p, k) debiased rewards of chosen minus rejected.
        length_differences: (p,) response tokens of chosen minus rejected.
        subsets, prompts: (p,).
        names: (k,) objectives.

    Returns:
        `accuracy`, `pairs`, `prompts`, `refused`, `ties`; `baselines` (uniform weights, the longer response);
        `objectives` (accuracy of each alone); `longer_right` and `longer_wrong` (accuracy where the longer
        response is the chosen, or the rejected one); `subsets`.
    """
    refused = np.isnan(margins)
    scored = np.where(refused, -np.inf, margins)
    longer, shorter = length_differences > 0, length_differences < 0
    groups = np.asarray(subsets)
    return {
        "accuracy": pair_accuracy(scored),
        "pairs": len(margins),
        "prompts": len(set(prompts)),
        "refused": int(refused.sum()),
        "ties": int((margins == 0).sum()),
        "baselines": {
            "uniform_weights": pair_accuracy(np.where(refused, -np.inf, reward_margins.mean(1))),
            "longer_response": pair_accuracy(length_differences),
        },
        "objectives": {name: pair_accuracy(reward_margins[:, i]) for i, name in enumerate(names)},
        "longer_right": {"accuracy": pair_accuracy(scored[longer]), "pairs": int(longer.sum())},
        "longer_wrong": {"accuracy": pair_accuracy(scored[shorter]), "pairs": int(shorter.sum())},
        "subsets": {
            str(name): {"accuracy": pair_accuracy(scored[groups == name]), "pairs": int((groups == name).sum())}
            for name in sorted(set(subsets))
            if name
        },
    }
