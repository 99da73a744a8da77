"""Attribution against explicit loops."""

from __future__ import annotations

import numpy as np

from armorm import attribution


def case(seed: int = 0, n: int = 7, k: int = 4):
    rng = np.random.default_rng(seed)
    output = 1.7 * rng.dirichlet(np.ones(k), n)
    transform = np.eye(k)
    transform[2] -= [0.4, -0.3, 1.0, 0.1]
    return rng.normal(0.5, 0.3, (n, k)), output, transform


def test_coefficients_are_what_each_own_reward_counts_in_the_score():
    rewards, output, transform = case()
    found = attribution.coefficients(output, transform)
    for row in range(len(rewards)):
        for objective in range(4):
            moved = rewards[row].copy()
            moved[objective] += 1
            change = output[row] @ (moved @ transform) - output[row] @ (rewards[row] @ transform)
            assert abs(found[row, objective] - change) < 1e-12
    assert (found[:, 2] < 0).any(), "the bias counts against the score where others are debiased"


def test_contributions_sum_to_the_score():
    rewards, output, transform = case()
    contributions = attribution.contributions(attribution.coefficients(output, transform), rewards)
    score = [sum(output[i, j] * (rewards[i] @ transform)[j] for j in range(4)) for i in range(len(rewards))]
    np.testing.assert_allclose(contributions.sum(1), score, atol=1e-12)


def test_relative_contributions_are_measured_from_a_response_of_average_rewards():
    rewards, output, transform = case()
    coefficients = attribution.coefficients(output, transform)
    mean = rewards.mean(0)
    relative = attribution.relative(coefficients, rewards, mean)
    for row in range(len(rewards)):
        for objective in range(4):
            expected = coefficients[row, objective] * (rewards[row, objective] - mean[objective])
            assert abs(relative[row, objective] - expected) < 1e-15
    average = attribution.relative(coefficients, np.tile(mean, (len(rewards), 1)), mean)
    np.testing.assert_array_equal(average, 0)
    scores = attribution.contributions(coefficients, rewards).sum(1)
    of_average = attribution.contributions(coefficients, mean).sum(1)
    np.testing.assert_allclose(relative.sum(1), scores - of_average, atol=1e-12)
