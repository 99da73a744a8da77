"""Stages that go beyond the paper, each absent unless the recipe asks for it: joint heads, quantile heads.

In:  what the stages before them made.
Out: arrays and a report, in the form in which the pipeline keeps a stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from armorm.heads.debias import Debiasing
from armorm.heads.gating import GatingNetwork
from armorm.heads.joint import JointPairs, fit_joint
from armorm.heads.quantile import fit_quantiles
from armorm.heads.regression import RegressionHead
from armorm.training.recipe import JointSection, QuantilesSection

_HEAD_ARRAYS = ("weight", "bias", "fold_weight", "fold_bias")


@torch.no_grad()
def pair_coefficients(network: GatingNetwork, debiasing: Debiasing, prompt_features: np.ndarray) -> np.ndarray:
    """What the score multiplies each reward by (p, k), for the prompt features (p, d) of pairs."""
    output = network(torch.from_numpy(prompt_features)).double().numpy()
    return output @ debiasing.matrix.T


def joint_stage(
    head: RegressionHead,
    features: np.ndarray,
    ratings: np.ndarray,
    folds: np.ndarray,
    pairs: JointPairs,
    section: JointSection,
    intercept: bool,
) -> tuple[dict[str, np.ndarray], Any]:
    """Heads trained on ratings and pairs together, float32 as they are served."""
    joint, report = fit_joint(
        head,
        features,
        ratings,
        folds,
        pairs,
        pair_weights=section.pair_weights,
        intercept=intercept,
        r2_price=section.r2_price,
    )
    return {name: getattr(joint, name).astype(np.float32) for name in _HEAD_ARRAYS}, asdict(report)


def joint_head(head: RegressionHead, arrays: dict[str, np.ndarray]) -> RegressionHead:
    """Stage 1's head with the weights of the joint stage."""
    wide: dict[str, Any] = {name: arrays[name].astype(np.float64) for name in _HEAD_ARRAYS}
    return replace(head, **wide)


def quantile_stage(
    features: np.ndarray,
    ratings: np.ndarray,
    rewards: np.ndarray,
    folds: np.ndarray,
    names: Sequence[str],
    section: QuantilesSection,
) -> tuple[dict[str, np.ndarray], Any]:
    """Quantile heads; the report names their objectives and levels.

    Args:
        rewards: (n, k) by weights that never saw the row's prompt.
    """
    found = fit_quantiles(features, ratings, rewards, folds, names, levels=section.levels)
    arrays = {
        "weight": found.weight.reshape(-1, features.shape[1]).astype(np.float32),
        "bias": found.bias.ravel().astype(np.float32),
    }
    report = {
        "objectives": found.objectives,
        "levels": list(found.levels),
        "heads": [asdict(entry) for entry in found.reports],
    }
    return arrays, report
