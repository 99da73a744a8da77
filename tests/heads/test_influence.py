"""Leaving out rows in closed form against refitting without them, by scikit-learn in float64."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from armorm.heads.influence import FittedRidge, effect_of_rows, noise, reward_of_rest
from armorm.heads.rated_record import sum_of_rows
from armorm.heads.statistics import Moments

PENALTIES = np.array([0.3, 30.0])


def rated(n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Features off the origin (n, d) float32, ratings of two objectives (n, 2)."""
    rng = np.random.default_rng(n + d)
    features = (rng.normal(size=(n, d)) + rng.normal(size=d)).astype(np.float32)
    return features, 0.5 + features @ rng.normal(size=(d, 2)) / d + rng.normal(size=(n, 2))


def refitted(features, ratings, kept, penalty, intercept, response) -> float:
    ridge = Ridge(alpha=penalty, fit_intercept=intercept, solver="svd", tol=1e-14)
    ridge.fit(features[kept].astype(np.float64), ratings[kept])
    return float(response @ ridge.coef_ + ridge.intercept_)


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize(("n", "d"), [(200, 12), (60, 90)])
def test_effects_equal_refitting_without_a_row_and_without_many_rows(intercept, n, d):
    features, ratings = rated(n, d)
    response = features[3].astype(np.float64) * 0.7 + 0.2
    ridge = FittedRidge.of(sum_of_rows(features, ratings), PENALTIES, intercept)
    rotated, target = ridge.rotated(features), ridge.rotated(response[None])[0]
    leverage, residuals = ridge.leverage(rotated), ridge.residuals(features, ratings)
    products = ridge.products(rotated, target)
    alone = products * residuals / (1 - leverage)
    everything = np.ones(n, bool)
    for column, penalty in enumerate(PENALTIES):
        full = refitted(features, ratings[:, column], everything, penalty, intercept, response)
        assert response @ ridge.weight[column] + ridge.bias[column] == pytest.approx(full, abs=1e-9)
        for row in range(50):
            kept = everything.copy()
            kept[row] = False
            without = refitted(features, ratings[:, column], kept, penalty, intercept, response)
            assert alone[row, column] == pytest.approx(full - without, abs=1e-9)
            predicted = refitted(features, ratings[:, column], kept, penalty, intercept, features[row])
            left_out = residuals[row, column] / (1 - leverage[row, column])
            assert left_out == pytest.approx(ratings[row, column] - predicted, abs=1e-8)
        for some in (np.arange(2), np.arange(5, 30), np.arange(0, 48)):  # fewer and more rows than the 12 features
            kept = np.setdiff1d(np.arange(n), some)
            without = refitted(features, ratings[:, column], kept, penalty, intercept, response)
            found = effect_of_rows(
                rotated[some], ridge.inverse[:, column], residuals[some, column], products[some, column]
            )
            assert found == pytest.approx(full - without, abs=1e-8)
            rest = sum_of_rows(features[kept], ratings[kept][:, [column]])
            assert reward_of_rest(rest, penalty, intercept, response) == pytest.approx(without, abs=1e-8)


def test_without_any_row_a_reward_is_zero_and_with_an_intercept_undefined():
    nothing = Moments.zero(4, 1)
    assert reward_of_rest(nothing, 1.0, False, np.ones(4)) == 0
    assert np.isnan(reward_of_rest(nothing, 1.0, True, np.ones(4)))


def test_noise_is_the_standard_deviation_of_the_ratings_around_a_linear_truth():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(4000, 8)).astype(np.float32)
    ratings = features @ rng.normal(size=(8, 2)) + rng.normal(size=(4000, 2)) * [0.5, 2.0]
    ridge = FittedRidge.of(sum_of_rows(features, ratings), np.array([1.0, 1.0]), False)
    leverage = ridge.leverage(ridge.rotated(features))
    errors = ridge.residuals(features, ratings) / (1 - leverage)
    sigma = noise(errors, leverage)
    np.testing.assert_allclose(sigma, [0.5, 2.0], rtol=0.05)
    scaled = errors * np.sqrt(1 - leverage) / sigma
    np.testing.assert_allclose(scaled.std(0), 1, rtol=0.01)
