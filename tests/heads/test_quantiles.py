"""Quantile heads: the smoothed loss against averages over jitter, known distributions, no crossing, calibration."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from armorm.errors import FitError
from armorm.heads.quantiles import LEVELS, fit_quantiles, half_width, pinball, share_below

FOLDS = 4


def rated(seed: int = 0, n: int = 4000, d: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, and ratings about x_0 whose spread grows with x_1: 0.1 * exp(x_1) standard deviations."""
    rng = np.random.default_rng(seed)
    features = rng.uniform(-1, 1, size=(n, d)) * np.array([1.0, 1.0, 20.0])
    ratings = 0.3 * features[:, 0] + 0.1 * (1.5 + features[:, 1]) * rng.normal(size=n)
    return features, ratings[:, None], np.arange(n) % FOLDS


def fitted(features, ratings, folds, **options):
    rewards = np.where(np.isnan(ratings), 0.0, 0.3 * features[:, :1])
    return fit_quantiles(features, ratings, rewards, folds, ["a"], **options), rewards


@pytest.mark.parametrize("level", [0.1, 0.5, 0.9])
def test_the_smoothed_loss_is_the_mean_of_the_plain_loss_over_a_cell(level):
    jitter = np.linspace(-0.3, 0.3, 200_001)
    for residual in (-1.0, -0.3, -0.1, 0.0, 0.2, 0.29, 0.8):
        z = residual + jitter
        plain = np.where(z > 0, level * z, (level - 1) * z).mean()
        assert pinball(np.array(residual), np.array(level), 0.3) == pytest.approx(plain, abs=1e-5)


def test_the_share_below_a_quantile_counts_part_of_a_cell():
    found = share_below(np.array([1.0, 2.0, 3.0, 4.0]), np.array(2.25), 0.5)
    np.testing.assert_allclose(found, [1, 0.75, 0, 0])


def test_quantiles_follow_a_spread_that_depends_on_the_response():
    features, ratings, folds = rated()
    head, _ = fitted(features, ratings, folds)
    assert head.reports[0].loss < 0.98 * head.reports[0].constant_loss
    fresh, _, _ = rated(seed=1)
    quantiles = head.predict(fresh, 0.3 * fresh[:, :1])[:, 0]
    spread = quantiles[:, LEVELS.index(0.9)] - quantiles[:, LEVELS.index(0.1)]
    expected = 2 * 1.2816 * 0.1 * (1.5 + fresh[:, 1])
    assert np.corrcoef(spread, expected)[0, 1] > 0.98
    assert spread.mean() == pytest.approx(expected.mean(), rel=0.05)


def test_coverage_on_new_responses_is_the_nominal_one():
    features, ratings, folds = rated()
    head, _ = fitted(features, ratings, folds)
    fresh, truth, _ = rated(seed=2)
    quantiles = head.predict(fresh, 0.3 * fresh[:, :1])[:, 0]
    np.testing.assert_allclose((truth < quantiles).mean(0), LEVELS, atol=0.03)
    np.testing.assert_allclose(head.reports[0].below, LEVELS, atol=0.03)


def test_levels_are_calibrated_in_cells():
    features, ratings, folds = rated()
    stars = np.clip(np.round(ratings * 4 + 3), 1, 5)
    rewards = np.broadcast_to(stars.mean(), stars.shape)
    head = fit_quantiles(features, stars, rewards, folds, ["stars"])
    assert head.reports[0].half_width == 0.5
    fresh, truth, _ = rated(seed=3)
    new = np.clip(np.round(truth * 4 + 3), 1, 5)
    quantiles = head.predict(fresh, np.full((len(fresh), 1), stars.mean()))[:, 0]
    np.testing.assert_allclose(share_below(new, quantiles, 0.5).mean(0), LEVELS, atol=0.03)


