"""Stage 1 against refitting: scikit-learn's ridge for every objective, alpha and fold, one by one."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from armorm.errors import FitError
from armorm.heads.accumulation import accumulate, blocks_of
from armorm.heads.regression import fit_regression as fit
from armorm.heads.regression import fold_of
from armorm.heads.statistics import Moments

fit_regression = partial(fit, precision="float64")
ALPHAS = (0.0001, 0.01, 1.0, 30.0, 100.0, 300.0, 1000.0, 10000.0)
NAMES = ["clear", "also-clear", "noisy", "very-noisy"]
FOLDS = 5


def rated_data(seed: int = 0, n: int = 300, d: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 features off the origin, four objectives of rising noise rated on three sets of rows, folds by prompt."""
    rng = np.random.default_rng(seed)
    features = (rng.normal(size=(n, d)) + rng.normal(size=d)).astype(np.float32)
    truth = rng.normal(size=(d, 4)) / np.sqrt(d)
    ratings = 0.5 + features @ truth + rng.normal(size=(n, 4)) * np.array([0.05, 0.1, 3.0, 12.0])
    ratings[rng.random(n) < 0.3, :2] = np.nan
    ratings[rng.random(n) < 0.5, 2] = np.nan
    folds = np.array([prompt % FOLDS for prompt in rng.integers(0, 60, n)])
    return features, ratings, folds


def moments_of(features, ratings) -> Moments:
    """Sums over rows that rate everything, in float64."""
    names, folds = [str(i) for i in range(ratings.shape[1])], np.zeros(len(features), np.int64)
    blocks = blocks_of(features, ratings, folds)
    return accumulate(blocks, names, 1, features.shape[1], precision="float64").moments(range(len(names)), 0)


def refitted(features, ratings, rows, alpha, intercept):
    """Weights and intercept of one objective on some rows, by scikit-learn in float64."""
    rated = rows & ~np.isnan(ratings)
    ridge = Ridge(alpha=alpha, fit_intercept=intercept, solver="svd", tol=1e-14)
    ridge.fit(features[rated].astype(np.float64), ratings[rated])
    return ridge.coef_, ridge.intercept_


def slow_errors(features, ratings, folds, intercept, validation_folds) -> list[float]:
    """Held-out mean squared error of one objective for each alpha."""
    errors = []
    for alpha in ALPHAS:
        squares = []
        for fold in validation_folds:
            weight, bias = refitted(features, ratings, folds != fold, alpha, intercept)
            held_out = (folds == fold) & ~np.isnan(ratings)
            squares += list((features[held_out].astype(np.float64) @ weight + bias - ratings[held_out]) ** 2)
        errors.append(float(np.mean(squares)))
    return errors


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("validation_folds", [None, (0,)])
def test_alphas_weights_and_errors_equal_those_of_refitting(intercept, validation_folds):
    features, ratings, folds = rated_data()
    head = fit_regression(
        features, ratings, folds, NAMES, alphas=ALPHAS, intercept=intercept, validation_folds=validation_folds
    )
    for column, report in enumerate(head.reports):
        errors = slow_errors(features, ratings[:, column], folds, intercept, validation_folds or range(FOLDS))
        alpha = ALPHAS[int(np.argmin(errors))]
        assert (report.objective, report.alpha) == (NAMES[column], alpha)
        assert report.ratings == (~np.isnan(ratings[:, column])).sum()
        np.testing.assert_allclose(report.validation_errors, errors, rtol=1e-9)
        variance = np.nanvar(ratings[:, column])
        assert report.r2 == pytest.approx(1 - min(errors) / variance, abs=1e-9)
        everything = np.ones(len(folds), bool)
        for weight, bias, rows in [
            (head.weight, head.bias, everything),
            *((head.fold_weight[fold], head.fold_bias[fold], folds != fold) for fold in range(FOLDS)),
        ]:
            expected, offset = refitted(features, ratings[:, column], rows, alpha, intercept)
            np.testing.assert_allclose(weight[column], expected, rtol=1e-8, atol=1e-8 * np.abs(expected).max())
            np.testing.assert_allclose(bias[column], offset, rtol=1e-8, atol=1e-9)
    assert len({report.alpha for report in head.reports}) > 1, "the objectives should need different penalties"


