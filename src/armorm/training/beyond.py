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

from armorm.heads.accumulation import accumulate, blocks_of
from armorm.heads.debiasing import Debiasing
from armorm.heads.gating import GatingNetwork
from armorm.heads.joint import JointPairs, JointReport, fit_joint
from armorm.heads.quantiles import fit_quantiles
from armorm.heads.regression import RegressionHead
from armorm.heads.uncertainty import ENOUGH_LEVELS, Uncertainty, calibrate, error_correlation
from armorm.training.schema import JointSection, QuantilesSection, RegressionSection
from armorm.training.stage1 import to_kept

_HEAD_ARRAYS = ("weight", "bias", "fold_weight", "fold_bias")


@torch.no_grad()
def pair_coefficients(network: GatingNetwork, debiasing: Debiasing, prompt_features: np.ndarray) -> np.ndarray:
    """What the score multiplies each reward by (p, k), for the prompt features (p, d) of pairs."""
    output = network(torch.from_numpy(prompt_features)).double().numpy()
    return output @ debiasing.matrix.T


def joint_stage(
    head: RegressionHead,
    uncertainty: Uncertainty | None,
    features: np.ndarray,
    ratings: np.ndarray,
    folds: np.ndarray,
    levels: Sequence[int],
    pairs: JointPairs,
    section: JointSection,
    regression: RegressionSection,
) -> tuple[dict[str, np.ndarray], Any]:
    """Heads trained on ratings and pairs together, float32 as they are served, kept in the form of stage 1.

    Args:
        head, uncertainty: stage 1's, of these rows.
        levels: (k,) different values of each objective's ratings.
        regression: as stage 1 was given it.
    """
    joint, report = fit_joint(
        head,
        features,
        ratings,
        folds,
        pairs,
        pair_weights=section.pair_weights,
        intercept=regression.intercept,
        weights=regression.weights,
        r2_price=section.r2_price,
    )
    rounded: dict[str, Any] = {
        name: getattr(joint, name).astype(np.float32).astype(np.float64) for name in _HEAD_ARRAYS
    }
    joint = replace(joint, **rounded)
    if uncertainty is not None:
        uncertainty = _measured_again(uncertainty, joint, report, features, ratings, folds, levels)
    arrays, kept = to_kept(joint, uncertainty)
    return arrays, {**kept, "joint": asdict(report)}


def _measured_again(
    uncertainty: Uncertainty,
    joint: RegressionHead,
    report: JointReport,
    features: np.ndarray,
    ratings: np.ndarray,
    folds: np.ndarray,
    levels: Sequence[int],
) -> Uncertainty:
    """Noise, correlation of errors and intervals of the joint heads, by their own errors on held-out folds.

    Leverage stays that of the ratings: what the pairs say besides is left out, which errs on the large side.
    """
    names = [entry.objective for entry in joint.reports]
    statistics = accumulate(blocks_of(features, ratings, folds), names, len(joint.fold_weight), features.shape[1])
    growth = (1 - np.array(report.r2_after)) / (1 - np.array(report.r2_before))
    measured = replace(
        uncertainty,
        noise=uncertainty.noise * np.sqrt(growth),
        correlation=error_correlation(statistics, joint),
    )
    return calibrate(measured, joint, blocks_of(features, ratings, folds), np.asarray(levels) >= ENOUGH_LEVELS)


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
