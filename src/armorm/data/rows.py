"""Rows of data: JSONL, JSON, CSV, TSV and Parquet files (plain or gzipped), streams, DataFrames, Datasets.

Every row has its file and number: the line in JSON lines, elsewhere the row, so that row 1 of a table is the one below
the header. A broken line, a truncated archive or a duplicated column is an error that names file, row and field. In CSV
and TSV the header line determines the separator (comma, semicolon or tab), empty cells are missing values, and values
stay text: `Row.value` reads numbers, and `standard` (data/layout_detection.py) the rest.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

from armorm.conversation import Conversation, ConversationLike
from armorm.data.cells import number_of
from armorm.data.layout_detection import LAYOUTS, kind_of, layout_fault, standard_values, tool_definitions
from armorm.errors import ConversationError, DataError, LayoutError, shown
from armorm.files import encoding_fault, wide_encoding

LINE_SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
TABLE_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
SUFFIXES = (*LINE_SUFFIXES, *TABLE_SUFFIXES, ".json", ".json.gz", ".parquet")
_DOUBLED = "the column occurs twice, expected each column once"
_LONGEST_CELL = 64 * 1024 * 1024
_SHEETS = (".xlsx", ".xls", ".xlsm", ".ods")
_HEAD = 65_536  # bytes of a file that tell its encoding


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        file: path or hub id.
        number: 1-based.
        values: its columns.
        textual: all values are text (CSV).
        given: its columns in the file, where `values` are those of the standard form.
    """

    file: str
    number: int
    values: Mapping[str, Any]
    textual: bool = False
    given: Mapping[str, Any] | None = field(default=None, compare=False)

    @property
    def filled(self) -> list[str]:
        """Names of the columns with a value."""
        return sorted(name for name, value in self.values.items() if value is not None)

    @property
    def columns(self) -> Mapping[str, Any]:
        """Its columns as they are in the file."""
        return self.values if self.given is None else self.given

    def standard(self, stated: Mapping[str, str] | None = None) -> Row:
        """The row in standard form, whatever its layout (data/layout_detection.py).

        Args:
            stated: the row's column of some roles.

        Raises:
            DataError: naming the place inside the row.
        """
        try:
            values = standard_values(self.values, stated, textual=self.textual)
        except ConversationError as error:
            raise self.error(error.problem, error.field) from None
        return Row(self.file, self.number, values, self.textual, self.columns)

    @property
    def kind(self) -> str:
        """`pairs`, `candidates` (several responses) or `conversations`."""
        return kind_of(self.values)

    def value(self, column: str) -> Any:
        """A value that may be a number: numbers and `true` and `false` in text are parsed."""
        value = self.values.get(column)
        number = number_of(value) if isinstance(value, str) else None
        return value if number is None else number

    @property
    def tools(self) -> list[Any] | None:
        """Definitions of tools: its column `tools`, if that is a list; in text, as JSON. Other text is none."""
        return tool_definitions(self.values.get("tools"))

    def conversation(self) -> Conversation:
        """The conversation of a row with `messages`, or with `prompt` and `response`.

        Raises:
            DataError: naming the place inside the row.
        """
        values = self.values
        try:
            if values.get("messages") is not None:
                return Conversation.from_messages(values["messages"], self.tools)
            if values.get("prompt") is not None and values.get("response") is not None:
                return Conversation.from_prompt(values["prompt"], values["response"], tools=self.tools)
        except ConversationError as error:
            raise self.error(error.problem, error.field) from None
        if self.kind != "conversations":
            found = "a preference pair" if self.kind == "pairs" else "several responses"
            problem = f"found {found}, expected a conversation: 'messages', or 'prompt' and 'response'"
            raise LayoutError(problem, file=self.file, row=self.number)
        raise self.layout_error(LAYOUTS[:2])

    def layout_error(self, expected: Iterable[Sequence[str]]) -> LayoutError:
        """The error for a row that has none of the expected layouts, with the closest one."""
        place, problem = layout_fault(self.values, expected)
        return LayoutError(problem, file=self.file, row=self.number, field=place)

    def split_role(self, train_split: str = "train") -> str:
        """What the row's `split` column makes it: `train`, `test`, `other` (neither), or '' if it has none.

        Args:
            train_split: the value that marks training rows.

        Raises:
            DataError: for a split that is not text.
        """
        split = self.values.get("split")
        if split is None or split == "":
            return ""
        if not isinstance(split, str):
            raise self.error(f"found {shown(split)}, expected the name of a split", "split")
        return "train" if split == train_split else "test" if split == "test" else "other"

    def error(self, problem: str, field: str = "") -> DataError:
        """The error that rejects this row."""
        return DataError(problem, file=self.file, row=self.number, field=field)


Layout = Callable[[Row], Iterable[Mapping[str, Any]]]


