"""The scale of the score: against a slow search, with few pairs, with weights, and with many pairs of one prompt."""

from __future__ import annotations

import json

import numpy as np
import pytest

from armorm.errors import FitError
from armorm.heads.calibration import (
    PRIOR_DEVIATION,
    PRIOR_MEDIAN,
    Calibration,
    divided_prompts,
    fit_scale,
    prompt_capped,
)


def pairs(rng: np.random.Generator, scale: float, count: int) -> np.ndarray:
    """Margins (count,) at scale 1 of pairs whose preference follows sigmoid(scale * margin)."""
    margins = rng.normal(size=count)
    return np.where(rng.random(count) < 1 / (1 + np.exp(-scale * margins)), margins, -margins)


def likeliest(margins: np.ndarray, weights: np.ndarray | float = 1.0) -> float:
    """The scale without a prior, by a fine grid."""
    grid = np.exp(np.linspace(-3, 5, 2001))
    return float(grid[np.argmin([(weights * np.logaddexp(0, -s * margins)).sum() for s in grid])])


@pytest.mark.parametrize("unit", [1e-4, 1.0, 300.0])
def test_the_scale_is_the_best_of_a_grid_whatever_the_unit(unit):
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 40, 120)
    margins, weights = rng.normal(0.5, 1.0, 120) * unit, rng.choice([0.5, 1.0, 3.0], 120)
    found = fit_scale(margins, weights, prompts)
    correlation = np.where(np.eye(120, dtype=bool), 1.0, np.where(prompts[:, None] == prompts, 1 / 3, 0.0))
    effective = weights.sum() ** 2 / (weights @ correlation @ weights)
    rms = np.sqrt(np.average(margins**2, weights=weights))
    grid = np.exp(np.linspace(-4, 3, 7001)) / rms
    objective = [
        effective * np.average(np.logaddexp(0, -s * margins), weights=weights)
        + (np.log(s * rms) - np.log(PRIOR_MEDIAN)) ** 2 / (2 * PRIOR_DEVIATION**2)
        for s in grid
    ]
    assert found.scale == pytest.approx(grid[int(np.argmin(objective))], rel=2e-3)
    assert found.effective_pairs == pytest.approx(effective)
    assert (found.pairs, found.prompts) == (120, len(set(prompts)))
    assert found.accuracy == pytest.approx(np.average(margins > 0, weights=weights))
    assert found.loss == pytest.approx(np.average(np.logaddexp(0, -found.scale * margins), weights=weights))
    # The standard error is that of the curvature in the logarithm, by differences.
    at, step = int(np.argmin(objective)), 100
    curvature = (objective[at - step] - 2 * objective[at] + objective[at + step]) / (step * 7 / 7000) ** 2
    assert found.scale_error == pytest.approx(curvature**-0.5, rel=0.02)


def test_twenty_pairs_that_are_all_right_give_a_sane_scale():
    equal = fit_scale(np.ones(20))
    assert 4 < equal.scale < 5.5
    mixed = fit_scale(np.abs(np.random.default_rng(0).normal(size=20)))
    assert mixed.scale < 12
    assert likeliest(np.ones(20)) > 100, "the likelihood alone has no maximum"


def test_few_pairs_do_not_give_a_scale_far_above_the_true_one():
    rng = np.random.default_rng(1)
    found = np.array([fit_scale(pairs(rng, 4.0, 20)).scale for _ in range(300)])
    assert np.quantile(found, 0.95) < 10
    assert np.median(found) == pytest.approx(4.0, rel=0.25)


def test_the_prior_vanishes_with_many_pairs():
    rng = np.random.default_rng(2)
    for true in (1.0, 4.0):
        for _ in range(20):
            margins = pairs(rng, true, 500)
            assert fit_scale(margins).scale == pytest.approx(likeliest(margins), rel=0.03)
        many = pairs(rng, true, 20_000)
        assert fit_scale(many).scale == pytest.approx(likeliest(many), rel=0.005)


