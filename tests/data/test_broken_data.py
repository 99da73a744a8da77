"""Whatever a data file holds, in any format: rows, or one line of words for the file or the row."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from armorm.data.preferences import preference_pair, row_conversations
from armorm.data.ratings import RatedSet, read_ratings
from armorm.data.rejections import Rejections
from armorm.data.sources import Location
from armorm.errors import ArmormError
from armorm.objectives import Objective
from tests.helpers.commands import run
from tests.helpers.conversations import chat
from tests.helpers.examples import examples
from tests.helpers.small_models import reward_model

FORMATS = ["jsonl", "jsonl.gz", "json", "json.gz", "csv", "csv.gz", "tsv", "parquet"]
ROWS = [
    {"messages": chat("Hi", "Yes."), "score": 4, "split": "train"},
    {"prompt": "Hi", "chosen": "Yes.", "rejected": "No.", "strength": 2},
    {"prompt": "Hi", "response": "Yes.", "score": 2.5, "id": "a"},
    {"prompt": "Hi", "responses": ["Yes.", "No."], "scores": [1, 2]},
]
COLUMNS = sorted({column for row in ROWS for column in row} | {"text", "system", "conversations", "label", ""})
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**25), 10**25),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "\x00", "\ud800", "\x1b[2J", "NaN", "1e999", "9" * 5000, "a\r\nb", '"', "[{", "Human: a\n\nAssistant:"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "type", "text", "tool_calls"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
options = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


def table(rows: list[dict[str, Any]], separator: str) -> bytes:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator)
    writer.writerow(columns)
    writer.writerows(
        [cell if isinstance(cell, str) else json.dumps(cell) for cell in map(row.get, columns)] for row in rows
    )
    return text.getvalue().encode("utf-8", "surrogatepass")  # fmt: skip


def parquet(rows: list[dict[str, Any]]) -> bytes:
    """Values that no column of Parquet can hold are text in it."""
    columns: dict[str, Any] = {}
    for column in dict.fromkeys(column for row in rows for column in row):
        cells = [row.get(column) for row in rows]
        try:
            columns[column] = pyarrow.array(cells)
            pyarrow.parquet.write_table(pyarrow.table({column: columns[column]}), io.BytesIO())
        except (pyarrow.ArrowException, OverflowError, UnicodeError):
            columns[column] = pyarrow.array([json.dumps(cell) for cell in cells])
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def content(kind: str, rows: list[dict[str, Any]]) -> bytes:
    if kind.endswith(".gz"):
        return gzip.compress(content(kind[:-3], rows))
    if kind == "parquet":
        return parquet(rows)
    if kind in ("csv", "tsv"):
        return table(rows, {"csv": ",", "tsv": "\t"}[kind])
    return (json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows)).encode()


def broken_file(draw: st.DataObject, kind: str, path: Path) -> None:
    """Valid rows with other values in one of them; then perhaps with other bytes, or an end too early."""
    rows = [dict(row) for row in draw.draw(st.lists(st.sampled_from(ROWS), min_size=1, max_size=3), "rows")]
    row = draw.draw(st.sampled_from(rows), "row")
    row.update(draw.draw(st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=3), "other values"))
    found = bytearray(content(kind, rows))
    place = draw.draw(st.integers(0, len(found) - 1), "place")
    fault = draw.draw(st.sampled_from(["none", "none", "bytes", "end"]), "fault")
    if fault == "bytes":
        found[place : place + 1] = draw.draw(st.binary(max_size=4), "bytes")
    elif fault == "end":
        del found[place:]
    path.write_bytes(found)


def one_line(error: ArmormError) -> None:
    assert str(error)
    assert str(error).isprintable(), repr(str(error))


def attempt(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except ArmormError as error:
        one_line(error)
        return None


def read_all(path: Path) -> None:
    """Read the file as everything that it could be."""
    for row in attempt(lambda: list(Location.find(path).rows_or_faults())) or []:
        if isinstance(row, ArmormError):
            one_line(row)
            continue
        for read in (row.conversation, lambda row=row: row_conversations(row), lambda row=row: preference_pair(row)):
            attempt(read)
    objective = {"score": Objective.rated("s-score", 1, 5)}
    rejections = Rejections()
    ratings = attempt(lambda: read_ratings([RatedSet(Location.find(path), objective, "s")], rejections=rejections))
    if ratings is not None:
        assert all(math.isnan(rating) or 1 <= rating <= 5 for rating in ratings.ratings.flat)
    for error in rejections.errors:
        one_line(error)


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=examples(10), **options)
@given(draw=st.data())
def test_any_broken_file_is_read_or_refused_in_one_line(tmp_path_factory, kind, draw):
    path = tmp_path_factory.getbasetemp() / f"broken.{kind}"
    broken_file(draw, kind, path)
    read_all(path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=examples(100), **options)
@given(draw=st.data())
def test_any_of_many_broken_files_is_read_or_refused_in_one_line(tmp_path_factory, kind, draw):
    path = tmp_path_factory.getbasetemp() / f"broken.{kind}"
    broken_file(draw, kind, path)
    read_all(path)


@pytest.mark.slow
@settings(max_examples=examples(100), **options)
@given(draw=st.data(), kind=st.sampled_from(FORMATS))
def test_score_of_any_broken_file_ends_with_words_and_finite_scores(tmp_path_factory, model, capsys, draw, kind):
    path = tmp_path_factory.getbasetemp() / f"broken.{kind}"
    broken_file(draw, kind, path)
    code, out, err = run(capsys, "score", path, "--model", model, "--dtype", "float32", "--device", "cpu")
    assert code in (0, 1)
    assert "Traceback" not in err
    rows = [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]
    assert all(math.isfinite(row["score"]) for row in rows if row.get("score") is not None)
    if code:
        assert err.strip().splitlines()[-1].startswith("armorm: ")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    reward_model().save_pretrained(folder)
    return folder
