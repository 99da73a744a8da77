"""Uncertainty audit on held-out rated rows: are predicted probabilities calibrated, do intervals have their coverage?

Of objectives with two rating levels: reliability diagram and Brier score; with five or more: coverage and width of the
intervals; of all: how far responses are from the rated ones. Between three and four levels the steps of the rating
alone would give an interval its coverage, whatever the model knows, so nothing is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from armorm.correlation import spearman
from armorm.heads.uncertainty import ENOUGH_LEVELS, LEVELS, Uncertainty
from armorm.objectives import ObjectiveSet

BINS = 10
_MIN_ROWS = 3


def uncertainty_audit(
    uncertainty: Uncertainty,
    rewards: np.ndarray,
    features: np.ndarray,
    ratings: np.ndarray,
    levels: Sequence[int],
    objectives: ObjectiveSet,
    sources: Sequence[str],
) -> dict[str, Any]:
    """Audit on n held-out rows.

    Args:
        rewards: (n, k), mapped scale.
        features: (n, d) response features.
        ratings: (n, k) raw ratings, NaN where missing.
        levels: (k,) number of distinct training ratings of each objective.
        sources: (n,) set of each row.

    Returns:
        `rank`, `objectives` (by name), and `unusual`: by source, the share of rows whose leverage is above the 99th
        percentile of rows like the rated ones, for the objectives that rate none of them.
    """
    leverage = uncertainty.leverage(features)
    spread = uncertainty.predictive_std(leverage)
    epistemic = uncertainty.epistemic_std(leverage)
    mapped = objectives.to_reward(ratings)
    found: dict[str, Any] = {}
    for column, objective in enumerate(objectives):
        rows = np.flatnonzero(~np.isnan(mapped[:, column]))
        entry: dict[str, Any] = {
            "levels": int(levels[column]),
            "n": len(rows),
            "noise": float(uncertainty.noise[column] * abs(objective.scale)),
            "error_bound": float(uncertainty.error_bound[column]),
        }
        if len(rows) >= _MIN_ROWS:
            predicted, given = rewards[rows, column], mapped[rows, column]
            entry["epistemic_std"] = float(epistemic[rows, column].mean() * abs(objective.scale))
            entry["error_against_leverage"] = spearman(np.abs(predicted - given), leverage[rows, column])
            usual = uncertainty.usual_leverage[column]  # NaN for an objective with too few rated rows
            entry["unusual"] = None if np.isnan(usual) else float((leverage[rows, column] > usual).mean())
            if levels[column] == 2:
                entry |= reliability(predicted, given)
            elif levels[column] >= ENOUGH_LEVELS:
                entry["intervals"] = _intervals(
                    uncertainty, column, np.abs(predicted - given) / spread[rows, column], spread[rows, column]
                )
                for interval in entry["intervals"].values():
                    interval["width"] *= abs(objective.scale)
        found[objective.name] = entry
    return {
        "rank": int(uncertainty.basis.shape[1]),
        "objectives": found,
        "unusual": _unusual(leverage, uncertainty, mapped, sources),
    }


def reliability(predicted: np.ndarray, outcome: np.ndarray, bins: int = BINS) -> dict[str, Any]:
    """Brier score and reliability diagram: are rows predicted as 0.7 good seven times in ten?

    Args:
        predicted: (n,) rewards; used as probabilities, clipped to 0..1.
        outcome: (n,) 0 or 1.

    Returns:
        `brier` of the predictions, `brier_of_base_rate`, and `reliability`: of bins of equal width, `predicted`
        (mean), `observed` (share of ones) and `n`; empty bins are omitted.
    """
    probability = np.clip(predicted, 0.0, 1.0)
    place = np.minimum((probability * bins).astype(np.int64), bins - 1)
    count = np.bincount(place, minlength=bins)
    filled = np.flatnonzero(count)
    return {
        "brier": float(((probability - outcome) ** 2).mean()),
        "brier_of_base_rate": float(outcome.var()),
        "reliability": [
            {
                "predicted": float(probability[place == bin].mean()),
                "observed": float(outcome[place == bin].mean()),
                "n": int(count[bin]),
            }
            for bin in filled
        ],
    }


def _intervals(uncertainty: Uncertainty, column: int, errors: np.ndarray, spread: np.ndarray) -> dict[str, Any]:
    """Coverage and mean width (mapped scale) of the interval of each confidence level."""
    found = {}
    for level in LEVELS:
        factor = uncertainty.conformal.get(level, np.full(len(uncertainty.groups), np.nan))[column]
        if not np.isnan(factor):
            found[str(level)] = {
                "coverage": float((errors <= factor).mean()),
                "width": float(2 * factor * spread.mean()),
            }
    return found


def _unusual(
    leverage: np.ndarray, uncertainty: Uncertainty, mapped: np.ndarray, sources: Sequence[str]
) -> dict[str, float]:
    """By source: share of its rows beyond the rated range of the objectives of other sources."""
    beyond, known = leverage > uncertainty.usual_leverage, ~np.isnan(uncertainty.usual_leverage)
    found = {}
    for source in dict.fromkeys(sources):
        rows = np.array([name == source for name in sources])
        others = np.isnan(mapped[rows]).all(0) & known
        if others.any():
            found[source] = float(beyond[np.ix_(rows, others)].mean())
    return found
