"""Held-out ratings: the fixture by hand, and random rows against a slow obvious version."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
from scipy.stats import spearmanr

from armorm.evaluation.benchmarks import ratings
from armorm.evaluation.examples import Item
from armorm.objectives import Objective, ObjectiveSet
from tests.helpers.marked_scorer import evaluated, values


def test_the_fixture_scores_as_worked_out_by_hand():
    results = evaluated("ratings", "ratings.jsonl")
    # kind: predictions 1 3 3 2 5 against 1 4 2 3 5; one more is refused and loses its two comparisons.
    # clear: predictions 1 3 2 5 against 5 4 3 1.
    assert values(results, "subsets") == pytest.approx(
        {
            "ratings-kind: Spearman": 8 / math.sqrt(9.5 * 10),
            "ratings-kind: within prompts": (2.5 + 1) / (3 + 3),
            "ratings-clear: Spearman": 1 - 6 * 18 / (4 * 15),
            "ratings-clear: within prompts": 0,
        }
    )
    assert results.data["left_out"] == {"rows of other splits than test": 1}
    assert results.objectives == ["ratings-kind", "ratings-clear"]
    assert not results.raw


def within_prompt_by_hand(prediction, rating, prompts) -> float:
    right = [
        1.0 if prediction[i] > prediction[j] else 0.5 if prediction[i] == prediction[j] else 0.0
        for i in range(len(rating))
        for j in range(len(rating))
        if prompts[i] == prompts[j] and rating[i] > rating[j]
    ]
    return sum(right) / len(right)


def test_metrics_are_those_of_a_double_loop_on_random_rows():
    rng = np.random.default_rng(0)
    objectives = ObjectiveSet([Objective.rated("s-up", 1, 5), Objective.rated("s-down", 0, 10, direction="lower")])
    given = np.column_stack([rng.integers(1, 6, 80), rng.integers(0, 11, 80)]).astype(float)
    rewards = objectives.to_reward(given) + 0.3 * rng.normal(size=given.shape)
    given[rng.random(given.shape) < 0.3] = math.nan
    prompts = rng.integers(0, 15, 80)
    items = [Item(str(i), "", "", str(prompts[i]), tuple(given[i]), {}) for i in range(80)]
    measured = ratings.measure(items, list(objectives.to_raw(rewards)), objectives.names)
    found = {metric.name: metric.on(measured) for metric in ratings.metrics(measured)}
    for column, name in enumerate(objectives.names):
        rows = np.flatnonzero(~np.isnan(given[:, column]))
        x, y = objectives.to_raw(rewards)[rows, column], given[rows, column]
        assert found[f"{name}: Spearman"] == pytest.approx(spearmanr(x, y).statistic)
        assert found[f"{name}: error"] == pytest.approx(sum(abs(x - y)) / len(rows))
        assert found[f"{name}: within prompts"] == pytest.approx(within_prompt_by_hand(x, y, prompts[rows]))


def test_means_are_over_objectives_with_a_hundred_ratings():
    rng = np.random.default_rng(1)
    given = rng.integers(1, 6, (150, 3)).astype(float)
    given[90:, 2] = math.nan
    items = [Item(str(i), "", "", str(i // 3), tuple(given[i]), {}) for i in range(150)]
    measure = partial(ratings.measure, names=("a", "b", "c"), raw=False)
    measured = measure(items, list(given + rng.normal(size=given.shape)))
    found = {metric.name: metric.on(measured) for metric in ratings.metrics(measured)}
    assert found[ratings.MEAN_SPEARMAN] == pytest.approx((found["a: Spearman"] + found["b: Spearman"]) / 2)
    assert "c: Spearman" in found
