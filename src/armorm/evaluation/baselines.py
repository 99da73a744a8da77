"""Baselines next to every metric: the score of length alone and of the prompt alone, under the same scoring rule.

Length: the longer response scores higher. Prompt: of pairs, a judge that reads only the prompt gives all responses the
same score, so the benchmark's rule for ties decides (`base.equal_scores`). Of ratings, it is a ridge regression on the
model's prompt features (for a model without them, on the words of the prompt), fitted on the evaluated rows in five
folds by groups of near-duplicate prompts, each predicted from the others.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from armorm.conversation import Conversation
from armorm.data.decontamination import prompt_groups
from armorm.evaluation.examples import Item
from armorm.heads.regression import MIN_RATINGS, fit_regression, fold_of

FOLDS = 5
WORD_COLUMNS = 512
_WORD = re.compile(r"\w+")


def by_length(rows: Sequence[np.ndarray], lengths: np.ndarray) -> list[np.ndarray]:
    """The length of each response; NaN for an invalid one."""
    padded = np.append(lengths, np.nan)
    return [padded[at] for at in rows]


def prompt_words(conversations: Sequence[Conversation]) -> tuple[np.ndarray, np.ndarray]:
    """Words of the prompts as features: hashed log counts with signs, normalised to length 1.

    Returns:
        features (m, `WORD_COLUMNS`) float32 of the distinct prompts, and the row (n,) of each conversation.
    """
    index: dict[str, int] = {}
    columns: dict[str, tuple[int, float]] = {}
    features: list[np.ndarray] = []
    rows = np.empty(len(conversations), np.int64)
    for row, conversation in enumerate(conversations):
        rows[row] = index.setdefault(conversation.prompt_key, len(features))
        if rows[row] < len(features):
            continue
        words = Counter(word for message in conversation.prompt for word in _WORD.findall(message.content.lower()))
        values = np.zeros(WORD_COLUMNS)
        for word, count in words.items():
            if word not in columns:
                number = int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")
                columns[word] = (number // 2 % WORD_COLUMNS, 1.0 if number % 2 else -1.0)
            column, sign = columns[word]
            values[column] += sign * np.log1p(count)
        features.append(values / (np.linalg.norm(values) or 1.0))
    return np.array(features, np.float32).reshape(-1, WORD_COLUMNS), rows


def by_prompt(
    items: Sequence[Item],
    rows: Sequence[np.ndarray],
    conversations: Sequence[Conversation],
    prompt_features: np.ndarray,
    prompt_index: np.ndarray,
) -> list[np.ndarray]:
    """Ratings predicted from the prompt alone; NaN for objectives with too few ratings to fit.

    Args:
        conversations: (n,).
        prompt_features: (m, d) of the distinct prompts.
        prompt_index: (n,) row of each conversation, -1 if unscored.
    """
    at = np.array([row[0] for row in rows], np.int64)
    index = np.where(at >= 0, prompt_index[at], -1)
    known = np.flatnonzero(index >= 0)
    ratings = np.array([item.labels for item in items], np.float64)
    predicted = np.full(ratings.shape, np.nan)
    if len(known):
        groups = prompt_groups(conversations)
        folds = np.array([fold_of(groups[conversations[row].prompt_key], FOLDS) for row in at[known]], np.int64)
        given = ratings[known]
        columns = [column for column in range(ratings.shape[1]) if _learnable(given[:, column], folds)]
        if columns:
            features = prompt_features[index[known]]
            names = [str(column) for column in columns]
            head = fit_regression(features, given[:, columns], folds, names, intercept=True)
            predicted[np.ix_(known, np.array(columns))] = head.predict_out_of_fold(features, folds)
    return list(predicted)


def _learnable(ratings: np.ndarray, folds: np.ndarray) -> bool:
    rated = ~np.isnan(ratings)
    return bool(rated.sum() >= MIN_RATINGS and np.ptp(ratings[rated]) > 0 and len(np.unique(folds[rated])) > 1)
