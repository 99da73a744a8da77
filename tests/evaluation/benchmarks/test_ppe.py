"""PPE: votes, the ranking of models, best of k."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import kendalltau, spearmanr

from armorm.errors import DataError
from armorm.evaluation.benchmarks.ppe import (
    BEST_OF_K,
    HUMAN,
    KENDALL,
    SPEARMAN,
    best_of_k,
    bradley_terry,
    rank_kendall,
    rank_spearman,
)
from tests.helpers.marked_scorer import evaluated, values


def test_the_best_of_k_is_the_highest_and_equal_ones_share():
    scores = np.array([[1, 3, 2], [4, 4, 1], [math.nan, 0, -1], [math.nan] * 3, [2, 2, 2]])
    correct = np.array([[1, 0, 1], [1, 0, 0], [1, 0, 1], [1, 1, 1], [1, 1, 0]])
    assert best_of_k(scores, correct).tolist() == pytest.approx([0, 1 / 2, 0, 0, 2 / 3])


def test_strengths_are_those_that_make_the_games_most_likely():
    wins = np.array([[0, 7, 9], [3, 0, 6], [1, 4, 0]], float)
    strength = bradley_terry(wins)

    def log_likelihood(s):
        total = 0.0
        for i in range(3):
            # One tie with an average opponent keeps every strength finite.
            total -= 0.5 * (np.logaddexp(0, -s[i]) + np.logaddexp(0, s[i]))
            for j in range(3):
                total -= wins[i, j] * np.logaddexp(0, s[j] - s[i])
        return total

    best = log_likelihood(strength)
    for i in range(3):
        for step in (-0.01, 0.01):
            moved = strength.copy()
            moved[i] += step
            assert log_likelihood(moved) < best + 1e-3
    assert strength[0] > strength[1] > strength[2]


def test_rank_correlations_are_those_of_scipy_for_many_rankings_at_once():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 5, (2, 20, 8)).astype(float)
    assert rank_spearman(first, second) == pytest.approx(
        [spearmanr(a, b).statistic for a, b in zip(first, second, strict=True)]
    )
    assert rank_kendall(first, second) == pytest.approx(
        [kendalltau(a, b).statistic for a, b in zip(first, second, strict=True)]
    )


def test_the_fixture_scores_as_worked_out_by_hand():
    results = evaluated("ppe", "ppe")
    assert values(results, "overall") == pytest.approx({HUMAN: 3 / 5, BEST_OF_K: (0.75 + 0 + 0 + 1 + 1) / 5})
    # By votes ant > bee > cat, by verdicts ant > cat > bee.
    assert values(results, "sections") == pytest.approx({SPEARMAN: 1 / 2, KENDALL: 1 / 3})
    subsets = values(results, "subsets")
    assert {name: value for name, value in subsets.items() if name.startswith("best")} == pytest.approx(
        {
            "best of k, MMLU-Pro": 0.75,
            "best of k, MATH": 0,
            "best of k, GPQA": 0,  # the correct answer was refused
            "best of k, MBPP-Plus": 1,
            "best of k, IFEval": 1,
        }
    )
    assert subsets[f"{HUMAN}, code"] == 0
    assert subsets[f"{HUMAN}, hard"] == pytest.approx(1 / 3)
    assert subsets[f"{HUMAN}, English"] == pytest.approx(2 / 3)
    assert subsets[f"{HUMAN}, other languages"] == pytest.approx(1 / 2)


def test_a_vote_that_is_a_tie_counts_towards_no_accuracy():
    figure = evaluated("ppe", "ppe/PPE-Human-Preference-V1.jsonl").level("overall")[HUMAN]
    assert (figure.examples, figure.prompts) == (5, 5)
    assert figure.baselines["chance"] == 0.5


def test_the_chance_of_best_of_k_is_the_share_of_correct_answers():
    figure = evaluated("ppe", "ppe").level("overall")[BEST_OF_K]
    assert figure.baselines["chance"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 2 + 1 / 2 + 1) / 5)


def test_a_missing_set_leaves_no_mean_of_five():
    results = evaluated("ppe", "ppe/PPE-MATH-Best-of-K.jsonl", "ppe/PPE-GPQA-Best-of-K.jsonl")
    assert values(results, "overall") == {}
    assert results.level("overall")[BEST_OF_K].lacking == ("MMLU-Pro", "MBPP-Plus", "IFEval")


def test_a_set_that_no_name_tells_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "scores": [true], "response_1": "b"}\n')
    with pytest.raises(DataError, match="expected one of MMLU-Pro"):
        evaluated("ppe", path)
