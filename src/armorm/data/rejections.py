"""Rows and cells that are left out: listed with file, row and column, counted, or with `strict` an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

from armorm.data.rows import Row
from armorm.data.sources import Location
from armorm.errors import DataError
from armorm.progress import Terminal

Read = TypeVar("Read")
SHOWN = 5
ROWS, CELLS = "rows that cannot be read", "rating cells without a number on their scale"


@dataclass
class Rejections:
    """What was left out while data were read.

    Attributes:
        strict: raise the first error instead.
        rows, cells: an error for each row and each cell.
    """

    strict: bool = False
    rows: list[DataError] = field(default_factory=list)
    cells: list[DataError] = field(default_factory=list)

    def reject_row(self, error: DataError) -> None:
        """Leave a row out.

        Raises:
            DataError: with `strict`.
        """
        if self.strict:
            raise error
        self.rows.append(error)

    def reject_cell(self, error: DataError) -> None:
        """Leave a cell out.

        Raises:
            DataError: with `strict`.
        """
        if self.strict:
            raise error
        self.cells.append(error)

    @property
    def counts(self) -> dict[str, int]:
        """Number of rows and of cells that were left out, those that are not 0."""
        return {name: len(errors) for name, errors in ((ROWS, self.rows), (CELLS, self.cells)) if errors}

    @property
    def errors(self) -> list[DataError]:
        """Rows, then cells."""
        return [*self.rows, *self.cells]

    def report(self, console: Terminal | None = None) -> None:
        """Print the first few of each kind, by default to stderr; callers print the counts."""
        console = console or Terminal(stderr=True, highlight=False, soft_wrap=True)
        for errors in (self.rows, self.cells):
            for error in errors[:SHOWN]:
                console.print(f"skipped: {error}", markup=False)
            if len(errors) > SHOWN:
                console.print(f"skipped: {len(errors) - SHOWN:,} more like these")


def read_rows(
    location: Location, read: Callable[[Row], Read], rejections: Rejections, limit: int | None = None
) -> Iterator[Read]:
    """What `read` makes of each row; a row that it cannot read is rejected.

    Args:
        limit: most rows to read.

    Raises:
        DataError: if no row can be read; with strict rejections, for the first one that cannot.
    """
    before, count = len(rejections.rows), 0
    for row in islice(location.rows_or_faults(), limit):
        try:
            if isinstance(row, DataError):
                raise row
            found = read(row)
        except DataError as error:
            rejections.reject_row(error)
            continue
        count += 1
        yield found
    if not count and len(rejections.rows) > before:
        raise rejections.rows[before]
