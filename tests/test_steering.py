"""Steering settings: what is kept, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from armorm.errors import ArmormError
from armorm.objectives import Objective, ObjectiveError, ObjectiveSet
from armorm.steering import SteeringError, steering_factors, steering_settings

OBJECTIVES = ObjectiveSet([Objective.rated(name, 0, 1) for name in ("helpful", "harmless", "style", "verbosity")])
BIASES = ["verbosity"]


def settings(multiply=None, drop=()):
    return steering_settings(OBJECTIVES, multiply or {}, drop, BIASES)


def test_factors_stand_in_the_order_of_the_objectives():
    steering = settings({"style": 2.5, "helpful": 0.5}, ["harmless"])
    assert steering == {"multiply": {"style": 2.5, "helpful": 0.5}, "drop": ["harmless"]}
    np.testing.assert_array_equal(steering_factors(OBJECTIVES, steering), [0.5, 0.0, 2.5, 1.0])
    assert json.loads(json.dumps(steering)) == steering


def test_nothing_changed_is_no_steering():
    assert settings() == settings({"style": 1.0}) == {}
    np.testing.assert_array_equal(steering_factors(OBJECTIVES, {}), 1)


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
