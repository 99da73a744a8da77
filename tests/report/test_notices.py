"""Warnings: said where they apply, with the figure, and not where they do not."""

from __future__ import annotations

import numpy as np

from armorm.report import page as notices

NAMES = ["help", "safe", "long"]


def titles(found) -> list[str]:
    return [notice.title for notice in found]


def test_a_gate_is_collapsed_blind_or_neither():
    rng = np.random.default_rng(0)
    steady = np.tile([0.97, 0.02, 0.01], (50, 1))
    assert titles(notices.gate_notices(NAMES, steady, ["long"])) == [
        "One objective makes up almost the whole score: the gate has collapsed"
    ]
    assert "help has 97% of the weight" in notices.gate_notices(NAMES, steady, [])[0].text
    blind = np.tile([0.5, 0.3, 0.2], (50, 1))
    assert titles(notices.gate_notices(NAMES, blind, [])) == [
        "Every prompt gets the same weights: the gate ignores the prompt"
    ]
    assert notices.gate_notices(NAMES, blind[:5], []) == [], "too few prompts to tell"
    assert notices.gate_notices(NAMES, rng.dirichlet([2, 2, 2], 50), []) == []


def test_an_objective_that_no_prompt_uses_is_named_unless_it_is_the_bias():
    weights = np.column_stack([np.linspace(0.3, 0.7, 50), np.linspace(0.699, 0.299, 50), np.full(50, 0.001)])
    assert titles(notices.gate_notices(NAMES, weights, [])) == ["No prompt uses long"]
    assert notices.gate_notices(NAMES, weights, ["long"]) == []
    assert notices.gate_notices(NAMES, weights[:5], []) == [], "too few prompts to tell"
    weights[0] = [0.3, 0.66, 0.04]  # one prompt needs it
    assert notices.gate_notices(NAMES, weights, []) == []


def test_length_is_warned_of_where_it_is_and_where_it_stays():
    before, after = np.array([0.8, 0.4, 0.99]), np.array([0.02, 0.1, 0.0])
    found = notices.objective_length_notices(NAMES, before, after, ["long"])
    assert titles(found) == ["help is mostly length"]
    assert "+0.80" in found[0].text and "after debiasing +0.02" in found[0].text
    many = notices.objective_length_notices([*NAMES, "kind"], np.append(before, -0.7), np.append(after, 0.0), ["long"])
    assert titles(many) == ["help and kind are mostly length"]
    assert "+0.80, after debiasing +0.02; -0.70, after debiasing +0.00" in many[0].text
    found = notices.objective_length_notices(NAMES, before, before, [])
    assert titles(found) == ["long is mostly length", "help is mostly length", "safe correlates with length"]
    assert all("nothing removes it" in notice.text for notice in found)
    assert notices.objective_length_notices(NAMES, -after, -after, []) == []


def test_a_score_that_goes_with_length_is_warned_of_with_its_remedy():
    found = notices.score_length_notices(0.5, (0.8, 0.6, 100), before=None)
    assert titles(found) == [
        "The score correlates with length (+0.50)",
        "It is right more often where the longer response is better",
    ]
    assert "Longer responses" in found[0].text and "drop the objectives that are mostly length" in found[0].text
    assert "80.0%" in found[1].text and "60.0%" in found[1].text
    for before, remedy in ((-0.7, "above 1"), (0.2, "below 1"), (-0.4, "below 1")):
        assert f"`debias_strength` {remedy}" in notices.score_length_notices(-0.5, None, before=before)[0].text
    assert titles(notices.score_length_notices(0.0, (0.5, 0.7, 100), before=0.0)) == [
        "It is right more often where the shorter response is better"
    ]
    assert notices.score_length_notices(0.1, (0.8, 0.6, 10), before=0.0) == [], "too few pairs to tell"
    assert notices.score_length_notices(0.1, (0.7, 0.65, 100), before=0.0) == []


def test_edits_that_do_not_act_as_they_should_are_named_with_their_change():
    def edit(expected: str, change: float, fault: bool) -> dict:
        return {"expected": expected, "change": change, "fault": fault}

    edits = {
        "insult before": edit("lower", 0.02, True),
        "first half": edit("lower", -0.5, False),
        "number changed": edit("lower", -0.01, True),
        "padding": edit("no effect", 0.4, True),
        "flattery": edit("no effect", 0.0, False),
    }
    found = notices.perturbation_notices(edits)
    assert titles(found) == ["Edits of responses: insult before and number changed", "Edits of responses: padding"]
    assert found[0].text == "They should lower the score, and do not: by +0.02, -0.01 standard deviations."
    assert "+0.40" in found[1].text
    assert notices.perturbation_notices({}) == []


def test_poor_fits_chance_and_lost_rows_are_said():
    reports = [
        {"objective": "a", "r2": 0.01},
        {"objective": "b", "r2": 0.4, "warning": "alpha at the end of its range"},
    ]
    assert titles(notices.fit_notices(reports)) == ["Hardly predicted: a", "b: its ratings are predicted unreliably"]
    assert notices.accuracy_notices(0.7, (0.6, 0.8), 100) == [] == notices.accuracy_notices(0.5, None, 10)
    (unsure,), (worse,) = (notices.accuracy_notices(0.5, ends, 100) for ends in ((0.49, 0.61), (0.3, 0.45)))
    assert (
        "49.0% to 61.0%" in unsure.text and "Guessing may" in unsure.title and "worse than by guessing" in worse.title
    )
    assert titles(notices.row_notices(2, 1, 1000)) == [
        "2 of 1,000 responses could not be scored",
        "1 of 1,000 conversations were truncated",
    ]
    assert titles(notices.gate_training_notices({"accuracy": 0.6, "uniform_accuracy": 0.6}))
    assert (
        notices.gate_training_notices({"accuracy": 0.7, "uniform_accuracy": 0.6})
        == []
        == notices.gate_training_notices({})
    )
    assert notices.row_notices(0, 0, 10) == [] == notices.steering_notices([])


def test_standard_deviations_that_are_approximate_are_said():
    assert notices.uncertainty_notices({}) == []
    (found,) = notices.uncertainty_notices({"help": 0.1, "safe": 0.4})
    assert "2 objectives" in found.text and "by up to 40% (safe)" in found.text
