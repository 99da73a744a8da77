"""Input rows of a command: files, hub data sets or standard input, read as conversations."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from armorm.conversation import Conversation
from armorm.data.rows import Row, line_rows
from armorm.data.sources import Location
from armorm.errors import DataError
from armorm.files import json_text

STANDARD_INPUT = "standard input"
# Two answers to one question: the input of commands that are given none.
EXAMPLE = [
    {"prompt": "How do I get a wine stain out of a cotton shirt?", "response": reply}
    for reply in (
        "Dab it with cold water and a little dish soap, let it stand for ten minutes, then rinse and wash as usual.",
        "Who cares? Throw it away, stupid.",
    )
]


def input_rows(name: str) -> Iterator[Row | DataError]:
    """Rows of a file, folder or hub data set, or of standard input (`-`); a broken line is yielded as its error."""
    if name != "-":
        return Location.find(name).rows_or_faults()
    if sys.stdin is None:
        raise DataError("is closed", file=STANDARD_INPUT)
    return line_rows(sys.stdin.buffer, STANDARD_INPUT)


def row_content(row: Row | DataError) -> str:
    """Everything about a row that decides what is made of it, as one text."""
    return str(row) if isinstance(row, DataError) else json_text([row.number, row.values])


def input_or_example(name: str | None) -> Iterator[Row | DataError]:
    """The same, or an example if no input is given."""
    if name is not None:
        return input_rows(name)
    print("no input given; this is an example (see --help):", file=sys.stderr)
    for example in EXAMPLE:
        print(f"  {example['prompt']} / {example['response']}", file=sys.stderr)
    return iter([Row("example", number, dict(example)) for number, example in enumerate(EXAMPLE, 1)])


def valid_rows(rows: Iterable[Row | DataError]) -> Iterator[Row]:
    """Raise the error of the first broken line."""
    for row in rows:
        if isinstance(row, DataError):
            raise row
        yield row


def split_rejected(rows: Iterable[Row | DataError]) -> tuple[list[tuple[Row, Conversation]], list[tuple[int, str]]]:
    """Rows with their conversations, and number and reason of each row that holds no valid conversation."""
    valid: list[tuple[Row, Conversation]] = []
    rejected: list[tuple[int, str]] = []
    for row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            valid.append((row, row.conversation()))
        except DataError as error:
            rejected.append((error.row or 0, f"{error.field}: {error.problem}" if error.field else error.problem))
    return valid, rejected
