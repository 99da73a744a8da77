"""Rows: every kind of file gives the same rows with their numbers, and every fault its place."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from armorm.data.ratings import RatedSet, read_ratings
from armorm.data.rows import Row, line_rows
from armorm.data.sources import Location
from armorm.errors import DataError
from armorm.objectives import Objective
from tests.helpers.conversations import chat

ROWS = [
    {"messages": chat("a", "b"), "score": 4, "note": None},
    {"messages": chat("naïve 語 \u2028 🙂", "d"), "score": None, "note": "x"},
    {"messages": chat("e", "f", "g", "h"), "score": 2, "note": "y"},
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def refusal(path: Path | str, **options: str) -> DataError:
    with pytest.raises(DataError) as caught:
        list(Location.find(path, **options).rows())
    return caught.value


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def saved(path: Path, kind: str) -> Path:
    """The rows as a file or folder of that kind."""
    path = path / f"set.{kind}"
    if kind in ("jsonl", "ndjson"):
        path.write_bytes(LINES)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(LINES))
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=2))
    elif kind == "json.gz":
        path.write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        import datasets

        datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "jsonl.gz", "json", "json.gz", "parquet", "folder"])
def test_every_kind_of_file_gives_the_same_rows_with_their_numbers(tmp_path, kind):
    path = saved(tmp_path, kind)
    rows = list(Location.find(path).rows())
    assert [dict(row.values) for row in rows] == ROWS
    assert [(row.file, row.number) for row in rows] == [(str(path), 1), (str(path), 2), (str(path), 3)]


def test_a_saved_dictionary_of_sets_gives_its_training_split_unless_another_is_named(tmp_path):
    import datasets

    path = str(tmp_path / "sets")
    splits = {"test": datasets.Dataset.from_list(ROWS[:1]), "train": datasets.Dataset.from_list(ROWS[1:])}
    datasets.DatasetDict(splits).save_to_disk(path)
    assert [row.values["score"] for row in Location.find(path).rows()] == [None, 2]
    assert [row.values["score"] for row in Location.find(path, split="test").rows()] == [4]
    assert "found splits test, train, expected 'dev'" in str(refusal(path, split="dev"))


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path):
    path = written(tmp_path / "a.jsonl", b'{"a": 1}\r\n\n  \n{"a": 2}')
    assert [(row.number, row.values["a"]) for row in Location.find(path).rows()] == [(1, 1), (4, 2)]


def test_a_byte_order_mark_is_no_fault(tmp_path):
    path = written(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + LINES)
    assert [row.values for row in Location.find(path).rows()] == ROWS


@pytest.mark.parametrize(
    ("line", "field", "problem"),
    [
        (b'{"a": 1', "", "invalid JSON at column 8: Expecting ',' delimiter"),
        (b"{'a': 1}", "", "invalid JSON at column 2"),
        (b"nonsense", "", "invalid JSON at column 1"),
        (b'{"a": "\xe9"}', "", "found a byte that is not UTF-8 at position 7"),
        (b'{"a": 1, "b": 2, "a": 3}', "a", "the column occurs twice, expected each column once"),
        (b'{"m": [{"role": 1, "role": 2}]}', "role", "the column occurs twice"),
        (b"[1, 2]", "", "found [1, 2], expected a JSON object"),
        (b'"text"', "", "found 'text', expected a JSON object"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "", "JSON nested too deeply"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "", "found an integer of thousands of digits"),
    ],
)
def test_a_broken_line_is_refused_with_file_row_and_field(tmp_path, line, field, problem):
    path = written(tmp_path / "a.jsonl", b'{"a": 0}\n\n' + line + b'\n{"a": 4}\n')
    error = refusal(path)
    assert (error.file, error.row, error.field) == (str(path), 3, field)
    assert problem in error.problem
    assert str(error).startswith(f"{path}, row 3")


def test_reading_can_go_on_after_a_broken_line(tmp_path):
    path = written(tmp_path / "a.jsonl", b'{"a": 0}\nnonsense\n{"a": 2}\n[]\n')
    found = list(Location.find(path).rows_or_faults())
    assert [type(entry) for entry in found] == [Row, DataError, Row, DataError]
    assert [entry.number if isinstance(entry, Row) else entry.row for entry in found] == [1, 2, 3, 4]


def test_lines_of_any_stream_are_read_under_its_name():
    found = list(line_rows([b'{"a": 1}\n', b"{\n"], "standard input"))
    assert found[0] == Row("standard input", 1, {"a": 1})
    assert str(found[1]).startswith("standard input, row 2: invalid JSON")


def test_a_truncated_archive_is_refused_with_the_last_row_it_gives(tmp_path):
    # Random digits, so that the end of the archive is far from the last row it still gives.
    numbers = np.random.default_rng(0).integers(0, 10**12, 20_000).tolist()
    lines = "".join(f'{{"a": {number}}}\n' for number in numbers).encode()
    whole = gzip.compress(lines)
    path = written(tmp_path / "a.jsonl.gz", whole[: len(whole) // 2])
    read = []
    with pytest.raises(DataError) as caught:
        for row in Location.find(path).rows():
            read.append(row.values["a"])
    assert 0 < len(read) < len(numbers)
    assert read == numbers[: len(read)]
    assert str(caught.value).startswith(
        f"{path}, row {len(read)}: cannot be read beyond this row: Compressed file ended"
    )


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz"])
@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda whole: whole[:-10], "Compressed file ended"),
        (lambda whole: b"[1, 2]", "Not a gzipped file"),
        (lambda whole: whole[:-8] + bytes(8), "CRC check failed"),
        (lambda whole: whole[:10] + b"\xff" * 20, "invalid block type"),
    ],
)
def test_a_damaged_archive_is_refused_by_name(tmp_path, name, damage, problem):
    path = written(tmp_path / name, damage(gzip.compress(b'{"a": 1}\n')))
    error = refusal(path)
    assert str(error).startswith(str(path))
    assert "cannot be read" in str(error)
    assert problem in str(error)
    assert "row 0" not in str(error)


@pytest.mark.parametrize(
    ("text", "row", "field", "problem"),
    [
        (b'{"a": 1}', None, "", "found dict, expected a list of objects (or .jsonl: one object a line)"),
        (b'[{"a": 1}, 5]', 2, "", "found 5, expected an object"),
        (b'[{"a": 1},\n {"b": 2 "c": 3}]', None, "", "invalid JSON at line 2, column 10"),
        (b'[{"a": "\xff"}]', None, "", "found a byte that is not UTF-8 at position 8"),
        (b'[{"a": 1}, {"a": 1, "b": 1, "b": 2}]', 2, "b", "the column occurs twice"),
        (b'[{"a": 1}, {}, {"m": [{"role": 1}, {"role": 1, "role": 2}]}]', 3, "role", "the column occurs twice"),
        (b'{"a": 1, "a": 2}', None, "a", "the column occurs twice"),
    ],
)
def test_a_broken_json_array_is_refused_with_its_place(tmp_path, text, row, field, problem):
    path = written(tmp_path / "a.json", text)
    error = refusal(path)
    assert (error.file, error.row, error.field) == (str(path), row, field)
    assert problem in error.problem


def test_a_column_that_stands_twice_in_parquet_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    columns = [pyarrow.array([1]), pyarrow.array([2]), pyarrow.array([3])]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names=["score", "note", "score"]), path)
    assert str(refusal(path)) == f"{path}, field 'score': the column occurs twice, expected each column once"


def test_a_field_that_stands_twice_in_a_parquet_value_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    struct = pyarrow.StructArray.from_arrays([pyarrow.array(["x"]), pyarrow.array(["y"])], names=["role", "role"])
    pyarrow.parquet.write_table(pyarrow.table({"score": [1], "message": struct}), path)
    error = refusal(path)
    assert (error.file, error.row, error.field) == (str(path), 1, "message")


def test_parquet_text_that_is_not_utf8_is_refused_with_row_and_field(tmp_path):
    path = tmp_path / "a.parquet"
    offsets = np.array([0, 1, 2, 4], np.int32).tobytes()
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, [None, *map(pyarrow.py_buffer, (offsets, b"ab\xff\xfe"))])
    pyarrow.parquet.write_table(pyarrow.table({"score": [1, 2, 3], "response": text}), path)
    error = refusal(path)
    assert (error.file, error.row, error.field) == (str(path), 3, "response")
    assert "can't decode byte 0xff" in error.problem


def test_damaged_parquet_is_refused_by_name(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": list(range(100))}), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + b"\xff" * 26 + whole[30:])
    assert str(refusal(path)).startswith(f"{path}: cannot be read at all")
    path.write_bytes(whole[:-20])
    assert str(refusal(path)).startswith(f"{path}: cannot be read as Parquet")


def test_a_missing_file_is_refused_with_the_nearest_name_beside_it(tmp_path, monkeypatch):
    (tmp_path / "truthfulqa.jsonl.gz").touch()
    error = refusal(tmp_path / "truthfullqa.jsonl")
    assert str(error) == (
        f"{tmp_path}/truthfullqa.jsonl: no such file or folder (did you mean truthfulqa.jsonl.gz?); "
        f"looked for {tmp_path}/truthfullqa.jsonl"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as relative:
        Location.find("truth.jsonl")
    assert str(relative.value).endswith(f"; looked for {tmp_path}/truth.jsonl")
    with pytest.raises(DataError, match=r"^absent/a\.jsonl: no such file or folder; looked for .*/absent/a\.jsonl$"):
        Location.find("absent/a.jsonl", tmp_path)


@pytest.mark.parametrize(
    "name", ["/absent", "./absent", "~/absent-folder", "~nobody-by-that-name/a", "a" * 300, "a/b/c"]
)
def test_a_path_that_is_absent_is_never_taken_for_a_hub_id(name):
    with pytest.raises(DataError, match="no such file or folder"):
        Location.find(name)


def test_relative_paths_start_at_the_root_and_the_home_is_known(tmp_path, monkeypatch):
    written(tmp_path / "a.jsonl", LINES)
    assert Location.find("a.jsonl", tmp_path).path == tmp_path / "a.jsonl"
    assert Location.find(tmp_path / "a.jsonl", Path("/elsewhere")).path == tmp_path / "a.jsonl"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Location.find("~/a.jsonl").path == tmp_path / "a.jsonl"


def test_a_name_with_an_owner_is_a_hub_id_unless_there_is_such_a_path(tmp_path):
    options = {"subset": "s", "split": "train", "revision": "v1"}
    assert Location.find("nvidia/HelpSteer", tmp_path, **options) == Location("nvidia/HelpSteer", None, **options)
    (tmp_path / "nvidia").mkdir()
    written(tmp_path / "nvidia" / "HelpSteer", b"")
    assert Location.find("nvidia/HelpSteer", tmp_path).path == tmp_path / "nvidia" / "HelpSteer"


def test_a_file_of_another_type_is_refused_with_the_types_that_are_read(tmp_path):
    path = written(tmp_path / "a.xlsx", b"PK")
    assert str(refusal(path)).startswith(f"{path}: found a file of type '.xlsx', expected .jsonl, .jsonl.gz")
    assert str(refusal(path)).endswith("; save it as CSV (UTF-8)")


def test_a_model_is_not_taken_for_rows(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="is a model, expected rows; a model is named by --model"):
        list(Location.find(str(tmp_path)).rows())


def test_a_folder_that_no_set_was_saved_in_is_refused(tmp_path):
    error = refusal(tmp_path)
    assert str(error).startswith(f"{tmp_path}: cannot be read as a datasets folder")
    assert "\n" not in str(error)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read_is_refused_by_name(tmp_path):
    path = written(tmp_path / "a.jsonl", LINES)
    path.chmod(0)
    assert str(refusal(path)).startswith(f"{path}: cannot be read at all: ")


def test_a_hub_set_without_a_network_ends_in_one_clear_line(monkeypatch):
    import datasets
    import huggingface_hub

    # HF_HUB_OFFLINE is read on import; other tests may have imported them already.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    error = refusal("nobody-armorm/no-such-set")
    assert error.file == "nobody-armorm/no-such-set"
    assert str(error).startswith("nobody-armorm/no-such-set: the set is not in the local cache and the hub ")
    assert "put its files into a folder nobody-armorm/no-such-set below data_root" in str(error)
    assert "\n" not in str(error)


def test_filled_columns_of_a_row_are_those_that_hold_something():
    assert Row("a", 1, {"b": 0, "a": "", "c": None}).filled == ["a", "b"]


# --- tables ---------------------------------------------------------------------------------------

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
    assert [row.number for row in rows] == [1, 2]  # of the row, whatever lines it takes


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
        (b"", "found no header line"),
        (b"a,b,a\n1,2,3\n", "field 'a': the column occurs twice"),
        (b"a,b\n1,2\n1\n", "row 2: found 1 cells, expected 2"),
        (b"a,b\n1,\xff\n", "found a byte that is not UTF-8"),
        (b'a,b\n1,"2\n', "row 1: cannot be read as a table"),
    ],
)
def test_a_broken_table_is_refused_with_its_place(tmp_path, content, message):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(Location.find(path).rows())
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_a_file_in_a_wide_encoding_is_refused_by_its_name(tmp_path, name, encoding):
    text = "prompt,response\nHi,Yes\n" if name == "a.csv" else '{"prompt": "Hi", "response": "Yes"}\n'
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(DataError, match=encoding[:6].upper()):
        list(Location.find(tmp_path / name).rows())


def test_the_embedded_answers_are_read_by_name(tmp_path):
    rows = list(Location.find("plain-answers", tmp_path).rows())
    kinds = [row.values["kind"] for row in rows]
    # (The numbers that docs/own-objectives.md and recipes/small.yaml state.)
    assert len({row.values["prompt"] for row in rows}) == len(rows) == 247
    assert {kind: kinds.count(kind) for kind in kinds} == {"everyday": 82, "sounds dangerous": 165}
    rated = [row.values for row in Location.find("plain-replies", tmp_path).rows()]
    by_prompt: dict[str, list[int]] = {}
    for values in rated:
        by_prompt.setdefault(values["prompt"], []).append(values["plain-right"])
    assert len(by_prompt) == 235
    assert {tuple(ratings) for ratings in by_prompt.values()} <= {(0, 1), (1, 0)}
    assert not by_prompt.keys() & {row.values["prompt"] for row in rows}
    (tmp_path / "plain-answers").mkdir()
    assert Location.find("plain-answers", tmp_path).path == tmp_path / "plain-answers"