def test_the_fit_is_a_minimum_of_the_written_loss_for_correlated_features():
    """Against a minimiser of each level alone that takes as many steps as it needs."""
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(800, 100)) / np.arange(1, 101)) @ np.linalg.qr(rng.normal(size=(100, 100)))[0]
    features /= features.std(0)
    spread = np.exp(0.03 * features @ rng.normal(size=100))
    ratings = np.round(spread * rng.normal(size=800))[:, None].clip(-10, 10)
    penalty, levels = 1e-3, (0.025, 0.5, 0.9)
    head = fit_quantiles(
        features, ratings, np.zeros_like(ratings), np.arange(800) % FOLDS, ["a"], levels=levels, penalties=[penalty]
    )
    x, half = (features - features.mean(0)) / features.std(0), half_width(ratings[:, 0])

    def loss(values: np.ndarray, level: float) -> float:
        residual = ratings[:, 0] - values[0] - x @ values[1:]
        return pinball(residual, np.array(level), half).mean() + penalty * values[1:] @ values[1:]

    def slope(values: np.ndarray, level: float) -> np.ndarray:
        below = share_below(ratings[:, 0], values[0] + x @ values[1:], half) - level
        return np.concatenate([[below.mean()], x.T @ below / len(x) + 2 * penalty * values[1:]])

    for index, level in enumerate(levels):
        weight = head.weight[0, index] * features.std(0)
        found = np.concatenate([[head.bias[0, index] + head.weight[0, index] @ features.mean(0)], weight])
        options = {"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-15, "gtol": 1e-10}
        slow = minimize(loss, np.zeros(101), args=(level,), jac=slope, method="L-BFGS-B", options=options)
        assert loss(found, level) == pytest.approx(slow.fun, rel=1e-4)


def test_quantiles_never_cross():
    features, ratings, folds = rated(n=200)
    head, _ = fitted(features, ratings, folds, penalties=[1e-6])
    far = 30 * rated(seed=5)[0]
    raw = np.einsum("nd,jqd->njq", far, head.weight) + head.bias
    assert (np.diff(raw, axis=2) < 0).any(), "lines that are not sorted do cross so far out"
    assert (np.diff(head.predict(far, np.zeros((len(far), 1))), axis=2) >= 0).all()


@pytest.mark.slow
def test_a_spread_that_depends_on_nothing_is_found_constant():
    rng = np.random.default_rng(0)
    features, noise = rng.normal(size=(600, 40)), rng.normal(size=(600, 1))
    head = fit_quantiles(features, noise, np.zeros_like(noise), np.arange(600) % FOLDS, ["noise"])
    assert np.isinf(head.reports[0].penalty)
    assert (head.weight == 0).all()
    assert head.bias[0, LEVELS.index(0.9)] == pytest.approx(1.28, abs=0.2)


def test_objectives_of_few_levels_or_ratings_have_none():
    features, ratings, folds = rated(n=400)
    table = np.hstack([(ratings > 0).astype(float), ratings, ratings])
    table[90:, 2] = np.nan
    head = fit_quantiles(features, table, np.zeros_like(table), folds, ["yes", "many", "rare"])
    assert head.objectives == ["many"]
    assert head.columns.tolist() == [1]
    assert head.predict(features[:7], np.zeros((7, 3))).shape == (7, 1, len(LEVELS))
    with pytest.raises(FitError, match="no objective has 5 levels and 100 ratings"):
        fit_quantiles(features, table[:, [0, 2]], np.zeros((400, 2)), folds, ["yes", "rare"])


@pytest.mark.parametrize("levels", [[], [0.5, 0.1], [0.0, 0.5], [0.5, 1.0], [0.5, 0.5]])
def test_levels_that_do_not_ascend_in_the_unit_interval_are_refused(levels):
    features, ratings, folds = rated(n=200)
    with pytest.raises(FitError, match="ascending"):
        fit_quantiles(features, ratings, np.zeros_like(ratings), folds, ["a"], levels=levels)


def test_half_a_cell_is_half_the_distance_of_neighbouring_levels():
    assert half_width(np.array([0.0, 0.25, 0.5, 1.0])) == 0.125
    continuous = np.random.default_rng(0).normal(size=500)
    assert half_width(continuous) == pytest.approx(0.05 * continuous.std())
