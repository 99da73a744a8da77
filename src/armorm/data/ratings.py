"""Rated conversations: several sets with their own objectives and scales, merged into one table.

Missing ratings stay missing (NaN). Objectives of different sources stay separate even if their names are the same: a
column without a source in its name gets its set's (`helpfulness` of `helpsteer` becomes `helpsteer-helpfulness`). Two
sets may rate the same objective (parts of one source) if they agree on its scale.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from armorm.conversation import Conversation
from armorm.data.rows import Row
from armorm.data.sources import Location
from armorm.errors import DataError, nearest, shown
from armorm.objectives import Objective, ObjectiveSet

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
    """

    conversations: list[Conversation]
    ratings: np.ndarray
    objectives: ObjectiveSet
    sources: list[str]
    splits: list[str]
    origins: list[tuple[str, int]] = field(default_factory=list)
    edits: list[str] = field(default_factory=list)

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
        )

    def with_column(self, objective: Objective, raw: np.ndarray) -> RatingTable:
        """The table with one more objective, raw values (n,) for every row."""
        objectives = ObjectiveSet([*self.objectives, objective])
        ratings = np.column_stack([self.ratings, raw])
        return replace(self, ratings=ratings, objectives=objectives)

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


def objective_name(column: str, source: str) -> str:
    """Name of a column's objective: prefixed with the source, unless the column's name contains one (`a-b`)."""
    return column if "-" in column else f"{source}-{column}"


def read_ratings(sets: Sequence[RatedSet], limit: int | None = None) -> RatingTable:
    """Read and merge rated sets.

    Args:
        limit: approximate number of rows to keep of each set, whatever its own.

    Raises:
        DataError: naming file, row and field of the first invalid value.
    """
    objectives = merge_objectives(sets)
    table = RatingTable([], np.empty((0, len(objectives))), objectives, [], [])
    for rated in sets:
        part = _read_set(rated, objectives)
        part = part.take(sample_by_prompt([c.prompt_key for c in part.conversations], smaller(limit, rated.rows)))
        table.ratings = np.concatenate([table.ratings, part.ratings])
        for name in ("conversations", "sources", "splits", "origins"):
            getattr(table, name).extend(getattr(part, name))
    return table


def _read_set(rated: RatedSet, objectives: ObjectiveSet) -> RatingTable:
    table = RatingTable([], np.empty(0), objectives, [], [])
    ratings: list[np.ndarray] = []
    columns_rated: set[str] = set()
    columns_found: set[str] = set()
    for row in rated.location.rows():
        values = np.full(len(objectives), np.nan)
        for column, objective in rated.columns.items():
            value = rating_value(row, column, objective)
            if not math.isnan(value):
                values[objectives.position(objective.name)] = value
                columns_rated.add(column)
        columns_found.update(row.values)
        table.splits.append(row.split_role(rated.train_split))
        table.conversations.append(row.conversation())
        ratings.append(values)
        table.origins.append((row.file, row.number))
    absent = [column for column in rated.columns if column not in columns_rated]
    if absent:
        hint = "" if absent[0] in columns_found else nearest(absent[0], columns_found)
        raise DataError(f"no row rates it{hint}", file=rated.location.name, field=absent[0])
    table.ratings = np.array(ratings).reshape(len(ratings), len(objectives))
    table.sources = [rated.source] * len(ratings)
    return table


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


def rating_value(row: Row, column: str, objective: Objective) -> float:
    """A raw rating, NaN if missing.

    Raises:
        DataError: for a value that is not a number, or outside the range; booleans are numbers only if the range is
            0 to 1.
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
