"""Debiasing against numpy, scipy and a fine grid."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from armorm.correlation import pearson, spearman, within_groups
from armorm.errors import FitError
from armorm.heads.debiasing import fit_debiasing, no_debiasing

BIAS = 2


def rewards_with_bias(seed: int = 0, n: int = 300) -> np.ndarray:
    """Five objectives: the third is the bias; two like it (one a lot), one dislikes it, one hardly minds."""
    rng = np.random.default_rng(seed)
    bias = rng.gamma(2.0, size=n)
    likes = np.array([0.8, 2.5, 1.0, -1.5, 0.02])
    rewards = bias[:, None] * likes + rng.normal(size=(n, 5))
    rewards[:, BIAS] = bias
    return rewards


def left_by_grid(reward: np.ndarray, bias: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Rank correlation that each penalty of the grid leaves."""
    return np.array([spearmanr(reward - penalty * bias, bias).statistic for penalty in grid])


def test_pearson_correlation_is_zero_after_the_transform():
    rewards = rewards_with_bias()
    debiasing = fit_debiasing(rewards, BIAS, metric="pearson")
    transformed = debiasing.apply(rewards)
    for column in (0, 1, 3, 4):
        before = np.corrcoef(rewards[:, column], rewards[:, BIAS])[0, 1]
        after = np.corrcoef(transformed[:, column], rewards[:, BIAS])[0, 1]
        assert debiasing.before[0, column] == pytest.approx(before, abs=1e-12)
        assert abs(after) < 1e-12
        assert debiasing.after[0, column] == pytest.approx(after, abs=1e-12)


def test_the_transform_takes_the_bias_out_of_the_others_and_leaves_none_of_itself():
    rewards = rewards_with_bias()
    debiasing = fit_debiasing(rewards, BIAS)
    penalties = debiasing.penalties[0]
    expected = np.eye(5)
    expected[BIAS] = [-penalties[0], -penalties[1], 0.0, -penalties[3], -penalties[4]]
    np.testing.assert_array_equal(debiasing.matrix, expected)
    assert penalties[BIAS] == 1
    assert debiasing.matrix[BIAS, BIAS] == 0
    by_hand = np.stack([rewards[:, i] - penalties[i] * rewards[:, BIAS] for i in range(5)], 1)
    np.testing.assert_allclose(debiasing.apply(rewards), by_hand, atol=1e-12)
    np.testing.assert_array_equal(debiasing.apply(rewards)[:, BIAS], 0)
    assert np.isnan(debiasing.after[0, BIAS])
    assert debiasing.before[0, BIAS] == pytest.approx(1)
    assert debiasing.against == (BIAS,)


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_penalties_have_the_sign_of_the_correlation(metric):
    rewards = rewards_with_bias()
    debiasing = fit_debiasing(rewards, BIAS, metric=metric)
    assert debiasing.penalties[0, 0] == pytest.approx(0.8, abs=0.25)
    assert debiasing.penalties[0, 1] == pytest.approx(2.5, abs=0.25)
    assert debiasing.penalties[0, 3] == pytest.approx(-1.5, abs=0.25)
    assert debiasing.before[0, 3] < -0.5
    assert abs(debiasing.after[0, 3]) < 0.01


def test_spearman_is_as_near_to_zero_as_a_fine_grid_comes():
    rewards = rewards_with_bias()
    debiasing = fit_debiasing(rewards, BIAS, metric="spearman")
    grid = np.linspace(-3, 3, 301)
    for column in (0, 1, 3, 4):
        reward, bias = rewards[:, column], rewards[:, BIAS]
        left = left_by_grid(reward, bias, grid)
        crossing = int(np.flatnonzero(left > 0).max())
        assert grid[crossing] <= debiasing.penalties[0, column] <= grid[crossing + 1]
        assert abs(debiasing.after[0, column]) <= np.abs(left).min() + 1e-12
        recorded = spearmanr(rewards @ debiasing.matrix[:, column], bias).statistic
        assert debiasing.after[0, column] == pytest.approx(
            recorded, abs=1e-4
        )  # a near-tie falls either way by rounding


