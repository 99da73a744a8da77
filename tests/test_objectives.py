"""Objectives: affine maps in both directions against the published scales, and what is rejected."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armorm.objectives import DIRECTIONS, SCALE_MAPS, Objective, ObjectiveError, ObjectiveSet, parse_scale

finite = st.floats(-1e3, 1e3, allow_nan=False)


@pytest.mark.parametrize(
    ("low", "high", "formula", "inverse"),
    [
        (0, 4, lambda x: (x + 0.5) / 5, lambda r: 5 * r - 0.5),  # HelpSteer
        (1, 10, lambda x: (x - 0.5) / 10, lambda r: 10 * r + 0.5),  # UltraFeedback overall
        (1, 5, lambda x: (x - 0.5) / 5, lambda r: 5 * r + 0.5),
    ],
)
def test_bin_centre_maps_are_the_published_ones(low, high, formula, inverse):
    objective = Objective.rated("a-b", low, high, scale_map="bin_centre")
    for level in range(low, high + 1):
        assert objective.to_reward(level) == formula(level)
        assert objective.to_raw(formula(level)) == inverse(formula(level))


def test_bin_centres_of_helpsteer_and_ultrafeedback_have_the_published_values():
    helpsteer = Objective.rated("helpsteer-helpfulness", 0, 4, scale_map="bin_centre")
    assert helpsteer.to_reward(np.arange(5)) == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9], abs=1e-15)
    overall = Objective.rated("ultrafeedback-overall_score", 1, 10, scale_map="bin_centre")
    assert overall.to_reward(np.array([1, 10])) == pytest.approx([0.05, 0.95], abs=1e-15)


def test_min_max_puts_the_ends_of_the_range_at_zero_and_one():
    assert Objective.rated("a-b", 1, 5).to_reward(np.array([1, 2, 5])).tolist() == [0, 0.25, 1]
    assert Objective.rated("a-is_safe", 0, 1).to_reward(np.array([0, 1])).tolist() == [0, 1]


def test_direction_lower_flips_both_maps_and_neutral_flips_none():
    flipped = Objective.rated("a-harm", 1, 5, direction="lower")
    assert flipped.to_reward(np.array([1, 2, 5])).tolist() == [1, 0.75, 0]
    centred = Objective.rated("a-harm", 0, 4, direction="lower", scale_map="bin_centre")
    assert centred.to_reward(np.arange(5)) == pytest.approx([0.9, 0.7, 0.5, 0.3, 0.1])
    neutral = Objective.rated("a-length", 1, 5, direction="neutral")
    assert neutral.to_reward(np.array([1, 5])).tolist() == [0, 1]


@settings(deadline=None, max_examples=50)
@given(
    st.integers(-50, 50),
    st.integers(1, 100),
    st.sampled_from(DIRECTIONS),
    st.sampled_from(SCALE_MAPS),
    st.lists(finite),
)
def test_maps_round_trip_and_stay_in_the_unit_interval(low, width, direction, scale_map, values):
    objective = Objective.rated("a-b", low, low + width, direction=direction, scale_map=scale_map)
    raw = np.array(values, np.float64)
    assert objective.to_raw(objective.to_reward(raw)) == pytest.approx(raw, rel=1e-12, abs=1e-9)
    assert objective.to_reward(objective.to_raw(raw)) == pytest.approx(raw, rel=1e-12, abs=1e-9)
    levels = objective.to_reward(np.arange(low, low + width + 1))
    assert levels.min() >= -1e-12
    assert levels.max() <= 1 + 1e-12
    assert (np.diff(levels) < 0).all() if direction == "lower" else (np.diff(levels) > 0).all()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(finite, st.floats(0.1, 100)), min_size=1, max_size=5), st.integers(0, 4))
def test_a_set_maps_every_column_as_its_objective_does(ranges, n):
    objectives = ObjectiveSet(
        Objective.rated(f"s-{i}", low, low + width, direction=DIRECTIONS[i % 3])
        for i, (low, width) in enumerate(ranges)
    )
    values = np.random.default_rng(n).normal(size=(n, 2, len(ranges)))
    rewards, raw = objectives.to_reward(values), objectives.to_raw(values)
    for column, objective in enumerate(objectives):
        assert np.array_equal(rewards[..., column], objective.to_reward(values[..., column]))
        assert np.array_equal(raw[..., column], objective.to_raw(values[..., column]))


def test_missing_ratings_stay_missing_in_both_maps():
    objectives = ObjectiveSet([Objective.rated("a-b", 1, 5), Objective.rated("a-c", 0, 1, direction="lower")])
    ratings = np.array([[3, math.nan], [math.nan, 1]])
    assert np.isnan(objectives.to_reward(ratings)).tolist() == [[False, True], [True, False]]
    assert math.isnan(objectives[0].to_reward(math.nan))


def test_source_is_the_first_part_of_the_name_unless_given():
    assert Objective.rated("helpsteer-helpfulness", 0, 4).source == "helpsteer"
    assert Objective.rated("helpsteer-helpfulness", 0, 4, source="mine").source == "mine"


@pytest.mark.parametrize(
    ("arguments", "options", "found"),
    [
        (("", 0, 1), {}, "an objective has no name"),
        (("a", 1, 1), {}, "objective a: range 1.0..1.0, expected low < high"),
        (("a", 2, 1), {}, "range 2.0..1.0"),
        (("a", 2, 1), {"scale_map": "bin_centre"}, "range 2.0..1.0"),
        (("a", 0, math.inf), {}, "range 0.0..inf"),
        (("a", math.nan, 1), {}, "range nan..1.0"),
        (("a", 0, 1), {"direction": "up"}, "direction 'up', expected higher, lower or neutral"),
        (("a", 0, 1), {"scale_map": "log"}, "map 'log', expected min_max or bin_centre"),
        (("a", 0.5, 3), {"scale_map": "bin_centre"}, "range 0.5..3, expected whole numbers"),
    ],
)
def test_an_objective_that_makes_no_sense_is_refused(arguments, options, found):
    with pytest.raises(ObjectiveError) as caught:
        Objective.rated(*arguments, **options)
    assert found in str(caught.value)


@pytest.mark.parametrize(("scale", "offset"), [(0.0, 1.0), (math.inf, 0.0), (1.0, math.nan)])
def test_a_map_that_cannot_be_undone_is_refused(scale, offset):
    with pytest.raises(ObjectiveError, match=r"objective a: scale .* expected a finite map"):
        Objective("a", "s", 0.0, 1.0, scale, offset)


def test_objectives_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Objective.rated("a-b", 0, 1).low = 2


def test_a_set_keeps_its_order_and_finds_columns_by_name():
    objectives = ObjectiveSet([Objective.rated(name, 0, 1) for name in ("s-z", "s-a", "s-m")])
    assert objectives.names == ["s-z", "s-a", "s-m"]
    assert [objectives.position(name) for name in objectives.names] == [0, 1, 2]
    assert (len(objectives), objectives[1].name, [o.name for o in objectives[1:]]) == (3, "s-a", ["s-a", "s-m"])
    assert repr(objectives) == "ObjectiveSet(s-z, s-a, s-m)"


def test_an_unknown_objective_is_refused_with_the_nearest_right_name():
    objectives = ObjectiveSet([Objective.rated("truthfulqa-truthful", 0, 1), Objective.rated("s-b", 0, 1)])
    with pytest.raises(ObjectiveError) as caught:
        objectives.position("truthfulqa-truthfull")
    assert str(caught.value) == (
        "unknown objective 'truthfulqa-truthfull' (did you mean truthfulqa-truthful?); "
        "there are truthfulqa-truthful, s-b"
    )


def test_the_same_name_twice_is_refused():
    with pytest.raises(ObjectiveError, match=r"objectives named twice: s-a$"):
        ObjectiveSet([Objective.rated(name, 0, 1) for name in ("s-a", "s-b", "s-a")])


def test_sets_are_equal_when_their_objectives_and_order_are():
    first, second = Objective.rated("s-a", 0, 1), Objective.rated("s-b", 0, 1)
    assert ObjectiveSet([first, second]) == ObjectiveSet([first, second])
    assert hash(ObjectiveSet([first, second])) == hash(ObjectiveSet([first, second]))
    assert ObjectiveSet([first, second]) != ObjectiveSet([second, first])
    assert ObjectiveSet([first]) != [first]


def test_a_set_survives_a_config_file():
    objectives = ObjectiveSet(
        [
            Objective.rated("s-a", 1, 10, scale_map="bin_centre"),
            Objective.rated("s-b", 1, 5, direction="lower"),
            Objective("verbosity", "computed", 2.0, 6.5, 4.5, 2.0, "neutral", "response_length"),
        ]
    )
    assert ObjectiveSet.from_dicts(json.loads(json.dumps(objectives.to_dicts()))) == objectives


@pytest.mark.parametrize("entry", [{"name": "a"}, {"name": "a", "colour": "red"}, "a"])
def test_a_config_entry_that_is_no_objective_is_refused(entry):
    with pytest.raises(ObjectiveError, match="invalid objectives"):
        ObjectiveSet.from_dicts([entry])


def test_a_scale_on_the_command_line_is_a_column_a_range_and_perhaps_a_direction():
    assert parse_scale("helpful=1:5") == ("helpful", (1, 5, None))
    assert parse_scale("a=b=-0.5:1e2:lower") == ("a=b", (-0.5, 100, "lower"))
    for text in ("helpful", "=1:5", "x=5:1", "x=1:1", "x=1:nan", "x=a:b", "x=1:5:up", "x=1:5:lower:1"):
        with pytest.raises(ObjectiveError, match="expected COLUMN=LOW:HIGH"):
            parse_scale(text)
