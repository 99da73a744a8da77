"""Baselines: what stands beside every figure, so that nobody has to guess what it is worth.

In:  items, the rows of their responses, lengths, and of an interpretable model its prompt features.
Out: scores in the layout of the model's, for the same scoring rule: by length alone, by the prompt alone.

Length: the longer response scores higher. Prompt: of pairs, a judge that reads the prompt alone scores all
its responses alike, so the benchmark's own rule for ties says what it gets (and `chance` what a random
order does). Of ratings, it is a ridge regression on the model's prompt features, fitted on the evaluated
rows in five folds by prompt, each predicted by the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from armorm.evaluation.examples import Item
from armorm.evaluation.scorers import Parts
from armorm.heads.regression import MIN_RATINGS, fit_regression, fold_of

FOLDS = 5


def by_length(rows: Sequence[np.ndarray], lengths: np.ndarray) -> list[np.ndarray]:
    """The length of each response; NaN for one that is no conversation."""
    padded = np.append(lengths, np.nan)
    return [padded[at] for at in rows]


def by_nothing(items: Sequence[Item]) -> list[np.ndarray]:
    """One score for every response of an item."""
    return [np.zeros(len(item.labels)) for item in items]


def by_prompt(items: Sequence[Item], rows: Sequence[np.ndarray], parts: Parts) -> list[np.ndarray]:
    """Ratings predicted from the prompt feature alone; NaN for objectives with too few ratings to fit."""
    at = np.array([row[0] for row in rows], np.int64)
    index = np.where(at >= 0, parts.prompt_index[at], -1)
    known = np.flatnonzero(index >= 0)
    ratings = np.array([item.labels for item in items], np.float64)
    predicted = np.full(ratings.shape, np.nan)
    if len(known):
        folds = np.array([fold_of(items[int(row)].prompt, FOLDS) for row in known], np.int64)
        given = ratings[known]
        columns = [column for column in range(ratings.shape[1]) if _learnable(given[:, column], folds)]
        if columns:
            features = parts.prompt_features[index[known]]
            names = [str(column) for column in columns]
            head = fit_regression(features, given[:, columns], folds, names, intercept=True)
            predicted[np.ix_(known, np.array(columns))] = head.predict_out_of_fold(features, folds)
    return list(predicted)


def _learnable(ratings: np.ndarray, folds: np.ndarray) -> bool:
    rated = ~np.isnan(ratings)
    return bool(rated.sum() >= MIN_RATINGS and np.ptp(ratings[rated]) > 0 and len(np.unique(folds[rated])) > 1)
