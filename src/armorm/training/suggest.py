"""`armorm suggest`: which responses to rate next, by what stage 1 would learn from them.

The rated rows are those of a model: its run's sufficient statistics (`work/statistics.safetensors`) if they are there,
else the leading eigenvectors that its uncertainty stores. The candidates are the pool over which the variance of the
predictions is to fall (`armorm.heads.optimal_design`); the penalty is the objective's own. An objective that the model
does not have starts without ratings, at the median penalty of the model's objectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from armorm.backbone.score_input import read_score_input
from armorm.conversation import Conversation
from armorm.errors import DataError, FitError, nearest
from armorm.features.extract import extract
from armorm.features.store import FeatureStore
from armorm.heads.optimal_design import RidgePosterior, greedy_design
from armorm.heads.statistics import RatingStatistics
from armorm.progress import say
from armorm.reward_model import ArmoRM
from armorm.training.dataset import group_index
from armorm.training.stages import STATISTICS


@dataclass(frozen=True)
class Suggestions:
    """n candidates, the one to rate first first.

    Attributes:
        objective: its name.
        rows: (n,) index of each in what was given.
        removed: (n,) share of the variance over all candidates that is gone once it and those before it are rated.
        leverage: (n,) of each when it was chosen.
        candidates: number of candidates.
        rejected: index and reason of each conversation that the backbone cannot read.
        exact: whether the rated rows' own sums were used, not the stored part of their spectrum.
    """

    objective: str
    rows: np.ndarray
    removed: np.ndarray
    leverage: np.ndarray
    candidates: int
    rejected: list[tuple[int, str]]
    exact: bool

    def __len__(self) -> int:
        return len(self.rows)


def suggest(
    model: ArmoRM,
    conversations: Sequence[Conversation],
    objective: str,
    count: int,
    *,
    run: str | Path | None = None,
    features: str | Path | None = None,
) -> Suggestions:
    """Choose conversations to rate on an objective.

    Args:
        conversations: candidates.
        objective: of the model, or a new one.
        count: most to choose.
        run: folder of the run that trained the model, for the sums of its rated rows.
        features: feature store to reuse and extend.

    Raises:
        FitError: for a model without uncertainty, whose penalties are not known.
        DataError: if no candidate can be read.
    """
    posterior, exact = _posterior(model, objective, run)
    given = read_score_input(model.backbone.template, conversations, model.model.config.limits, "skip")
    kept = given.of_kept(given.indices)
    if not len(kept):
        reason = given.rejected[0][1] if given.rejected else "there are none"
        raise DataError(f"no candidate can be read: {reason}")
    store = FeatureStore.of(features, model.backbone) if features is not None else None
    found = extract(model.backbone, given.encoded.encoded, store).response
    prompts = group_index([conversations[i].prompt_key for i in kept])
    design = greedy_design(posterior, found, count, prompts)
    return Suggestions(
        objective, kept[design.chosen], design.removed, design.leverage, len(kept), list(given.rejected), exact
    )


def _posterior(model: ArmoRM, objective: str, run: str | Path | None) -> tuple[RidgePosterior, bool]:
    known = model.uncertainty
    if known is None:
        raise FitError(
            f"{model.name}: has no uncertainty, expected a model that was trained with regression.uncertainty"
        )
    names = model.objectives.names
    if objective not in names:
        say(f"{objective}: no objective of {model.name}{nearest(objective, names)}, so it starts without ratings")
        size = known.basis.shape[2]
        return RidgePosterior.without_ratings(size, float(np.median(known.penalties))), True
    column = names.index(objective)
    path = None if run is None else Path(run) / "work" / STATISTICS
    if path is not None and path.is_file():
        statistics = RatingStatistics.load(path)
        if objective in statistics.names:
            place = statistics.names.index(objective)
            columns = next(columns for columns in statistics.row_sets() if place in columns)
            parts = [statistics.moments(columns, fold) for fold in range(statistics.folds)]
            options: dict[str, Any] = {"intercept": bool(model.model.config.regression_bias)}
            total = sum(parts[1:], parts[0])
            return RidgePosterior.of_moments(total, float(known.penalties[column]), **options), True
    return RidgePosterior.of_uncertainty(known, column), False
