"""Presets: of each public set, hand-written rows in its exact raw layout, in files as the hub has them, read by the
real loader from a folder that bears the set's name."""

from __future__ import annotations

import json

import numpy as np
import pytest

from armorm import Recipe
from armorm.data import hub
from armorm.data.preferences import read_preferences
from armorm.data.presets import PREFERENCE_PRESETS, RATING_PRESETS, preference_preset, rating_preset
from armorm.data.ratings import RatedSet, read_ratings
from armorm.data.sources import Location
from armorm.errors import DataError, RecipeError
from armorm.training.dataset import preset_location, read_training_data
from armorm.training.schema import SetSection
from tests.helpers.conversations import chat
from tests.helpers.raw_layouts import HELPSTEER, PAIRED, RATED, SAFE, written


def test_every_preset_has_rows_of_its_raw_layout_here():
    assert set(RATED) == set(RATING_PRESETS)
    assert set(PAIRED) == set(PREFERENCE_PRESETS)


@pytest.mark.parametrize("name", RATED)
def test_rated_rows_in_the_sets_own_layout_are_read_from_its_own_files(tmp_path, name):
    file, rows, splits, meant = RATED[name]
    preset = rating_preset(name)
    written(tmp_path, preset.hub_id, file, rows, splits)
    location = preset_location(preset, SetSection(), tmp_path)
    assert location.path == tmp_path / preset.hub_id
    table = read_ratings_of(location, name)
    found = [([turn.content for turn in c.prompt], c.response) for c in table.conversations]
    assert found == [(prompt, response) for prompt, response, _ in meant]
    np.testing.assert_array_equal(table.ratings, [ratings for _, _, ratings in meant])


def read_ratings_of(location: Location, name: str):
    preset = rating_preset(name)
    columns = preset.objectives(name, "bin_centre")
    rated = {
        column: objective
        for column, objective in columns.items()
        if any(row.values.get(column) is not None for row in location.rows())
    }
    table = read_ratings([RatedSet(location, rated, name)])
    for column, objective in columns.items():
        if column not in rated:
            table = table.with_column(objective, np.full(len(table), np.nan))
    order = [table.objectives.position(objective.name) for objective in columns.values()]
    table.ratings = table.ratings[:, order]
    return table


@pytest.mark.parametrize("name", PAIRED)
def test_pairs_in_the_sets_own_layout_are_read_from_its_own_files(tmp_path, name):
    file, rows, splits, meant = PAIRED[name]
    preset = preference_preset(name)
    written(tmp_path, preset.hub_id, file, rows, splits)
    pairs = read_preferences(preset_location(preset, SetSection(), tmp_path), name)
    found = [([t.content for t in p.chosen.prompt], p.chosen.response, p.rejected.response, p.margin) for p in pairs]
    assert found == meant


def test_the_nineteen_of_the_merged_set_and_of_its_sources_are_the_released_ones_with_their_maps():
    from armorm.model.released import from_released

    settings = {"model_type": "llama", "num_objectives": 19, "hidden_size": 8}
    released = from_released(settings | {"gating_temperature": 10, "gating_hidden_dim": 4, "gating_n_hidden": 1})[
        "objectives"
    ]
    merged = list(rating_preset("armorm").objectives("armorm", "bin_centre").values())
    assert [objective.name for objective in merged] == [entry["name"] for entry in released]
    for objective, entry in zip(merged, released, strict=True):
        assert (objective.scale, objective.offset) == (entry["scale"], entry["offset"]), objective.name
    of_sources = {}
    for name in set(RATING_PRESETS) - {"armorm"}:
        of_sources |= {o.name: o for o in rating_preset(name).objectives(name, "bin_centre").values()}
    for objective in merged:
        source = of_sources[objective.name]
        assert (source.low, source.high, source.scale, source.direction) == (
            objective.low, objective.high, objective.scale, objective.direction,
        ), objective.name  # fmt: skip


def test_objectives_of_different_presets_stay_apart():
    names = [o.name for name, p in RATING_PRESETS.items() if name != "armorm" for o in p.objectives(name).values()]
    assert len(set(names)) == len(names)


def test_a_rating_out_of_range_is_refused_by_set_row_and_field(tmp_path):
    row = RATED["helpsteer"][1][0] | {"verbosity": 5}
    written(tmp_path, "nvidia/HelpSteer", "train.jsonl.gz", [RATED["helpsteer"][1][0], row])
    columns = rating_preset("helpsteer").objectives("helpsteer")
    location = preset_location(rating_preset("helpsteer"), SetSection(), tmp_path)
    with pytest.raises(DataError, match=r"nvidia/HelpSteer, row 2, field 'verbosity': found 5, expected .* 0 to 4"):
        read_ratings([RatedSet(location, columns, "helpsteer")])


