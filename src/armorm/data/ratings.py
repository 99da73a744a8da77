"""Rated conversations: many sets with their own objectives and scales, merged to one table.

In:  sets of rows `{"messages": [...]}` or `{"prompt", "response"}`, with a column per objective.
Out: `RatingTable`: n conversations, raw ratings (n, k) with NaN where a rating is missing.

Missing ratings stay missing. Objectives of different sources stay apart even where their names are
alike: a column without a source in its name is given its set's (`helpfulness` of `helpsteer` becomes
`helpsteer-helpfulness`). Two sets may rate the same objective (parts of one source) if they agree on
its scale. Everything out of order is refused with file, row and field.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from armorm.conversation import Conversation
from armorm.data.rows import Row
from armorm.data.sources import Location
from armorm.errors import DataError, nearest, shown
from armorm.objectives import Objective, ObjectiveSet


@dataclass(frozen=True)
class RatedSet:
    """One set of rated rows.

    Attributes:
        location: where its rows are.
        columns: objective of each rating column.
        source: name of the set, for reports.
        train_split: value of the `split` column that marks training rows.
    """

    location: Location
    columns: Mapping[str, Objective]
    source: str
    train_split: str = "train"


@dataclass
class RatingTable:
    """Rated conversations of several sets.

    Attributes:
        conversations: n of them.
        ratings: (n, k) raw ratings, NaN where missing.
        objectives: the k objectives.
        sources: (n,) name of the set each row came from.
        splits: (n,) `train` or `test` by the row's `split` column, '' where it has none, `other` for the rest.
        origins: (n,) file and row number.
    """

    conversations: list[Conversation]
    ratings: np.ndarray
    objectives: ObjectiveSet
    sources: list[str]
    splits: list[str]
    origins: list[tuple[str, int]] = field(default_factory=list)

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
        )

    def with_column(self, objective: Objective, raw: np.ndarray) -> RatingTable:
        """The table with one more objective, raw values (n,) for every row."""
        objectives = ObjectiveSet([*self.objectives, objective])
        ratings = np.column_stack([self.ratings, raw])
        return RatingTable(self.conversations, ratings, objectives, self.sources, self.splits, self.origins)

    @property
    def counts(self) -> dict[str, int]:
        """Ratings of each objective."""
        present = (~np.isnan(self.ratings)).sum(0)
        return {name: int(count) for name, count in zip(self.objectives.names, present, strict=True)}


def objective_name(column: str, source: str) -> str:
    """Name of a column's objective: prefixed with its source, unless the column already names one (`a-b`)."""
    return column if "-" in column else f"{source}-{column}"


def read_ratings(sets: Sequence[RatedSet], limit: int | None = None) -> RatingTable:
    """Read and merge rated sets.

    Args:
        limit: about how many rows to keep of each set, as `sample_by_prompt` draws them.

    Raises:
        DataError: naming file, row and field of the first fault.
    """
    objectives = merge_objectives(sets)
    rows = [row for rated in sets for row in _read_set(rated, objectives, limit)]
    return RatingTable(
        conversations=[row.conversation for row in rows],
        ratings=np.array([row.ratings for row in rows]).reshape(len(rows), len(objectives)),
        objectives=objectives,
        sources=[row.source for row in rows],
        splits=[row.split for row in rows],
        origins=[row.origin for row in rows],
    )


@dataclass(frozen=True)
class _RatedRow:
    conversation: Conversation
    ratings: np.ndarray
    source: str
    split: str
    origin: tuple[str, int]


def _read_set(rated: RatedSet, objectives: ObjectiveSet, limit: int | None) -> list[_RatedRow]:
    position = {name: i for i, name in enumerate(objectives.names)}
    rows: list[_RatedRow] = []
    columns_rated: set[str] = set()
    columns_found: set[str] = set()
    for row in rated.location.rows():
        values = np.full(len(objectives), np.nan)
        for column, objective in rated.columns.items():
            value = rating_value(row, column, objective)
            if not math.isnan(value):
                values[position[objective.name]] = value
                columns_rated.add(column)
        columns_found.update(row.values)
        split = row.split_role(rated.train_split)
        rows.append(_RatedRow(row.conversation(), values, rated.source, split, (row.file, row.number)))
    absent = [column for column in rated.columns if column not in columns_rated]
    if absent:
        hint = "" if absent[0] in columns_found else nearest(absent[0], columns_found)
        raise DataError(f"no row rates it{hint}", file=rated.location.name, field=absent[0])
    return [rows[i] for i in sample_by_prompt([row.conversation.prompt_key for row in rows], limit)]


def sample_by_prompt(prompt_keys: Sequence[str], limit: int | None) -> list[int]:
    """Rows of a random choice of whole prompts, about `limit` rows in all, in order; the content decides which."""
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


def merge_objectives(sets: Iterable[RatedSet]) -> ObjectiveSet:
    """All objectives in order of appearance.

    Raises:
        DataError: where two sets give one objective different scales, or two columns of a set rate one objective.
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


def rating_value(row: Row, column: str, objective: Objective) -> float:
    """A raw rating, NaN where it is missing.

    Raises:
        DataError: for a value that is no number, or outside the objective's range; true and false are
            numbers on a range 0 to 1 only.
    """
    value = row.value(column)
    if value is None or (isinstance(value, (float, np.floating)) and math.isnan(value)):
        return math.nan
    if isinstance(value, (bool, np.bool_)):
        is_number = (objective.low, objective.high) == (0, 1)
    else:
        is_number = isinstance(value, (int, float, np.integer, np.floating))
    if not (is_number and objective.low <= value <= objective.high):
        raise row.error(f"found {shown(value)}, expected a number from {objective.low:g} to {objective.high:g}", column)
    return float(value)
