"""Agreement of a judge with people: each figure against a slow version, and biases that were planted."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from armorm.conversation import Conversation
from armorm.evaluation.label_agreement import pair_agreement, rating_agreement
from armorm.evaluation.labelling import Labels


def conversations(lengths):
    return [Conversation.from_prompt(f"question {row // 2}", "x" * int(n)) for row, n in enumerate(lengths)]


def slow_kappa(a, b, low, high):
    """Cohen's kappa with quadratic weights, from the table of counts."""
    levels = np.arange(low, high + 1)
    observed = np.array([[np.mean((a == x) & (b == y)) for y in levels] for x in levels])
    expected = np.outer(observed.sum(1), observed.sum(0))
    weights = (levels[:, None] - levels[None, :]) ** 2
    return 1 - (weights * observed).sum() / (weights * expected).sum()


def test_figures_equal_a_slow_version_over_replies_that_both_rated():
    random = np.random.default_rng(0)
    own = random.integers(1, 6, 200).astype(float)
    judged = np.clip(own + random.integers(-1, 3, 200), 1, 5).astype(float)
    length = random.integers(5, 500, 200)
    judged[:7], own[5:12] = np.nan, np.nan
    both = slice(12, None)
    found = {figure.name: figure for figure in rating_agreement(judged, own, conversations(length))}
    a, b = judged[both], own[both]
    assert found["Spearman"].value == pytest.approx(spearmanr(a, b).statistic)
    assert found["kappa"].value == pytest.approx(slow_kappa(a, b, 1, 5))
    assert found["bias"].value == pytest.approx((a - b).mean())
    assert found["length"].value == pytest.approx(spearmanr(a - b, length[both]).statistic)
    assert found["judge and length"].value == pytest.approx(spearmanr(judged[7:], length[7:]).statistic)
    assert found["Spearman"].count == 188 and found["judge and length"].count == 193
    for figure in found.values():
        assert figure.interval[0] < figure.value < figure.interval[1]


def test_a_judge_that_likes_long_replies_has_a_length_bias_and_a_fair_one_has_none():
    random = np.random.default_rng(1)
    own, length = random.integers(1, 6, 400).astype(float), random.integers(5, 500, 400)
    biased = {f.name: f for f in rating_agreement(own + length / 200, own, conversations(length))}
    fair = {f.name: f for f in rating_agreement(own + random.normal(size=400), own, conversations(length))}
    assert biased["length"].interval[0] > 0.9
    assert fair["length"].interval[0] < 0 < fair["length"].interval[1]


def test_few_prompts_have_no_interval_and_no_own_ratings_no_agreement():
    judged, rows = np.array([1.0, 2, 3, 4]), conversations([4, 9, 16, 25])
    few = {f.name: f for f in rating_agreement(judged, judged + 1, rows)}
    assert few["Spearman"].value == 1 and few["Spearman"].interval is None
    assert few["bias"].value == -1
    alone = {f.name: f for f in rating_agreement(judged, np.full(4, np.nan), rows)}
    assert np.isnan(alone["Spearman"].value) and np.isnan(alone["kappa"].value)
    assert alone["judge and length"].value == 1


def test_position_bias_consistency_and_agreement_of_pairs():
    rows = conversations([3, 9] * 100)  # two replies of each prompt, the second one longer
    own = np.array([1.0, 5.0] * 100)
    verdicts = {}
    for place in range(100):  # half the prompts: always the first shown; the others: always the longer
        i, j = 2 * place, 2 * place + 1
        verdicts[i, j] = [1, -1] if place < 50 else [-1, -1]
    labels = Labels(np.empty((200, 0)), verdicts=verdicts)
    found = {f.name: f for f in pair_agreement(labels, own, True, rows)}
    assert found["first"].value == pytest.approx(0.75)
    assert found["first"].interval[0] > 0.5
    assert found["consistent"].value == 0.5
    assert found["longer"].value == 1 and found["longer"].count == 50
    assert found["agreement"].value == pytest.approx(0.75)  # ties count half
    lower = {f.name: f for f in pair_agreement(labels, own, False, rows)}
    assert lower["agreement"].value == pytest.approx(0.25)
    assert {f.name: f for f in pair_agreement(labels, None, True, rows)}["agreement"].count == 0
