from __future__ import annotations

import json

import pytest

from armorm.data.sources import Location
from armorm.errors import DataError, RecipeError
from armorm.training.dataset import read_training_data
from armorm.training.recipe import Recipe


def rated(prompt: str, response: str, split: str | None = None, **ratings) -> dict:
    row = {"prompt": prompt, "response": response, **ratings}
    return row | ({"split": split} if split else {})


def preferred(prompt: str, split: str | None = None) -> dict:
    row = {"prompt": prompt, "chosen": "yes, gladly", "rejected": "no"}
    return row | ({"split": split} if split else {})


@pytest.fixture
def folder(tmp_path):
    """Rated rows and pairs with splits of their own, and rows without."""

    def write(name: str, rows: list[dict]) -> None:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(
        "split.jsonl",
        [rated(f"train {i}", "a", "train", quality=i % 5) for i in range(20)]
        + [rated(f"test {i}", "a", "test", quality=i % 5) for i in range(6)]
        + [rated("other", "a", "validation", quality=1)],
    )
    write("whole.jsonl", [rated(f"whole {i}", reply, score=i % 2) for i in range(200) for reply in ("a", "b")])
    write("pairs.jsonl", [preferred(f"train {i}", "train") for i in range(10)] + [preferred("test 0", "train")])
    write("bench.jsonl", [preferred("train 0"), preferred("bench 1")])
    return tmp_path


def recipe(folder, text: str) -> Recipe:
    return Recipe.from_text(f"data_root: {folder}\n{text}")


BASE = """
ratings:
  - {data: split.jsonl, objectives: {quality: [0, 4]}}
  - {data: whole.jsonl, objectives: {score: [0, 1]}}
preferences:
  - {data: pairs.jsonl}
"""


def test_rows_go_where_their_split_says_and_others_by_prompt(folder):
    data = read_training_data(recipe(folder, BASE))
    table = data.table
    by_split = {split: sum(table.splits[i] == split for i in data.train_rows) for split in ("train", "test", "other")}
    assert by_split == {"train": 20, "test": 0, "other": 0}
    assert sum(table.splits[i] == "test" for i in data.test_rows) == 6
    assert data.left_out["rated rows of other splits"] == 1
    train_prompts = {table.conversations[i].prompt_key for i in data.train_rows}
    test_prompts = {table.conversations[i].prompt_key for i in data.test_rows}
    assert not train_prompts & test_prompts
    held_out = sum(table.sources[i] == "whole" for i in data.test_rows)
    assert held_out % 2 == 0
    assert 0.02 * 400 < held_out < 0.2 * 400


def test_no_prompt_that_is_evaluated_on_is_trained_on(folder):
    data = read_training_data(recipe(folder, BASE + "evaluation:\n  - {benchmark: pairs, data: bench.jsonl}\n"))
    evaluated = {pair.prompt_key for pairs in data.evaluations.values() for pair in pairs}
    evaluated |= {data.table.conversations[i].prompt_key for i in data.test_rows}
    trained = {data.table.conversations[i].prompt_key for i in data.train_rows} | {
        pair.prompt_key for pair in data.pairs
    }
    assert evaluated
    assert not evaluated & trained
    assert data.left_out["rated training rows whose prompt is evaluated on"] == 1  # `train 0` of the benchmark
    assert data.left_out["training pairs whose prompt is evaluated on"] == 2  # `train 0` and `test 0`