@pytest.mark.parametrize("seed", range(4))
def test_ties_leave_no_more_than_on_a_grid_that_meets_them(seed):
    rng = np.random.default_rng(seed)
    bias = rng.integers(0, 5, 60).astype(float)
    rewards = np.stack([bias, rng.integers(0, 3, 60) + np.round(bias / 2), rng.integers(0, 2, 60).astype(float)], 1)
    debiasing = fit_debiasing(rewards, 0, metric="spearman")
    grid = np.arange(-32, 33) / 16  # holds 0 and the halves and quarters at which integer ratings tie
    for column in (1, 2):
        assert abs(debiasing.after[0, column]) <= np.abs(left_by_grid(rewards[:, column], bias, grid)).min() + 1e-12


def test_a_heavily_tied_reward_without_rank_correlation_is_left_alone():
    bias = np.exp(np.arange(8.0))  # skewed, so that the search starts away from zero
    reward = np.array([0.0, 1, 1, 0, 0, 1, 1, 0])
    assert spearmanr(reward, bias).statistic == pytest.approx(0, abs=1e-15)
    debiasing = fit_debiasing(np.stack([reward, bias], 1), 1, metric="spearman")
    assert debiasing.penalties[0, 0] == 0
    assert debiasing.after[0, 0] == pytest.approx(0, abs=1e-15)


def test_correlations_are_those_of_numpy_and_scipy_and_zero_for_a_constant():
    rng = np.random.default_rng(1)
    first, second = rng.integers(0, 6, 80).astype(float), rng.normal(size=80)
    assert pearson(first, second) == pytest.approx(np.corrcoef(first, second)[0, 1], abs=1e-12)
    assert spearman(first, second) == pytest.approx(spearmanr(first, second).statistic, abs=1e-12)
    assert pearson(first, np.full(80, 2.0)) == 0
    assert spearman(np.full(80, 2.0), first) == 0


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_a_bias_that_does_not_vary_is_refused(metric):
    rewards = rewards_with_bias()
    rewards[:, BIAS] = 0.1
    with pytest.raises(FitError, match="does not vary over the 300 reference rows"):
        fit_debiasing(rewards, BIAS, metric=metric)
    with pytest.raises(FitError, match="does not vary over the 2 reference rows"):
        fit_debiasing(rewards_with_bias()[:2], BIAS, metric=metric)


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_a_bias_that_varies_between_prompts_only_is_refused_within_prompts(metric):
    rewards = rewards_with_bias()
    prompts = np.repeat(np.arange(100), 3)
    rewards[:, BIAS] = prompts / 10 + 0.1  # means of three equal numbers are off by rounding
    fit_debiasing(rewards, BIAS, metric=metric)
    with pytest.raises(FitError, match="does not vary"):
        fit_debiasing(rewards, BIAS, metric=metric, level="within_prompt", groups=prompts)


def prompts_that_hide_a_bias() -> tuple[np.ndarray, np.ndarray]:
    """Longer is better between prompts, and worse within each."""
    rng = np.random.default_rng(2)
    prompts = np.repeat(np.arange(80), 4)
    level = rng.normal(size=80)[prompts] * 3
    within = rng.normal(size=320)
    bias = level + within
    return np.stack([level * 2 - within + 0.3 * rng.normal(size=320), bias], 1), prompts


