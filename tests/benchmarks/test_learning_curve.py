"""The learning curve: samples are drawn as described, and fewer rows than features give the same ridge regression."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import learning_curve
from armorm.correlation import spearman
from armorm.heads.regression import fit_regression

PROMPTS = np.repeat(np.arange(30), 4)


def test_whole_takes_prompts_one_after_another_and_spread_one_row_of_each_first():
    whole = learning_curve.whole(PROMPTS, np.random.default_rng(0))
    spread = learning_curve.spread(PROMPTS, np.random.default_rng(0))
    assert sorted(whole) == sorted(spread) == list(range(len(PROMPTS)))
    assert (PROMPTS[whole].reshape(30, 4) == PROMPTS[whole][::4, None]).all()
    assert all(sorted(part) == list(range(30)) for part in PROMPTS[spread].reshape(4, 30))


def test_fewer_rows_than_features_give_the_ridge_of_all_features():
    rng = np.random.default_rng(1)
    features, unseen = rng.normal(size=(120, 200)).astype(np.float32), rng.normal(size=(50, 200)).astype(np.float32)
    weight = rng.normal(size=200)
    ratings, truth = (features @ weight)[:, None], (unseen @ weight)[:, None]
    (found,) = learning_curve.correlations((features, ratings, PROMPTS), (unseen, truth), ["a"])
    folds = PROMPTS % learning_curve.INNER_FOLDS
    head = fit_regression(features, ratings, folds, ["a"], alphas=learning_curve.ALPHAS, precision="float64")
    assert abs(found - spearman((unseen @ head.weight.T + head.bias)[:, 0], truth[:, 0])) < 0.002
    assert found > 0.4