@pytest.mark.parametrize("empty", ["chosen", "rejected"])
def test_a_benchmark_prompt_with_an_empty_response_is_not_trained_on(folder, empty):
    rows = [preferred(f"train {i}") | {"subset": "alpacaeval-easy", "id": i} for i in range(4)]
    rows[1][empty] = ""
    (folder / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = read_training_data(recipe(folder, BASE + "evaluation:\n  - {benchmark: rewardbench, data: bench.jsonl}\n"))
    assert data.left_out["rated training rows whose prompt is evaluated on"] == 4
    assert data.left_out["training pairs whose prompt is evaluated on"] == 4 + 1  # `test 0` as well


def test_a_test_share_of_zero_holds_nothing_out(folder):
    data = read_training_data(recipe(folder, BASE + "test_share: 0\n"))
    assert not any(data.table.sources[i] == "whole" for i in data.test_rows)


def test_pairs_from_ratings_stay_within_a_prompt_and_are_capped(folder):
    rows = [rated(f"many {i}", f"reply {j}", "train", quality=j % 5) for i in range(3) for j in range(10)]
    (folder / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = """
ratings:
  - {data: many.jsonl, objectives: {quality: [0, 4]}}
preferences:
  - {from_ratings: many-quality, margin: 2, max_pairs_per_prompt: 5}
"""
    data = read_training_data(recipe(folder, text))
    assert len(data.pairs) == 15
    assert all(pair.margin is not None and pair.margin >= 2 for pair in data.pairs)
    assert data.left_out["training pairs over the cap of their prompt"] == 3 * (4 * (3 + 2 + 1) - 5)


def test_pairs_from_ratings_of_other_splits_are_counted_with_and_without_a_cap(folder):
    splits = ("train", "test", "validation")
    rows = [rated(split, f"reply {j}", split, quality=j % 5) for split in splits for j in range(10)]
    (folder / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = """
ratings:
  - {data: many.jsonl, objectives: {quality: [0, 4]}}
preferences:
  - {from_ratings: many-quality, margin: 2}
"""
    whole = read_training_data(recipe(folder, text))
    capped = read_training_data(recipe(folder, text.replace("margin: 2", "margin: 2, max_pairs_per_prompt: 5")))
    assert (len(whole.pairs), len(whole.test_pairs)) == (24, 24)
    assert (len(capped.pairs), len(capped.test_pairs)) == (5, 5)
    assert whole.left_out["pairs of other splits"] == capped.left_out["pairs of other splits"] == 24
    assert capped.left_out["training pairs over the cap of their prompt"] == 24 - 5


def test_twice_the_same_response_is_left_out_of_training_and_counted(folder):
    row = {"prompt": "train 1", "chosen": "same", "rejected": "same", "split": "train"}
    with open(folder / "pairs.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    data = read_training_data(recipe(folder, BASE))
    assert data.left_out["training pairs of twice the same response"] == 1
    assert not any(pair.is_tie for pair in data.pairs)


def test_a_missing_file_is_refused_by_its_place_in_the_recipe(folder):
    with pytest.raises(RecipeError, match=r"preferences\.0\.data: absent\.jsonl: no such file"):
        read_training_data(recipe(folder, BASE.replace("pairs.jsonl", "absent.jsonl")))
    with pytest.raises(RecipeError, match=r"evaluation\.1\.data: gone\.jsonl: no such file"):
        read_training_data(
            recipe(folder, BASE + "evaluation:\n  - {benchmark: ratings}\n  - {benchmark: pairs, data: gone.jsonl}\n")
        )


def test_unknown_objectives_are_refused_with_the_nearest_right_one(folder):
    with pytest.raises(RecipeError, match=r"preferences\.1\.from_ratings: .*did you mean split-quality\?"):
        read_training_data(recipe(folder, BASE + "  - {from_ratings: split-qualty, margin: 1}\n"))
    with pytest.raises(RecipeError, match=r"debias\.against\.0: .*did you mean verbosity\?"):
        with_computed = BASE.replace("preferences:", "  - {compute: response_length, name: verbosity}\npreferences:")
        read_training_data(recipe(folder, with_computed + "debias: {against: [verbostiy]}\n"))
    with pytest.raises(RecipeError, match=r"ratings\.2\.compute: unknown measure 'length'"):
        read_training_data(recipe(folder, BASE.replace("preferences:", "  - {compute: length}\npreferences:")))


def test_pairs_have_the_weight_of_their_set(folder):
    text = """
ratings:
  - {data: two.jsonl, objectives: {score: [0, 1]}}
preferences:
  - {preset: hh-rlhf, weight: 2}
  - {from_ratings: two-score, margin: 1, source: ours, weak: true}
  - {data: pairs.jsonl, weight: 0.5}
"""
    rows = [rated("Name a tree.", reply, "train", score=score) for score, reply in enumerate(("Cod", "Oak"))]
    (folder / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    repository = folder / "Anthropic" / "hh-rlhf"
    repository.mkdir(parents=True)
    dialogue = "\n\nHuman: Name a fish.\n\nAssistant: "
    (repository / "train.jsonl").write_text(
        json.dumps({"chosen": f"{dialogue}Cod.", "rejected": f"{dialogue}Oak."}) + "\n"
    )
    data = read_training_data(recipe(folder, text))
    found = {(pair.source, pair.weight, pair.weak) for pair in (*data.pairs, *data.test_pairs)}
    assert found == {("hh-rlhf", 2.0, False), ("ours", 1.0, True), ("pairs", 0.5, False)}
    weak = text.replace("weight: 2", "weak: true").replace("weight: 0.5", "weak: true")
    with pytest.raises(RecipeError, match=r"preferences: every set is weak, expected at least one"):
        recipe(folder, weak)


def test_weights_of_sets_have_one_place(folder):
    with pytest.raises(RecipeError, match=r"gating: source_weights is now the key weight of each entry of preferences"):
        recipe(folder, BASE + "gating: {source_weights: {pairs: 4}}\n")
    assert recipe(folder, BASE + "gating: {source_weights: {}}\n").gating == recipe(folder, BASE).gating


def test_objectives_defined_twice_are_refused(folder):
    with pytest.raises(RecipeError, match="'split-quality' is defined twice"):
        read_training_data(
            recipe(
                folder,
                BASE.replace("preferences:", "  - {compute: response_length, name: split-quality}\npreferences:"),
            )
        )


def test_a_benchmark_without_test_rows_is_refused(folder):
    (folder / "train_only.jsonl").write_text(json.dumps(preferred("x", "train")) + "\n")
    with pytest.raises(DataError, match=r"train_only\.jsonl, field 'split': no row has split 'test'"):
        read_training_data(recipe(folder, BASE + "evaluation:\n  - {benchmark: pairs, data: train_only.jsonl}\n"))


def test_a_limit_keeps_whole_prompts(folder):
    data = read_training_data(recipe(folder, BASE + "limit: 11\n"))
    rows = [
        c.prompt_key
        for c, source in zip(data.table.conversations, data.table.sources, strict=True)
        if source == "whole"
    ]
    assert len(rows) == 12
    assert all(rows.count(key) == 2 for key in rows)


def test_only_computed_objectives_are_not_enough(folder):
    text = "ratings:\n  - {compute: response_length}\npreferences:\n  - {data: pairs.jsonl}\n"
    with pytest.raises(RecipeError, match="without one, expected a construct, or a computed objective and one"):
        read_training_data(recipe(folder, text))


def test_a_relative_path_out_of_data_root_is_read_with_a_notice_and_an_absolute_one_without(tmp_path, capsys):
    inside, outside = tmp_path / "root" / "a.jsonl", tmp_path / "b.jsonl"
    for path in (inside, outside):
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"prompt": "p", "response": "r"}\n')
    root = tmp_path / "root"
    for name in ("a.jsonl", "../root/a.jsonl", str(outside)):
        Location.find(name, root)
    assert capsys.readouterr().err == ""
    for _ in range(2):
        Location.find("../b.jsonl", root)
    assert capsys.readouterr().err == f"notice: ../b.jsonl is outside data_root {root}: reading {outside}\n"
