"""Steering settings: what is kept, and what is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from armorm.errors import ArmormError
from armorm.model.remote_code import steering_terms
from armorm.objectives import Objective, ObjectiveError, ObjectiveSet
from armorm.steering import (
    SteeringError,
    checked_policy,
    read_policy,
    sentences,
    steering_settings,
    to_policy,
    with_steering_note,
)

OBJECTIVES = ObjectiveSet([Objective.rated(name, 0, 1) for name in ("helpful", "harmless", "style", "verbosity")])
BIASES = ["verbosity"]


def settings(multiply=None, drop=(), **others):
    return steering_settings(OBJECTIVES, multiply or {}, drop, BIASES, **others)


def terms(steering):
    """What a model applies for settings."""
    return steering_terms(SimpleNamespace(objectives=OBJECTIVES.to_dicts(), steering=steering))


def test_factors_stand_in_the_order_of_the_objectives():
    steering = settings({"style": 2.5, "helpful": 0.5}, ["harmless"])
    assert steering == {"multiply": {"style": 2.5, "helpful": 0.5}, "drop": ["harmless"]}
    assert terms(steering) == ([0.5, 0.0, 2.5, 1.0], None, 1.0, 1.0)
    assert json.loads(json.dumps(steering)) == steering


def test_nothing_changed_is_no_steering():
    assert settings() == settings({"style": 1.0}) == {}


def test_a_factor_of_zero_drops():
    assert settings({"style": 0}) == settings(drop=["style"]) == {"multiply": {}, "drop": ["style"]}
    assert settings({"style": 3.0}, ["style"]) == settings(drop=["style"])


def test_one_objective_may_be_dropped_by_its_bare_name():
    assert settings(drop="style") == settings(drop=["style"])


@pytest.mark.parametrize("multiply_or_drop", [{"drop": ["verbosity"]}, {"multiply": {"verbosity": 0.0}}])
def test_an_objective_that_others_are_debiased_against_cannot_be_dropped(multiply_or_drop):
    with pytest.raises(SteeringError, match="objective verbosity cannot be dropped: others are debiased against it"):
        settings(**multiply_or_drop)
    assert settings({"verbosity": 0.25}) == {"multiply": {"verbosity": 0.25}, "drop": []}
    assert steering_settings(OBJECTIVES, {}, ["verbosity"], []) == {"multiply": {}, "drop": ["verbosity"]}


@pytest.mark.parametrize("factor", [-0.5, float("nan"), float("inf")])
def test_a_factor_that_is_no_finite_number_from_zero_up_is_refused(factor):
    with pytest.raises(SteeringError, match=r"objective style: factor .*, expected a finite number >= 0"):
        settings({"style": factor})


def test_dropping_everything_is_refused():
    with pytest.raises(SteeringError, match="every objective is dropped"):
        steering_settings(OBJECTIVES, {"helpful": 0}, ["harmless", "style", "verbosity"], [])


def test_an_unknown_objective_is_refused_with_the_nearest_right_one():
    for arguments in ({"multiply": {"harmles": 2.0}}, {"drop": ["harmles"]}):
        with pytest.raises(ObjectiveError, match=r"unknown objective 'harmles' \(did you mean harmless\?\)"):
            settings(**arguments)
    assert issubclass(SteeringError, ArmormError)


# --- pinned and blended --------------------------------------------------------------------------


def test_pins_take_their_share_and_a_blend_its_part_of_the_rest():
    steering = settings(
        {"harmless": 2.0}, pin={"helpful": 0.4}, blend={"share": 0.5, "weights": {"style": 2, "harmless": 1}}
    )
    assert steering["pin"] == {"helpful": 0.4}
    assert steering["blend"] == {"share": 0.5, "weights": {"style": 2.0, "harmless": 1.0}}
    factors, fixed, gate_share, strength = terms(steering)
    assert factors == [0.0, 2.0, 1.0, 1.0]
    np.testing.assert_allclose(fixed, [0.4, 0.6 * 0.5 / 3, 0.6 * 0.5 * 2 / 3, 0.0])
    assert gate_share == pytest.approx(0.3)
    assert strength == 1.0
    assert sum(fixed) + gate_share == pytest.approx(1.0)


def test_a_blend_without_weights_is_even_over_what_is_left():
    steering = settings(drop=["style"], pin={"helpful": 0.5}, blend={"share": 1.0})
    assert steering["blend"] == {"share": 1.0, "weights": {"harmless": 1.0, "verbosity": 1.0}}
    _, fixed, gate_share, _ = terms(steering)
    np.testing.assert_allclose(fixed, [0.5, 0.25, 0.0, 0.25])
    assert gate_share == 0


def test_pins_that_are_the_whole_leave_the_gate_nothing():
    assert terms(settings(pin={"helpful": 0.7, "style": 0.3})) == (None, [0.7, 0.0, 0.3, 0.0], 0.0, 1.0)
    thirds = settings(pin=dict.fromkeys(["helpful", "style", "harmless"], 1 / 3))
    assert sum(terms(thirds)[1]) == pytest.approx(1.0, abs=1e-15)


def test_what_changes_nothing_is_left_out():
    assert settings(blend={"share": 0.0, "weights": {"style": 1.0}}, debias_strength=1.0, pin={}) == {}
    assert terms({}) == (None, None, 1.0, 1.0)
    assert settings(pin={"style": 0.0}) == settings(drop=["style"])


def test_the_strength_of_debiasing_is_kept_and_zero_is_one():
    for strength in (0, 0.5, 2):
        steering = settings(debias_strength=strength)
        assert steering == {"multiply": {}, "drop": [], "debias_strength": float(strength)}
        assert terms(steering)[3] == strength
    with pytest.raises(SteeringError, match="debias_strength: this model is not debiased"):
        steering_settings(OBJECTIVES, debias_strength=0.5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"pin": {"helpful": 1.2}}, "objective helpful: pinned to 1.2, expected a share from 0 to 1"),
        ({"pin": {"helpful": float("nan")}}, "objective helpful: pinned to nan"),
        ({"pin": {"helpful": 0.7, "style": 0.7}}, "pinned shares sum to 1.4, expected at most 1"),
        ({"pin": {"helpful": 0.5}, "drop": ["helpful"]}, "objective helpful is both pinned and dropped"),
        ({"pin": {"helpful": 0.5}, "multiply": {"helpful": 2.0}}, "objective helpful is both pinned and multiplied"),
        ({"pin": {"verbosity": 0.0}}, "objective verbosity cannot be dropped"),
        (
            {"pin": {"verbosity": 0.5}, "drop": ["helpful", "harmless", "style"]},
            "sum to 0.5 and no other objective remains",
        ),
        ({"pin": {"stile": 0.5}}, r"unknown objective 'stile' \(did you mean style\?\)"),
        ({"blend": {"share": 2}}, "blend.share: found 2, expected a share from 0 to 1"),
        ({"blend": {"weights": {"style": 1}}}, "blend.share: found None"),
        ({"blend": {"share": 0.5, "wieghts": {}}}, r"blend.wieghts: unknown key \(did you mean weights\?\)"),
        (
            {"blend": {"share": 0.5, "weights": {"style": -1}}},
            "blend.weights.style: found -1, expected a finite number",
        ),
        ({"blend": {"share": 0.5, "weights": {"style": 0}}}, "blend.weights: every weight is 0"),
        ({"blend": {"share": 0.5, "weights": {"style": 1}}, "drop": ["style"]}, "style is both blended and dropped"),
        ({"blend": {"share": 0.5, "weights": {"style": 1}}, "pin": {"style": 0.1}}, "both blended and pinned"),
        ({"blend": {"share": 0.5, "weights": {"stile": 1}}}, "did you mean style"),
        ({"debias_strength": -1.0}, "debias_strength -1.0, expected a finite number >= 0"),
        ({"debias_strength": True}, "debias_strength True, expected a finite number >= 0"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(arguments, said):
    with pytest.raises(ArmormError, match=said):
        settings(**arguments)


# --- policies ------------------------------------------------------------------------------------

POLICY = """\
multiply: {style: 2}
pin: {helpful: 0.5}
blend: {share: 0.25, weights: {harmless: 1}}
debias_strength: 1.5
"""


def test_a_policy_says_what_the_arguments_say_and_settings_are_written_as_one(tmp_path):
    (tmp_path / "policy.yaml").write_text(POLICY)
    steering = settings(**read_policy(tmp_path / "policy.yaml"))
    assert steering == settings(
        {"style": 2.0}, pin={"helpful": 0.5}, blend={"share": 0.25, "weights": {"harmless": 1.0}}, debias_strength=1.5
    )
    (tmp_path / "again.yaml").write_text(to_policy(steering))
    assert settings(**read_policy(tmp_path / "again.yaml")) == steering
    assert json.loads(json.dumps(steering)) == steering
    assert to_policy({}) == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mutliply: {style: 2}", r"policy.yaml, mutliply: unknown key \(did you mean multiply\?\)"),
        ("multiply: {style: two}", r"policy.yaml, multiply.style: found 'two', expected a number"),
        ("multiply: [style]", r"policy.yaml, multiply: found \['style'\], expected a number for each objective"),
        ("drop: {style: 1}", r"policy.yaml, drop: found .*, expected a list of objectives"),
        ("blend: 0.5", r"policy.yaml, blend: found 0.5, expected share and weights"),
        ("blend: {share: 0.5, weights: {style: yes}}", r"policy.yaml, blend.weights.style: found True"),
        ("pin: {style: 0.5}\npin: {helpful: 0.5}", r"policy.yaml: not valid YAML: key 'pin' occurs twice"),
        ("- style", r"policy.yaml: found \['style'\], expected keys and values: multiply, drop"),
        ("multiply: {", r"policy.yaml: not valid YAML"),
    ],
)
def test_a_policy_that_is_wrong_is_refused_by_its_key(tmp_path, text, said):
    (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(SteeringError, match=said):
        read_policy(tmp_path / "policy.yaml")
    with pytest.raises(SteeringError, match=r"absent.yaml: no such file or folder; looked for /"):
        read_policy(tmp_path / "absent.yaml")


def test_a_policy_may_name_one_objective_to_drop():
    assert settings(**checked_policy({"drop": "style", "multiply": None})) == settings(drop=["style"])


# --- words ---------------------------------------------------------------------------------------


def test_every_change_is_said_in_a_sentence():
    said = sentences(
        settings(
            {"style": 2.0},
            ["harmless"],
            pin={"helpful": 0.5},
            blend={"share": 0.25, "weights": {"verbosity": 3, "style": 1}},
            debias_strength=0,
        )
    )
    assert said == [
        "style is weighted 2 times",
        "harmless is dropped",
        "helpful has 0.5 of the weight on every prompt",
        "0.25 of the remaining weight is fixed on every prompt: verbosity 0.75, style 0.25",
        "debiasing is 0 times as strong as trained",
    ]
    assert sentences({}) == []


def test_a_card_says_once_below_its_title_how_the_model_is_steered():
    card = "---\nlibrary_name: armorm\n---\n\n# small\n\nText.\n"
    once = with_steering_note(card, settings({"style": 2.0}), ["Rankings that flip: 3."])
    assert once.index("# small") < once.index("**This model is steered**") < once.index("Text.")
    assert "- style is weighted 2 times" in once and "Rankings that flip: 3." in once
    again = with_steering_note(once, settings(drop=["style"]))
    assert again.count("**This model is steered**") == 1 and "is weighted 2 times" not in again
    assert with_steering_note(again, {}) == card