def test_more_features_than_rows_are_solved_as_well():
    rng = np.random.default_rng(1)
    features, folds = rng.normal(size=(40, 90)).astype(np.float32), np.arange(40) % 4
    ratings = features[:, :1] + rng.normal(size=(40, 1))
    head = fit_regression(features, ratings, folds, ["wide"], alphas=(3.0,))
    expected, _ = refitted(features, ratings[:, 0], np.ones(40, bool), 3.0, False)
    np.testing.assert_allclose(head.weight[0], expected, rtol=1e-8, atol=1e-8 * np.abs(expected).max())


def test_a_fold_without_rows_changes_nothing():
    features, ratings, folds = rated_data()
    dense = fit_regression(features, ratings, folds, NAMES, alphas=ALPHAS)
    spread = fit_regression(features, ratings, folds * 2, NAMES, alphas=ALPHAS)
    np.testing.assert_array_equal(spread.weight, dense.weight)
    np.testing.assert_array_equal(spread.fold_weight[::2], dense.fold_weight)


def test_rows_without_a_rating_are_left_out():
    features, ratings, folds = rated_data()
    column = ratings[:, 2:3]
    unrated = np.isnan(column[:, 0])
    first = fit_regression(features, column, folds, ["noisy"], alphas=ALPHAS)
    other_features = features.copy()
    other_features[unrated] = np.nan  # any use of such a row would show
    second = fit_regression(other_features, column, folds, ["noisy"], alphas=ALPHAS)
    third = fit_regression(features[~unrated], column[~unrated], folds[~unrated], ["noisy"], alphas=ALPHAS)
    for head in (second, third):
        np.testing.assert_array_equal(head.weight, first.weight)
        assert head.reports == first.reports


def test_objectives_fitted_together_are_as_fitted_alone():
    features, ratings, folds = rated_data()
    together = fit_regression(features, ratings, folds, NAMES, alphas=ALPHAS)
    for column, name in enumerate(NAMES):
        alone = fit_regression(features, ratings[:, column : column + 1], folds, [name], alphas=ALPHAS)
        np.testing.assert_allclose(alone.weight[0], together.weight[column], rtol=1e-10, atol=1e-12)
        assert alone.reports[0].alpha == together.reports[column].alpha


@pytest.mark.parametrize("intercept", [False, True])
def test_out_of_fold_predictions_never_saw_the_prompt(intercept):
    features, ratings, folds = rated_data()
    settings = {"alphas": (1.0,), "intercept": intercept}
    whole = fit_regression(features, ratings, folds, NAMES, **settings)
    predicted = whole.predict_out_of_fold(features, folds)
    for fold in range(FOLDS):
        rows = folds == fold
        altered = ratings.copy()
        altered[rows] = 1000 - 7 * altered[rows]
        other = fit_regression(features, altered, folds, NAMES, **settings)
        np.testing.assert_allclose(other.predict_out_of_fold(features, folds)[rows], predicted[rows], atol=1e-8)
        assert np.abs(other.predict(features) - whole.predict(features)).max() > 1
        for column in range(4):
            weight, bias = refitted(features, ratings[:, column], ~rows, 1.0, intercept)
            np.testing.assert_allclose(predicted[rows, column], features[rows] @ weight + bias, atol=1e-8)


def test_prompts_outside_training_are_predicted_by_the_final_weights():
    features, ratings, folds = rated_data()
    head = fit_regression(features, ratings, folds, NAMES, alphas=(1.0,), intercept=True)
    unseen = np.full(len(folds), -1)
    np.testing.assert_allclose(head.predict_out_of_fold(features, unseen), head.predict(features), rtol=1e-12)
    mixed = np.where(np.arange(len(folds)) < 7, -1, folds)
    predicted = head.predict_out_of_fold(features, mixed)
    np.testing.assert_allclose(predicted[:7], head.predict(features)[:7], rtol=1e-12)
    np.testing.assert_allclose(predicted[7:], head.predict_out_of_fold(features, folds)[7:], rtol=1e-12)


