"""What sets and prompts count among preference pairs, by small cases counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from armorm.heads.pair_weights import pair_weights

# Set a: 300 pairs of one prompt and 1 pair of another; set b: 1 pair of each of 16 prompts.
PROMPTS = np.array([0] * 300 + [1] + [2 + i for i in range(16)])
SOURCES = np.array(["a"] * 301 + ["b"] * 16)
ONES = np.ones(len(PROMPTS))


def totals(weights: np.ndarray) -> tuple[float, float]:
    return float(weights[SOURCES == "a"].sum()), float(weights[SOURCES == "b"].sum())


def test_a_prompt_with_300_pairs_counts_as_the_cap():
    weights = pair_weights(ONES, PROMPTS, SOURCES, 3.0, "size")
    assert weights[:300].sum() == pytest.approx(3)
    assert totals(weights) == pytest.approx((4, 16))
    np.testing.assert_array_equal(pair_weights(ONES, PROMPTS, SOURCES, None, "size"), ONES)


@pytest.mark.parametrize(("balance", "ratio"), [("size", 4.0), ("root", 2.0), ("equal", 1.0)])
def test_sets_are_balanced_by_their_capped_sizes(balance, ratio):
    first, second = totals(pair_weights(ONES, PROMPTS, SOURCES, 3.0, balance))
    assert second / first == pytest.approx(ratio)
    assert first + second == pytest.approx(20)


def test_the_given_weight_of_a_set_multiplies_what_it_counts():
    given = np.where(SOURCES == "b", 0.25, 1.0)
    first, second = totals(pair_weights(given, PROMPTS, SOURCES, 3.0, "root"))
    assert second / first == pytest.approx(0.5)


def test_a_single_set_keeps_its_weights_under_every_balance():
    alone = [pair_weights(ONES, PROMPTS, ONES, 3.0, balance) for balance in ("size", "root", "equal")]
    np.testing.assert_allclose(alone[1], alone[0])
    np.testing.assert_allclose(alone[2], alone[0])
