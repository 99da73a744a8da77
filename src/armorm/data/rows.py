"""Rows of data from wherever people keep them, with their numbers, so that a fault can be pointed at.

In:  a path (.jsonl, .jsonl.gz, .json, .csv, .tsv, .parquet, a folder of such files or saved by `datasets`) or a hub id.
Out: `Row`: the file, the 1-based number, the values.

A set may have a layout of its own: a function from a row as it stands to the rows that it means.

A broken line, a truncated archive, or a column that stands twice in a row stops the reading, by name.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from armorm.errors import DataError, nearest, shown

LINE_SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
TABLE_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
SUFFIXES = (*LINE_SUFFIXES, *TABLE_SUFFIXES, ".json", ".json.gz", ".parquet")
_DOUBLED = "the column stands twice, expected each column once"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        file: path or hub id it came from.
        number: 1-based.
        values: its columns.
        textual: every value came as text (CSV), so numbers are read from it; see `value`.
    """

    file: str
    number: int
    values: Mapping[str, Any]
    textual: bool = False

    @property
    def filled(self) -> list[str]:
        """Names of the columns that hold something."""
        return sorted(name for name, value in self.values.items() if value is not None)

    def value(self, column: str) -> Any:
        """A value that may be a number: text of a textual row that reads as one is one, as are `true` and `false`."""
        value = self.values.get(column)
        return _number(value) if self.textual and isinstance(value, str) else value

    def error(self, problem: str, field: str = "") -> DataError:
        """The refusal of this row."""
        return DataError(problem, file=self.file, row=self.number, field=field)


Layout = Callable[[Row], Iterable[Mapping[str, Any]]]


@dataclass(frozen=True)
class Location:
    """Where rows are.

    Attributes:
        name: what the user wrote, a path or a hub id.
        path: the existing file or folder, or None for a hub id.
        subset, split, revision, data_dir: of a hub set or a folder.
        layout: from a row as it stands to the rows that it means; None where they are the same.
        offline: ask nothing of the hub.
    """

    name: str
    path: Path | None
    subset: str | None = None
    split: str | None = None
    revision: str | None = None
    data_dir: str | None = None
    layout: Layout | None = None
    offline: bool = False

    @classmethod
    def find(cls, name: str | Path, root: Path | None = None, **options: Any) -> Location:
        """Resolve a path below `root`, or a hub id `owner/name`.

        Raises:
            DataError: for a name that is neither, with the nearest name in its folder.
        """
        text = str(name)
        try:
            path = (root or Path()) / Path(text).expanduser()
            if path.exists():
                return cls(text, path, **options)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"no such file or folder ({reason})", file=shown(text)) from None
        if not _HUB_ID.fullmatch(text) or text.endswith(SUFFIXES):
            folder = path.parent
            hint = nearest(path.name, [entry.name for entry in folder.iterdir()]) if folder.is_dir() else ""
            raise DataError(f"no such file or folder{hint}; looked for {path}", file=text)
        return cls(text, None, **options)

    def rows(self) -> Iterator[Row]:
        """Read the rows in order.

        Raises:
            DataError: for anything that cannot be read, by file and row.
        """
        for row in self.rows_or_faults():
            if isinstance(row, DataError):
                raise row
            yield row

    def rows_or_faults(self) -> Iterator[Row | DataError]:
        """Read the rows in order; a broken line is yielded as its error, and reading goes on.

        Raises:
            DataError: for a file that cannot be read at all.
        """
        for row in self._raw_rows():
            if self.layout is None or isinstance(row, DataError):
                yield row
                continue
            try:
                meant = [Row(row.file, row.number, values, row.textual) for values in self.layout(row)]
            except DataError as error:
                yield error
                continue
            yield from meant

    def _raw_rows(self) -> Iterator[Row | DataError]:
        if self.path is None or self.path.is_dir():
            from armorm.data.hub import dataset_rows

            yield from dataset_rows(self)
        elif self.path.name.endswith(LINE_SUFFIXES):
            yield from _line_rows(self.path)
        elif self.path.name.endswith(TABLE_SUFFIXES):
            from armorm.data.tables import table_rows

            yield from table_rows(self.path)
        elif self.path.name.endswith((".json", ".json.gz")):
            yield from _array_rows(self.path)
        elif self.path.suffix == ".parquet":
            yield from _parquet_rows(self.path)
        else:
            raise DataError(
                f"found a file of type {self.path.suffix!r}, expected {', '.join(SUFFIXES)}", file=self.name
            )


def line_rows(lines: Iterable[bytes], name: str) -> Iterator[Row | DataError]:
    """Rows of JSON lines; blank lines are no rows, broken ones are yielded as errors."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
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
    """A file to read, unpacked where it ends in .gz."""
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
    """The refusal of the first value of a batch that is no Python value, such as text that is not UTF-8."""
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
        raise DataError(f"found a byte that is not UTF-8 at position {error.start}", file=path, row=number) from None
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
    """Whether a JSON value is, or contains, that very object."""
    if value is part:
        return True
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(_holds(entry, part) for entry in inner)


def unreadable(file: Path | str, number: int, error: Exception) -> DataError:
    """The refusal of a file that breaks off after so many rows."""
    place = "beyond this row" if number else "at all"
    return DataError(f"cannot be read {place}: {error}", file=file, row=number or None)
