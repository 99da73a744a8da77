"""Uncertainty against the plain formulas, by inversion, and against what refitting does."""

from __future__ import annotations

import json

import numpy as np
import pytest

from armorm.heads.accumulation import accumulate, blocks_of
from armorm.heads.leverage import FoldedSpectra, Spectrum
from armorm.heads.regression import fit_from_statistics
from armorm.heads.uncertainty import StreamedQuantiles, Uncertainty, fit_uncertainty

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
    blocks = blocks_of(features, ratings, folds, 100)
    uncertainty = fit_uncertainty(
        statistics, head, blocks, np.array([True, False, True]), intercept=intercept, **options
    )
    return features, ratings, folds, head, uncertainty


def plain_leverage(x: np.ndarray, rated: np.ndarray, alpha: float, intercept: bool = False) -> np.ndarray:
    """x^T (G + alpha I)^-1 x by inverting; with an intercept about the mean, and 1/n more."""
    rated = rated.astype(np.float64)
    mean = rated.mean(0) if intercept else np.zeros(rated.shape[1])
    inverse = np.linalg.inv((rated - mean).T @ (rated - mean) + alpha * np.eye(rated.shape[1]))
    return (((x - mean) @ inverse) * (x - mean)).sum(1) + (1 / len(rated) if intercept else 0)


def leverage_without_fold(
    features: np.ndarray, ratings: np.ndarray, folds: np.ndarray, alpha: float, intercept: bool = False
) -> np.ndarray:
    """Leverage (n, k) of every rated row with respect to the rated rows of the other folds."""
    found = np.full(ratings.shape, np.nan)
    for column in range(ratings.shape[1]):
        rated = ~np.isnan(ratings[:, column])
        for fold in np.unique(folds):
            inside, outside = rated & (folds == fold), rated & (folds != fold)
            found[inside, column] = plain_leverage(features[inside], features[outside], alpha, intercept)
    return found