def test_weights_decide_between_pairs_that_disagree():
    rng = np.random.default_rng(3)
    margins = np.concatenate([pairs(rng, 6.0, 2000), pairs(rng, 0.5, 2000)])
    weights = np.repeat([1.0, 0.02], 2000)
    weighted, plain = fit_scale(margins, weights), fit_scale(margins)
    assert weighted.scale == pytest.approx(likeliest(margins, weights), rel=0.01)
    assert weighted.scale > 1.5 * plain.scale
    assert fit_scale(margins, 7 * weights).scale == pytest.approx(weighted.scale), "only relative weights matter"


def test_many_pairs_of_one_prompt_are_not_many_observations():
    rng = np.random.default_rng(4)
    margins = np.abs(rng.normal(size=200))
    alone, together = fit_scale(margins), fit_scale(margins, prompts=np.zeros(200, int))
    assert alone.effective_pairs == pytest.approx(200)
    assert together.effective_pairs == pytest.approx(3, rel=0.02)
    assert together.scale < alone.scale / 2
    assert together.scale_error > 1.3 * alone.scale_error


def test_the_standard_error_covers_the_true_scale():
    rng = np.random.default_rng(5)
    found = [fit_scale(pairs(rng, 3.0, 150)) for _ in range(400)]
    z = np.array([np.log(one.scale / 3.0) / one.scale_error for one in found])
    assert 0.85 < np.sqrt(np.mean(z**2)) < 1.15


def test_a_calibrated_scale_expects_the_accuracy_that_it_has():
    found = fit_scale(pairs(np.random.default_rng(6), 2.0, 20_000))
    assert found.expected_accuracy == pytest.approx(found.accuracy, abs=0.01)


def test_pairs_that_are_all_wrong_or_all_tied_give_a_finite_positive_scale():
    wrong = fit_scale(-np.abs(np.random.default_rng(7).normal(size=100)))
    assert 0 < wrong.scale < 0.2
    assert wrong.accuracy == 0
    tied = fit_scale(np.zeros(5))
    assert 0 < tied.scale < 10
    assert tied.loss == pytest.approx(np.log(2))


def test_a_calibration_is_plain_values_and_back():
    found = fit_scale(np.array([0.5, -0.2, 1.0]), np.array([1.0, 2.0, 1.0]), np.array([0, 0, 1]))
    assert Calibration.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize(
    ("margins", "weights", "message"),
    [
        ([], [], "0 margins"),
        ([1.0, 2.0], [1.0], "2 margins, 1 weights"),
        ([1.0, np.nan], [1.0, 1.0], "not finite"),
        ([1.0, 2.0], [1.0, -1.0], "expected weights >= 0"),
        ([1.0, 2.0], [0.0, 0.0], "expected weights >= 0"),
    ],
)
def test_values_that_cannot_be_fitted_are_refused(margins, weights, message):
    with pytest.raises(FitError, match=message):
        fit_scale(np.array(margins), np.array(weights))


def test_a_prompt_counts_as_at_most_so_many_pairs():
    prompts = np.array([7, 3, 7, 7, 7, 9, 9])
    weights = np.array([1.0, 1.0, 3.0, 1.0, 1.0, 0.5, 0.5])
    np.testing.assert_allclose(prompt_capped(weights, prompts, 2.0), [0.5, 1.0, 1.5, 0.5, 0.5, 0.5, 0.5])
    assert prompt_capped(np.ones(50), np.zeros(50), 3.0).sum() == pytest.approx(3)
    np.testing.assert_array_equal(prompt_capped(weights, prompts, None), weights)


def test_prompts_are_divided_whole_into_halves_of_similar_size():
    prompts = np.random.default_rng(8).integers(0, 60, 400)
    second = divided_prompts(prompts, 0)
    assert abs(second.mean() - 0.5) < 0.03
    assert not set(prompts[second]) & set(prompts[~second])
    np.testing.assert_array_equal(second, divided_prompts(prompts, 0))
    assert (second != divided_prompts(prompts, 1)).any()
