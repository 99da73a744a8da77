"""The Bradley-Terry baseline against a slow minimisation of the same objective."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from armorm.errors import FitError
from armorm.heads.bradley_terry import PENALTIES, fit_bradley_terry


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
