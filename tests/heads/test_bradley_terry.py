"""The Bradley-Terry baseline against a slow minimisation of the same objective."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from armorm.errors import FitError
from armorm.heads.bradley_terry import PENALTIES, fit_bradley_terry, fit_preference_objective


def preferences(seed: int = 0, p: int = 240, d: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs whose choice follows a logistic law of the features' difference; a quarter is held out."""
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(2, p, d)) * np.array([1.0, 10.0, 0.1, 1.0])
    truth = np.array([1.0, -0.15, 12.0, 0.0])
    wins = rng.random(p) < 1 / (1 + np.exp(-(first - second) @ truth))
    chosen, rejected = np.where(wins[:, None], first, second), np.where(wins[:, None], second, first)
    return chosen.astype(np.float32), rejected.astype(np.float32), np.arange(p) % 4 == 0


def slow_loss(weights: np.ndarray, scaled: np.ndarray, penalty: float) -> float:
    terms = [np.log1p(np.exp(-float(row @ weights))) for row in scaled]
    return float(np.mean(terms) + penalty * np.sum(weights**2))


def slow_minimum(scaled: np.ndarray, penalty: float) -> np.ndarray:
    return minimize(slow_loss, np.zeros(scaled.shape[1]), args=(scaled, penalty), method="BFGS").x


def scaled_difference(chosen: np.ndarray, rejected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    difference = chosen.astype(np.float64) - rejected
    scale = np.sqrt((difference**2).mean(0))
    return difference / scale, scale


def test_weights_are_those_of_a_minimisation_without_gradients():
    chosen, rejected, held_out = preferences()
    scaled, scale = scaled_difference(chosen, rejected)
    losses = [slow_loss(slow_minimum(scaled[~held_out], penalty), scaled[held_out], 0.0) for penalty in PENALTIES]
    expected = slow_minimum(scaled, PENALTIES[int(np.argmin(losses))])
    found = fit_bradley_terry(chosen, rejected, held_out) * scale
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())


def test_the_numerical_gradient_vanishes_at_the_weights():
    chosen, rejected, held_out = preferences()
    scaled, scale = scaled_difference(chosen, rejected)
    found = fit_bradley_terry(chosen, rejected, held_out) * scale
    gradients = []
    for penalty in PENALTIES:
        steps = 1e-5 * np.eye(len(found))
        gradient = [slow_loss(found + s, scaled, penalty) - slow_loss(found - s, scaled, penalty) for s in steps]
        gradients.append(np.abs(gradient).max() / 2e-5)
    assert min(gradients) < 2e-5
    assert sorted(gradients)[1] > 1e-4, "at one penalty only"


def test_weights_order_new_pairs():
    weights = fit_bradley_terry(*preferences(p=800))
    chosen, rejected, _ = preferences(seed=1, p=800)
    assert ((chosen - rejected) @ weights > 0).mean() > 0.8


def test_the_unit_of_a_feature_does_not_matter():
    chosen, rejected, held_out = preferences()
    unit = np.array([1.0, 1e4, 1e-4, 1.0])
    plain = chosen @ fit_bradley_terry(chosen, rejected, held_out)
    rescaled = (chosen * unit) @ fit_bradley_terry(chosen * unit, rejected * unit, held_out)
    np.testing.assert_allclose(rescaled, plain, atol=1e-3)


def test_a_split_with_an_empty_side_is_refused():
    chosen, rejected, held_out = preferences()
    for mask in (np.zeros_like(held_out), np.ones_like(held_out)):
        with pytest.raises(FitError, match=f"{mask.sum()} of 240 pairs are held out"):
            fit_bradley_terry(chosen, rejected, mask)


def pairs_of_prompts(p: int = 600, d: int = 12, prompts: int = 60):
    """Pairs decided by a known direction, with noise; fold and prompt of each."""
    rng = np.random.default_rng(3)
    direction = rng.normal(size=d)
    first, second = rng.normal(size=(2, p, d)) + 2.0
    wins = (first - second) @ direction + rng.logistic(size=p) > 0
    chosen, rejected = np.where(wins[:, None], first, second), np.where(wins[:, None], second, first)
    prompt = rng.integers(0, prompts, p)
    return direction, chosen, rejected, prompt % 5, prompt


