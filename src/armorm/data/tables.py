"""Tables as people keep ratings: CSV and TSV, as spreadsheets write them.

In:  a .csv or .tsv file (plain or .gz) with a header line; UTF-8, with or without a byte order mark.
Out: `Row`s whose values are text (`Row.value` reads numbers), numbered by the line on which each begins.

Commas, semicolons and tabs separate: the header line decides, since spreadsheets write what their country writes.
An empty cell is a missing value. A list of messages as JSON in a column `messages`, `prompt`, `chosen` or `rejected`
is read as such.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from armorm.data.rows import Row, opened, unreadable
from armorm.errors import DataError

_CONVERSATIONS = ("messages", "prompt", "chosen", "rejected")
_LONGEST_CELL = 64 * 1024 * 1024


def table_rows(path: Path) -> Iterator[Row | DataError]:
    """Rows of a table; one with another number of cells than the header is yielded as an error.

    Raises:
        DataError: for a file without a header, with a column twice, or that is no text.
    """
    number = 1
    try:
        with opened(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as text:
            head = text.readline()
            if not head.strip():
                raise DataError("found no header line, expected the names of the columns", file=path, row=1)
            separator = _separator(path, head)
            header = [name.strip() for name in next(csv.reader([head], delimiter=separator))]
            _check(header, path)
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
        raise DataError(f"found a byte that is not UTF-8 ({error.reason}); save it as UTF-8", file=path) from None
    except (gzip.BadGzipFile, OSError, EOFError, zlib.error) as error:
        raise unreadable(path, number, error) from None


def _separator(path: Path, head: str) -> str:
    if ".tsv" in path.suffixes:
        return "\t"
    return max(",;\t", key=head.count)


def _check(header: list[str], path: Path) -> None:
    doubled = next((name for name in header if header.count(name) > 1), None)
    if doubled is not None:
        raise DataError("the column stands twice, expected each column once", file=path, field=doubled)


def _cell(name: str, text: str) -> Any:
    if not text.strip():
        return None
    if name in _CONVERSATIONS and text.lstrip().startswith("[{"):
        try:
            return json.loads(text)
        except ValueError:
            return text  # a text that merely begins like JSON
    return text
