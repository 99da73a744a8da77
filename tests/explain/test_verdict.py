"""The sentence on top: which is better, how sure, and what carries it; which rows are folded."""

from __future__ import annotations

import numpy as np
import pytest

from armorm.attribution import turning
from armorm.explain.verdict import Reason, carried_by, fold, listed, pair_verdict, score_verdict, too_close

REASONS = [Reason("honest", 0.5, True), Reason("brief", 0.2, False), Reason("kind", -0.1, False)]


def test_a_sure_verdict_names_the_probability_and_what_carries_it():
    assert pair_verdict("A", "B", 0.6, REASONS, probability=0.83) == (
        "A is better than B (probability 83%): it is rated higher on honest and lower on brief."
    )


def test_without_a_calibration_the_margin_is_in_standard_deviations():
    sentence = pair_verdict("A", "B", 0.6, REASONS, margin_in_std=0.41)
    assert sentence.startswith("A is better than B by 0.41 standard deviations of reference scores: it is rated")
    assert pair_verdict("A", "B", 0.6) == "A scores higher than B."


def test_turned_round_the_sentence_is_the_same():
    turned = [Reason(r.name, -r.value, not r.higher) for r in REASONS]
    for options in ({"probability": 0.83}, {"probability": 0.55}, {"margin_in_std": 0.4}, {"margin_in_std": 0.1}, {}):
        other = {"probability": 0.0, "margin_in_std": 0.0} | options
        negated = {"probability": 1 - other["probability"], "margin_in_std": -other["margin_in_std"]}
        back = {key: negated[key] for key in options}
        assert pair_verdict("B", "A", -0.6, turned, **back) == pair_verdict("A", "B", 0.6, REASONS, **options)


@pytest.mark.parametrize(
    ("options", "close"),
    [
        ({"probability": 0.599}, True),
        ({"probability": 0.6}, False),
        ({"probability": 0.41}, True),
        ({"probability": 0.39}, False),
        ({"probability": 0.9, "margin_in_std": 0.01}, False),  # the calibration counts if there is one
        ({"margin_in_std": 0.249}, True),
        ({"margin_in_std": -0.249}, True),
        ({"margin_in_std": 0.25}, False),
        ({}, False),
    ],
)
def test_too_close_to_call_follows_the_stated_rule(options, close):
    assert too_close(1.0, **options) == close
    assert pair_verdict("A", "B", 1.0, REASONS, **options).startswith("Too close to call") == close


def test_what_is_too_close_says_what_speaks_for_each_side():
    assert pair_verdict("A", "B", 0.6, REASONS, probability=0.55) == (
        "Too close to call: A is better with probability 55%. Strongest for A: honest and brief; for B: kind."
    )


def test_a_rounded_probability_never_contradicts_the_rule():
    assert "with probability 59%" in pair_verdict("A", "B", 0.6, probability=0.599)
    assert pair_verdict("A", "B", 0.6, probability=0.6) == "A is better than B (probability 60%)."
    assert pair_verdict("A", "B", 0.6, probability=0.9999) == "A is better than B (probability over 99%)."


def test_strong_objectives_on_the_other_side_are_named():
    reasons = [Reason("honest", 0.5, True), Reason("kind", -0.4, False)]
    assert pair_verdict("A", "B", 0.1, reasons, probability=0.7).endswith("higher on honest, in spite of kind.")


def test_at_most_three_objectives_carry_a_verdict_and_none_that_is_small():
    values = {"a": 5.0, "b": 4.0, "c": 3.0, "d": 2.0, "e": -9.0}
    assert [r.name for r in carried_by([Reason(*item) for item in values.items()])] == ["a", "b", "c"]
    assert [r.name for r in carried_by([Reason("a", 9.0), Reason("b", 0.9)])] == ["a"]


def test_a_single_response_is_placed_among_the_reference_responses():
    assert score_verdict(1.0, 84.0, REASONS) == (
        "This response scores higher than 84% of reference responses. "
        "It is raised most by honest and brief, lowered most by kind."
    )
    assert score_verdict(-0.2, 42.0, []) == "This response scores higher than 42% of reference responses."
    for normalised, place in ((-0.2, "close to"), (1.0, "above"), (-1.0, "below")):
        said = f"This response scores {place} the mean of the reference responses."
        assert score_verdict(normalised, None, []) == said
    assert score_verdict(None, None, REASONS) == "It is raised most by honest and brief, lowered most by kind."
    assert score_verdict(None, None, []) == "This response has average rewards."


def test_a_debiasing_correction_is_named_as_one_after_the_others():
    said = "It is raised most by brief and the correction for honest, lowered most by kind."
    assert score_verdict(None, None, REASONS, ["honest"]) == said
    said = "It is raised most by the correction for honest and brief, lowered most by the correction for kind."
    assert score_verdict(None, None, REASONS, ["kind", "brief", "honest"]) == said


def test_rows_under_two_percent_are_folded_two_at_least():
    assert fold([10.0, 0.1, -5.0, -0.2]) == ([0, 2], [3, 1])
    assert fold([10.0, 0.1, -5.0]) == ([0, 2, 1], []), "one row is not worth folding"
    assert fold([0.0, 0.0]) == ([0, 1], [])


def test_a_turning_objective_alone_turns_the_preference():
    assert turning(np.array([3.0, 1.0, -2.0])).tolist() == [[True, False, False]]
    assert turning(np.array([-3.0, -1.0, 2.0])).tolist() == [[True, False, False]]
    assert turning(np.array([1.0, 1.0, 1.0])).tolist() == [[False] * 3]
    assert turning(np.array([2.0])).tolist() == [[True]], "a tie is no preference"
    assert turning(np.array([1.0, -1.0])).tolist() == [[False, False]]


def test_names_are_listed_as_in_a_sentence():
    assert [listed(names) for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
