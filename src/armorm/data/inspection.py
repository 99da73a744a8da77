"""Inspect user data for `armorm init`, `extend` and `inspect`: layout, columns, probable rating scales, invalid rows.

A guess is the narrowest common scale that contains the values; other common scales that also do are listed with it. A
few values that no narrow scale holds (a 45 among ratings from 1 to 5) do not widen it, and cells that are no number
(`n/a`) do not make a rating column a text column: both are listed with their row, and are left out when the column is
read. The user confirms guesses, because a scale whose ends nobody used looks like a narrower one. Columns that are not
ratings (text, ids, times, counts beyond any common scale) are set aside with the reason.
"""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

from armorm.data.candidates import several_responses
from armorm.data.cells import rating_cell
from armorm.data.layout_detection import ROLES, recognised_columns
from armorm.data.preferences import preference_pair
from armorm.data.ratings import RatedSet, objective_name
from armorm.data.rejections import Rejections, read_rows
from armorm.data.rows import Row
from armorm.data.sources import Location
from armorm.errors import DataError, nearest
from armorm.objectives import Direction, Objective, ObjectiveSet

ColumnScale = tuple[float, float, "Direction | None"]
# Scales that rating forms use, narrow ones first.
SCALES: tuple[tuple[float, float], ...] = tuple(
    sorted(
        {(0, 1), (1, 3), (0, 2), (-1, 1), (1, 4), (0, 3), (1, 5), (0, 4), (-2, 2), (1, 6), (0, 5), (1, 7), (0, 6)}
        | {(-3, 3), (1, 9), (1, 10), (0, 10), (1, 100), (0, 100)},
        key=lambda scale: (scale[1] - scale[0], abs(scale[0] - 0.6)),  # of one width: from 1 or 0, then negative
    )
)  # fmt: skip
_NO_RATING = {
    "id", "row", "index", "number", "time", "timestamp", "date", "seconds", "tokens", "seed", "rater", "margin",
}  # fmt: skip
_LESS_IS_BETTER = (
    "harm", "toxic", "unsafe", "error", "offens", "bias", "hallucinat", "rude", "spam", "muddle", "fault",
)  # fmt: skip
_NEUTRAL = ("verbos", "length", "complexity", "formality")
_MARK = re.compile(r"found '\s*(n/?a|none|-+|\?+|\.|missing|unknown|skip(ped)?)\s*',", re.IGNORECASE)
_MANY = 10  # values from which one may be odd
_MOST_FAULTS = 1000  # listed of a column
_MOST_REASONS = 8  # columns whose reason an error message gives
_MOST_TEXTS = 3  # of a column without numbers, in an error message
MOST_ODD = 0.02  # share of the values that may be off a guessed scale (or one value, of at least ten)
MOST_TEXT = 0.2  # share of the cells of a rating column that may be text


@dataclass(frozen=True)
class ScaleGuess:
    """The scale that a number column is probably rated on.

    Attributes:
        column: its name in the file.
        low, high: the scale.
        direction: `lower` and `neutral` are guessed from the column's name.
        rated: number of values.
        lowest, highest, levels: smallest, largest and number of distinct values.
        others: other common scales that contain the values and are hardly wider.
        stated: the user gave the scale.
        raters: mean number of raters of a cell.
        spread: mean standard deviation between them, NaN for single raters.
        odd: number of cells that are left out: off the scale, or without a number.
    """

    column: str
    low: float
    high: float
    direction: Direction
    rated: int
    lowest: float
    highest: float
    levels: int
    others: tuple[tuple[float, float], ...] = ()
    stated: bool = False
    raters: float = 1.0
    spread: float = math.nan
    odd: int = 0


@dataclass
class Inspection:
    """What a file contains.

    Attributes:
        location: of the file, with the columns that the user stated.
        columns: the file's column of each role that has another name there.
        kinds: number of valid rows of each kind (`Row.kind`).
        rows, prompts: number of valid rows and of their distinct prompts.
        several: number of prompts with at least two responses.
        splits: number of valid rows of each split.
        guesses: scales of the rating columns.
        aside: of a file of ratings, the reason for each column that is not a rating.
        numbers: of each number column, how often each value occurs.
        other: the other columns.
        rejections: rows and cells that are left out.
    """

    location: Location
    columns: dict[str, str]
    kinds: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    prompts: int = 0
    several: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    guesses: list[ScaleGuess] = field(default_factory=list)
    aside: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, Counter[float]] = field(default_factory=dict)
    other: list[str] = field(default_factory=list)
    rejections: Rejections = field(default_factory=Rejections)

    @property
    def kind(self) -> str:
        """`pairs`, or `ratings` for conversations."""
        return "pairs" if self.kinds["pairs"] else "ratings"

    @property
    def why_unrated(self) -> str:
        """` (COLUMN: REASON; ...)` of columns that are not ratings, for an error message; '' if there are none."""
        reasons = [f"{column}: {reason}" for column, reason in self.aside.items()]
        more = ["..."] if len(reasons) > _MOST_REASONS else []
        return f" ({'; '.join(reasons[:_MOST_REASONS] + more)})" if reasons else ""


