"""Objectives fitted to preference pairs (`bradley_terry` in a recipe), next to the rated and measured ones.

Each adds a column to the heads of stage 1: the reward by all pairs, and by those of the other folds of prompts, so that
the gate is trained on rewards that never saw a pair's prompt. Their R^2 is McFadden's, 1 - loss / log 2 on held-out
folds, and their standard errors are those of the Laplace approximation (heads/bradley_terry.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from armorm.data.preferences import PreferencePair
from armorm.errors import FitError
from armorm.heads.bradley_terry import fit_preference_objective
from armorm.heads.gate_training import GateSettings
from armorm.heads.pair_weights import pair_weights
from armorm.heads.regression import RegressionHead, RegressionReport, fold_of
from armorm.heads.uncertainty import Uncertainty
from armorm.objectives import Objective
from armorm.training.dataset import group_index
from armorm.training.featurize import Corpus

SOURCE = "preferences"


def with_preference_objectives(
    head: RegressionHead,
    uncertainty: Uncertainty | None,
    entries: Mapping[str, Sequence[str]],
    pairs: Sequence[PreferencePair],
    corpus: Corpus,
    gating: GateSettings,
) -> tuple[RegressionHead, Uncertainty | None, list[Objective]]:
    """The head and its uncertainty with a column for each objective, and the objectives.

    Args:
        entries: by objective, the names of its preference sets.
        pairs: training pairs of all sets.
        gating: `prompt_cap` and `balance` of the pairs.

    Raises:
        FitError: for an objective with too few pairs.
    """
    corpus, objectives = corpus.of_pairs, []
    for name, sources in entries.items():
        own = [pair for pair in pairs if pair.source in sources]
        chosen, rejected = (corpus.responses([getattr(pair, side) for pair in own]) for side in ("chosen", "rejected"))
        groups = corpus.group_keys([pair.chosen for pair in own])
        count = len(head.fold_weight)
        folds = np.array([fold_of(key, count) for key in groups], np.int64)
        weights = pair_weights(
            np.array([pair.weight for pair in own]),
            group_index(groups),
            group_index([pair.source for pair in own]),
            gating.prompt_cap,
            gating.balance,
        )
        try:
            fitted = fit_preference_objective(chosen, rejected, folds, count, weights)
        except FitError as error:
            raise FitError(f"objective {name}: {error}") from None
        warning = "" if fitted.r2 > 0 else "held-out loss is no better than chance"
        report = RegressionReport(name, len(own), fitted.penalty, fitted.losses, fitted.r2, warning)
        head = RegressionHead(
            np.vstack([head.weight, fitted.weight]),
            np.append(head.bias, fitted.bias),
            np.concatenate([head.fold_weight, fitted.fold_weight[:, None]], 1),
            np.column_stack([head.fold_bias, fitted.fold_bias]),
            [*head.reports, report],
        ).rounded()
        scale = fitted.high - fitted.low
        objectives.append(Objective(name, SOURCE, fitted.low, fitted.high, scale, fitted.low))
        if uncertainty is not None:
            sides = np.concatenate([chosen, rejected])
            found = (fitted.eigenvalues, fitted.vectors, fitted.alpha, 1 / scale, fitted.center, sides)
            uncertainty = uncertainty.with_objective(*found)
    return head, uncertainty, objectives