def test_moments_are_the_plain_sums_and_add_and_subtract():
    rng = np.random.default_rng(2)
    features = rng.normal(3, 1, size=(20_000, 3)).astype(np.float32)  # more than two blocks
    ratings = rng.normal(size=(20_000, 2))
    whole = moments_of(features, ratings)
    x = features.astype(np.float64)
    assert whole.count == 20_000
    for found, expected in [
        (whole.gram, x.T @ x),
        (whole.feature_sum, x.sum(0)),
        (whole.cross, x.T @ ratings),
        (whole.rating_sum, ratings.sum(0)),
        (whole.rating_products, ratings.T @ ratings),
    ]:
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-8)
    part, rest = moments_of(features[:5_000], ratings[:5_000]), moments_of(features[5_000:], ratings[5_000:])
    for found, expected in [(part + rest, whole), (whole - part, rest)]:
        assert found.count == expected.count
        np.testing.assert_allclose(found.gram, expected.gram, rtol=1e-12)
        np.testing.assert_allclose(found.feature_sum, expected.feature_sum, rtol=1e-12)
        np.testing.assert_allclose(found.cross, expected.cross, atol=1e-8)
        np.testing.assert_allclose(found.rating_sum, expected.rating_sum, atol=1e-8)
        np.testing.assert_allclose(found.rating_products, expected.rating_products, rtol=1e-9, atol=1e-9)


def test_squared_error_from_sums_is_that_of_the_residuals():
    features, ratings, _ = rated_data()
    rated = ~np.isnan(ratings).any(1)
    x, r = features[rated].astype(np.float64), ratings[rated]
    rng = np.random.default_rng(3)
    weights, bias = rng.normal(size=(4, x.shape[1])), rng.normal(size=4)
    expected = ((x @ weights.T + bias - r) ** 2).sum(0)
    np.testing.assert_allclose(moments_of(x, r).squared_error(weights, bias), expected, rtol=1e-11)


def test_objectives_that_cannot_be_learned_are_all_named_at_once():
    features, _, folds = rated_data()
    rng = np.random.default_rng(4)
    ratings = np.full((len(features), 5), np.nan)
    ratings[:, 0] = rng.random(len(features))
    ratings[:19, 1] = rng.random(19)
    ratings[:, 2] = 0.5
    ratings[folds == 3, 3] = rng.random((folds == 3).sum())
    ratings[folds != 0, 4] = rng.random((folds != 0).sum())
    names = ["fine", "rare", "flat", "lonely", "unvalidated"]
    with pytest.raises(FitError) as caught:
        fit_regression(features, ratings, folds, names, validation_folds=(0,))
    message = str(caught.value)
    assert "fine" not in message
    assert "rare has 19 ratings, expected at least 20" in message
    assert f"flat has the same rating on all {len(features)} rows" in message
    assert "lonely is rated in only one fold of prompts" in message
    assert "unvalidated has no rating in the validation folds" in message


def test_an_objective_that_features_say_nothing_about_gets_a_warning():
    features, ratings, folds = rated_data()
    ratings = np.column_stack([ratings[:, 0], np.random.default_rng(5).random(len(features))])
    clear, random = fit_regression(features, ratings, folds, ["clear", "random"]).reports
    assert clear.warning == ""
    assert clear.r2 > 0.9
    assert "no better than always predicting the mean" in random.warning
    assert random.r2 <= 0


def test_objectives_share_one_decomposition_only_where_they_share_all_rows():
    features, ratings, folds = rated_data()
    statistics = accumulate(blocks_of(features, ratings, folds), NAMES, FOLDS, features.shape[1])
    assert sorted(map(tuple, statistics.row_sets())) == [(0, 1), (2,), (3,)]


def test_the_fold_of_a_prompt_depends_on_its_key_alone():
    keys = [f"{i:032x}" for i in np.random.default_rng(6).integers(0, 2**62, 2000)]
    keys = [key[::-1] for key in keys]  # random digits in front
    folds = [fold_of(key, 5) for key in keys]
    assert folds == [int(key[:8], 16) % 5 for key in keys]
    assert min(np.bincount(folds, minlength=5)) > 300