def test_an_objective_fitted_to_pairs_finds_the_direction_and_runs_from_zero_to_one():
    direction, chosen, rejected, folds, _ = pairs_of_prompts()
    found = fit_preference_objective(chosen, rejected, folds, 5, np.ones(len(folds)))
    assert np.corrcoef(found.weight, direction)[0, 1] > 0.97
    rewards = np.concatenate([chosen, rejected]) @ found.weight + found.bias
    np.testing.assert_allclose(np.percentile(rewards, (1, 99)), [0, 1], atol=1e-9)
    log_odds = (found.high - found.low) * ((chosen - rejected) @ found.weight)
    assert np.logaddexp(0, -log_odds).mean() < min(found.losses) < np.log(2)
    assert found.r2 == pytest.approx(1 - min(found.losses) / np.log(2))
    assert 0.7 < found.accuracy < 1


def test_the_weights_of_a_fold_never_saw_its_pairs(monkeypatch):
    monkeypatch.setattr("armorm.heads.bradley_terry.OBJECTIVE_PENALTIES", (1e-3,))
    _, chosen, rejected, folds, _ = pairs_of_prompts()
    found = fit_preference_objective(chosen, rejected, folds, 5, np.ones(len(folds)))
    swapped = [np.where((folds == 2)[:, None], b, a) for a, b in ((chosen, rejected), (rejected, chosen))]
    other = fit_preference_objective(*swapped, folds, 5, np.ones(len(folds)))
    np.testing.assert_allclose(other.fold_weight[2], found.fold_weight[2], rtol=1e-3, atol=1e-5)
    assert np.abs(other.fold_weight[1] - found.fold_weight[1]).max() > 1e-2
    assert np.abs(other.weight - found.weight).max() > 1e-2


def test_the_weights_of_pairs_count_like_repetitions():
    _, chosen, rejected, folds, _ = pairs_of_prompts(p=200)
    twice = np.where(np.arange(200) < 50, 2, 1)
    weighted = fit_preference_objective(chosen, rejected, folds, 5, twice.astype(float))
    rows = np.repeat(np.arange(200), twice)
    repeated = fit_preference_objective(chosen[rows], rejected[rows], folds[rows], 5, np.ones(len(rows)))
    np.testing.assert_allclose(weighted.losses, repeated.losses, rtol=1e-3)
    np.testing.assert_allclose(weighted.eigenvalues, repeated.eigenvalues, rtol=0.02)


def test_standard_errors_are_those_of_the_laplace_approximation():
    _, chosen, rejected, folds, _ = pairs_of_prompts()
    found = fit_preference_objective(chosen, rejected, folds, 5, np.ones(len(folds)))
    scale = found.high - found.low
    difference = chosen - rejected
    p = 1 / (1 + np.exp(-scale * difference @ found.weight))
    precision = np.einsum("i,ij,il->jl", p * (1 - p), difference, difference) + found.alpha * np.eye(12)
    size = np.sqrt(np.mean(difference**2))
    assert found.alpha == pytest.approx(2 * len(folds) * found.penalty * size**2)
    covariance = np.linalg.inv(precision) / scale**2
    row = chosen[:5] - found.center
    expected = np.sqrt(np.einsum("nd,de,ne->n", row, covariance, row))
    inverse = (found.vectors.T / (found.eigenvalues + found.alpha)) @ found.vectors
    np.testing.assert_allclose(np.sqrt(np.einsum("nd,de,ne->n", row, inverse, row)) / scale, expected, rtol=1e-8)


def test_too_few_pairs_for_an_objective_are_refused():
    _, chosen, rejected, folds, _ = pairs_of_prompts(p=30)
    with pytest.raises(FitError, match="found 10 pairs in"):
        fit_preference_objective(chosen[:10], rejected[:10], folds[:10], 5, np.ones(10))
    with pytest.raises(FitError, match="30 pairs in 1 folds"):
        fit_preference_objective(chosen, rejected, np.zeros(30, int), 5, np.ones(30))
