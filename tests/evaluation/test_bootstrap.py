"""Bootstrap intervals and permutation tests by prompt, against slow obvious versions and known cases."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from armorm.evaluation.bootstrap import MIN_PROMPTS, Clusters, differences, holm, intervals, wilson
from armorm.evaluation.metrics import GroupValues, Metric, by_group, group_sums, mean_metric, nan_mean

METRIC = mean_metric("overall", "accuracy", ("a", "right"))


def measured(values, group="a"):
    return by_group([group] * len(values), "right", np.asarray(values, float))


def clusters(prompts, subsets=None):
    return Clusters.of_items([str(prompt) for prompt in prompts], subsets or ["a"] * len(prompts))


def test_no_interval_and_no_test_below_the_minimum_of_prompts():
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
    assert tenfold[0] == pytest.approx(once[0], abs=0.002)
    as_if_apart = intervals([METRIC], measured(np.repeat(values, 10)), clusters(range(600)))
    assert np.ptp(as_if_apart[0]) < 0.5 * np.ptp(once[0])


def test_prompts_are_drawn_within_their_subset():
    # Two subsets that differ, constant within: with their sizes fixed, hardly anything varies.
    values = np.repeat([0.0, 1.0], 40)
    groups = ["a"] * 40 + ["b"] * 40
    pooled = mean_metric("overall", "accuracy", ("all", "right"))
    (within,) = intervals([pooled], measured(values, "all"), clusters(range(80), groups))
    (across,) = intervals([pooled], measured(values, "all"), clusters(range(80)))
    assert sum(within) == pytest.approx(1)
    assert np.ptp(within) < 0.4 * np.ptp(across)


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(3).integers(0, 2, 50)
    first, second, other = (intervals([METRIC], measured(values), clusters(range(50)), seed=seed) for seed in (0, 0, 1))
    assert first == second != other


def test_p_is_that_of_all_exchanges_of_whole_prompts():
    """Fifty prompts, of which only six differ: all 64 exchanges of those can be counted."""
    first = np.zeros((50, 2))
    second = np.zeros((50, 2))
    first[:6] = [[1, 1], [1, 0], [0, 0], [1, 1], [1, 1], [1, 0]]
    second[:6] = [[0, 0], [0, 0], [1, 0], [0, 1], [0, 0], [1, 1]]
    gaps = (first - second).sum(1)[:6]
    observed = abs(gaps.sum())
    exact = np.mean([abs(np.dot(signs, gaps)) >= observed for signs in product((-1, 1), repeat=6)])
    where = clusters(np.repeat(np.arange(50), 2))
    (found,) = differences(
        [METRIC], measured(first.reshape(-1)), measured(second.reshape(-1)), where, permutations=4000
    )
    assert found.p == pytest.approx(exact, abs=0.03)
    assert found.difference == pytest.approx(gaps.sum() / 100)


def test_a_model_does_not_differ_from_itself_and_differs_from_a_much_worse_one():
    rng = np.random.default_rng(4)
    good, bad = (rng.random(200) < 0.9).astype(float), (rng.random(200) < 0.5).astype(float)
    (same,) = differences([METRIC], measured(good), measured(good), clusters(range(200)))
    assert (same.difference, same.p, same.significant) == (0, 1, False)
    assert same.interval == pytest.approx((-1.96 / 202, 1.96 / 202), rel=1e-4)  # 200 equal prompts: no certainty
    (found,) = differences([METRIC], measured(good), measured(bad), clusters(range(200)))
    assert found.p < 0.001
    assert found.significant
    assert found.interval[0] > 0


def test_the_values_of_differences_are_those_of_each_metric_alone():
    rng = np.random.default_rng(0)
    names = rng.choice(["a", "b", "c"], 120).tolist()
    first, second = (by_group(names, "right", rng.integers(0, 2, 120)) for _ in range(2))
    groups = [(name, "right") for name in ("a", "b", "c", "absent")]
    metrics = [mean_metric("subsets", group[0], group) for group in groups] + [mean_metric("overall", "all", *groups)]
    found = differences(metrics, first, second, clusters(range(120), names), resamples=50, permutations=50)
    np.testing.assert_equal([d.first for d in found], [metric.on(first) for metric in metrics])
    np.testing.assert_equal([d.second for d in found], [metric.on(second) for metric in metrics])


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


def test_wilson_gives_the_textbook_interval():
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(1.0, 50)[1] == 1.0


def coverage(sizes, truth, runs=150):
    """Share of intervals of the plain mean of subsets that hold the true accuracy."""
    rng = np.random.default_rng(0)
    names = [f"s{i:03d}" for i, size in enumerate(sizes) for _ in range(size)]
    groups = [(name, "right") for name in dict.fromkeys(names)]
    mean = Metric("overall", "mean", tuple(groups), lambda sums: nan_mean([sums.mean(group) for group in groups]))
    where = clusters(range(len(names)), names)
    held = 0
    for _ in range(runs):
        values = (rng.random(len(names)) < truth).astype(float)
        (interval,) = intervals([mean], by_group(names, "right", values), where, resamples=200)
        held += interval[0] <= truth <= interval[1]
    return held / runs


@pytest.mark.parametrize(
    "size", [60, pytest.param(4, marks=pytest.mark.slow), 2, pytest.param(1, marks=pytest.mark.slow)]
)
def test_intervals_hold_the_truth_however_small_the_subsets_are(size):
    # 150 runs of a true 95%: 0.90 to 0.99 in all but one of a thousand.
    assert 0.90 <= coverage([size] * (120 // size), 0.8) <= 0.995


def test_a_metric_that_rests_on_few_effective_prompts_has_no_interval():
    # 100 prompts, but half of the metric rests on two of them.
    names = ["a"] * 98 + ["b"] * 2
    groups = [("a", "right"), ("b", "right")]
    mean = Metric("overall", "mean", tuple(groups), lambda sums: nan_mean([sums.mean(group) for group in groups]))
    values = by_group(names, "right", np.random.default_rng(0).integers(0, 2, 100))
    assert intervals([mean], values, clusters(range(100), names)) == [None]
    assert intervals([mean_metric("subsets", "a", groups[0])], values, clusters(range(100), names)) != [None]
