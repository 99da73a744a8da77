"""Rows written in the format of a file's suffix: `.csv`, `.tsv`, `.parquet`, else JSON lines.

Commands take only the suffixes that `data/rows.py` reads back (`require_row_format`).

JSON lines are written as they come. In a table, objects of numbers become columns (`rewards.helpfulness`); other nested
values are JSON text in CSV and TSV, and stay nested in Parquet. A table's columns follow from all rows, so its rows are
kept until the end.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from armorm.errors import OutputError
from armorm.files import json_text, output_target, plain, text_file, write_whole

WriteRow = Callable[[Mapping[str, Any]], None]
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_LINES = (".jsonl", ".ndjson")


def require_row_format(path: Path) -> None:
    """Check that the suffix of an output is that of a format; FIFOs, devices and `/dev/stdout` need none.

    Raises:
        OutputError: with the suffix that was found.
    """
    if path.suffix not in (*_LINES, *_SEPARATORS, ".parquet") and output_target(path) is not None:
        found = f"found suffix {path.suffix}" if path.suffix else "found no suffix"
        raise OutputError(path, f"{found}, expected .jsonl, .csv, .tsv or .parquet")


@contextmanager
def row_writer(path: Path) -> Iterator[WriteRow]:
    """A function that writes one row; the file gets its name when the block ends without an error."""
    if path.suffix in _SEPARATORS:
        rows: list[dict[str, Any]] = []
        yield lambda row: rows.append({name: _text(value) for name, value in _flat(row).items()})
        with text_file(path) as file:
            writer = csv.DictWriter(file, _columns(rows), delimiter=_SEPARATORS[path.suffix], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        kept: list[dict[str, Any]] = []
        yield lambda row: kept.append(_flat(row))
        write_whole(path, lambda temporary: _write_parquet(kept, temporary))
    else:
        with text_file(path) as file:
            yield lambda row: print(json_text(row), file=file, flush=True)


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with a column for each number of an object of numbers."""
    flat: dict[str, Any] = {}
    for name, value in plain(row).items():
        if isinstance(value, Mapping) and all(isinstance(entry, (int, float, type(None))) for entry in value.values()):
            flat |= {f"{name}.{key}": entry for key, entry in value.items()}
        else:
            flat[name] = value
    return flat


def _text(value: Any) -> Any:
    return json_text(value) if isinstance(value, (dict, list)) else value


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _write_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {}
    for name in _columns(rows):
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError):  # values of several types
            columns[name] = pyarrow.array([None if value is None else str(_text(value)) for value in values])
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
