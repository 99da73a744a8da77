"""What `armorm extend` is given on its command line, as rated sets.

In:  files, and objectives written `COLUMN=LOW:HIGH[:lower|:neutral]`, or none: then every column of numbers.
Out: `RatedSet`s; an objective that the model has keeps the model's scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from armorm.data.ratings import RatedSet, objective_name
from armorm.data.sources import Location
from armorm.embedded import embedded_path
from armorm.errors import DataError, RecipeError
from armorm.model.configuration import ArmoRMConfig
from armorm.objectives import DIRECTIONS, Objective, ObjectiveSet

_OTHER = {"messages", "prompt", "response", "split"}


def rated_sets(
    model: str, data: Sequence[str], objectives: Sequence[str]
) -> tuple[list[RatedSet], list[tuple[str, float, float]]]:
    """Rated sets of files.

    Returns:
        the sets; name and range of each objective whose range was taken from the data.

    Raises:
        RecipeError: for an objective that is not written as expected.
        DataError: for a file without a column of numbers.
    """
    known = ArmoRMConfig.from_pretrained(embedded_path(model) or model).objective_set
    given = dict(_parsed(text) for text in objectives)
    sets, taken = [], []
    for name in data:
        location = Location.find(name)
        source = Path(location.name).name.split(".")[0]
        ranges = given or {column: (low, high, "higher") for column, (low, high) in _ranges(location).items()}
        columns = {}
        for column, (low, high, direction) in ranges.items():
            objective = _objective(known, column, source, low, high, direction)
            columns[column] = objective
            if not given and objective.name not in known.names:
                taken.append((objective.name, low, high))
        sets.append(RatedSet(location, columns, source))
    return sets, taken


def preference_locations(data: Sequence[str]) -> list[Location]:
    """Where the pairs are."""
    return [Location.find(name) for name in data]


def _objective(known: ObjectiveSet, column: str, source: str, low: float, high: float, direction: str) -> Objective:
    name = objective_name(column, source)
    if name in known.names:
        return known[known.position(name)]
    return Objective.rated(name, low, high, source=name.split("-")[0], direction=direction)  # type: ignore[arg-type]


def _parsed(text: str) -> tuple[str, tuple[float, float, str]]:
    column, _, scale = text.partition("=")
    parts = scale.split(":")
    try:
        low, high = (float(part) for part in parts[:2])
        direction = parts[2] if len(parts) > 2 else "higher"
    except ValueError:
        low = high = 0.0
        direction = ""
    if not column or not low < high or direction not in DIRECTIONS or len(parts) > 3:
        raise RecipeError(f"--objective {text!r}: expected COLUMN=LOW:HIGH, COLUMN=LOW:HIGH:lower or :neutral")
    return column, (low, high, direction)


def _ranges(location: Location) -> dict[str, tuple[float, float]]:
    """Lowest and highest value of each column that holds nothing but numbers."""
    found: dict[str, tuple[float, float]] = {}
    other = set(_OTHER)
    for row in location.rows():
        for name, value in row.values.items():
            if name in other or value is None:
                continue
            if isinstance(value, (bool, int, float)):
                low, high = found.get(name, (float(value), float(value)))
                found[name] = (min(low, float(value)), max(high, float(value)))
            else:
                other.add(name)
    ranges = {name: ends for name, ends in found.items() if name not in other and ends[0] < ends[1]}
    if not ranges:
        raise DataError("no column of numbers that vary, expected ratings", file=location.name)
    return ranges
