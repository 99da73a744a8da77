"""Inspection: what a team's own file holds, and which scales its ratings are probably on.

In:  a `Location` (CSV, TSV, JSON lines, Parquet, ...), what the user says of its columns.
Out: `Inspection`: the columns that hold prompt and response, a `ScaleGuess` for each column of numbers, counts, faults.

A guess is the narrowest common scale that holds every value seen; others that do too are named beside it. It is
for a person to confirm: a scale whose ends nobody used looks like a narrower one. Columns that are numbers but no
ratings (identifiers, times, counts beyond any common scale) are set aside, by name and with the reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from armorm.conversation import Conversation
from armorm.data.layouts import renamed
from armorm.data.preferences import preference_pair
from armorm.data.ratings import row_conversation
from armorm.data.rows import Row
from armorm.data.sources import Location
from armorm.errors import DataError
from armorm.objectives import Direction

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
_NO_RATING = (
    "id",
    "row",
    "index",
    "number",
    "time",
    "timestamp",
    "date",
    "seconds",
    "tokens",
    "seed",
    "rater",
    "margin",
)
_LESS_IS_BETTER = (
    "harm",
    "toxic",
    "unsafe",
    "error",
    "offens",
    "bias",
    "hallucinat",
    "rude",
    "spam",
    "muddle",
    "fault",
)
_NEUTRAL = ("verbos", "length", "complexity", "formality")


@dataclass(frozen=True)
class ScaleGuess:
    """What a column of numbers is probably rated on.

    Attributes:
        column: its name in the file.
        low, high: the scale.
        direction: `lower` and `neutral` by the column's name.
        rated: values seen.
        lowest, highest, levels: of them.
        others: further common scales that hold them and are hardly wider.
        stated: whether the user gave the scale.
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
    """What a file holds.

    Attributes:
        location: of it, with its columns renamed where they need be.
        columns: the file's column for each of ours, where the names differ.
        kind: `ratings` or `pairs`.
        rows, prompts: readable rows and their distinct prompts.
        several: prompts with at least two responses.
        guesses: of the rating columns.
        aside: reason for each column of numbers that is no rating.
        faults: refused rows in all, and the first few.
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


def inspect_set(
    location: Location,
    *,
    columns: Mapping[str, str] | None = None,
    scales: Mapping[str, tuple[float, float, Direction | None]] | None = None,
    skipped: Sequence[str] = (),
) -> Inspection:
    """Read a file once and say what it holds.

    Args:
        columns: the file's column for some of ours, where the user knows better.
        scales: low, high and direction (None: by the name) of columns, where the user states them.
        skipped: columns that are no ratings.

    Raises:
        DataError: for a file without rows, or in which no column looks like a prompt and a response.
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
    values: dict[str, Counter[float]] = {}
    texts: set[str] = set()
    responses: Counter[str] = Counter()
    for row in found.location.rows_or_faults():
        try:
            if isinstance(row, DataError):
                raise row
            conversation = _conversation(row, kind)
        except DataError as error:
            found.fault_count += 1
            found.faults += [str(error)] if len(found.faults) < 5 else []
            continue
        found.rows += 1
        responses[conversation.prompt_key] += 1
        for name in row.values:
            if name not in _ROLES:
                _count(name, row.value(name), values, texts)
    found.prompts, found.several = len(responses), sum(count > 1 for count in responses.values())
    if kind == "ratings":
        stated = scales or {}
        unknown = [name for name in (*stated, *skipped) if name not in values and name not in texts]
        if unknown:
            raise DataError(
                f"found columns {', '.join(first.values)}, expected it", file=location.name, field=unknown[0]
            )
        for name in first.values:
            if name in values and name not in skipped and name not in texts:
                _judge(found, name, values[name], stated.get(name))
    return found


def _conversation(row: Row, kind: str) -> Conversation:
    return preference_pair(row).chosen if kind == "pairs" else row_conversation(row)


def _roles(row: Row, stated: Mapping[str, str]) -> dict[str, str]:
    """The file's column for each role that it has."""
    plain = {name.strip().lower().replace(" ", "_"): name for name in row.values}
    roles = {}
    for role, words in _ROLES.items():
        own = stated.get(role) or next((plain[word] for word in words if word in plain), None)
        if own is not None:
            if own not in row.values:
                raise row.error(f"found columns {', '.join(row.values)}, expected it", own)
            roles[role] = own
    return roles


def _count(name: str, value: object, values: dict[str, Counter[float]], texts: set[str]) -> None:
    if isinstance(value, (bool, int, float)):
        if not math.isnan(value):
            values.setdefault(name, Counter())[float(value)] += 1
    elif value is not None:
        texts.add(name)


def _judge(
    found: Inspection, name: str, counts: Counter[float], stated: tuple[float, float, Direction | None] | None
) -> None:
    low, high, rated = min(counts), max(counts), counts.total()
    seen = (rated, low, high, len(counts))
    direction = _direction(name)
    if stated is not None:
        found.guesses.append(ScaleGuess(name, stated[0], stated[1], stated[2] or direction, *seen, stated=True))
        return
    words = name.lower().replace("-", "_").split("_")
    if set(words) & set(_NO_RATING):
        found.aside[name] = "its name is that of no rating"
    elif len(counts) == 1:
        found.aside[name] = f"every value is {low:g}"
    elif (fitting := [scale for scale in SCALES if scale[0] <= low and high <= scale[1]]) and not (
        len(counts) == rated > 20 and all(value.is_integer() for value in counts)
    ):
        best = fitting[0]
        near = tuple(s for s in fitting[1:] if s[1] - s[0] <= best[1] - best[0] + 1)
        found.guesses.append(ScaleGuess(name, best[0], best[1], direction, *seen, others=near))
    else:
        found.aside[name] = f"values from {low:g} to {high:g} are on no common scale"


def _direction(name: str) -> Direction:
    lower = name.lower()
    if any(word in lower for word in _NEUTRAL):
        return "neutral"
    return "lower" if any(word in lower for word in _LESS_IS_BETTER) else "higher"
