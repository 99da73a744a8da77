"""Presets: of each public set, hand-written rows in its exact raw layout, in files as the hub has them, read by the
real loader from a folder that bears the set's name."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml

from armorm import Recipe
from armorm.data import hub
from armorm.data.preferences import read_preferences
from armorm.data.presets import NINETEEN, PREFERENCE_PRESETS, RATING_PRESETS, preference_preset, rating_preset
from armorm.data.ratings import RatedSet, read_ratings
from armorm.data.rows import Location
from armorm.errors import DataError, RecipeError
from armorm.training.plan import plan, preset_location
from armorm.training.sections import SetSection
from tests.conftest import chat

HELPSTEER = ["helpfulness", "correctness", "coherence", "complexity", "verbosity"]


def written(root: Path, hub_id: str, file: str, rows: list[dict], splits: dict[str, str] | None = None) -> Path:
    """The files of a set below its name, with the README that names its splits where the hub has one."""
    folder = root / hub_id
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    if file.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(lines) if file.endswith(".gz") else lines)
    if splits:
        files = [{"split": split, "path": place} for split, place in splits.items()]
        head = yaml.safe_dump({"configs": [{"config_name": "default", "data_files": files}]})
        (folder / "README.md").write_text(f"---\n{head}---\n")
    return folder


def annotation(rating: str, **more: str) -> dict:
    return {"Rating": rating, "Rationale": "It says so.", **more}


def completion(response: str, overall: float, ratings: list[str], model: str) -> dict:
    kinds = {"Type": ["1"], "Rationale For Rating": "Fine."}
    names = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    annotations = {name: annotation(rating, **kinds) for name, rating in zip(names, ratings, strict=True)}
    return {
        "annotations": annotations,
        "custom_system_prompt": "You are an AI assistant.",
        "model": model,
        "principle": "helpfulness",
        "response": response,
        "critique": "Good.",
        "fine-grained_score": 4.0,
        "overall_score": overall,
    }


# Of each rated preset: file, rows as published, splits, and the (prompt, response, ratings) they mean.
RATED = {
    "helpsteer": (
        "train.jsonl.gz",
        [{"prompt": "Name a colour.", "response": "Red.", **dict(zip(HELPSTEER, (4, 3, 4, 0, 1), strict=True))}],
        None,
        [(["Name a colour."], "Red.", (4, 3, 4, 0, 1))],
    ),
    "helpsteer2": (
        "train.jsonl.gz",
        [
            {"prompt": "c#", "response": "A language.", **dict(zip(HELPSTEER, (3, 4, 4, 2, 1), strict=True))},
            {
                "prompt": "Hi\n<extra_id_1>Assistant\nHello, how are you?\n<extra_id_1>User\nWell.\nAnd you?",
                "response": "Fine.",
                **dict(zip(HELPSTEER, (2, 2, 4, 1, 0), strict=True)),
            },
        ],
        None,
        [
            (["c#"], "A language.", (3, 4, 4, 2, 1)),
            (["Hi", "Hello, how are you?", "Well.\nAnd you?"], "Fine.", (2, 2, 4, 1, 0)),
        ],
    ),
    "ultrafeedback": (
        "evol_instruct.jsonl",
        [
            {
                "source": "evol_instruct",
                "instruction": "Add 2 and 3.",
                "models": ["alpaca-7b", "gpt-4", "bard"],
                "completions": [
                    completion("5", 8.5, ["5", "4", "5", "3"], "gpt-4"),
                    completion("6", 1.0, ["1", "N/A", "2", "1"], "alpaca-7b"),
                    completion("", 1.0, ["1", "1", "1", "1"], "bard"),
                ],
                "correct_answers": ["5"],
                "incorrect_answers": ["6"],
            }
        ],
        None,
        [(["Add 2 and 3."], "5", (8.5, 5, 5, 4, 3)), (["Add 2 and 3."], "6", (1, 1, 2, np.nan, 1))],
    ),
    "beavertails": (
        "round0/330k/train.jsonl.gz",
        [
            {"prompt": "p", "response": "r", "category": {"animal_abuse": False, "violence": True}, "is_safe": False},
            {"prompt": "q", "response": "s", "category": {"animal_abuse": False, "violence": False}, "is_safe": True},
        ],
        {"330k_train": "round0/330k/train.jsonl.gz"},
        [(["p"], "r", (0,)), (["q"], "s", (1,))],
    ),
    "code-ultrafeedback": (
        "data/train-00000-of-00001.parquet",
        [
            {
                "instruction": f"Sort a list, {preference}.",
                "preference": preference,
                "models": ["gpt-4", "wizard"],
                "responses": [{"model": "gpt-4", "response": "sorted(x)"}, {"model": "wizard", "response": "x.sort()"}],
                "annotations": [
                    {"model": "wizard", "rating": str(1 + place), "rationale": "So."},
                    {"model": "gpt-4", "rating": "N/A" if place else "5", "rationale": "So."},
                ],
            }
            for place, preference in enumerate(
                ("complexity", "style", "explanation", "instruction-following", "readability")
            )
        ],
        None,
        [(["Sort a list, complexity."], "x.sort()", (1, *[np.nan] * 4)), (["Sort a list, complexity."], "sorted(x)", (5, *[np.nan] * 4))]
        + [
            ([f"Sort a list, {name}."], "x.sort()", tuple(1 + i if i == j else np.nan for j in range(5)))
            for i, name in ((1, "style"), (2, "explanation"), (3, "instruction-following"), (4, "readability"))
        ],
    ),
    "feedback-collection": (
        "new_feedback_collection.json",
        [
            {
                "instruction": "###Task Description: ...",
                "output": "Feedback: good. [RESULT] 4",
                "input": "",
                "orig_instruction": "Write a poem.",
                "orig_response": "Roses are red.",
                "orig_reference_answer": "Better roses.",
                "orig_criteria": "Does it rhyme?",
                "orig_score1_description": "no",
                "orig_score2_description": "hardly",
                "orig_score3_description": "somewhat",
                "orig_score4_description": "well",
                "orig_score5_description": "fully",
                "orig_feedback": "good",
                "orig_score": "4",
            }
        ],
        None,
        [(["Write a poem."], "Roses are red.", (4,))],
    ),
    "capybara": (
        "data/train-00000-of-00001.parquet",
        [
            {
                "source": "Dove",
                "chosen": chat("a", "b", "c", "good"),
                "chosen_rating": 5,
                "chosen_model": "m",
                "rejected": chat("a", "b", "c", "bad"),
                "rejected_rating": 2,
                "rejected_model": "n",
            }
        ],
        None,
        [(["a", "b", "c"], "good", (5,)), (["a", "b", "c"], "bad", (2,))],
    ),
    "distilabel-math": (
        "data/train-00000-of-00001.parquet",
        [
            {
                "metadata": "{}",
                "instruction": "1+1?",
                "chosen_response": "2",
                "chosen_rating": 9.0,
                "rejected_response": "3",
                "rejected_rating": 4.5,
            }
        ],
        None,
        [(["1+1?"], "2", (9,)), (["1+1?"], "3", (4.5,))],
    ),
    "distilabel-orca": (
        "data/train-00000-of-00001.parquet",
        [
            {
                "system": system,
                "input": "Name a bird.",
                "chosen": "Robin.",
                "rejected": "Salmon.",
                "generations": ["Robin.", "Salmon."],
                "order": ["chosen", "rejected"],
                "labelling_model": "gpt-4-1106-preview",
                "rating": rating,
                "rationale": "One is a fish.",
                "status": "unchanged",
                "original_chosen": "Robin.",
                "original_rejected": "Salmon.",
                "chosen_score": 9.0,
                "in_gsm8k_train": False,
            }
            for system, rating in (("Be brief.", [9.0, 1.0]), ("", [7.0, 2.0]), ("", None))
        ],
        None,
        [
            (["Be brief.", "Name a bird."], "Robin.", (9,)),
            (["Be brief.", "Name a bird."], "Salmon.", (1,)),
            (["Name a bird."], "Robin.", (7,)),
            (["Name a bird."], "Salmon.", (2,)),
        ],
    ),
    "armorm": (
        "data/train-00000-of-00001.parquet",
        [
            {"dataset": "helpsteer", "messages": chat("h", "i"), **dict.fromkeys(NINETEEN)}
            | {f"helpsteer-{name}": value for name, value in zip(HELPSTEER, (0.9, 0.7, 0.5, 0.3, 0.1), strict=True)},
            {"dataset": "rest", "messages": chat("j", "k"), **dict.fromkeys(NINETEEN)}
            | {"ultrafeedback-overall_score": 0.95, "beavertails-is_safe": 1.0, "code-style": 0.9, "argilla-judge_lm": 0.05},
        ],
        None,
        [
            (["h"], "i", (4, 3, 2, 1, 0, *[np.nan] * 14)),
            (["j"], "k", (*[np.nan] * 5, 10, *[np.nan] * 4, 1, np.nan, np.nan, 1, np.nan, 5, *[np.nan] * 3)),
        ],
    ),
}  # fmt: skip

SCORED = {"rejected": chat("a", "bad"), "rejected_score": 1.0, "chosen_score": 4.0, "chosen": chat("a", "good")}
SAFE = {
    "prompt": "a",
    "response_0": "bad",
    "response_1": "good",
    "is_response_0_safe": False,
    "is_response_1_safe": True,
    "better_response_id": 0,
    "safer_response_id": 1,
}
GOOD = (["a"], "good", "bad", None)
# Of each preference preset: file, rows as published, splits, and the (prompt, chosen, rejected, margin) they mean.
PAIRED = {
    "ultrafeedback-binarized": (
        "data/train_prefs-00000-of-00001.parquet",
        [
            {
                "prompt": "a",
                "prompt_id": "0",
                "chosen": chat("a", "good"),
                "rejected": chat("a", "bad"),
                "messages": chat("a", "good"),
                "score_chosen": 8.5,
                "score_rejected": 7.0,
            }
        ],
        {"train_prefs": "data/train_prefs-*"},
        [(["a"], "good", "bad", 1.5)],
    ),
    "ultrafeedback-cleaned": (
        "data/train-00000-of-00001.parquet",
        [
            {
                "source": "evol_instruct",
                "prompt": "a",
                "chosen": chat("a", "good"),
                "chosen-rating": 5.0,
                "chosen-model": "m",
                "rejected": chat("a", "bad"),
                "rejected-rating": 4.5,
                "rejected-model": "n",
            }
        ],
        None,
        [(["a"], "good", "bad", 0.5)],
    ),
    "ultrafeedback-pairs": ("data/train-00000-of-00003.parquet", [SCORED], None, [(["a"], "good", "bad", 3)]),
    "helpsteer-pairs": ("data/train-00000-of-00001.parquet", [SCORED], None, [(["a"], "good", "bad", 3)]),
    "helpsteer2-pairs": (
        "preference/preference.jsonl.gz",
        [
            {
                "split": split,
                "prompt": "a",
                "response_1": first,
                "response_2": second,
                "preference_strength": strength,
                "preference_statement": "Better.",
                "preference_elaboration": "It is.",
            }
            for split, first, second, strength in (
                ("train", "good", "bad", -2),
                ("train", "bad", "good", 3),
                ("train", "one", "two", 0),
            )
        ],
        None,
        [(["a"], "good", "bad", 2), (["a"], "good", "bad", 3)],
    ),
    "shp": (
        "askbaking/train.json",
        [
            {"post_id": "x", "domain": "askbaking_train", "history": "a", "human_ref_A": first, "human_ref_B": second,
             "labels": label, "score_A": 5, "score_B": 2, "score_ratio": 2.5}
            for first, second, label in (("good", "bad", 1), ("bad", "good", 0))
        ],
        None,
        [GOOD, GOOD],
    ),
    "hh-rlhf": (
        "harmless-base/train.jsonl.gz",
        [{"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: good", "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: bad"}],
        None,
        [(["a", "b", "c"], "good", "bad", None)],
    ),
    "safe-rlhf": (
        "data/Alpaca-7B/train.jsonl",
        [SAFE | {"prompt_source": "x", "response_0_severity_level": 2, "response_0_sha256": "0"}],
        {"train": "data/Alpaca-7B/train.jsonl"},
        [GOOD],
    ),
    "safe-rlhf-helpful": ("data/Alpaca-7B/train.jsonl", [SAFE], {"train": "data/Alpaca-7B/train.jsonl"}, [(["a"], "bad", "good", None)]),
    "safe-rlhf-30k": ("round0/train.jsonl.gz", [SAFE], {"train": "round0/train.jsonl.gz"}, [GOOD]),
    "capybara-pairs": (RATED["capybara"][0], RATED["capybara"][1], None, [(["a", "b", "c"], "good", "bad", 3)]),
    "distilabel-math-pairs": (RATED["distilabel-math"][0], RATED["distilabel-math"][1], None, [(["1+1?"], "2", "3", None)]),
    "distilabel-orca-pairs": (
        RATED["distilabel-orca"][0],
        [RATED["distilabel-orca"][1][0], RATED["distilabel-orca"][1][1] | {"status": "tie"}],
        None,
        [(["Be brief.", "Name a bird."], "Robin.", "Salmon.", None)],
    ),
    "skywork-80k": ("data/train-00000-of-00001.parquet", [{"chosen": chat("a", "good"), "rejected": chat("a", "bad"), "source": "x"}], None, [GOOD]),
    "skywork-80k-v0.1": ("data/train-00000-of-00001.parquet", [{"chosen": chat("a", "good"), "rejected": chat("a", "bad"), "source": "x"}], None, [GOOD]),
    "armorm-pairs": ("data/train-00000-of-00002.parquet", [SCORED], None, [(["a"], "good", "bad", 3)]),
}  # fmt: skip


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
    for name in set(RATING_PRESETS) - {"armorm", "helpsteer2", "distilabel-math"}:
        of_sources |= {o.name: o for o in rating_preset(name).objectives(name, "bin_centre").values()}
    assert {name: (o.low, o.high, o.scale, o.direction) for name, o in of_sources.items()} == {
        o.name: (o.low, o.high, o.scale, o.direction) for o in merged
    }


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
    with pytest.raises(RecipeError, match="unknown preset 'shp'; it is one of preference pairs"):
        rating_preset("shp")
    with pytest.raises(RecipeError, match="unknown preset 'beavertails'; it is one of ratings"):
        preference_preset("beavertails")


def test_offline_one_line_says_what_is_missing_and_where_it_may_be_put(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_hub_answers", lambda: False)
    recipe = Recipe.from_text(
        f"data_root: {tmp_path}\nratings: [{{preset: helpsteer}}]\npreferences: [{{preset: shp}}]"
    )
    with pytest.raises(DataError) as caught:
        plan(recipe)
    assert str(caught.value) == (
        "nvidia/HelpSteer: the set is not in the cache of this machine and the hub cannot be reached; fetch it once with "
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
    data = plan(recipe)
    kept = [data.table.conversations[i].prompt[0].content for i in data.train_rows]
    assert kept == ["What is up with docs?", "2-2?"]
    assert [pair.chosen.prompt[-1].content for pair in data.pairs] == kept
    assert data.left_out == {
        "rated training rows whose prompt is evaluated on, written otherwise": 3,
        "training pairs whose prompt is evaluated on, written otherwise": 3,
    }
    assert data.benchmarks == [("rewardbench", "rewardbench", [str(tmp_path / "allenai/reward-bench")])]
