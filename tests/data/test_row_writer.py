"""Rows are written in the format of the suffix, and read back as they were."""

from __future__ import annotations

import json

import pytest

from armorm.data.row_writer import row_writer
from armorm.data.sources import Location
from tests.helpers.conversations import chat

ROWS = [
    {"row": 1, "score": 0.5, "rewards": {"help": 0.25}, "messages": chat('a, "b"', "c\nd"), "note": "é"},
    {"row": 2, "score": -1.0, "rewards": {"help": None}, "messages": chat("e", "f"), "id": 7},
]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.parquet"])
def test_a_table_has_a_column_for_each_number_and_reads_back(tmp_path, name):
    with row_writer(tmp_path / name) as write:
        for row in ROWS:
            write(row)
    found = list(Location.find(tmp_path / name).rows())
    for row, given in zip(found, ROWS, strict=True):
        assert (row.value("row"), row.value("score")) == (given["row"], given["score"])
        assert row.value("rewards.help") == given["rewards"]["help"]
        assert row.conversation().to_list() == given["messages"]
        assert (row.values["note"], row.value("id")) == (given.get("note"), given.get("id"))


def test_other_suffixes_get_json_lines(tmp_path):
    for name in ("a.jsonl", "a.txt"):
        with row_writer(tmp_path / name) as write:
            write(ROWS[0])
        assert json.loads((tmp_path / name).read_text()) == ROWS[0]


def test_values_of_several_types_are_text_in_parquet(tmp_path):
    with row_writer(tmp_path / "a.parquet") as write:
        write({"x": 1})
        write({"x": "one"})
    assert [row.values["x"] for row in Location.find(tmp_path / "a.parquet").rows()] == ["1", "one"]


def test_nothing_is_written_if_the_work_fails(tmp_path):
    for name in ("a.csv", "a.parquet", "a.jsonl"):
        with pytest.raises(RuntimeError), row_writer(tmp_path / name) as write:
            write(ROWS[0])
            raise RuntimeError
    assert not list(tmp_path.iterdir())
