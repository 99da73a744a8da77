"""Examples and sources: addressed by content, read from wherever they are."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from armorm.conversation import Conversation
from armorm.data.sources import HubSet, find_sources
from armorm.errors import DataError
from armorm.evaluation.examples import Item, LabelledPairs, fingerprint, make_example, numbered
from tests.helpers.marked_scorer import FIXTURES, evaluated, values


def pair(prompt="a", chosen="b", rejected="c", **options):
    builds = [lambda: Conversation.from_prompt(prompt, chosen), lambda: Conversation.from_prompt(prompt, rejected)]
    return make_example(builds, (1, 0), **options)


def test_a_key_is_made_of_content_labels_and_subset():
    key = pair().item.key
    assert pair(id="other", origin=("file", 7)).item.key == key
    others = [pair(prompt="x"), pair(chosen="x"), pair(rejected="x"), pair(subset="x"), pair(chosen="c", rejected="b")]
    assert len({key, *(example.item.key for example in others)}) == 6


def test_repeated_examples_are_numbered_and_the_fingerprint_knows_no_order():
    examples = numbered([pair(), pair(chosen="x"), pair()])
    keys = [example.item.key for example in examples]
    assert keys[2] == f"{keys[0]}-2"
    items = [example.item for example in examples]
    assert fingerprint(items) == fingerprint(items[::-1]) != fingerprint(items[:2])


def test_a_refused_response_leaves_the_others_and_the_prompt():
    example = pair(rejected=" ")
    assert example.conversations[1] is None
    assert example.item.prompt == pair().item.prompt
    assert [position for position, _ in example.faults] == [1]


def test_pairs_are_of_different_labels_only():
    item = Item("k", "", "", "p", (1.0, 0.0, 1.0, 0.0))
    pairs = LabelledPairs.of([item], [np.array([10, 11, -1, 13])])
    assert list(zip(pairs.better.tolist(), pairs.worse.tolist(), strict=True)) == [
        (10, 11),
        (10, 13),
        (-1, 11),
        (-1, 13),
    ]
    assert pairs.weight.tolist() == [0.25] * 4
    assert Item.from_dict(json.loads(json.dumps(item.to_dict()))) == item


def test_a_folder_a_file_and_a_saved_set_hold_the_same_rows(tmp_path):
    import datasets

    rows = [json.loads(line) for line in (FIXTURES / "rewardbench.jsonl").read_text().splitlines()]
    data = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"raw": data.select([0]), "filtered": data}).save_to_disk(tmp_path / "saved")
    snapshot = tmp_path / "snapshot" / "data"
    snapshot.mkdir(parents=True)
    data.to_parquet(snapshot / "filtered-00000-of-00001.parquet")
    data.select([0]).to_parquet(snapshot / "raw-00000-of-00001.parquet")
    expected = evaluated("rewardbench", "rewardbench.jsonl")
    for place in (tmp_path / "saved", tmp_path / "snapshot"):
        results = evaluated("rewardbench", place)
        assert results.data["fingerprint"] == expected.data["fingerprint"]
        assert values(results, "sections") == values(expected, "sections")


def test_hub_sets_come_with_the_splits_that_count():
    published = [HubSet("owner/bench", ("gpt", "claude"))]
    assert [(s.location.name, s.location.split, s.name) for s in find_sources([], published)] == [
        ("owner/bench", "gpt", "gpt"),
        ("owner/bench", "claude", "claude"),
    ]
    (other,) = find_sources(["owner/other"], published)
    assert (other.location.split, other.name) == (None, "other")
    (given,) = find_sources(["owner/bench"], published, split="raw")
    assert given.location.split == "raw"
    assert [s.name for s in find_sources(["owner/prior"], published, [HubSet("owner/prior", ("shp",))])] == ["shp"]


def test_of_a_saved_set_the_test_split_is_evaluated_unless_another_is_named(tmp_path):
    import datasets

    rows = [{"prompt": f"q{i}", "chosen": f"a <{i}>", "rejected": "b <1>"} for i in range(4)]
    parts = {"train": datasets.Dataset.from_list(rows[:1]), "test": datasets.Dataset.from_list(rows[1:])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert values(evaluated("pairs", tmp_path / "saved"), "overall") == {"accuracy": pytest.approx(2 / 3)}
    assert values(evaluated("pairs", tmp_path / "saved", split="train"), "overall") == {"accuracy": 0}


def test_a_folder_without_data_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(DataError, match="no data files"):
        find_sources([tmp_path])


def test_a_row_of_two_prompts_is_an_error_and_not_a_loss(tmp_path):
    sides = [[{"role": "user", "content": q}, {"role": "assistant", "content": "x <1>"}] for q in "ab"]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"chosen": sides[0], "rejected": sides[1]}) + "\n")
    with pytest.raises(DataError, match=r"row 1.*different prompts"):
        evaluated("pairs", path)


def test_a_set_of_refused_rows_only_is_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "chosen": "", "rejected": ""}\n')
    with pytest.raises(DataError, match="no row can be scored"):
        evaluated("pairs", path)


def test_several_files_of_pairs_are_subsets_by_name(tmp_path):
    for name in ("one", "two"):
        lines = [
            {key: value for key, value in json.loads(line).items() if key != "subset"}
            for line in (FIXTURES / "pairs.jsonl").read_text().splitlines()
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert values(evaluated("pairs", tmp_path), "subsets") == pytest.approx({"one": 0.4, "two": 0.4})
    shutil.rmtree(tmp_path)
