"""Rated conversations: several sets with their own objectives and scales, merged into one table.

Missing ratings stay missing (NaN). Objectives of different sources stay separate even if their names are the same: a
column without a source in its name gets its set's (`helpfulness` of `helpsteer` becomes `helpsteer-helpfulness`). Two
sets may rate the same objective (parts of one source) if they agree on its scale.

A row that cannot be read, and a cell without a number on its scale, costs that row or cell: both are listed in the
`Rejections` that a reader is given (without one, the first is an error). A column whose cells are mostly off its scale
was rated on another one, which is always an error.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from armorm.conversation import Conversation
from armorm.data.cells import Cell, rating_cell
from armorm.data.rejections import Rejections, read_rows
from armorm.data.rows import Row
from armorm.data.sources import Location
from armorm.errors import DataError, nearest
from armorm.objectives import Objective, ObjectiveSet

MOST_OUTSIDE = 0.2  # share of a column's cells that may be off its scale, if they are more than
FEW_OUTSIDE = 4  # so many
OWN_REPLY = "own reply"  # the edit of a constructed row whose reply is as it is in its set


@dataclass(frozen=True)
class RatedSet:
    """One set of rated rows.

    Attributes:
        location: of its rows.
        columns: objective of each rating column.
        source: name of the set, for reports.
        train_split: value of the `split` column that marks training rows.
        rows: approximate number of rows to keep (`sample_by_prompt`); by default all.
    """

    location: Location
    columns: Mapping[str, Objective]
    source: str
    train_split: str = "train"
    rows: int | None = None


@dataclass
class RatingTable:
    """Rated conversations of several sets.

    Attributes:
        conversations: (n,).
        ratings: (n, k) raw ratings, NaN where missing.
        objectives: (k,).
        sources: (n,) name of the set of each row.
        splits: (n,) as `Row.split_role` gives it.
        origins: (n,) file and row number.
        edits: (n,) what was done to the reply of a constructed row, '' for rows of sets; empty without such rows.
        spreads: (n, k) standard deviation between the raters of a cell, NaN for one rater; None without several.
        raters: (n, k) number of raters of each cell, 0 where missing; None where `spreads` is.
    """

    conversations: list[Conversation]
    ratings: np.ndarray
    objectives: ObjectiveSet
    sources: list[str]
    splits: list[str]
    origins: list[tuple[str, int]] = field(default_factory=list)
    edits: list[str] = field(default_factory=list)
    spreads: np.ndarray | None = None
    raters: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.conversations)

    def take(self, rows: Sequence[int] | np.ndarray) -> RatingTable:
        """The table of some rows."""
        rows = [int(row) for row in rows]
        return RatingTable(
            [self.conversations[i] for i in rows],
            self.ratings[rows],
            self.objectives,
            [self.sources[i] for i in rows],
            [self.splits[i] for i in rows],
            [self.origins[i] for i in rows] if self.origins else [],
            [self.edits[i] for i in rows] if self.edits else [],
            None if self.spreads is None else self.spreads[rows],
            None if self.raters is None else self.raters[rows],
        )

    def with_column(self, objective: Objective, raw: np.ndarray) -> RatingTable:
        """The table with one more objective, raw values (n,) for every row."""
        objectives = ObjectiveSet([*self.objectives, objective])
        ratings = np.column_stack([self.ratings, raw])
        spreads = None if self.spreads is None else np.column_stack([self.spreads, np.full(len(self), np.nan)])
        raters = None if self.raters is None else np.column_stack([self.raters, (~np.isnan(raw)).astype(np.int64)])
        return replace(self, ratings=ratings, objectives=objectives, spreads=spreads, raters=raters)

    @property
    def natural(self) -> np.ndarray:
        """Mask (n,) of the rows of sets; without any, of the unedited replies of constructed rows, each once."""
        edits = np.array(self.edits or [""] * len(self), object)
        mask = np.asarray(edits == "", bool)
        if not mask.any():
            own = np.flatnonzero(edits == OWN_REPLY)
            _, first = np.unique([self.conversations[i].key for i in own], return_index=True)
            mask[own[first]] = True
        return mask

    def with_unrated(self, objectives: Sequence[Objective]) -> RatingTable:
        """The table with more objectives, which no row rates."""
        table = self
        for objective in objectives:
            table = table.with_column(objective, np.full(len(self), np.nan))
        return table

    @property
    def counts(self) -> dict[str, int]:
        """Ratings of each objective."""
        present = (~np.isnan(self.ratings)).sum(0)
        return {name: int(count) for name, count in zip(self.objectives.names, present, strict=True)}

    @property
    def rater_spreads(self) -> dict[str, float]:
        """Mean standard deviation between the raters of a cell, of each objective that several rated."""
        if self.spreads is None:
            return {}
        columns = zip(self.objectives.names, self.spreads.T, strict=True)
        return {name: float(np.nanmean(column)) for name, column in columns if not np.isnan(column).all()}


def objective_name(column: str, source: str) -> str:
    """Name of a column's objective: prefixed with the source, unless the column's name contains one (`a-b`)."""
    return column if "-" in column else f"{source}-{column}"


def read_ratings(
    sets: Sequence[RatedSet], limit: int | None = None, rejections: Rejections | None = None
) -> RatingTable:
    """Read and merge rated sets.

    Args:
        limit: approximate number of rows to keep of each set, whatever its own.
        rejections: collects the rows and cells that are left out; if None, the first of them raises a DataError.

    Raises:
        DataError: naming file, row and field; for a set without a row that can be read, or without a rated column.
    """
    rejections = Rejections(strict=True) if rejections is None else rejections
    objectives = merge_objectives(sets)
    table = RatingTable([], np.empty((0, len(objectives))), objectives, [], [])
    spreads, raters = [np.empty((0, len(objectives)))], [np.empty((0, len(objectives)), np.int64)]
    for rated in sets:
        part = _read_set(rated, objectives, rejections)
        part = part.take(sample_by_prompt([c.prompt_key for c in part.conversations], smaller(limit, rated.rows)))
        table.ratings = np.concatenate([table.ratings, part.ratings])
        assert part.spreads is not None and part.raters is not None
        spreads.append(part.spreads)
        raters.append(part.raters)
        for name in ("conversations", "sources", "splits", "origins"):
            getattr(table, name).extend(getattr(part, name))
    merged = np.concatenate(spreads)
    if not np.isnan(merged).all():
        table.spreads, table.raters = merged, np.concatenate(raters)
    return table


def _read_set(rated: RatedSet, objectives: ObjectiveSet, rejections: Rejections) -> RatingTable:
    table = RatingTable([], np.empty(0), objectives, [], [])
    ratings: list[np.ndarray] = []
    spreads: list[np.ndarray] = []
    raters: list[np.ndarray] = []
    columns_found: set[str] = set()
    seen = {column: ColumnCheck(column, objective) for column, objective in rated.columns.items()}
    places = {column: objectives.position(objective.name) for column, objective in rated.columns.items()}

    def read(row: Row) -> tuple[Row, str, Conversation]:
        return row, row.split_role(rated.train_split), row.conversation()

    for row, split, conversation in read_rows(rated.location, read, rejections):
        values, between = np.full((2, len(objectives)), np.nan)
        count = np.zeros(len(objectives), np.int64)
        for column in rated.columns:
            cell = seen[column].read(row, rejections)
            place = places[column]
            if not math.isnan(cell.value):
                values[place], between[place], count[place] = cell.value, cell.spread, cell.raters
        columns_found.update(row.values)
        table.splits.append(split)
        table.conversations.append(conversation)
        ratings.append(values)
        spreads.append(between)
        raters.append(count)
        table.origins.append((row.file, row.number))
    for check in seen.values():
        check.require_scale()
    absent = [column for column in rated.columns if not seen[column].rated]
    if absent:
        hint = "" if absent[0] in columns_found else nearest(absent[0], columns_found)
        raise DataError(f"no row rates it{hint}", file=rated.location.name, field=absent[0])
    shape = (len(ratings), len(objectives))
    table.ratings, table.spreads = (np.array(a).reshape(shape) for a in (ratings, spreads))
    table.raters = np.array(raters, np.int64).reshape(shape)
    table.sources = [rated.source] * len(ratings)
    return table


@dataclass
class ColumnCheck:
    """Reads the cells of a rating column, and counts how many are off its scale."""

    column: str
    objective: Objective
    rated: int = 0
    outside: int = 0
    first: DataError | None = None

    def read(self, row: Row, rejections: Rejections) -> Cell:
        """The cell of a row. A fault in it is added to the rejections.

        Raises:
            DataError: if the rejections are strict.
        """
        cell = rating_cell(row.values.get(self.column), self.objective.low, self.objective.high)
        self.rated += not math.isnan(cell.value)
        if cell.fault:
            error = row.error(cell.fault, self.column)
            if cell.outside:
                self.outside += 1
                self.first = self.first or error
            rejections.reject_cell(error)
        return cell

    def require_scale(self) -> None:
        """Raise a DataError if so many cells are off the scale that it must be another one."""
        total = self.rated + self.outside
        if self.first and (not self.rated or self.outside > max(FEW_OUTSIDE, MOST_OUTSIDE * total)):
            raise DataError(
                f"{self.first.problem}; {self.outside:,} of {total:,} cells are off this scale: check its ends",
                file=self.first.file,
                row=self.first.row,
                field=self.column,
            )


def smaller(*limits: int | None) -> int | None:
    """The smallest limit that is given."""
    return min((limit for limit in limits if limit is not None), default=None)


def sample_by_prompt(prompt_keys: Sequence[str], limit: int | None) -> list[int]:
    """Indices of about `limit` rows: all rows of pseudo-random prompts, chosen by their content, in order."""
    if limit is None or len(prompt_keys) <= limit:
        return list(range(len(prompt_keys)))
    counts = Counter(prompt_keys)
    drawn: set[str] = set()
    rows = 0
    for key in sorted(counts):
        if rows >= limit:
            break
        drawn.add(key)
        rows += counts[key]
    return [i for i, key in enumerate(prompt_keys) if key in drawn]


def split_role(split: str, prompt_key: str, test_share: float) -> str:
    """`train`, `test` or `other`: by the `split` of a row, else by a hash of its prompt."""
    return split or ("test" if int(prompt_key[16:24], 16) / 2**32 < test_share else "train")


def merge_objectives(sets: Iterable[RatedSet]) -> ObjectiveSet:
    """All objectives in order of appearance.

    Raises:
        DataError: if two sets give an objective different scales, or two columns of a set rate the same one.
    """
    merged: dict[str, Objective] = {}
    for rated in sets:
        columns: dict[str, str] = {}
        for column, objective in rated.columns.items():
            other = columns.setdefault(objective.name, column)
            if other != column:
                raise DataError(
                    f"rates objective {objective.name}, as column '{other}' does; expected one column for each",
                    file=rated.location.name,
                    field=column,
                )
            known = merged.setdefault(objective.name, objective)
            if known != objective:
                raise DataError(
                    f"objective {objective.name} has range {_scale(objective)} here, {_scale(known)} in another set; "
                    "expected one scale, or a source of its own",
                    file=rated.location.name,
                    field=column,
                )
    return ObjectiveSet(merged.values())


def _scale(objective: Objective) -> str:
    signed = f"{objective.scale:g} * reward {objective.offset:+g}"
    return f"{objective.low:g}..{objective.high:g} ({objective.direction}, raw = {signed}, source {objective.source})"