def clustered(
    seed: int, n: int, d: int, shared: float, *, responses: int = 4, falling: float = 0.5, noise: float = 0.5
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features, ratings (n, 1), folds and noiseless ratings (n,) of n responses, `responses` to a prompt.

    Half of the variance of the features, and the share `shared` of that of the noise, belongs to the prompt.
    """
    rng = np.random.default_rng(seed)
    prompt = np.repeat(np.arange(n // responses), responses)
    deviation = np.arange(1, d + 1) ** -falling
    weight = np.random.default_rng(99).normal(size=d)
    weight /= np.sqrt((weight**2 * deviation**2).sum())
    of_prompt, own = rng.normal(size=(n // responses, d))[prompt], rng.normal(size=(n, d))
    features = (np.sqrt(0.5) * (of_prompt + own) * deviation).astype(np.float32)
    errors = np.sqrt(shared) * rng.normal(size=n // responses)[prompt] + np.sqrt(1 - shared) * rng.normal(size=n)
    truth = features @ weight
    return features, (truth + noise * errors)[:, None], prompt % 5, truth


def uncertainty_of(features: np.ndarray, ratings: np.ndarray, folds: np.ndarray, **options):
    """A head and its uncertainty, alpha chosen from the default grid."""
    d, names = features.shape[1], ["a", "b", "c"][: ratings.shape[1]]
    statistics = accumulate(blocks_of(features, ratings, folds), names, int(folds.max()) + 1, d, precision="float64")
    head = fit_from_statistics(statistics)
    blocks = blocks_of(features, ratings, folds)
    return head, fit_uncertainty(statistics, head, blocks, np.ones(len(names), bool), **options)


@pytest.mark.parametrize("intercept", [False, True])
def test_leverage_and_standard_deviations_are_those_of_the_formulas(intercept):
    features, ratings, folds, head, uncertainty = fitted(intercept)
    assert uncertainty.basis.shape == (2, D, D), "so small a matrix is kept whole"
    leverage = uncertainty.leverage(features)
    errors = head.predict_out_of_fold(features, folds) - ratings
    held_out = leverage_without_fold(features, ratings, folds, 5.0, intercept)
    for column in range(3):
        rated = ~np.isnan(ratings[:, column])
        np.testing.assert_allclose(
            leverage[:, column], plain_leverage(features, features[rated], 5.0, intercept), rtol=1e-4
        )
        inflation = 1 + uncertainty.design_effect[column] * held_out[rated, column]
        sigma = np.sqrt((errors[rated, column] ** 2).sum() / inflation.sum())
        assert uncertainty.noise[column] == pytest.approx(sigma, rel=1e-5)
    epistemic, predictive = uncertainty.epistemic_std(leverage), uncertainty.predictive_std(leverage)
    np.testing.assert_allclose(epistemic, uncertainty.noise * np.sqrt(uncertainty.design_effect * leverage))
    np.testing.assert_allclose(predictive**2, uncertainty.noise**2 + epistemic**2)


@pytest.mark.parametrize("shared", [0.0, 0.5, 0.8])
@pytest.mark.parametrize(("n", "d"), [(1000, 60), (1600, 200), (300, 400)])
def test_errors_of_rewards_are_as_large_as_the_epistemic_std_whatever_prompts_share(n, d, shared):
    """Rewards of new responses against the noiseless ratings; the noise of four responses to a prompt is partly one."""
    squares = []
    for seed in range(3):
        head, uncertainty = uncertainty_of(*clustered(seed, n, d, shared)[:3])
        features, _, _, truth = clustered(seed + 100, 1000, d, shared)
        said = uncertainty.epistemic_std(uncertainty.leverage(features))[:, 0]
        squares.append(np.mean(((head.predict(features)[:, 0] - truth) / said) ** 2))
    assert 0.95 < np.sqrt(np.mean(squares)) < 1.1


def test_the_design_effect_is_one_for_independent_rows_and_the_ratio_of_the_sandwich_otherwise():
    for shared in (0.0, 0.8):
        found, expected = [], []
        for seed in range(4):
            features, ratings, folds, truth = clustered(seed, 2000, 50, shared)
            head, uncertainty = uncertainty_of(features, ratings, folds)
            x, alpha = features.astype(np.float64), head.reports[0].alpha
            inverse = np.linalg.inv(x.T @ x + alpha * np.eye(50))
            errors = (ratings[:, 0] - truth).reshape(-1, 4)
            per_prompt = np.einsum("pi,pid->pd", errors, x.reshape(-1, 4, 50))
            sandwich = np.trace(inverse @ per_prompt.T @ per_prompt @ inverse @ x.T @ x)
            independent = errors.var() * np.trace(inverse @ x.T @ x @ inverse @ x.T @ x)
            found.append(uncertainty.design_effect[0])
            expected.append(sandwich / independent)
        assert np.mean(found) == pytest.approx(np.mean(expected), rel=0.1)
    assert np.mean(found) > 1.8


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_error_of_a_cut_basis_keeps_within_its_bound(rank):
    features, ratings, _, _, uncertainty = fitted(max_rank=rank, tolerance=0.0)
    assert uncertainty.basis.shape == (2, rank, D)
    probes = np.random.default_rng(2).normal(size=(500, D)).astype(np.float32)
    for column in range(3):
        rated = features[~np.isnan(ratings[:, column])]
        for x in (features, probes):
            ratio = np.sqrt(uncertainty.leverage(x)[:, column] / plain_leverage(x, rated, 5.0, False))
            assert np.abs(ratio - 1).max() <= np.expm1(np.log1p(uncertainty.error_bound[column])) / (
                1 - min(uncertainty.error_bound[column], 0.9)
            )


@pytest.mark.parametrize(("n", "d", "rank"), [(1000, 100, 20), (400, 600, 40)])
def test_leverage_by_a_cut_basis_is_right_on_average_over_new_rows(n, d, rank):
    features, ratings, folds, _ = clustered(0, n, d, 0.0)
    head, uncertainty = uncertainty_of(features, ratings, folds, max_rank=rank)
    fresh = clustered(1, 4000, d, 0.0)[0]
    exact = plain_leverage(fresh, features, head.reports[0].alpha)
    assert uncertainty.leverage(fresh).mean() == pytest.approx(exact.mean(), rel=0.03)


def test_no_more_is_kept_than_the_tolerance_asks_for():
    loose, strict = (fitted(tolerance=tolerance)[4] for tolerance in (0.9, 0.01))
    assert loose.basis.shape[1] <= strict.basis.shape[1] == D
    assert strict.error_bound.max() <= 0.01


def test_errors_of_objectives_on_the_same_rows_go_together_and_of_others_do_not():
    features, ratings, folds, head, uncertainty = fitted()
    found = uncertainty.correlation
    errors = (head.predict_out_of_fold(features, folds) - ratings)[: len(ratings) // 2, :2]
    products = errors.T @ errors
    expected = products[0, 1] / np.sqrt(products[0, 0] * products[1, 1])
    assert found[0, 1] == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(found, found.T)
    assert expected > 0.3
    assert found[0, 2] == found[1, 2] == 0


def test_the_score_std_is_that_of_a_sum_of_correlated_errors():
    features, _, _, _, uncertainty = fitted()
    coefficients = np.random.default_rng(3).normal(size=(len(features), 3))
    leverage = uncertainty.leverage(features)
    parts = coefficients * uncertainty.epistemic_std(leverage)
    plain = [
        np.sqrt(sum(p[i] * p[j] * uncertainty.correlation[i, j] for i in range(3) for j in range(3))) for p in parts
    ]
    np.testing.assert_allclose(uncertainty.score_std(leverage, coefficients), plain, rtol=1e-9)


def test_far_from_the_rated_rows_leverage_is_high():
    features, _, _, _, uncertainty = fitted()
    far = uncertainty.leverage(features[:50] * 10)
    assert (far > 50 * uncertainty.leverage(features[:50])).all()


def test_intervals_hold_the_share_they_claim_on_rows_not_seen():
    _, _, _, head, uncertainty = fitted()
    assert np.isnan([values[1] for values in uncertainty.conformal.values()]).all()
    fresh, fresh_ratings, _ = rows(seed=9, n=4000)
    errors = np.abs(head.predict(fresh) - fresh_ratings) / uncertainty.predictive_std(uncertainty.leverage(fresh))
    for level, factors in uncertainty.conformal.items():
        for column in (0, 2):
            known = errors[~np.isnan(errors[:, column]), column]
            assert (known <= factors[column]).mean() == pytest.approx(level, abs=0.05)


@pytest.mark.parametrize("intercept", [False, True])
def test_half_widths_are_quantiles_of_held_out_errors_over_held_out_deviations(intercept):
    features, ratings, folds, head, uncertainty = fitted(intercept)
    held_out = leverage_without_fold(features, ratings, folds, 5.0, intercept)
    errors = np.abs(ratings - head.predict_out_of_fold(features, folds)) / uncertainty.predictive_std(held_out)
    for level, factors in uncertainty.conformal.items():
        for column in (0, 2):
            ordered = np.sort(errors[~np.isnan(errors[:, column]), column])
            assert factors[column] == pytest.approx(ordered[int(np.ceil(301 * level)) - 1], rel=0.0025)


@pytest.mark.parametrize(("n", "d"), [(1600, 200), (1000, 256), (240, 360)])
@pytest.mark.parametrize("options", [{}, {"max_rank": 40}])
def test_one_new_row_in_a_hundred_is_unusual_and_intervals_cover_what_they_claim(n, d, options):
    """With few rows for the features, rows that were fitted on have much less leverage than new ones."""
    unusual, covered = [], []
    for seed in range(3):
        head, uncertainty = uncertainty_of(*clustered(seed, n, d, 0.0)[:3], **options)
        features, ratings, _, _ = clustered(seed + 100, 3000, d, 0.0)
        leverage = uncertainty.leverage(features)
        unusual.append((leverage > uncertainty.usual_leverage).mean())
        errors = np.abs(head.predict(features) - ratings) / uncertainty.predictive_std(leverage)
        covered.append([(errors <= factor).mean() for factor in uncertainty.conformal.values()])
    assert 0.005 <= np.mean(unusual) <= 0.02
    np.testing.assert_allclose(np.mean(covered, 0), list(uncertainty.conformal), atol=0.025)


def test_with_fewer_rows_than_features_all_of_them_are_stored_and_leverage_is_exact():
    features, ratings, folds, _ = clustered(0, 300, 500, 0.0)
    head, uncertainty = uncertainty_of(features, ratings, folds, tolerance=1e-6)
    assert uncertainty.basis.shape == (1, 300, 500)
    assert uncertainty.error_bound[0] == 0
    probes = np.random.default_rng(1).normal(size=(200, 500))
    exact = plain_leverage(probes, features, head.reports[0].alpha)
    np.testing.assert_allclose(uncertainty.leverage(probes)[:, 0], exact, rtol=1e-4)
    assert uncertainty_of(features, ratings, folds, max_rank=100)[1].error_bound[0] > 0.3, "the bound says it is not"


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
    features, _, _, _, uncertainty = fitted(intercept=True)
    again = Uncertainty.from_settings(uncertainty.settings(), uncertainty.tensors())
    np.testing.assert_array_equal(again.leverage(features), uncertainty.leverage(features))
    np.testing.assert_array_equal(again.conformal[0.8], uncertainty.conformal[0.8])
    np.testing.assert_array_equal(again.correlation, uncertainty.correlation)
    np.testing.assert_array_equal(again.design_effect, uncertainty.design_effect)


def test_objectives_of_an_earlier_model_keep_their_uncertainty():
    features, ratings, folds, _, earlier = fitted(intercept=True, max_rank=3)
    _, later = uncertainty_of(features * 2, ratings, folds)
    merged = later.with_earlier(earlier, {0: 2, 2: 1}, {})
    merged = Uncertainty.from_settings(merged.settings(), merged.tensors())
    leverage, before, new = (one.leverage(features) for one in (merged, earlier, later))
    np.testing.assert_allclose(leverage, np.column_stack([before[:, 2], new[:, 1], before[:, 1]]), rtol=1e-6)
    for std in ("epistemic_std", "predictive_std"):
        old, fresh = (getattr(one, std)(one.leverage(features)) for one in (earlier, later))
        expected = np.column_stack([old[:, 2], fresh[:, 1], old[:, 1]])
        np.testing.assert_allclose(getattr(merged, std)(leverage), expected, rtol=1e-6)
    for level, factors in merged.conformal.items():
        np.testing.assert_array_equal(factors[[0, 2]], earlier.conformal[level][[2, 1]])
        assert factors[1] == later.conformal[level][1]
    assert merged.correlation[0, 2] == earlier.correlation[2, 1]
    assert merged.correlation[0, 1] == later.correlation[0, 1]
    assert len(merged.basis) == 3
    calibrated = later.with_earlier(earlier, {0: 2}, {1: 1})
    np.testing.assert_allclose(calibrated.leverage(features)[:, 1], new[:, 1])
    of_earlier, of_later = earlier.conformal[0.95], later.conformal[0.95]
    np.testing.assert_array_equal(calibrated.conformal[0.95], [of_earlier[2], of_earlier[1], of_later[2]])
    expected = [earlier.usual_leverage[2], earlier.usual_leverage[1], later.usual_leverage[2]]
    np.testing.assert_array_equal(calibrated.usual_leverage, expected)


def test_what_few_rows_do_not_determine_is_kept_as_strict_json():
    features, ratings, folds, _ = clustered(0, 60, 5, 0.0)
    uncertainty = uncertainty_of(features, ratings, folds)[1]
    assert np.isnan(uncertainty.usual_leverage).all(), "a 99th percentile needs 99 rows"
    text = json.dumps(uncertainty.settings(), allow_nan=False)
    again = Uncertainty.from_settings(json.loads(text), uncertainty.tensors())
    assert np.isnan(again.usual_leverage).all()
    np.testing.assert_array_equal(again.conformal[0.95], uncertainty.conformal[0.95])


def test_eigenvalues_that_are_rounding_leave_the_share_of_a_fold_between_its_ends():
    def one(values: list[float], held_out: list[float]) -> Spectrum:
        return Spectrum(np.array(values), np.eye(2, dtype=np.float32), np.zeros(2), 100, np.array(held_out))

    for without, share in ((1e-3, 1.0), (0.0, 0.8)):  # larger than in the total, by rounding; and as it should be
        folded = FoldedSpectra(one([1e6, 0.0], []), {0: one([8e5, without], [2e5, 0.0])}, False)
        (found,) = folded.shares(1e-6).values()
        assert found == pytest.approx(share, rel=0.01)


def test_settings_of_version_0_1_have_no_design_effect():
    features, _, _, _, uncertainty = fitted()
    settings = uncertainty.settings()
    del settings["design_effect"]
    again = Uncertainty.from_settings(settings, uncertainty.tensors())
    leverage = again.leverage(features)
    np.testing.assert_allclose(again.epistemic_std(leverage), again.noise * np.sqrt(leverage))
