"""Rows of data files (JSONL, JSON, CSV, TSV, Parquet, plain or gzipped), each with its file and number.

A broken line, a truncated archive or a duplicated column is an error that names file, row and field. In CSV and TSV
the header line determines the separator (comma, semicolon or tab) and empty cells are missing values; values stay
text (`Row.value` reads numbers), except that a JSON list of messages in a column `messages`, `prompt`, `chosen` or
`rejected` is parsed.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from armorm.conversation import Conversation
from armorm.errors import ConversationError, DataError, shown
from armorm.files import encoding_fault, wide_encoding

LINE_SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
TABLE_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
SUFFIXES = (*LINE_SUFFIXES, *TABLE_SUFFIXES, ".json", ".json.gz", ".parquet")
_DOUBLED = "the column occurs twice, expected each column once"
_CONVERSATIONS = ("messages", "prompt", "chosen", "rejected")
_LONGEST_CELL = 64 * 1024 * 1024
_HEAD = 65_536  # bytes of a file that tell its encoding


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        file: path or hub id.
        number: 1-based.
        values: its columns.
        textual: all values are text (CSV), from which `value` reads numbers.
    """

    file: str
    number: int
    values: Mapping[str, Any]
    textual: bool = False

    @property
    def filled(self) -> list[str]:
        """Names of the columns with a value."""
        return sorted(name for name, value in self.values.items() if value is not None)

    def value(self, column: str) -> Any:
        """A value that may be a number: in a textual row, numbers and `true` and `false` are parsed."""
        value = self.values.get(column)
        return _number(value) if self.textual and isinstance(value, str) else value

    def conversation(self) -> Conversation:
        """The conversation of a row with `messages`, or with `prompt` and `response`.

        Raises:
            DataError: naming the place inside the row.
        """
        values = self.values
        try:
            if values.get("messages") is not None:
                return Conversation.from_messages(values["messages"])
            if values.get("prompt") is not None and values.get("response") is not None:
                return Conversation.from_prompt(values["prompt"], values["response"])
        except ConversationError as error:
            raise self.error(error.problem, error.field) from None
        raise self.error(f"found columns {shown(self.filled, 80)}, expected 'messages', or 'prompt' and 'response'")

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
        yield from _table_rows(path)
    elif path.name.endswith((".json", ".json.gz")):
        yield from _array_rows(path)
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path)
    else:
        raise DataError(f"found a file of type {path.suffix!r}, expected {', '.join(SUFFIXES)}", file=path)


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


def _array_rows(path: Path) -> Iterator[Row]:
    try:
        with opened(path) as file:
            text = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, 0, error) from None
    if fault := wide_encoding(text):
        raise DataError(fault, file=path)
    entries = _parsed(path, None, text)
    if not isinstance(entries, list):
        raise DataError(
            f"found {type(entries).__name__}, expected a list of objects (or .jsonl: one object a line)", file=path
        )
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            raise DataError(f"found {shown(entry)}, expected an object", file=path, row=number)
        yield Row(str(path), number, entry)


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


def _number(text: str) -> Any:
    stripped = text.strip()
    if stripped.lower() in ("true", "false"):
        return stripped.lower() == "true"
    for kind in (int, float):
        try:
            return kind(stripped)
        except ValueError:
            continue
    return text


def _holds(value: Any, part: dict[str, Any]) -> bool:
    """Whether a JSON value is or contains this very object."""
    if value is part:
        return True
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(_holds(entry, part) for entry in inner)


def unreadable(file: Path | str, number: int, error: Exception) -> DataError:
    """The error for a file that cannot be read after row `number`."""
    place = "beyond this row" if number else "at all"
    return DataError(f"cannot be read {place}: {error}", file=file, row=number or None)


def _table_rows(path: Path) -> Iterator[Row | DataError]:
    """Rows of a table; for a row with another number of cells than the header an error is yielded.

    Raises:
        DataError: for a file without a header, with a duplicated column, or that is not text.
    """
    number = 1
    try:
        with opened(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as text:
            head = text.readline()
            if not head.strip():
                raise DataError("found no header line, expected the column names", file=path, row=1)
            if fault := wide_encoding(head.encode()):
                raise DataError(f"{fault}; save it as UTF-8", file=path)
            separator = "\t" if ".tsv" in path.suffixes else max(",;\t", key=head.count)
            header = [name.strip() for name in next(csv.reader([head], delimiter=separator))]
            doubled = _first_doubled(header)
            if doubled is not None:
                raise DataError(_DOUBLED, file=path, field=doubled)
            csv.field_size_limit(_LONGEST_CELL)
            lines = csv.reader(text, delimiter=separator, strict=True)
            number = 2
            for cells in lines:
                start, number = number, lines.line_num + 2
                if not cells:
                    continue
                if len(cells) != len(header):
                    yield DataError(
                        f"found {len(cells)} cells, expected {len(header)}: one for each column of the header",
                        file=path,
                        row=start,
                    )
                    continue
                yield Row(str(path), start, {n: _cell(n, c) for n, c in zip(header, cells, strict=True)}, textual=True)
    except csv.Error as error:
        raise DataError(f"cannot be read as a table: {error}", file=path, row=number) from None
    except UnicodeDecodeError as error:
        with opened(path) as raw:
            fault = encoding_fault(raw.read(_HEAD)) or f"found a byte that is not UTF-8 ({error.reason})"
        raise DataError(f"{fault}; save it as UTF-8", file=path) from None
    except (gzip.BadGzipFile, OSError, EOFError, zlib.error) as error:
        raise unreadable(path, number, error) from None


def _cell(name: str, text: str) -> Any:
    if not text.strip():
        return None
    if name in _CONVERSATIONS and text.lstrip().startswith("[{"):
        try:
            return json.loads(text)
        except ValueError:
            return text  # text that only begins like JSON
    return text
