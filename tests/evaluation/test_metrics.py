"""Pair and rating metrics, each against a slow obvious version."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from armorm.objectives import Objective, ObjectiveSet
from armorm.training.pair_metrics import pair_accuracy, pair_figures, rating_figures, within_prompt_accuracy


def test_a_tie_or_an_unscored_pair_is_wrong_and_no_pairs_have_no_accuracy():
    assert pair_accuracy(np.array([1.0, 1e-12, 0.0, -1.0, math.nan])) == 2 / 5
    assert math.isnan(pair_accuracy(np.array([])))


def within_prompt_by_hand(prediction, rating, prompts) -> tuple[float, int]:
    right, count = 0.0, 0
    for i in range(len(rating)):
        for j in range(len(rating)):
            if prompts[i] == prompts[j] and rating[i] > rating[j]:
                count += 1
                right += 1.0 if prediction[i] > prediction[j] else 0.5 if prediction[i] == prediction[j] else 0.0
    return (right / count if count else math.nan), count


row = st.tuples(
    st.integers(-2, 2),
    st.one_of(st.integers(1, 4), st.just(math.nan)),
    st.integers(0, 3),
)


@settings(deadline=None, max_examples=50)
@given(st.lists(row, max_size=15), st.booleans())
def test_within_prompt_accuracy_is_that_of_a_double_loop(rows, as_text):
    prediction, rating = (np.array([row[i] for row in rows], np.float64) for i in (0, 1))
    prompts = np.array([f"prompt {p}" if as_text else p for *_, p in rows], str if as_text else np.int64)
    accuracy, pairs = within_prompt_accuracy(prediction, rating, prompts)
    expected, count = within_prompt_by_hand(prediction, rating, prompts)
    assert pairs == count
    assert accuracy == pytest.approx(expected, nan_ok=True)


def test_only_responses_to_one_prompt_are_compared():
    # Between prompts every order is wrong, within each it is right.
    prediction, rating = np.array([5.0, 6.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0, 4.0])
    assert within_prompt_accuracy(prediction, rating, np.array([0, 0, 1, 1])) == (1.0, 2)
    assert within_prompt_accuracy(prediction, rating, np.zeros(4, int)) == (2 / 6, 6)


OBJECTIVES = ObjectiveSet(
    [
        Objective.rated("s-up", 1, 5),
        Objective.rated("s-down", 0, 10, direction="lower"),
        Objective.rated("s-rare", 0, 4),
        Objective.rated("s-never", 0, 1),
    ]
)


def rated_rows():
    """Rewards that follow the ratings roughly; the third objective has two ratings, the fourth none."""
    rng = np.random.default_rng(0)
    ratings = np.column_stack(
        [rng.integers(1, 6, 60), rng.integers(0, 11, 60), rng.integers(0, 5, 60), np.zeros(60)]
    ).astype(float)
    rewards = OBJECTIVES.to_reward(ratings) + 0.2 * rng.normal(size=ratings.shape)
    ratings[rng.random(ratings.shape) < 0.4] = math.nan
    ratings[2:, 2] = math.nan
    ratings[:2, 2] = [1, 3]
    ratings[:, 3] = math.nan
    return rewards, ratings, rng.integers(0, 12, 60)


def test_rating_figures_are_those_of_each_objective_by_hand():
    rewards, ratings, prompts = rated_rows()
    figures = rating_figures(rewards, ratings, OBJECTIVES, prompts)
    assert list(figures) == OBJECTIVES.names
    for column, objective in enumerate(OBJECTIVES):
        found = figures[objective.name]
        rows = [i for i in range(60) if not math.isnan(ratings[i, column])]
        raw = [float(objective.to_raw(rewards[i, column])) for i in rows]
        given = [ratings[i, column] for i in rows]
        assert found["n"] == len(rows)
        assert found["prompts"] == len({int(prompts[i]) for i in rows})
        accuracy, pairs = within_prompt_by_hand(raw, given, [prompts[i] for i in rows])
        assert found["within_prompt"] == pytest.approx(accuracy, nan_ok=True)
        assert found["within_prompt_pairs"] == pairs
        if len(rows) < 3:
            assert math.isnan(found["spearman"])
            assert math.isnan(found["mae"])
        else:
            assert found["spearman"] == pytest.approx(spearmanr(raw, given).statistic)
            assert found["mae"] == pytest.approx(sum(abs(a - b) for a, b in zip(raw, given, strict=True)) / len(rows))


def test_a_good_prediction_of_an_objective_of_direction_lower_has_a_positive_correlation():
    rewards, ratings, prompts = rated_rows()
    figures = rating_figures(rewards, ratings, OBJECTIVES, prompts)
    assert figures["s-down"]["spearman"] > 0.7
    assert figures["s-down"]["within_prompt"] > 0.7
    reversed_figures = rating_figures(1 - rewards, ratings, OBJECTIVES, prompts)
    assert reversed_figures["s-down"]["spearman"] < -0.7


def test_errors_are_in_raw_units():
    objectives = ObjectiveSet([Objective.rated("s-a", 0, 10)])
    ratings = np.array([[2.0], [4.0], [6.0]])
    figures = rating_figures(objectives.to_reward(ratings) + 0.15, ratings, objectives, np.arange(3))
    assert figures["s-a"]["mae"] == pytest.approx(1.5)
    assert figures["s-a"]["within_prompt_pairs"] == 0
    assert math.isnan(figures["s-a"]["within_prompt"])


def share(flags) -> float:
    flags = list(flags)
    return sum(flags) / len(flags) if flags else math.nan


def test_pair_figures_are_those_of_a_loop_over_pairs():
    rng = np.random.default_rng(1)
    p, names = 40, ["s-a", "s-b", "s-c"]
    margins = rng.integers(-2, 3, p).astype(float)
    reward_margins = rng.integers(-2, 3, (p, 3)).astype(float)
    lengths = rng.integers(-2, 3, p).astype(float)
    margins[:3] = math.nan
    reward_margins[:3] = math.nan
    subsets = ["" if i % 5 == 0 else f"subset {i % 3}" for i in range(p)]
    prompts = [f"prompt {i % 7}" for i in range(p)]
    figures = pair_figures(margins, reward_margins, lengths, subsets, prompts, names)
    right = [bool(margin > 0) for margin in margins]

    assert figures["accuracy"] == share(right)
    assert (figures["pairs"], figures["prompts"], figures["refused"]) == (40, 7, 3)
    assert figures["ties"] == sum(margin == 0 for margin in margins) > 0
    assert figures["baselines"] == {
        "uniform_weights": share(sum(row) > 0 for row in reward_margins),
        "longer_response": share(length > 0 for length in lengths),
    }
    assert figures["objectives"] == {name: share(row[i] > 0 for row in reward_margins) for i, name in enumerate(names)}
    longer = [i for i in range(p) if lengths[i] > 0]
    shorter = [i for i in range(p) if lengths[i] < 0]
    assert figures["longer_right"] == {"accuracy": share(right[i] for i in longer), "pairs": len(longer)}
    assert figures["longer_wrong"] == {"accuracy": share(right[i] for i in shorter), "pairs": len(shorter)}
    assert len(longer) + len(shorter) < p
    assert figures["subsets"] == {
        name: {"accuracy": share(right[i] for i in range(p) if subsets[i] == name), "pairs": subsets.count(name)}
        for name in ("subset 0", "subset 1", "subset 2")
    }


def test_no_pairs_give_no_figures_but_no_error():
    figures = pair_figures(np.empty(0), np.empty((0, 2)), np.empty(0), [], [], ["a", "b"])
    assert (figures["pairs"], figures["refused"], figures["ties"], figures["subsets"]) == (0, 0, 0, {})
    values = [figures["accuracy"], *figures["baselines"].values(), *figures["objectives"].values()]
    assert all(math.isnan(value) for value in values)
