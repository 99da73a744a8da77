"""Tables: what spreadsheets write is read as rows with their line numbers, and every fault has its place."""

from __future__ import annotations

import gzip

import pytest

from armorm.data.ratings import RatedSet, rating_value, read_ratings
from armorm.data.rows import Row
from armorm.data.sources import Location
from armorm.errors import DataError
from armorm.objectives import Objective

CSV = 'prompt,response,score,safe\n"Hi, there","Hello.\nHow are you?",4,true\n\nBye,"She said ""no"".",,false\n'
MEANT = [("Hi, there", "Hello.\nHow are you?", 4, True), ("Bye", 'She said "no".', None, False)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", CSV.encode()),
        ("a.csv", b"\xef\xbb\xbf" + CSV.encode()),
        ("a.csv", CSV.replace("\n", "\r\n").encode()),
        ("a.csv.gz", gzip.compress(CSV.encode())),
        ("a.csv", CSV.replace("there", "THERE").replace(",", ";").replace("Hi; THERE", "Hi, there").encode()),
        ("a.tsv", CSV.replace(",", "\t").replace("Hi\t there", "Hi, there").encode()),
    ],
)
def test_a_table_is_read_whatever_its_separator_line_ends_and_packing(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    rows = list(Location.find(path).rows())
    found = [
        (r.values["prompt"], r.values["response"].replace("\r\n", "\n"), r.value("score"), r.value("safe"))
        for r in rows
    ]
    assert found == MEANT
    assert [row.number for row in rows] == [2, 5]


def test_only_a_table_has_numbers_in_its_text():
    objective = Objective.rated("a", 1, 5)
    assert rating_value(Row("f", 1, {"a": " 4 "}, textual=True), "a", objective) == 4
    with pytest.raises(DataError, match="found '4', expected a number"):
        rating_value(Row("f", 1, {"a": "4"}), "a", objective)
    with pytest.raises(DataError, match="found 'four', expected a number"):
        rating_value(Row("f", 1, {"a": "four"}, textual=True), "a", objective)


def test_a_response_that_is_a_number_stays_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,response,score\n2+2?,4,1\n")
    table = read_ratings([RatedSet(Location.find(path), {"score": Objective.rated("score", 0, 1)}, "a")])
    assert table.conversations[0].response == "4"


def test_messages_in_a_cell_are_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('messages,score\n"[{""role"": ""user"", ""content"": ""a""}]",1\n"[{not json",2\n')
    assert [row.values["messages"] for row in Location.find(path).rows()] == [
        [{"role": "user", "content": "a"}],
        "[{not json",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "row 1: found no header line"),
        (b"a,b,a\n1,2,3\n", "field 'a': the column occurs twice"),
        (b"a,b\n1,2\n1\n", "row 3: found 1 cells, expected 2"),
        (b"a,b\n1,\xff\n", "found a byte that is not UTF-8"),
        (b'a,b\n1,"2\n', "row 2: cannot be read as a table"),
    ],
)
def test_a_broken_table_is_refused_with_its_place(tmp_path, content, message):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(Location.find(path).rows())
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
