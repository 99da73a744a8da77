"""The gate's discount: an objective that is hardly known gets next to no weight, and the model file shows nothing of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from armorm.heads.discount import LEAST, discount_of, discounted, fold_discount
from armorm.heads.gate_training import fit_gate
from armorm.model.remote_code import GatingNetwork
from armorm.objectives import Objective, ObjectiveSet, Reliability
from tests.heads.test_gating import SETTINGS, D, task


def weights_of(network: GatingNetwork, features: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return network.weights(torch.from_numpy(features)).double().numpy()


def test_a_discounted_gate_computes_the_same_when_it_is_folded():
    torch.manual_seed(0)
    network = GatingNetwork(D, 4, hidden_size=8, hidden_layers=1, temperature=3.0).eval()
    features = np.random.default_rng(0).normal(size=(9, D)).astype(np.float32)
    plain = weights_of(network, features)
    discount = np.array([1.0, 0.5, 0.01, 0.2])
    layer = network.layers[-1]
    logits = network.layers[0](torch.from_numpy(features)).relu() @ layer.weight.T + layer.bias
    expected = discount * np.exp(discount * logits.detach().double().numpy() / 3.0)
    discounted(network, discount)
    inside = weights_of(network, features)
    np.testing.assert_allclose(inside, expected / expected.sum(1, keepdims=True), rtol=1e-5)
    fold_discount(network)
    assert type(network.layers[-1]) is torch.nn.Linear
    np.testing.assert_allclose(weights_of(network, features), inside, rtol=1e-5)
    discounted(network, discount, keep=True)
    np.testing.assert_allclose(weights_of(network, features), inside, rtol=1e-4)
    assert not np.allclose(inside, plain, atol=0.05)


def test_the_discount_is_a_power_of_the_reliability_relative_to_the_best():
    np.testing.assert_allclose(discount_of(np.array([0.5, 0.25, 0.0]), 2.0), [1.0, 0.25, (LEAST / 0.5) ** 2])
    np.testing.assert_allclose(discount_of(np.array([0.6, np.nan, 0.2]), 1.0), [1.0, 2 / 3, 1 / 3])
    np.testing.assert_allclose(discount_of(np.array([0.6, 0.2]), 0.0), [1.0, 1.0])
    np.testing.assert_allclose(discount_of(np.array([np.nan, np.nan]), 1.0), [1.0, 1.0])


@pytest.fixture(scope="module")
def fits():
    """Gates on pairs that objectives 0 and 2 decide, without discount and with objective 0 hardly known."""
    features, pairs = task()
    reliability = np.array([1e-5, 0.4, 0.4, 0.4])
    return {
        known: fit_gate(features, pairs, SETTINGS, reliability=reliability if known else None)
        for known in (False, True)
    }, features


def test_an_objective_that_is_hardly_known_gets_next_to_no_weight_however_well_it_fits_the_pairs(fits):
    (plain, _), (network, report) = fits[0][False], fits[0][True]
    assert weights_of(plain, fits[1])[:, 0].mean() > 0.3
    assert weights_of(network, fits[1])[:, 0].max() < 0.02
    assert report.exponent in SETTINGS.reliability
    assert report.exponent_losses[f"{report.exponent:g}"] == min(report.exponent_losses.values())


def test_the_exponent_is_the_one_with_the_least_loss_of_constant_weights_on_the_stopping_pairs():
    features, pairs = task()
    helpful, harmful = np.array([0.9, 0.3, 0.9, 0.3]), np.array([0.3, 0.9, 0.3, 0.9])
    settings = SETTINGS.model_copy(update={"reliability": (0.0, 2.0), "steps": 1})
    for reliability, expected in ((helpful, 2.0), (harmful, 0.0)):
        report = fit_gate(features, pairs, settings, reliability=reliability)[1]
        assert report.exponent == expected


def test_a_reliability_is_the_signals_share_of_signal_and_estimation_error():
    assert Reliability(0.5, 0.03, 0.01).value == pytest.approx(0.75)
    assert Reliability(-0.1, 0.0, 0.01).value == 0
    assert Reliability(0.28, 0.056, (1.03 / 1.96) ** 2).value < 0.2
    assert Reliability(0.5, 0.03, None).value == 0.5
    assert Reliability(-0.5, 0.0, None).value == 0


def test_the_reliability_of_objectives_is_kept_in_their_dictionaries():
    plain = ObjectiveSet([Objective.rated("a-b", 0, 1), Objective.rated("a-c", 0, 1)])
    known = plain.with_reliability({"a-b": Reliability(0.5, 0.02, 0.03)})
    assert ObjectiveSet.from_dicts(known.to_dicts()).reliability[0] == pytest.approx(0.4)
    assert np.isnan(known.reliability[1])
    assert known == plain
    assert "reliability" not in plain.to_dicts()[0]