def file_rows(path: Path) -> Iterator[Row | DataError]:
    """Rows of one file, in order; for a broken line its error is yielded and reading continues.

    Raises:
        DataError: for a file that cannot be read.
    """
    if path.name.endswith(LINE_SUFFIXES):
        yield from _line_rows(path)
    elif path.name.endswith(TABLE_SUFFIXES):
        with _opened_whole(path) as file:
            yield from _table_rows(file, str(path), "\t" if ".tsv" in path.suffixes else "")
    elif path.name.endswith((".json", ".json.gz")):
        with _opened_whole(path) as file:
            yield from _array_rows(file, str(path))
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path)
    else:
        step = "; save it as CSV (UTF-8)" if path.suffix.lower() in _SHEETS else ""
        raise DataError(f"found a file of type {path.suffix!r}, expected {', '.join(SUFFIXES)}{step}", file=path)


def object_rows(data: Any, name: str) -> Iterator[Row | DataError]:
    """Rows of a DataFrame (pandas or Polars), or of an iterable of objects such as a `datasets.Dataset`.

    Raises:
        DataError: for a duplicated column, or an entry that is no object.
    """
    for number, values in enumerate(entries_of(data), 1):
        if not isinstance(values, Mapping):
            raise DataError(f"found {shown(values)}, expected an object with columns", file=name, row=number)
        yield Row(name, number, values)


def read_conversation(entry: ConversationLike | Mapping[str, Any]) -> Conversation:
    """The conversation of a list of messages, or of an object with the columns of a row of any layout.

    Raises:
        ConversationError: naming the field.
    """
    if not isinstance(entry, Mapping):
        return Conversation.from_messages(entry)
    try:
        return Row("", 0, entry).standard().conversation()
    except DataError as error:
        raise ConversationError(error.problem, error.field) from None


def valid_rows(rows: Iterable[Row | DataError]) -> Iterator[Row]:
    """The rows; the first fault among them is raised."""
    for row in rows:
        if isinstance(row, DataError):
            raise row
        yield row


def entries_of(data: Any) -> Iterable[Any]:
    """What `read_conversation` reads of each row of a DataFrame; other data are such entries already."""
    if hasattr(data, "iter_rows"):
        return cast(Iterable[Any], data.iter_rows(named=True))
    return _frame_rows(data, "DataFrame") if hasattr(data, "itertuples") else data


def _frame_rows(frame: Any, name: str) -> Iterator[dict[str, Any]]:
    import pandas

    names = [str(column) for column in frame.columns]
    if (doubled := _first_doubled(names)) is not None:
        raise DataError(_DOUBLED, file=name, field=doubled)
    for cells in frame.itertuples(index=False, name=None):
        yield {
            column: None if pandas.api.types.is_scalar(cell) and pandas.isna(cell) else cell
            for column, cell in zip(names, cells, strict=True)
        }


def stream_rows(stream: Iterable[bytes], name: str) -> Iterator[Row | DataError]:
    """Rows of a stream: JSON lines, read as they come, or else a JSON list or a table, as its first line shows."""
    lines = iter(stream)
    head: list[bytes] = []
    for line in lines:
        head.append(line)
        if line.strip():
            break
    first = head[-1].removeprefix(b"\xef\xbb\xbf").lstrip() if head else b""
    if not first or first.startswith(b"{") or wide_encoding(first):
        yield from line_rows(chain(head, lines), name)
    elif first.startswith(b"["):
        yield from _array_rows(io.BytesIO(b"".join(chain(head, lines))), name)
    else:
        yield from _table_rows(io.BytesIO(b"".join(chain(head, lines))), name)


