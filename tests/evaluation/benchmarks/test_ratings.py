"""Held-out ratings: the fixture by hand, and random rows against a slow obvious version."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given as given_values
from hypothesis import settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from armorm.data.sources import find_sources
from armorm.evaluation.benchmarks import ratings
from armorm.evaluation.examples import Item
from armorm.objectives import Objective, ObjectiveSet
from tests.helpers.data_files import write_rows
from tests.helpers.marked_scorer import evaluated, values
from tests.helpers.memory import peak_bytes


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


_ODD = [math.nan, math.inf, -math.inf, 0.0, -0.0, 5e-324]


@settings(deadline=None, max_examples=200)
@given_values(
    st.lists(
        st.tuples(
            st.one_of(st.integers(0, 4).map(float), st.sampled_from(_ODD)),
            st.one_of(st.integers(0, 9).map(float), st.sampled_from([math.nan, math.inf])),
            st.sampled_from("pqr"),
        ),
        max_size=40,
    ),
    st.sampled_from([np.float32, np.float64]),
)
def test_comparisons_of_each_row_are_those_of_a_double_loop(rows, dtype):
    prediction = np.array([x for x, _, _ in rows], np.float64).astype(dtype)
    rating = np.array([y for _, y, _ in rows], np.float64)
    prompts = [prompt for *_, prompt in rows]
    right, count = ratings.comparison_columns(prediction, rating, prompts)
    for i in range(len(rows)):
        lower = [j for j in range(len(rows)) if prompts[i] == prompts[j] and rating[i] > rating[j]]
        with np.errstate(invalid="ignore"):
            differences = [prediction[i] - prediction[j] for j in lower]
        assert count[i] == len(lower)
        assert right[i] == sum(1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in differences)


@pytest.mark.parametrize("levels", [5, 10**6])
def test_comparisons_of_many_candidates_of_a_prompt_need_no_matrix_of_pairs(levels):
    rng = np.random.default_rng(2)
    rating = rng.integers(0, levels, 3000).astype(float)
    prediction = np.round(rating / levels + rng.normal(size=3000), 2)
    right, count = ratings.comparison_columns(prediction, rating, ["p"] * 3000)
    assert (
        peak_bytes(lambda: ratings.comparison_columns(prediction, rating, ["p"] * 3000)) < 3e6
    )  # a matrix of 3000 x 3000 bytes takes 9 MB
    for row in range(0, 3000, 100):
        lower = prediction[rating < rating[row]]
        assert count[row] == len(lower)
        assert right[row] == (lower < prediction[row]).sum() + 0.5 * (lower == prediction[row]).sum()


def test_the_columns_of_each_file_are_its_own(tmp_path):
    row = {"prompt": "a", "response": "b"}
    write_rows(tmp_path / "one.jsonl", row | {"kind": 1}, row | {"kind": 2, "clear": 3}, row | {"note": "text"})
    write_rows(tmp_path / "two.jsonl", row | {"clear": 4, "kind": 5}, row | {"clear": None})
    sources = find_sources([tmp_path / "one.jsonl", tmp_path / "two.jsonl"])
    loaded = ratings.read(sources, ObjectiveSet([Objective.rated("one-kind", 1, 5), Objective.rated("clear", 1, 5)]))
    assert loaded.names == ["one-kind", "clear"]
    labels = [example.item.labels for example in loaded.examples]
    assert np.array_equal(labels, [[1, math.nan], [2, 3], [math.nan, 4]], equal_nan=True)
    assert loaded.skipped == {"ratings of 'kind', no objective of the model": 1, "rows without a rating": 2}


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