@pytest.mark.parametrize(
    ("preset", "row", "message"),
    [
        ("ultrafeedback", {"instruction": "x"}, "field 'completions': found columns"),
        ("ultrafeedback", {"instruction": "x", "completions": [{"response": "r"}]}, r"field 'completions\[0\]'"),
        ("feedback-collection", RATED["feedback-collection"][1][0] | {"orig_score": "four"}, "found 'four', expected a rating"),
        ("code-ultrafeedback", RATED["code-ultrafeedback"][1][0] | {"responses": []}, "expected one of"),
        ("shp", PAIRED["shp"][1][0] | {"labels": 2}, "field 'labels': found 2, expected 0 or 1"),
        ("safe-rlhf", SAFE | {"safer_response_id": 7}, "field 'safer_response_id': found 7"),
        ("helpsteer2-pairs", PAIRED["helpsteer2-pairs"][1][0] | {"preference_strength": 9}, "found 9, expected a whole"),
    ],
)  # fmt: skip
def test_a_row_of_another_layout_is_refused_by_its_field(tmp_path, preset, row, message):
    found = RATING_PRESETS.get(preset) or PREFERENCE_PRESETS[preset]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message):
        list(Location(str(path), path, layout=found.layout).rows())


def test_an_unknown_preset_is_refused_with_the_nearest_right_name():
    with pytest.raises(RecipeError, match=r"unknown preset 'helpster' \(did you mean helpsteer\?\)"):
        rating_preset("helpster")
    with pytest.raises(RecipeError, match="unknown preset 'shp'; it is a preset of preference pairs"):
        rating_preset("shp")
    with pytest.raises(RecipeError, match="unknown preset 'beavertails'; it is a preset of ratings"):
        preference_preset("beavertails")


def test_offline_one_line_says_what_is_missing_and_where_it_may_be_put(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    recipe = Recipe.from_text(
        f"data_root: {tmp_path}\nratings: [{{preset: helpsteer}}]\npreferences: [{{preset: shp}}]"
    )
    with pytest.raises(DataError) as caught:
        read_training_data(recipe)
    assert str(caught.value) == (
        "nvidia/HelpSteer: the set is not in the local cache and the hub cannot be reached; fetch it once with "
        "a connection, or put its files into a folder nvidia/HelpSteer below data_root"
    )


def test_presets_train_from_their_folders_and_prompts_of_a_benchmark_are_kept_out_however_they_are_written(tmp_path):
    ratings = dict(zip(HELPSTEER, (4, 3, 4, 0, 1), strict=True))
    prompts = ["What's  up, Doc?", "WHAT'S UP DOC", "What is up with docs?", "2+2?", "2-2?"]
    written(
        tmp_path,
        "nvidia/HelpSteer",
        "train.jsonl.gz",
        [{"prompt": p, "response": f"r{i}", **ratings} for i, p in enumerate(prompts)],
    )
    pairs = [{"chosen": [{"role": "system", "content": "Hey."}, *chat(p, "good")], "rejected": [{"role": "system", "content": "Hey."}, *chat(p, "bad")], "source": "x"} for p in prompts]  # fmt: skip
    written(tmp_path, "Skywork/Skywork-Reward-Preference-80K-v0.2", "data/train-00000-of-00001.parquet", pairs)
    bench = {"prompt": "What's up, doc?", "chosen": "c", "rejected": "r", "subset": "mt-bench-hard", "id": 1}
    written(tmp_path, "allenai/reward-bench", "data/filtered-00000-of-00001.parquet", [bench])
    (tmp_path / "mine.jsonl").write_text(json.dumps({"prompt": "2+2", "chosen": "4", "rejected": "5"}) + "\n")
    recipe = Recipe.from_text(
        f"data_root: {tmp_path}\ntest_share: 0\nratings: [{{preset: helpsteer}}]\npreferences: [{{preset: skywork-80k}}]\n"
        "evaluation: [{benchmark: rewardbench}]\nkeep_apart: [mine.jsonl]"
    )
    data = read_training_data(recipe)
    kept = [data.table.conversations[i].prompt[0].content for i in data.train_rows]
    assert kept == ["What is up with docs?", "2-2?"]
    assert [pair.chosen.prompt[-1].content for pair in data.pairs] == kept
    assert data.left_out == {
        "rated training rows whose prompt is evaluated on, written otherwise": 3,
        "training pairs whose prompt is evaluated on, written otherwise": 3,
    }
    assert data.benchmarks == [("rewardbench", "rewardbench", [str(tmp_path / "allenai/reward-bench")])]
