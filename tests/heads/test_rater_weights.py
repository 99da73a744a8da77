"""Weights of rows from the spread of their raters: the weighted ridge against a slow version, and whether it helps."""

from __future__ import annotations

import numpy as np
import pytest

from armorm.heads.accumulation import RatedBlock, accumulate, blocks_of
from armorm.heads.rater_weights import LEAST_SHARE, rater_weights
from armorm.heads.regression import fit_from_statistics, fit_regression
from armorm.heads.statistics import RatingStatistics


def weighted_blocks(features, ratings, folds, weights, size=37):
    for start in range(0, len(features), size):
        part = slice(start, start + size)
        yield RatedBlock(features[part], ratings[part], folds[part], {c: w[part] for c, w in weights.items()})


@pytest.mark.parametrize("intercept", [False, True])
def test_weighted_sums_give_the_weighted_ridge(intercept, tmp_path):
    random = np.random.default_rng(0)
    n, d, k = 200, 7, 3
    x, r, folds = random.normal(size=(n, d)) + 2, random.normal(size=(n, k)), np.arange(n) % 4
    r[random.random((n, k)) < 0.2] = np.nan
    weights = {1: random.uniform(0.2, 3, n)}
    blocks = weighted_blocks(x, r, folds, weights)
    statistics = accumulate(blocks, ["a", "b", "c"], 4, d, precision="float64")
    statistics.save(tmp_path / "statistics.safetensors")
    options = {"alphas": (0.5,), "intercept": intercept}
    head = fit_from_statistics(RatingStatistics.load(tmp_path / "statistics.safetensors"), **options)
    for column in range(k):
        rows = ~np.isnan(r[:, column])
        w = weights.get(column, np.ones(n))[rows]
        design = np.column_stack([x, np.ones(n)])[rows] if intercept else x[rows]
        penalty = np.diag([0.5] * d + [0.0] * intercept)
        slow = np.linalg.solve(design.T @ (w[:, None] * design) + penalty, design.T @ (w * r[rows, column]))
        np.testing.assert_allclose(head.weight[column], slow[:d], atol=1e-9)
        if intercept:
            assert head.bias[column] == pytest.approx(slow[d])
        errors = []
        for fold in range(4):
            held = rows & (folds == fold)
            predicted = x[held] @ head.fold_weight[fold, column] + head.fold_bias[fold, column]
            errors.append(weights.get(column, np.ones(n))[held] * (r[held, column] - predicted) ** 2)
        expected = np.concatenate(errors).sum() / w.sum()
        assert head.reports[column].validation_errors[0] == pytest.approx(expected)
        assert head.reports[column].ratings == rows.sum()


def test_rows_without_weights_have_the_sums_that_they_had():
    random = np.random.default_rng(1)
    x, r, folds = random.normal(size=(90, 5)), random.normal(size=(90, 2)), np.arange(90) % 3
    plain = accumulate(blocks_of(x, r, folds), ["a", "b"], 3, 5)
    ones = accumulate(weighted_blocks(x, r, folds, {1: np.ones(90)}, 90), ["a", "b"], 3, 5)
    assert list(plain.groups) == [(0, 1)]
    one, other = (fit_from_statistics(found, alphas=(1.0,)) for found in (plain, ones))
    np.testing.assert_allclose(one.weight, other.weight, rtol=1e-6)


def test_weights_follow_the_variance_of_the_mean_above_a_floor():
    raters = np.array([1, 2, 2, 5] * 10)
    spreads = np.array([np.nan, 0.0, 1.0, 0.5] * 10)
    found = rater_weights(raters, spreads, np.ones(40, bool), 1.0)
    one, calm, torn, five = found[:4]
    assert found.mean() == pytest.approx(1)
    assert five > calm > torn > one
    pooled = (10 * 1.0 + 40 * 0.25) / 60
    own = [(4 * pooled + s) / (4 + f) / m for s, f, m in ((0, 0, 1), (0, 1, 2), (1, 1, 2), (1, 4, 5))]
    rest = 1 - np.mean(own)
    np.testing.assert_allclose(found[:4] / found[0], (rest + own[0]) / (rest + np.array(own)))
    noisy = rater_weights(raters, spreads * 100, np.ones(40, bool), 1.0)  # the floor: a fifth of the error
    pooled *= 1e4
    own = [(4 * pooled + s) / (4 + f) / m for s, f, m in ((0, 0, 1), (0, 1, 2), (1e4, 1, 2), (1e4, 4, 5))]
    np.testing.assert_allclose(noisy[:4] / noisy[0], (LEAST_SHARE + own[0]) / (LEAST_SHARE + np.array(own)))


def test_single_raters_few_cells_and_equal_variances_have_no_weights():
    many = np.ones(40, bool)
    assert rater_weights(np.ones(40), np.full(40, np.nan), many, 1.0) is None
    assert rater_weights(np.full(40, 3), np.full(40, 0.5), many, 1.0) is None
    few = np.array([2.0] * 19 + [1] * 21)
    assert rater_weights(few, np.where(few > 1, 0.5, np.nan), many, 1.0) is None


def test_weights_help_where_some_cells_have_many_raters_and_others_one():
    gains = []
    for seed in range(20):
        random = np.random.default_rng(seed)
        x = random.normal(size=(240, 12))
        true = random.normal(size=12) / 12**0.5
        raters = np.where(np.arange(240) % 4 == 0, 8, 1)
        answers = [x[i] @ true + random.normal(size=m) * 1.5 for i, m in enumerate(raters)]
        means = np.array([each.mean() for each in answers])[:, None]
        spreads = np.array([each.std(ddof=1) if len(each) > 1 else np.nan for each in answers])
        folds = np.arange(240) % 5
        plain = fit_regression(x, means, folds, ["a"], precision="float64")
        error = min(plain.reports[0].validation_errors)
        weights = rater_weights(raters, spreads, np.ones(240, bool), error)
        statistics = accumulate(weighted_blocks(x, means, folds, {0: weights}), ["a"], 5, 12, precision="float64")
        weighted = fit_from_statistics(statistics)
        gains.append(((plain.weight[0] - true) ** 2).sum() - ((weighted.weight[0] - true) ** 2).sum())
    gains = np.array(gains)
    assert gains.mean() > 2 * gains.std(ddof=1) / len(gains) ** 0.5