def without_prompt_means(values: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    return np.array([values[i] - values[prompts == prompts[i]].mean(0) for i in range(len(values))])


@pytest.mark.parametrize(("metric", "tolerance"), [("pearson", 1e-12), ("spearman", 0.005)])
def test_the_level_decides_which_correlation_goes(metric, tolerance):
    rewards, prompts = prompts_that_hide_a_bias()
    measure = pearson if metric == "pearson" else spearman
    pooled = fit_debiasing(rewards, 1, metric=metric)
    within = fit_debiasing(rewards, 1, metric=metric, level="within_prompt", groups=prompts)
    bias = without_prompt_means(rewards, prompts)[:, 1]

    def left_within(debiasing):
        return measure(without_prompt_means(debiasing.apply(rewards), prompts)[:, 0], bias)

    assert abs(left_within(within)) < tolerance
    assert abs(left_within(pooled)) > 0.5
    assert abs(measure(pooled.apply(rewards)[:, 0], rewards[:, 1])) < tolerance
    assert abs(measure(within.apply(rewards)[:, 0], rewards[:, 1])) > 0.5
    assert pooled.penalties[0, 0] > 0 > within.penalties[0, 0]
    assert within.after[0, 0] == pytest.approx(left_within(within), abs=1e-4)  # near-ties fall either way by rounding


def test_prompts_with_one_response_say_nothing_within_prompts():
    rewards, prompts = prompts_that_hide_a_bias()
    lone = np.random.default_rng(3).normal(5, 9, size=(50, 2))
    more, more_prompts = np.concatenate([rewards, lone]), np.concatenate([prompts, np.arange(1000, 1050)])
    settings = {"metric": "pearson", "level": "within_prompt"}
    alone = fit_debiasing(rewards, 1, groups=prompts, **settings)
    np.testing.assert_array_equal(fit_debiasing(more, 1, groups=more_prompts, **settings).matrix, alone.matrix)
    np.testing.assert_allclose(within_groups(more, more_prompts), without_prompt_means(rewards, prompts), atol=1e-12)


def test_within_prompts_needs_the_prompts():
    with pytest.raises(FitError, match="needs the prompt of each reference row"):
        fit_debiasing(rewards_with_bias(), BIAS, level="within_prompt")


def test_no_debiasing_changes_nothing():
    rewards = rewards_with_bias()
    nothing = no_debiasing(5)
    np.testing.assert_array_equal(nothing.apply(rewards), rewards)
    assert nothing.against == ()
    np.testing.assert_array_equal(nothing.penalties, 0)


# --- several biases ------------------------------------------------------------------------------


def two_biases(seed: int = 0, n: int = 400, together: float = 0.6) -> np.ndarray:
    """Length and markdown that go together, and three objectives that like or dislike either; lognormal, so that ranks
    and values differ."""
    rng = np.random.default_rng(seed)
    length = rng.normal(size=n)
    markdown = together * length + np.sqrt(1 - together**2) * rng.normal(size=n)
    own = rng.normal(size=(n, 3))
    likes = np.array([[0.8, -0.5, 0.0], [0.3, 0.9, 0.0]])
    return np.column_stack(
        [length, markdown, own + np.stack([length, markdown], 1) @ likes, np.exp(own[:, 0] + length)]
    )


def test_pearson_takes_out_several_biases_exactly():
    rewards = two_biases()
    debiasing = fit_debiasing(rewards, [0, 1], metric="pearson")
    debiased = debiasing.apply(rewards)
    for column in (2, 3, 4, 5):
        for bias in (0, 1):
            assert abs(pearson(debiased[:, column], rewards[:, bias])) < 1e-12
            assert abs(debiasing.after[bias, column]) < 1e-12
            assert debiasing.before[bias, column] == pytest.approx(pearson(rewards[:, column], rewards[:, bias]))
    np.testing.assert_array_equal(debiased[:, :2], 0)
    assert np.isnan(debiasing.after[:, :2]).all()
    expected = np.eye(6)
    expected[:2] = 0
    for column in (2, 3, 4, 5):
        design = np.column_stack([np.ones(len(rewards)), rewards[:, :2]])
        expected[:2, column] = -np.linalg.lstsq(design, rewards[:, column], rcond=None)[0][1:]
    np.testing.assert_allclose(debiasing.matrix, expected, atol=1e-12)


def test_taking_out_one_bias_leaves_the_other_and_both_leave_neither():
    rewards = two_biases()
    one = fit_debiasing(rewards, 0, metric="spearman").apply(rewards)
    both = fit_debiasing(rewards, [0, 1], metric="spearman").apply(rewards)
    assert abs(spearman(one[:, 3], rewards[:, 1])) > 0.2
    for column in (2, 3, 4, 5):
        for bias in (0, 1):
            assert abs(spearman(both[:, column], rewards[:, bias])) < 0.005


@pytest.mark.parametrize("seed", range(5))
def test_spearman_leaves_less_than_the_pearson_solution(seed):
    rewards = two_biases(seed, together=0.8)
    pearsons = fit_debiasing(rewards, [0, 1], metric="pearson").apply(rewards)
    debiasing = fit_debiasing(rewards, [0, 1], metric="spearman")
    for column in (2, 3, 4, 5):
        left = [abs(spearman(pearsons[:, column], rewards[:, bias])) for bias in (0, 1)]
        assert np.abs(debiasing.after[:, column]).max() <= max(left) + 1e-9
    assert np.nanmax(np.abs(debiasing.after)) < 0.01
    assert abs(spearman(pearsons[:, 5], rewards[:, 0])) > 0.02, "the case should need the search"


def test_one_bias_in_a_list_is_one_bias():
    rewards = rewards_with_bias()
    np.testing.assert_array_equal(fit_debiasing(rewards, [BIAS]).matrix, fit_debiasing(rewards, BIAS).matrix)


def test_biases_that_determine_each_other_are_refused():
    rewards = two_biases(together=0.995)
    with pytest.raises(
        FitError, match=r"nearly collinear: the others explain 99\.\d% of the variance of the one in column"
    ):
        fit_debiasing(rewards, [0, 1])
    sums = np.column_stack([rewards, rewards[:, 0] + rewards[:, 2]])
    with pytest.raises(FitError, match="nearly collinear"):
        fit_debiasing(sums, [0, 2, 6])
    fit_debiasing(two_biases(together=0.9), [0, 1])


def test_an_objective_that_is_almost_nothing_but_the_bias_is_named():
    rng = np.random.default_rng(0)
    length = rng.normal(size=500)
    rewards = np.column_stack([length + 0.1 * rng.normal(size=500), rng.normal(size=500), length])
    debiasing = fit_debiasing(rewards, 2)
    assert debiasing.explained[0] == pytest.approx(pearson(rewards[:, 0], length) ** 2)
    (warning,) = debiasing.warnings(["helpful", "safe", "verbosity"])
    assert warning.startswith("objective helpful is almost entirely explained by verbosity: 99%")


# --- the published search ------------------------------------------------------------------------


def test_the_published_search_takes_the_first_of_its_penalties_that_will_do():
    rewards = rewards_with_bias()
    debiasing = fit_debiasing(rewards, BIAS, method="published")
    grid = np.linspace(0, 0.95, 24)
    left = left_by_grid(rewards[:, 0], rewards[:, BIAS], grid)
    assert debiasing.penalties[0, 0] == grid[int(np.flatnonzero(left <= 0.03)[0])]
    assert debiasing.penalties[0, 3] == 0, "the search is one-sided: what dislikes length is left alone"
    assert debiasing.penalties[0, 1] == 1, "no penalty of the grid is enough for this one"
    assert debiasing.unmet == (1,)
    assert "objective b: no penalty of the published search" in " ".join(debiasing.warnings(list("abcde")))


@pytest.mark.parametrize("options", [{"metric": "pearson"}, {"level": "within_prompt"}, {"against": [0, 1]}])
def test_the_published_search_knows_one_way_only(options):
    settings = {"against": BIAS, **options}
    with pytest.raises(FitError, match="one bias, metric spearman and level pooled"):
        fit_debiasing(rewards_with_bias(), settings.pop("against"), method="published", **settings)


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_an_objective_keeps_its_correlation_with_a_bias_of_its_meaning(metric):
    rng = np.random.default_rng(3)
    biases = rng.normal(size=(800, 2))
    rewards = np.column_stack([biases @ [0.6, -0.8], biases @ [0.5, 0.9], np.zeros(800)])
    rewards = np.column_stack([rewards[:, :2] + rng.normal(size=(800, 2)), biases])
    kept = fit_debiasing(rewards, (2, 3), metric=metric, keep={0: [3]})
    everything = fit_debiasing(rewards, (2, 3), metric=metric)
    assert kept.penalties[1, 0] == 0
    assert abs(kept.after[0, 0]) < 0.02
    assert kept.after[1, 0] < -0.4
    np.testing.assert_array_equal(kept.penalties[:, 1:], everything.penalties[:, 1:])
    alone = fit_debiasing(rewards, (2, 3), metric=metric, keep={0: [2, 3]})
    np.testing.assert_array_equal(alone.matrix[:, 0], [1, 0, 0, 0])
