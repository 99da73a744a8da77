"""What to rate next, against a slow version that inverts the matrix for each candidate."""

from __future__ import annotations

import numpy as np
import pytest

from armorm.heads.optimal_design import RidgePosterior, greedy_design
from armorm.heads.rated_record import sum_of_rows


def rated(random, n, d):
    features = random.normal(size=(n, d)) * np.linspace(3, 0.1, d) + 1
    return features, sum_of_rows(features, random.normal(size=(n, 1)))


def slow_variance(rows, pool, alpha, intercept):
    """Sum over the pool of x^T (X^T X + alpha I)^-1 x; the intercept is a constant feature without penalty."""
    if intercept:
        rows, pool = (np.column_stack([values, np.ones(len(values))]) for values in (rows, pool))
    penalty = np.diag([alpha] * (rows.shape[1] - intercept) + [0.0] * intercept)
    inverse = np.linalg.inv(rows.T @ rows + penalty)
    return np.einsum("nd,de,ne->", pool, inverse, pool)


def slow_greedy(rows, pool, alpha, count, intercept, prompts=None):
    chosen, left = [], []
    for _ in range(count):
        taken = [0 if prompts is None else sum(prompts[c] == prompts[i] for c in chosen) for i in range(len(pool))]
        open_rows = [i for i in range(len(pool)) if i not in chosen]
        fewest = min(taken[i] for i in open_rows)
        found = {
            i: slow_variance(np.vstack([rows, pool[chosen], pool[i : i + 1]]), pool, alpha, intercept)
            for i in open_rows
            if taken[i] == fewest
        }
        chosen.append(min(found, key=found.get))
        left.append(found[chosen[-1]])
    return chosen, left


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("by_prompt", [False, True])
def test_greedy_choice_and_variance_equal_the_slow_version(intercept, by_prompt):
    random = np.random.default_rng(0)
    rows, moments = rated(random, 9, 6)
    pool = random.normal(size=(20, 6))
    prompts = np.repeat(np.arange(5), 4) if by_prompt else None
    posterior = RidgePosterior.of_moments(moments, 0.7, intercept)
    before = slow_variance(rows, pool, 0.7, intercept)
    assert posterior.leverage(pool).sum() == pytest.approx(before)
    design = greedy_design(posterior, pool, 8, prompts)
    chosen, left = slow_greedy(rows, pool, 0.7, 8, intercept, prompts)
    assert design.chosen.tolist() == chosen
    assert design.removed == pytest.approx([1 - each / before for each in left])
    if by_prompt:
        assert len(set(prompts[design.chosen[:5]].tolist())) == 5


def test_an_objective_without_ratings_starts_from_its_prior():
    pool = np.random.default_rng(1).normal(size=(12, 4))
    design = greedy_design(RidgePosterior.without_ratings(4, 2.0), pool, 5)
    chosen, _ = slow_greedy(np.zeros((1, 4)), pool, 2.0, 5, False)
    assert design.chosen.tolist() == chosen


def test_an_outlier_has_the_largest_leverage_but_is_not_chosen():
    random = np.random.default_rng(2)
    pool = np.zeros((200, 10))
    pool[:, :5] = random.normal(size=(200, 5))
    pool[7] = 0
    pool[7, 9] = 4  # alone in its direction
    posterior = RidgePosterior.without_ratings(10, 1.0)
    assert np.argsort(-posterior.leverage(pool))[:10].tolist().count(7) == 1
    assert 7 not in greedy_design(posterior, pool, 5).chosen


def test_all_candidates_are_chosen_once_and_variance_only_falls():
    random = np.random.default_rng(3)
    _, moments = rated(random, 30, 5)
    design = greedy_design(RidgePosterior.of_moments(moments, 1.0, False), random.normal(size=(15, 5)), 99)
    assert sorted(design.chosen.tolist()) == list(range(15))
    assert (np.diff(design.removed) > 0).all() and design.removed[0] > 0
