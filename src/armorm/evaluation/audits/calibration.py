"""Calibration audit: is the model right as often as its Bradley-Terry probabilities state?

The probability that the higher-scoring response is the better one is sigmoid(|margin|), the confidence, at least a
half; margins are those of a calibrated model times its `margin_scale`. A tie is half right. Pairs with an unscored
response are excluded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit

BINS = 10
_SCALES = (-10.0, 10.0)


def calibration(margins: np.ndarray, weights: np.ndarray | None = None, bins: int = BINS) -> dict[str, Any]:
    """Calibration of margins (p,), better minus worse, with weights (p,).

    Returns:
        `comparisons` (their number; nothing else if it is 0), `expected_calibration_error`, `log_loss`, `brier`,
        `best_scale` (the factor of all margins with the lowest log loss), `log_loss_at_best_scale`, and `bins` of equal
        weight: mean `confidence`, `accuracy` and `share`.
    """
    known = ~np.isnan(margins)
    margins = margins[known]
    weights = np.ones(len(margins)) if weights is None else weights[known]
    if not len(margins) or weights.sum() <= 0:
        return {"comparisons": 0}
    weights = weights / weights.sum()
    confidence = expit(np.abs(margins))
    right = np.where(margins > 0, 1.0, np.where(margins == 0, 0.5, 0.0))
    order = np.argsort(confidence, kind="stable")
    position = np.cumsum(weights[order]) - weights[order] / 2
    bin_of = np.empty(len(margins), np.int64)
    bin_of[order] = np.minimum((position * bins).astype(np.int64), bins - 1)
    share = np.bincount(bin_of, weights, bins)
    filled = share > 0
    mean_confidence = np.bincount(bin_of, weights * confidence, bins)[filled] / share[filled]
    accuracy = np.bincount(bin_of, weights * right, bins)[filled] / share[filled]

    def log_loss(scale: float) -> float:
        return float((weights * np.logaddexp(0, -scale * margins)).sum())

    best = minimize_scalar(lambda log_scale: log_loss(float(np.exp(log_scale))), bounds=_SCALES, method="bounded")
    scale = float(np.exp(best.x))
    return {
        "comparisons": len(margins),
        "expected_calibration_error": float((share[filled] * np.abs(accuracy - mean_confidence)).sum()),
        "log_loss": log_loss(1.0),
        "brier": float((weights * expit(-margins) ** 2).sum()),
        "best_scale": scale,
        "log_loss_at_best_scale": log_loss(scale),
        "bins": [
            {"confidence": float(c), "accuracy": float(a), "share": float(s)}
            for c, a, s in zip(mean_confidence, accuracy, share[filled], strict=True)
        ],
    }
