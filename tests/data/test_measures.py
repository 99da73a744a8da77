"""Computed objectives: length on a logarithmic scale, between its own percentiles."""

from __future__ import annotations

import math

import numpy as np
import pytest

from armorm.conversation import Conversation
from armorm.data.measures import MEASURES, computed_objective, find_measure, measure
from armorm.errors import FitError
from armorm.objectives import ObjectiveError
from tests.helpers.conversations import chat


def percentile(values: list[float], share: float) -> float:
    """Between the two nearest of the sorted values, in proportion."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def test_response_length_is_the_logarithm_of_one_more_than_the_tokens():
    lengths = [0, 1, 10, 4000]
    conversations = [Conversation.from_messages(chat("a", "b"))] * len(lengths)
    found = measure("response_length", conversations, lengths)
    assert found == pytest.approx([math.log(1 + n) for n in lengths])
    assert found.dtype == np.float64


def test_response_length_counts_the_response_alone(tiny_backbone):
    short = Conversation.from_messages(chat("a word", "yes"))
    long_prompt = Conversation.from_messages(chat("a word " * 50, "yes"))
    long_reply = Conversation.from_messages(chat("a word", "yes " * 50))
    conversations = [short, long_prompt, long_reply]
    tokens = [row.response_tokens for row in tiny_backbone.template.encode(conversations)]
    values = measure("response_length", conversations, tokens)
    assert values[0] == values[1] < values[2]


def test_an_unknown_measure_is_refused_with_the_nearest_right_one():
    with pytest.raises(ObjectiveError, match=r"unknown measure 'response_lenght' \(did you mean response_length\?\)"):
        measure("response_lenght", [], [])


def test_conversations_and_encodings_must_match_in_number():
    with pytest.raises(ValueError, match="shorter"):
        measure("response_length", [Conversation.from_messages(chat("a", "b"))], [])


def test_the_map_puts_the_first_and_last_percentile_at_zero_and_one_and_clips_nothing():
    training = np.random.default_rng(0).lognormal(size=500)
    objective = computed_objective("verbosity", "response_length", training)
    low, high = percentile(training.tolist(), 0.01), percentile(training.tolist(), 0.99)
    assert (objective.low, objective.high) == pytest.approx((low, high))
    assert objective.to_reward(np.array([low, high])) == pytest.approx([0, 1], abs=1e-12)
    rewards = objective.to_reward(training)
    assert rewards == pytest.approx([(value - low) / (high - low) for value in training])
    assert rewards.min() < 0
    assert rewards.max() > 1
    assert objective.to_raw(rewards) == pytest.approx(training)


def test_a_computed_objective_says_what_it_is():
    objective = computed_objective("verbosity", "response_length", np.arange(10.0))
    assert (objective.name, objective.source, objective.direction) == ("verbosity", "computed", "neutral")
    assert objective.compute in MEASURES


@pytest.mark.parametrize("training", [np.full(20, 3.0), np.array([]), np.array([1.0, math.nan])])
def test_a_measure_that_does_not_vary_is_refused(training):
    with pytest.raises(FitError, match=f"verbosity does not vary over the {len(training)} training rows"):
        computed_objective("verbosity", "response_length", training)


def values_of(name: str, *responses: str) -> list[float]:
    conversations = [Conversation.from_messages(chat("a", response)) for response in responses]
    return measure(name, conversations, [1] * len(responses)).tolist()


def test_densities_count_list_items_and_markdown_in_lines_that_are_not_blank():
    text = "# Steps\n\n1. Mix **well**.\n2. Bake.\n   \nDone, see [here](http://x.y)."
    assert values_of("list_density", "plain", text, "- a\n- b") == [0.0, 2 / 4, 1.0]
    assert values_of("markdown_density", "plain", text, "- a\n- b") == [0.0, 5 / 4, 1.0]


def test_a_function_of_the_users_own_is_called_with_the_messages(tmp_path, monkeypatch):
    (tmp_path / "own_measures.py").write_text(
        "def exclamations(messages):\n    return messages[-1]['content'].count('!')\n\ndef words(messages):\n    return 'many'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert values_of("python:own_measures:exclamations", "Hi!", "Oh!!", "no") == [1.0, 2.0, 0.0]
    with pytest.raises(
        FitError, match=r"measure 'python:own_measures:words' returned 'many'.*expected a finite number"
    ):
        values_of("python:own_measures:words", "Hi!")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("python:no_such_module:f", "cannot be imported"),
        ("python:math:no_such_function", "cannot be imported"),
        ("python:math:pi", "pi of math is not a function"),
        ("python:math", "expected python:MODULE:FUNCTION"),
        ("math:sqrt", "unknown measure"),
    ],
)
def test_a_function_that_is_not_there_is_refused(name, message):
    with pytest.raises(ObjectiveError, match=message):
        find_measure(name)
