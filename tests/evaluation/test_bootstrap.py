"""Bootstrap intervals and permutation tests by prompt, against slow obvious versions and known cases."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from armorm.evaluation.bootstrap import MIN_PROMPTS, Clusters, differences, holm, intervals
from armorm.evaluation.metrics import GroupValues, by_group, group_sums, mean_metric, nan_mean

METRIC = mean_metric("overall", "accuracy", ("a", "right"))


def measured(values, group="a"):
    return by_group([group] * len(values), "right", np.asarray(values, float))


def clusters(prompts, subsets=None):
    return Clusters.of_items([str(prompt) for prompt in prompts], subsets or ["a"] * len(prompts))


def test_no_interval_and_no_test_below_thirty_prompts():
    rng = np.random.default_rng(0)
    for count in (MIN_PROMPTS - 1, MIN_PROMPTS):
        values, other = rng.integers(0, 2, (2, 3 * count))
        where = clusters(np.repeat(np.arange(count), 3))
        (interval,) = intervals([METRIC], measured(values), where)
        (difference,) = differences([METRIC], measured(values), measured(other), where)
        shown = count >= MIN_PROMPTS
        assert (interval is not None, difference.interval is not None, difference.p is not None) == (shown,) * 3
        assert difference.prompts == count


def test_an_interval_is_about_two_standard_errors_each_way():
    values = (np.random.default_rng(1).random(900) < 0.3).astype(float)
    (interval,) = intervals([METRIC], measured(values), clusters(range(900)))
    error = np.sqrt(values.var() / 900)
    assert interval[0] == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert interval[1] == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_repeating_every_row_of_a_prompt_narrows_nothing():
    values = np.random.default_rng(2).integers(0, 2, 60)
    once = intervals([METRIC], measured(values), clusters(range(60)))
    tenfold = intervals([METRIC], measured(np.repeat(values, 10)), clusters(np.repeat(np.arange(60), 10)))
    assert tenfold == once
    as_if_apart = intervals([METRIC], measured(np.repeat(values, 10)), clusters(range(600)))
    assert np.ptp(as_if_apart[0]) < 0.5 * np.ptp(once[0])


def test_prompts_are_drawn_within_their_subset():
    # Two subsets that differ, constant within: with their sizes fixed, nothing varies.
    values = np.repeat([0.0, 1.0], 40)
    groups = ["a"] * 40 + ["b"] * 40
    pooled = mean_metric("overall", "accuracy", ("all", "right"))
    (interval,) = intervals([pooled], measured(values, "all"), clusters(range(80), groups))
    assert interval == (0.5, 0.5)


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(3).integers(0, 2, 50)
    first, second, other = (intervals([METRIC], measured(values), clusters(range(50)), seed=seed) for seed in (0, 0, 1))
    assert first == second != other


def test_p_is_that_of_all_exchanges_of_whole_prompts():
    """Thirty prompts, of which only six differ: all 64 exchanges of those can be counted."""
    first = np.zeros((30, 2))
    second = np.zeros((30, 2))
    first[:6] = [[1, 1], [1, 0], [0, 0], [1, 1], [1, 1], [1, 0]]
    second[:6] = [[0, 0], [0, 0], [1, 0], [0, 1], [0, 0], [1, 1]]
    gaps = (first - second).sum(1)[:6]
    observed = abs(gaps.sum())
    exact = np.mean([abs(np.dot(signs, gaps)) >= observed for signs in product((-1, 1), repeat=6)])
    where = clusters(np.repeat(np.arange(30), 2))
    (found,) = differences(
        [METRIC], measured(first.reshape(-1)), measured(second.reshape(-1)), where, permutations=4000
    )
    assert found.p == pytest.approx(exact, abs=0.03)
    assert found.difference == pytest.approx(gaps.sum() / 60)


def test_a_model_does_not_differ_from_itself_and_differs_from_a_much_worse_one():
    rng = np.random.default_rng(4)
    good, bad = (rng.random(200) < 0.9).astype(float), (rng.random(200) < 0.5).astype(float)
    (same,) = differences([METRIC], measured(good), measured(good), clusters(range(200)))
    assert (same.difference, same.p, same.interval, same.significant) == (0, 1, (0, 0), False)
    (found,) = differences([METRIC], measured(good), measured(bad), clusters(range(200)))
    assert found.p < 0.001
    assert found.significant
    assert found.interval[0] > 0


def test_holm_gives_up_at_the_first_p_that_is_too_large():
    assert holm({0: 0.01, 1: 0.04, 2: 0.03}) == {0}
    assert holm({0: 0.01, 1: 0.02, 2: 0.03}) == {0, 1, 2}
    assert holm({0: 0.02, 1: 0.02, 2: 0.02}) == set()
    assert holm({}) == set()


def test_means_ignore_what_is_absent():
    values = [np.array([1.0, np.nan, np.nan]), np.array([0.0, 0.5, np.nan])]
    assert nan_mean(values, [3, 1]).tolist() == pytest.approx([0.75, 0.5, np.nan], nan_ok=True)
    assert np.isnan(group_sums({}).mean(("a", "right")))


def test_several_groups_together_have_one_mean_over_their_rows():
    both = {("a", "right"): GroupValues(np.arange(1), np.array([1.0]))} | {
        ("b", "right"): GroupValues(np.arange(1, 4), np.array([0.0, 0.0, 1.0]))
    }
    assert group_sums(both).mean(("a", "right"), ("b", "right")) == pytest.approx(0.5)