@dataclass
class _Column:
    """Values of a column that may be a rating: how often each occurs and in which row first, and what is no number.

    `files` and `numbers` hold the file and number of that first row, in the order of `values`: an id column has as many
    values as the file has rows, so the rows themselves, with their texts, must not be kept.
    """

    values: Counter[float] = field(default_factory=Counter)
    files: list[str] = field(default_factory=list)
    numbers: array[int] = field(default_factory=lambda: array("q"))
    raters: int = 0
    spreads: list[float] = field(default_factory=list)
    text: int = 0
    faults: list[DataError] = field(default_factory=list)

    def add(self, row: Row, name: str) -> None:
        cell = rating_cell(row.values[name])
        if not math.isnan(cell.value):
            if cell.value not in self.values:
                # One string object for all rows of a file: some readers make a new one for each row.
                same = bool(self.files) and self.files[-1] == row.file
                self.files.append(self.files[-1] if same else row.file)
                self.numbers.append(row.number)
            self.values[cell.value] += 1
            self.raters += cell.raters
            self.spreads += [] if math.isnan(cell.spread) else [cell.spread]
        if cell.fault:
            self.text += 1
            if len(self.faults) <= _MOST_FAULTS:
                self.faults.append(row.error(cell.fault, name))

    @property
    def is_number(self) -> bool:
        """Whether the cells are numbers, up to a few."""
        marks = sum(_is_mark(error) for error in self.faults)
        return bool(self.values) and self.text - marks <= MOST_TEXT * (self.values.total() + self.text)

    @property
    def reason(self) -> str:
        """Why a column that is not `is_number` is no rating."""
        if not self.values:
            return "text" if self.text else "every cell is empty"
        return f"{self.text:,} of {self.values.total() + self.text:,} cells are text"

    @property
    def texts(self) -> str:
        """The first few distinct texts of a column without numbers."""
        found = [error.problem.removeprefix("found ").removesuffix(", expected a number") for error in self.faults]
        distinct = list(dict.fromkeys(found))
        return ", ".join(distinct[:_MOST_TEXTS] + ["..."] * (len(distinct) > _MOST_TEXTS)) or "only empty cells"


def inspect_set(
    location: Location,
    *,
    columns: Mapping[str, str] | None = None,
    scales: Mapping[str, ColumnScale] | None = None,
    skipped: Sequence[str] = (),
) -> Inspection:
    """Read a file once and summarise it.

    Args:
        columns: the file's column for some of ours, instead of the one recognised by name.
        scales: low, high and direction (None: by the column's name) of columns whose scale the user states.
        skipped: columns that are not ratings.

    Raises:
        DataError: for a file without valid rows, an unknown column, or a column without numbers whose scale is stated.
    """
    stated, scales = dict(columns or {}), scales or {}
    found = Inspection(replace(location, columns=stated), {})
    seen: dict[str, _Column] = {}
    responses: Counter[str] = Counter()
    for row, (prompt, count) in read_rows(found.location, lambda row: (row, _prompt_key(row)), found.rejections):
        found.rows += 1
        found.columns = found.columns or recognised_columns(row.columns, stated)
        found.kinds[row.kind] += 1
        found.splits.update([str(row.values["split"])] if row.values.get("split") else [])
        responses[prompt] += count
        for name in row.values:
            if name not in ROLES:
                seen.setdefault(name, _Column()).add(row, name)
    if not found.rows:
        raise DataError("found no rows", file=location.name)
    found.prompts, found.several = len(responses), sum(count > 1 for count in responses.values())
    unknown = next((name for name in (*scales, *skipped) if name not in seen), None)
    if unknown is not None:
        raise DataError(
            f"found columns {', '.join(seen)}, expected it{nearest(unknown, seen)}", file=location.name, field=unknown
        )
    for name, column in seen.items():
        if column.is_number:
            found.numbers[name] = column.values
        else:
            found.other.append(name)
        if found.kind != "ratings":
            continue
        if name in skipped:
            found.aside[name] = "skipped"
        elif name in scales and not column.values:
            raise DataError(f"found {column.texts}; expected numbers", file=location.name, field=name)
        elif column.is_number or name in scales:
            _judge(found, name, column, scales.get(name))
        elif name != "tools":  # (part of the conversation)
            found.aside[name] = column.reason
    return found


def _prompt_key(row: Row) -> tuple[str, int]:
    """Key of a row's prompt, and its number of responses."""
    if row.kind == "pairs":
        return preference_pair(row).prompt_key, 1
    if row.kind == "conversations":
        return row.conversation().prompt_key, 1
    responses = several_responses(row)
    for fault in responses.faults.values():
        raise row.error(fault)
    return next(c.prompt_key for c in responses.conversations if c is not None), len(responses.conversations)


def _is_mark(error: DataError) -> bool:
    """Whether a cell that is no number is a mark of absence, such as `n/a`."""
    return _MARK.match(error.problem) is not None


