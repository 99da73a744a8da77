"""Scores of an interpretable model made from given rewards and gating weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from armorm.attribution import coefficients
from armorm.evaluation.scorer import Scored
from armorm.score_batch import ScoreBatch


def scored(
    rewards: np.ndarray,
    weights: np.ndarray,
    *,
    scale: float = 1.0,
    transform: np.ndarray | None = None,
    names: Sequence[str] | None = None,
    prompt_index: np.ndarray | None = None,
) -> Scored:
    """Rewards and gating weights (n, k); each conversation has a prompt of its own unless `prompt_index` is given."""
    rewards, weights = np.array(rewards, float), np.array(weights, float)
    n, k = rewards.shape
    transform = np.eye(k) if transform is None else np.array(transform, float)
    coefficient = coefficients(scale * weights, transform)
    contributions = coefficient * rewards
    batch = ScoreBatch(
        scores=contributions.sum(1),
        rewards=rewards,
        gating_weights=weights,
        gating_output=scale * weights,
        coefficients=coefficient,
        contributions=contributions,
        relative=contributions,
        names=list(names or (f"o{i}" for i in range(k))),
        rows=np.arange(n),
        prompt_index=np.arange(n) if prompt_index is None else np.array(prompt_index),
    )
    return Scored(batch.scores, batch=batch, transform=transform, prompt_features=np.zeros((n, 1)))
