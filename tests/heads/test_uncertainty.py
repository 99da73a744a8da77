"""Uncertainty against the plain formulas, by inversion, and against what refitting does."""

from __future__ import annotations

import numpy as np
import pytest

from armorm.heads.accumulation import accumulate, blocks_of
from armorm.heads.regression import fit_from_statistics
from armorm.heads.uncertainty import StreamedQuantiles, Uncertainty, calibrate, error_correlation, fit_uncertainty

D, FOLDS = 12, 4
NAMES = ["a", "b", "c"]


def rows(seed: int = 0, n: int = 600) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of falling spread; a and b rated on the same rows with errors that go together, c on others."""
    rng = np.random.default_rng(seed)
    features = (rng.normal(size=(n, D)) * 0.7 ** np.arange(D) * 3 + 0.5).astype(np.float32)
    noise = rng.normal(size=(n, 3)) * [0.3, 0.5, 0.4]
    noise[:, 1] += 0.8 * noise[:, 0]
    ratings = features @ np.linspace(-1, 1, 3 * D).reshape(D, 3) / D + noise
    first = np.arange(n) < n // 2
    ratings[first, 2] = np.nan
    ratings[~first, :2] = np.nan
    return features, ratings, np.arange(n) % FOLDS


def fitted(intercept: bool = False, **options):
    features, ratings, folds = rows()
    statistics = accumulate(blocks_of(features, ratings, folds), NAMES, FOLDS, D, precision="float64")
    head = fit_from_statistics(statistics, alphas=(5.0,), intercept=intercept)
    return features, ratings, folds, statistics, head, fit_uncertainty(statistics, head, intercept=intercept, **options)


def plain_leverage(x: np.ndarray, rated: np.ndarray, alpha: float, intercept: bool) -> np.ndarray:
    """x^T (G + alpha I)^-1 x by inverting; with an intercept about the mean, and 1/n more."""
    rated = rated.astype(np.float64)
    mean = rated.mean(0) if intercept else np.zeros(D)
    inverse = np.linalg.inv((rated - mean).T @ (rated - mean) + alpha * np.eye(D))
    return np.einsum("nd,de,ne->n", x - mean, inverse, x - mean) + (1 / len(rated) if intercept else 0)


@pytest.mark.parametrize("intercept", [False, True])
def test_leverage_and_standard_deviations_are_those_of_the_formulas(intercept):
    features, ratings, folds, _, head, uncertainty = fitted(intercept)
    assert uncertainty.basis.shape == (2, D, D), "so small a matrix is kept whole"
    leverage = uncertainty.leverage(features)
    out_of_fold = head.predict_out_of_fold(features, folds)
    for column in range(3):
        rated = ~np.isnan(ratings[:, column])
        np.testing.assert_allclose(
            leverage[:, column], plain_leverage(features, features[rated], 5.0, intercept), rtol=1e-4
        )
        sigma = np.sqrt(np.mean((out_of_fold - ratings)[rated, column] ** 2))
        assert uncertainty.noise[column] == pytest.approx(sigma, rel=1e-6)
    epistemic, predictive = uncertainty.epistemic_std(leverage), uncertainty.predictive_std(leverage)
    np.testing.assert_allclose(epistemic, uncertainty.noise * np.sqrt(leverage))
    np.testing.assert_allclose(predictive**2, uncertainty.noise**2 + epistemic**2)


def test_epistemic_std_is_what_fits_on_other_draws_of_the_ratings_differ_by():
    """Refit on fresh noise, many times: the spread of a prediction is sigma sqrt(x^T A^-1 G A^-1 x), of which the
    epistemic std is an upper bound that is near for a small alpha."""
    features, ratings, folds, _, _, _ = fitted()
    rated = ~np.isnan(ratings[:, 2])
    x = features[rated].astype(np.float64)
    rng = np.random.default_rng(1)
    statistics = accumulate(blocks_of(features, ratings, folds), NAMES, FOLDS, D, precision="float64")
    head = fit_from_statistics(statistics, alphas=(0.01,))
    uncertainty = fit_uncertainty(statistics, head)
    inverse = np.linalg.inv(x.T @ x + 0.01 * np.eye(D))
    draws = [features @ inverse @ x.T @ (0.4 * rng.normal(size=len(x))) for _ in range(400)]
    spread = np.std(draws, axis=0)
    said = uncertainty.epistemic_std(uncertainty.leverage(features))[:, 2] * 0.4 / uncertainty.noise[2]
    np.testing.assert_allclose(spread, said, rtol=0.2)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_error_of_a_cut_basis_keeps_within_its_bound_and_is_nothing_on_average(rank):
    features, ratings, _, _, _, uncertainty = fitted(max_rank=rank, tolerance=0.0)
    assert uncertainty.basis.shape == (2, rank, D)
    probes = np.random.default_rng(2).normal(size=(500, D)).astype(np.float32)
    for column in range(3):
        rated = features[~np.isnan(ratings[:, column])]
        for x in (features, probes):
            ratio = np.sqrt(uncertainty.leverage(x)[:, column] / plain_leverage(x, rated, 5.0, False))
            assert np.abs(ratio - 1).max() <= np.expm1(np.log1p(uncertainty.error_bound[column])) / (
                1 - min(uncertainty.error_bound[column], 0.9)
            )
        mean = uncertainty.leverage(rated)[:, column].mean()
        assert mean == pytest.approx(plain_leverage(rated, rated, 5.0, False).mean(), rel=1e-4)


def test_no_more_is_kept_than_the_tolerance_asks_for():
    loose, strict = (fitted(tolerance=tolerance)[5] for tolerance in (0.9, 0.01))
    assert loose.basis.shape[1] <= strict.basis.shape[1] == D
    assert strict.error_bound.max() <= 0.01


def test_errors_of_objectives_on_the_same_rows_go_together_and_of_others_do_not():
    features, ratings, folds, statistics, head, _ = fitted()
    found = error_correlation(statistics, head)
    errors = (head.predict_out_of_fold(features, folds) - ratings)[: len(ratings) // 2, :2]
    products = errors.T @ errors
    expected = products[0, 1] / np.sqrt(products[0, 0] * products[1, 1])
    assert found[0, 1] == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(found, found.T)
    assert expected > 0.3
    assert found[0, 2] == found[1, 2] == 0


def test_the_score_std_is_that_of_a_sum_of_correlated_errors():
    features, _, _, _, _, uncertainty = fitted()
    coefficients = np.random.default_rng(3).normal(size=(len(features), 3))
    leverage = uncertainty.leverage(features)
    parts = coefficients * uncertainty.epistemic_std(leverage)
    plain = [
        np.sqrt(sum(p[i] * p[j] * uncertainty.correlation[i, j] for i in range(3) for j in range(3))) for p in parts
    ]
    np.testing.assert_allclose(uncertainty.score_std(leverage, coefficients), plain, rtol=1e-9)


def test_far_from_the_rated_rows_leverage_is_high():
    features, _, _, _, _, uncertainty = fitted()
    far = uncertainty.leverage(features[:50] * 10)
    assert (far > 50 * uncertainty.leverage(features[:50])).all()


def test_intervals_hold_the_share_they_claim_on_rows_not_seen():
    features, ratings, folds, _, head, uncertainty = fitted()
    calibrated = calibrate(uncertainty, head, blocks_of(features, ratings, folds, 100), np.array([True, False, True]))
    assert np.isnan([values[1] for values in calibrated.conformal.values()]).all()
    fresh, fresh_ratings, _ = rows(seed=9, n=4000)
    leverage = calibrated.leverage(fresh)
    errors = np.abs(head.predict(fresh) - fresh_ratings) / calibrated.predictive_std(leverage)
    for level, factors in calibrated.conformal.items():
        for column in (0, 2):
            known = errors[~np.isnan(errors[:, column]), column]
            assert (known <= factors[column]).mean() == pytest.approx(level, abs=0.05)
    assert (leverage[2000:, 2] <= calibrated.usual_leverage[2]).mean() == pytest.approx(0.99, abs=0.02)


def test_streamed_quantiles_are_those_of_sorting():
    values = np.random.default_rng(4).lognormal(size=(1000, 2))
    values[:300, 1] = np.nan
    streamed = StreamedQuantiles(2)
    for part in np.array_split(values, 7):
        streamed.add(part)
    for level in (0.5, 0.8, 0.95):
        for column, count in ((0, 1000), (1, 700)):
            ordered = np.sort(values[~np.isnan(values[:, column]), column])
            exact = ordered[int(np.ceil((count + 1) * level)) - 1]
            assert exact <= streamed.conformal(level)[column] <= exact * 1.003
    assert np.isnan(streamed.conformal(0.9999)[0])


def test_what_a_model_keeps_is_read_back():
    features, ratings, folds, _, head, uncertainty = fitted(intercept=True)
    calibrated = calibrate(uncertainty, head, blocks_of(features, ratings, folds), np.array([True, False, True]))
    again = Uncertainty.from_settings(calibrated.settings(), calibrated.tensors())
    np.testing.assert_array_equal(again.leverage(features), calibrated.leverage(features))
    np.testing.assert_array_equal(again.conformal[0.8], calibrated.conformal[0.8])
    np.testing.assert_array_equal(again.correlation, calibrated.correlation)
