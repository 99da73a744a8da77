"""Inspect user data for `armorm init` and `armorm extend`: columns, probable rating scales, invalid rows.

A guess is the narrowest common scale that contains every value; other common scales that also do are listed with it.
The user confirms guesses, because a scale whose ends nobody used looks like a narrower one. Number columns that are
not ratings (ids, times, counts beyond any common scale) are set aside with the reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from armorm.conversation import Conversation
from armorm.data.layouts import renamed
from armorm.data.preferences import preference_pair
from armorm.data.ratings import RatedSet, objective_name
from armorm.data.rows import Row
from armorm.data.sources import Location
from armorm.errors import DataError
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
_ROLES = {
    "messages": ("messages", "conversation", "conversations", "dialogue", "dialog"),
    "prompt": ("prompt", "question", "instruction", "query", "request", "input", "user", "context"),
    "response": ("response", "answer", "completion", "reply", "output", "assistant", "generation"),
    "chosen": ("chosen", "preferred", "winner", "better"),
    "rejected": ("rejected", "dispreferred", "loser", "worse"),
    "split": ("split",),
}
_NO_RATING = {
    "id", "row", "index", "number", "time", "timestamp", "date", "seconds", "tokens", "seed", "rater", "margin",
}  # fmt: skip
_LESS_IS_BETTER = (
    "harm", "toxic", "unsafe", "error", "offens", "bias", "hallucinat", "rude", "spam", "muddle", "fault",
)  # fmt: skip
_NEUTRAL = ("verbos", "length", "complexity", "formality")
_SHOWN_FAULTS = 5


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


@dataclass
class Inspection:
    """What a file contains.

    Attributes:
        location: of the file, its columns renamed where necessary.
        columns: the file's column for each of ours, where the names differ.
        kind: `ratings` or `pairs`.
        rows, prompts: number of valid rows and of their distinct prompts.
        several: number of prompts with at least two responses.
        guesses: scales of the rating columns.
        aside: reason for each number column that is not a rating.
        fault_count, faults: number of invalid rows, and the first few errors.
    """

    location: Location
    columns: dict[str, str]
    kind: str
    rows: int = 0
    prompts: int = 0
    several: int = 0
    guesses: list[ScaleGuess] = field(default_factory=list)
    aside: dict[str, str] = field(default_factory=dict)
    fault_count: int = 0
    faults: list[str] = field(default_factory=list)


class _Columns:
    """Values of the columns that contain only numbers."""

    def __init__(self) -> None:
        self._values: dict[str, Counter[float]] = {}
        self._text: set[str] = set()

    def add(self, row: Row) -> None:
        for name in row.values:
            value = row.value(name)
            if name in _ROLES or value is None:
                continue
            if not isinstance(value, (bool, int, float)):
                self._text.add(name)
            elif not math.isnan(value):
                self._values.setdefault(name, Counter())[float(value)] += 1

    def numbers(self) -> dict[str, Counter[float]]:
        """How often each value of each number column occurs."""
        return {name: counts for name, counts in self._values.items() if name not in self._text}

    def __contains__(self, name: str) -> bool:
        return name in self._values or name in self._text


def inspect_set(
    location: Location,
    *,
    columns: Mapping[str, str] | None = None,
    scales: Mapping[str, ColumnScale] | None = None,
    skipped: Sequence[str] = (),
) -> Inspection:
    """Read a file once and summarise it.

    Args:
        columns: the file's column for some of ours, instead of the one guessed by name.
        scales: low, high and direction (None: by the column's name) of columns whose scale the user states.
        skipped: columns that are not ratings.

    Raises:
        DataError: for a file without valid rows, or without columns for a prompt and a response.
    """
    first = next((row for row in location.rows_or_faults() if isinstance(row, Row)), None)
    if first is None:
        raise DataError("found no rows that can be read", file=location.name)
    roles = _roles(first, columns or {})
    kind = "pairs" if "chosen" in roles and "rejected" in roles else "ratings"
    if kind == "ratings" and "messages" not in roles and not {"prompt", "response"} <= set(roles):
        raise DataError(
            f"found columns {', '.join(first.values)}, expected a prompt and a response (say which with "
            "--column prompt=NAME --column response=NAME), messages, or chosen and rejected",
            file=location.name,
        )
    differing = {ours: own for ours, own in roles.items() if ours != own}
    found = Inspection(replace(location, layout=renamed(differing)) if differing else location, differing, kind)
    seen = _Columns()
    responses: Counter[str] = Counter()
    for row in found.location.rows_or_faults():
        try:
            if isinstance(row, DataError):
                raise row
            conversation = _conversation(row, kind)
        except DataError as error:
            found.fault_count += 1
            found.faults += [str(error)] if len(found.faults) < _SHOWN_FAULTS else []
            continue
        found.rows += 1
        responses[conversation.prompt_key] += 1
        seen.add(row)
    found.prompts, found.several = len(responses), sum(count > 1 for count in responses.values())
    if kind == "ratings":
        stated, numbers = scales or {}, seen.numbers()
        unknown = next((name for name in (*stated, *skipped) if name not in seen), None)
        if unknown is not None:
            raise DataError(f"found columns {', '.join(first.values)}, expected it", file=location.name, field=unknown)
        for name in first.values:
            if name in numbers and name not in skipped:
                _judge(found, name, numbers[name], stated.get(name))
    return found


def _conversation(row: Row, kind: str) -> Conversation:
    return preference_pair(row).chosen if kind == "pairs" else row.conversation()


def _roles(row: Row, stated: Mapping[str, str]) -> dict[str, str]:
    """The file's column for each of `_ROLES` that it has."""
    plain = {name.strip().lower().replace(" ", "_"): name for name in row.values}
    roles = {}
    for role, words in _ROLES.items():
        own = stated.get(role) or next((plain[word] for word in words if word in plain), None)
        if own is not None:
            if own not in row.values:
                raise row.error(f"found columns {', '.join(row.values)}, expected it", own)
            roles[role] = own
    return roles


def _judge(found: Inspection, name: str, counts: Counter[float], stated: ColumnScale | None) -> None:
    low, high, rated = min(counts), max(counts), counts.total()
    seen = (rated, low, high, len(counts))
    direction = _direction(name)
    if stated is not None:
        found.guesses.append(ScaleGuess(name, stated[0], stated[1], stated[2] or direction, *seen, stated=True))
        return
    if not _NO_RATING.isdisjoint(name.lower().replace("-", "_").split("_")):
        found.aside[name] = "its name is not that of a rating"
    elif len(counts) == 1:
        found.aside[name] = f"every value is {low:g}"
    elif (fitting := [scale for scale in SCALES if scale[0] <= low and high <= scale[1]]) and not (
        len(counts) == rated > 20 and all(value.is_integer() for value in counts)
    ):
        best = fitting[0]
        near = tuple(s for s in fitting[1:] if s[1] - s[0] <= best[1] - best[0] + 1)
        found.guesses.append(ScaleGuess(name, best[0], best[1], direction, *seen, others=near))
    else:
        found.aside[name] = f"values from {low:g} to {high:g} fit no common scale"


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
        scales: low, high and direction (None: `higher`) of each rating column; if empty, every number column is one,
            from its lowest to its highest value.

    Returns:
        the sets; name and range of each new objective whose range was taken from the data.

    Raises:
        DataError: for a file without a number column.
    """
    sets, taken = [], []
    for name in data:
        location = Location.find(name)
        source = Path(location.name).name.split(".")[0]
        columns = {}
        for column, (low, high, direction) in (scales or _ranges(location)).items():
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


def _ranges(location: Location) -> dict[str, ColumnScale]:
    """Lowest and highest value of each number column whose values vary."""
    seen = _Columns()
    for row in location.rows():
        seen.add(row)
    numbers = seen.numbers()
    if not any(len(counts) > 1 for counts in numbers.values()):
        raise DataError("no column of numbers that vary, expected ratings", file=location.name)
    return {name: (min(counts), max(counts), None) for name, counts in numbers.items() if len(counts) > 1}