def _judge(found: Inspection, name: str, column: _Column, stated: ColumnScale | None) -> None:
    counts = column.values
    direction = _direction(name)
    if stated is not None:
        _add_guess(found, name, column, stated[:2], stated[2] or direction, stated=True)
        return
    integers = len(counts) == counts.total() > 20 and all(value.is_integer() for value in counts)
    scale = None if integers else _scale_of(counts)
    if not _NO_RATING.isdisjoint(name.lower().replace("-", "_").split("_")):
        found.aside[name] = "its name is not that of a rating"
    elif len(counts) == 1:
        found.aside[name] = f"every value is {min(counts):g}"
    elif scale is not None:
        near = tuple(s for s in SCALES if s != scale and _holds(s, scale, counts) and _width(s) <= _width(scale) + 1)
        _add_guess(found, name, column, scale, direction, others=near)
    else:
        found.aside[name] = f"values from {min(counts):g} to {max(counts):g} fit no common scale"


def _add_guess(
    found: Inspection,
    name: str,
    column: _Column,
    scale: tuple[float, float],
    direction: Direction,
    *,
    others: tuple[tuple[float, float], ...] = (),
    stated: bool = False,
) -> None:
    counts, (low, high) = column.values, scale
    inside = {value: count for value, count in counts.items() if low <= value <= high}
    odd = [value for value in counts if value not in inside]
    for value, file, number in zip(counts, column.files, column.numbers, strict=True):
        if value not in inside:
            problem = f"found {value:g}, expected a number from {low:g} to {high:g}"
            found.rejections.reject_cell(DataError(problem, file=file, row=number, field=name))
    for error in column.faults:
        found.rejections.reject_cell(error)
    found.guesses.append(
        ScaleGuess(
            name,
            low,
            high,
            direction,
            sum(inside.values()),
            min(inside, default=low),
            max(inside, default=high),
            len(inside),
            others,
            stated,
            column.raters / counts.total(),
            fmean(column.spreads) if column.spreads else math.nan,
            sum(counts[value] for value in odd) + column.text,
        )
    )


def _scale_of(counts: Counter[float]) -> tuple[float, float] | None:
    """The narrowest common scale that holds the values, or all but a few if it is less than half as wide."""
    total = counts.total()
    whole = next((scale for scale in SCALES if _outside(scale, counts) == 0), None)
    spared = max(1, int(MOST_ODD * total)) if total >= _MANY else 0
    most = next((scale for scale in SCALES if _outside(scale, counts) <= spared), None)
    if most is None or (whole is not None and _width(most) * 2 >= _width(whole)):
        return whole
    inner = [value for value in counts if most[0] <= value <= most[1]]
    return most if len(inner) > 1 else whole


def _outside(scale: tuple[float, float], counts: Counter[float]) -> int:
    return sum(count for value, count in counts.items() if not scale[0] <= value <= scale[1])


def _holds(other: tuple[float, float], scale: tuple[float, float], counts: Counter[float]) -> bool:
    """Whether another scale holds every value that a scale holds."""
    return all(other[0] <= value <= other[1] for value in counts if scale[0] <= value <= scale[1])


def _width(scale: tuple[float, float]) -> float:
    return scale[1] - scale[0]


def _direction(name: str) -> Direction:
    lower = name.lower()
    if any(word in lower for word in _NEUTRAL):
        return "neutral"
    return "lower" if any(word in lower for word in _LESS_IS_BETTER) else "higher"


def rated_sets(
    known: ObjectiveSet, data: Sequence[str], scales: Mapping[str, ColumnScale]
) -> tuple[list[RatedSet], list[tuple[str, float, float]]]:
    """Rated sets of files whose ratings are added to a model.

    Args:
        known: the model's objectives, which keep their scale.
        data: paths or hub ids.
        scales: low, high and direction (None: `higher`) of each rating column; if empty, every rating column that
            `inspect_set` finds, on the scale that it guesses.

    Returns:
        the sets; name and range of each new objective whose range was guessed.

    Raises:
        DataError: for a file without a rating column.
    """
    sets, taken = [], []
    for name in data:
        location = Location.find(name)
        source = Path(location.name).name.split(".")[0]
        own, why = dict(scales), ""
        if not scales:
            inspected = inspect_set(location)
            own = {guess.column: (guess.low, guess.high, guess.direction) for guess in inspected.guesses}
            why = inspected.why_unrated
        if not own:
            problem = f"found no column of ratings (numbers that vary, on a common scale){why}"
            raise DataError(problem, file=location.name)
        columns = {}
        for column, (low, high, direction) in own.items():
            objective = objective_name(column, source)
            if objective in known.names:
                columns[column] = known[known.position(objective)]
                continue
            columns[column] = Objective.rated(
                objective, low, high, source=objective.split("-")[0], direction=direction or "higher"
            )
            if not scales:
                taken.append((objective, low, high))
        sets.append(RatedSet(location, columns, source))
    return sets, taken