def line_rows(lines: Iterable[bytes], name: str) -> Iterator[Row | DataError]:
    """Rows of JSON lines; blank lines are skipped, for broken ones errors are yielded."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if number == 1 and (fault := wide_encoding(line)):  # its lines cannot be told apart
            raise DataError(fault, file=name)
        try:
            value = _parsed(name, number, line.rstrip())
        except DataError as error:
            yield error
            continue
        if isinstance(value, dict):
            yield Row(name, number, value)
        else:
            yield DataError(f"found {shown(value)}, expected a JSON object", file=name, row=number)


def opened(path: Path) -> IO[bytes]:
    """Open a file for reading, decompressed if its name ends in .gz."""
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _line_rows(path: Path) -> Iterator[Row | DataError]:
    number = 0
    try:
        with opened(path) as lines:
            for row in line_rows(lines, str(path)):
                number = row.number if isinstance(row, Row) else (row.row or number)
                yield row
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, number, error) from None


@contextmanager
def _opened_whole(path: Path) -> Iterator[IO[bytes]]:
    """The file, opened; a fault of the archive or the disk is the error of the whole file."""
    try:
        with opened(path) as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, 0, error) from None


def _array_rows(file: IO[bytes], name: str) -> Iterator[Row]:
    text = file.read()
    if fault := wide_encoding(text):
        raise DataError(fault, file=name)
    entries = _parsed(name, None, text)
    if not isinstance(entries, list):
        raise DataError(
            f"found {type(entries).__name__}, expected a list of objects (or .jsonl: one object a line)", file=name
        )
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            raise DataError(f"found {shown(entry)}, expected an object", file=name, row=number)
        yield Row(name, number, entry)


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"cannot be read as Parquet: {error}", file=path) from None
    names = file.schema_arrow.names
    doubled = _first_doubled(names)
    if doubled is not None:
        raise DataError(_DOUBLED, file=path, field=doubled)
    number = 0
    try:
        for batch in file.iter_batches():
            try:
                rows = batch.to_pylist()
            except ValueError as error:
                raise _parquet_fault(path, number, batch, error) from None
            for values in rows:
                number += 1
                yield Row(str(path), number, values)
    except (pyarrow.ArrowException, OSError) as error:
        raise unreadable(path, number, error) from None


def _parquet_fault(path: Path, number: int, batch: Any, fault: ValueError) -> DataError:
    """The error for the first value of a batch that cannot be converted, such as text that is not UTF-8."""
    for offset in range(len(batch)):
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                column[offset].as_py()
            except ValueError as error:
                return DataError(f"cannot be read: {error}", file=path, row=number + offset + 1, field=name)
    return unreadable(path, number, fault)


def _parsed(path: Path | str, number: int | None, text: bytes) -> Any:
    doubled: list[tuple[dict[str, Any], str]] = []

    def noted(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            doubled.append((found, str(_first_doubled([name for name, _ in pairs]))))
        return found

    try:
        value = json.loads(text, object_pairs_hook=noted)
    except UnicodeDecodeError as error:
        raise DataError(encoding_fault(text) or f"not UTF-8: {error.reason}", file=path, row=number) from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " if number is None else ""
        raise DataError(f"invalid JSON at {place}column {error.colno}: {error.msg}", file=path, row=number) from None
    except ValueError:
        raise DataError("found an integer of thousands of digits, expected a number", file=path, row=number) from None
    except RecursionError:
        raise DataError("JSON nested too deeply", file=path, row=number) from None
    if doubled:
        part, name = doubled[0]
        if number is None and isinstance(value, list):
            number = next(i for i, entry in enumerate(value, 1) if _holds(entry, part))
        raise DataError(_DOUBLED, file=path, row=number, field=name)
    return value


def _first_doubled(names: Sequence[str]) -> str | None:
    return next((name for name in names if names.count(name) > 1), None)


def _holds(value: Any, part: dict[str, Any]) -> bool:
    """Whether a JSON value is or contains this very object."""
    if value is part:
        return True
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(_holds(entry, part) for entry in inner)


def unreadable(file: Path | str, number: int, error: Exception) -> DataError:
    """The error for a file that cannot be read after row `number`."""
    place = "beyond this row" if number else "at all"
    said = " ".join(str(error).split())  # (pyarrow adds the whole schema)
    return DataError(f"cannot be read {place}: {said[:300]}{'...' * (len(said) > 300)}", file=file, row=number or None)


def _table_rows(raw: IO[bytes], name: str, separator: str = "") -> Iterator[Row | DataError]:
    """Rows of a table; for a row with another number of cells than the header an error is yielded.

    Args:
        separator: by default the most frequent of the header line.

    Raises:
        DataError: for a file without a header, with a duplicated column, or that is not text.
    """
    number = 0
    text = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
    try:
        head = text.readline()
        if not head.strip():
            raise DataError("found no header line, expected the column names", file=name)
        if fault := wide_encoding(head.encode()):
            raise DataError(f"{fault}; save it as UTF-8", file=name)
        separator = separator or max(",;\t", key=head.count)
        header = [column.strip() for column in next(csv.reader([head], delimiter=separator))]
        doubled = _first_doubled(header)
        if doubled is not None:
            raise DataError(_DOUBLED, file=name, field=doubled)
        csv.field_size_limit(_LONGEST_CELL)
        for cells in csv.reader(text, delimiter=separator, strict=True):
            if not cells:
                continue
            number += 1
            if len(cells) == len(header):
                values = {n: cell if cell.strip() else None for n, cell in zip(header, cells, strict=True)}
                yield Row(name, number, values, textual=True)
                continue
            found = f"found {len(cells)} cells, expected {len(header)}: one for each column of the header"
            yield DataError(found, file=name, row=number)
    except csv.Error as error:
        raise DataError(f"cannot be read as a table: {error}", file=name, row=number + 1) from None
    except UnicodeDecodeError as error:
        raw.seek(0)
        fault = encoding_fault(raw.read(_HEAD)) or f"found a byte that is not UTF-8 ({error.reason})"
        raise DataError(f"{fault}; save it as UTF-8", file=name) from None
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(name, number, error) from None
