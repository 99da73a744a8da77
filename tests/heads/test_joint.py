"""Joint training against slow minimisation of the same loss, and what it must and must not do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize

from armorm.errors import FitError
from armorm.heads.joint import JointPairs, fit_joint
from armorm.heads.regression import RegressionHead, fit_regression

FOLDS = 3


def corpus(
    seed: int = 0, n: int = 240, p: int = 150, d: int = 5
) -> tuple[np.ndarray, np.ndarray, np.ndarray, JointPairs]:
    """Three objectives, two rated on one half and one on the other; pairs prefer what no rating speaks of."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, d)) * np.array([1.0, 3.0, 0.3, 1.0, 1.0])
    truth = rng.normal(size=(3, d)) * 0.2
    truth[:, -1] = 0
    ratings = 0.5 + features @ truth.T + 0.2 * rng.normal(size=(n, 3))
    ratings[: n // 2, 2] = np.nan
    ratings[n // 2 :, :2] = np.nan
    differences = rng.normal(size=(p, d)) * np.array([1.0, 3.0, 0.3, 1.0, 1.0])
    taste = truth.sum(0) + np.array([0, 0, 0, 0, 1.0])
    differences *= np.sign(differences @ taste + 0.5 * rng.logistic(size=p))[:, None]
    coefficients = rng.dirichlet(np.ones(3), size=p) * 4
    return features, ratings, np.arange(n) % FOLDS, JointPairs(differences, coefficients, np.arange(p) % FOLDS)


def stage_one(features: np.ndarray, ratings: np.ndarray, folds: np.ndarray, intercept: bool = False) -> RegressionHead:
    return fit_regression(features, ratings, folds, ["a", "b", "c"], alphas=[3.0], intercept=intercept)


def slow_loss(
    flat: np.ndarray,
    features: np.ndarray,
    ratings: np.ndarray,
    pairs: JointPairs,
    beta: float,
    intercept: bool,
    alphas: tuple[float, ...] = (3.0, 3.0, 3.0),
) -> float:
    values = flat.reshape(3, -1)
    weight, bias = values[:, :-1], values[:, -1] if intercept else np.zeros(3)
    total = 0.0
    for j in range(3):
        rated = ~np.isnan(ratings[:, j])
        error = features[rated] @ weight[j] + bias[j] - ratings[rated, j]
        total += (error @ error + alphas[j] * weight[j] @ weight[j]) / (rated.sum() * ratings[rated, j].var())
    margins = [c @ (weight @ x) for c, x in zip(pairs.coefficients, pairs.differences, strict=True)]
    return float(total + beta * np.mean(np.log1p(np.exp(-np.array(margins)))))


@pytest.mark.parametrize("intercept", [False, True])
def test_the_weights_are_those_of_a_minimisation_of_the_written_loss(intercept):
    features, ratings, folds, pairs = corpus()
    if intercept:
        features = features + 2.0
    head = stage_one(features, ratings, folds, intercept)
    joint, report = fit_joint(
        head, features, ratings, folds, pairs, pair_weights=[0.5], intercept=intercept, r2_price=np.inf
    )
    assert report.pair_weight == 0.5
    slow = minimize(
        slow_loss, np.zeros(3 * 6), args=(features, ratings, pairs, 0.5, intercept), method="BFGS"
    ).x.reshape(3, 6)
    np.testing.assert_allclose(joint.weight, slow[:, :-1], atol=1e-3)
    if intercept:
        np.testing.assert_allclose(joint.bias, slow[:, -1], atol=5e-3)
    assert np.abs(joint.weight - head.weight).max() > 0.01


def test_an_objective_that_counts_more_keeps_its_weaker_penalty():
    features, ratings, folds, pairs = corpus()
    weights = {"b": 30.0}
    head = fit_regression(features, ratings, folds, ["a", "b", "c"], alphas=[30.0], weights=weights)
    joint, _ = fit_joint(head, features, ratings, folds, pairs, pair_weights=[0.5], weights=weights, r2_price=np.inf)
    arguments = (features, ratings, pairs, 0.5, False, (30.0, 1.0, 30.0))
    slow = minimize(slow_loss, np.zeros(3 * 6), args=arguments, method="BFGS").x.reshape(3, 6)
    np.testing.assert_allclose(joint.weight, slow[:, :-1], atol=1e-3)


def test_pairs_count_by_their_weight():
    features, ratings, folds, pairs = corpus()
    head = stage_one(features, ratings, folds)
    copies = np.random.default_rng(5).choice([1, 12], len(pairs.folds))
    repeated = np.repeat(np.arange(len(pairs.folds)), copies)
    weighted = replace(pairs, weights=2.0 * copies)
    options = {"pair_weights": [0.5], "r2_price": np.inf}
    (found, report), (expected, plain), (other, _) = (
        fit_joint(head, features, ratings, folds, one, **options) for one in (weighted, pairs.take(repeated), pairs)
    )
    np.testing.assert_allclose(found.weight, expected.weight, atol=1e-4)
    assert np.abs(other.weight - expected.weight).max() > 5e-3
    np.testing.assert_allclose(report.losses, plain.losses, rtol=1e-4)
    np.testing.assert_allclose(report.accuracies, plain.accuracies, rtol=1e-9)


def test_fold_weights_saw_neither_ratings_nor_pairs_of_their_fold():
    features, ratings, folds, pairs = corpus()
    head = stage_one(features, ratings, folds)
    options = {"pair_weights": [0.5], "r2_price": np.inf}
    joint, first = fit_joint(head, features, ratings, folds, pairs, **options)
    others = pairs.folds != 1
    changed = JointPairs(pairs.differences * np.where(others, 1, 1.7)[:, None], pairs.coefficients, pairs.folds)
    other_ratings = np.where((folds == 1)[:, None], 1.3 * ratings, ratings)
    again, report = fit_joint(
        stage_one(features, other_ratings, folds), features, other_ratings, folds, changed, **options
    )
    assert first.pair_weight == report.pair_weight == 0.5
    np.testing.assert_allclose(again.fold_weight[1], joint.fold_weight[1], atol=1e-6)
    assert np.abs(again.fold_weight[0] - joint.fold_weight[0]).max() > 1e-3


def test_a_taste_that_no_rating_speaks_of_is_learned_from_pairs():
    features, ratings, folds, pairs = corpus(n=600, p=600)
    head = stage_one(features, ratings, folds)
    joint, report = fit_joint(head, features, ratings, folds, pairs)
    assert report.pair_weight > 0
    zero, chosen = 0, report.pair_weights.index(report.pair_weight)
    assert report.losses[chosen] < report.losses[zero] - 0.02
    _, _, _, fresh = corpus(seed=0, n=600, p=600)
    assert (fresh.margins(joint.weight) > 0).mean() > (fresh.margins(head.weight) > 0).mean()


def test_the_price_in_ratings_is_kept():
    features, ratings, folds, pairs = corpus(n=600, p=600)
    head = stage_one(features, ratings, folds)
    free = fit_joint(head, features, ratings, folds, pairs, pair_weights=[30.0], r2_price=np.inf)[1]
    assert np.mean(free.r2_before) - np.mean(free.r2_after) > 0.02
    kept_head, kept = fit_joint(head, features, ratings, folds, pairs, pair_weights=[30.0], r2_price=0.02)
    assert kept.pair_weight == 0
    np.testing.assert_array_equal(kept_head.weight, head.weight)


def test_pairs_that_follow_no_rule_leave_stage_one_as_it_was():
    features, ratings, folds, pairs = corpus()
    signs = np.random.default_rng(3).choice([-1.0, 1.0], len(pairs.folds))
    noise = JointPairs(pairs.differences * signs[:, None], pairs.coefficients * 1e-3, pairs.folds)
    head = stage_one(features, ratings, folds)
    joint, report = fit_joint(head, features, ratings, folds, noise)
    assert np.mean(report.r2_after) >= np.mean(report.r2_before) - 0.02
    assert report.losses[report.pair_weights.index(report.pair_weight)] <= report.losses[0]
    assert report.r2_before == pytest.approx([r.r2 for r in head.reports], abs=1e-6)
    assert joint.reports == head.reports


@pytest.mark.parametrize(("folds", "part"), [(-1, "outside 0..2"), (3, "outside 0..2"), (1, "one fold")])
def test_pairs_in_no_fold_or_all_in_one_are_refused(folds, part):
    features, ratings, rated_folds, pairs = corpus()
    wrong = JointPairs(pairs.differences, pairs.coefficients, np.full(len(pairs.folds), folds))
    with pytest.raises(FitError, match=part):
        fit_joint(stage_one(features, ratings, rated_folds), features, ratings, rated_folds, wrong)
