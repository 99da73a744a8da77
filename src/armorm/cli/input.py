"""Input rows of a command: what its argument names (data/sources.py), or else standard input."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

from armorm.conversation import Conversation
from armorm.data.rows import Row
from armorm.data.sources import STANDARD_INPUT, Location
from armorm.errors import DataError, LayoutError
from armorm.files import json_text

EXAMPLE = """echo '{"prompt": "What is 2+2?", "response": "4"}' | armorm score"""


def row_content(row: Row | DataError) -> str:
    """Everything about a row that decides what is made of it, as one text."""
    return str(row) if isinstance(row, DataError) else json_text([row.number, row.values, row.columns])


def input_rows(name: str | None, *, strict: bool = False, example: str = EXAMPLE) -> Iterator[Row | DataError]:
    """Rows of a file, folder, hub data set or standard input (`-`, or no name); a broken line is yielded as its error.

    Args:
        strict: raise it instead.
        example: command line that is shown if there is no input.

    Raises:
        DataError: if nothing is named and standard input is a terminal, or if there are no rows.
    """
    if name in (None, "-") and sys.stdin is None:
        raise DataError("is closed", file=STANDARD_INPUT)
    if name is None and sys.stdin.isatty():
        raise DataError(f"no input: expected a file, or rows on standard input, such as {example}")
    location = Location.standard_input() if name in (None, "-") else Location.find(name)
    rows = location.rows() if strict else location.rows_or_faults()
    first = next(rows, None)  # an unreadable file is reported before a model is loaded
    if first is None:
        raise DataError("found no rows", file=location.name)
    return chain([first], rows)


def split_rejected(
    rows: Iterable[Row | DataError], *, strict: bool = False, others: Mapping[str, str] | None = None
) -> tuple[list[tuple[Row, Conversation]], list[tuple[int, str]]]:
    """Rows with their conversations, and number and reason of each row that holds no valid conversation.

    Args:
        others: the command that reads rows of another kind (`Row.kind`), which the reason names.

    Raises:
        DataError: with `strict`, for the first such row.
    """
    valid: list[tuple[Row, Conversation]] = []
    rejected: list[tuple[int, str]] = []
    for row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            valid.append((row, row.conversation()))
        except DataError as error:
            found = error
            if isinstance(row, Row) and isinstance(error, LayoutError) and others and row.kind in others:
                found = row.error(f"{error.problem}; use armorm {others[row.kind]}", error.field)
            if strict:
                raise found from None
            rejected.append((found.row or 0, found.reason))
    return valid, rejected
