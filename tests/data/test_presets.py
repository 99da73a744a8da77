"""Presets: hub names, columns and scales as FIELD.md gives them, and rows that fit them."""

from __future__ import annotations

import numpy as np
import pytest

from armorm.data.presets import RATING_PRESETS, rating_preset
from armorm.data.ratings import RatedSet, read_ratings
from armorm.data.rows import Location
from armorm.errors import DataError, RecipeError
from tests.data.writing import write_rows

HELPSTEER = ["helpfulness", "correctness", "coherence", "complexity", "verbosity"]


@pytest.mark.parametrize(
    ("name", "hub_id", "split", "columns"),
    [
        ("helpsteer", "nvidia/HelpSteer", "train", dict.fromkeys(HELPSTEER, (0, 4))),
        ("helpsteer2", "nvidia/HelpSteer2", "train", dict.fromkeys(HELPSTEER, (0, 4))),
        ("beavertails", "PKU-Alignment/BeaverTails", "330k_train", {"is_safe": (0, 1)}),
    ],
)
def test_a_preset_names_the_published_set_with_its_columns_and_scales(name, hub_id, split, columns):
    preset = rating_preset(name)
    assert (preset.hub_id, preset.split, dict(preset.columns)) == (hub_id, split, columns)
    assert list(preset.columns) == list(columns)
    assert preset.licence


def test_every_preset_is_a_hub_id_and_makes_objectives_of_its_own(tmp_path):
    names = []
    for name, preset in RATING_PRESETS.items():
        assert Location.find(preset.hub_id, tmp_path).path is None
        names += [objective.name for objective in preset.objectives(name).values()]
    assert len(set(names)) == len(names)


def test_rows_of_a_preset_are_read_on_its_scale(tmp_path):
    columns = rating_preset("helpsteer").objectives("helpsteer")
    row = {"prompt": "a", "response": "b"} | {column: i for i, column in enumerate(HELPSTEER)}
    table = read_ratings([RatedSet(write_rows(tmp_path / "a.jsonl", row), columns, "helpsteer")])
    assert table.objectives.names == [f"helpsteer-{column}" for column in HELPSTEER]
    assert np.array_equal(table.objectives.to_reward(table.ratings), [[0, 0.25, 0.5, 0.75, 1]])
    with pytest.raises(DataError, match="field 'verbosity': found 5, expected a number from 0 to 4"):
        read_ratings([RatedSet(write_rows(tmp_path / "b.jsonl", row | {"verbosity": 5}), columns, "helpsteer")])


def test_an_unknown_preset_is_refused_with_the_nearest_right_name():
    with pytest.raises(RecipeError) as caught:
        rating_preset("helpster")
    assert "unknown preset 'helpster' (did you mean helpsteer?)" in str(caught.value)
    assert "beavertails" in str(caught.value)


def test_more_verbosity_is_not_better():
    directions = {c: objective.direction for c, objective in rating_preset("helpsteer").objectives("x").items()}
    assert directions.pop("verbosity") == "neutral"
    assert set(directions.values()) == {"higher"}
