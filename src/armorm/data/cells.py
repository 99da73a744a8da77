"""Rating cells: a number, text that is one, or the ratings of several raters.

`"4"`, `"4,5"` (decimal comma), `true` and `"false"` are numbers. Null, NaN, blank text and the texts `nan`, `null` and
`none` (as programs write them) are missing. A list (in text: a JSON list, or numbers separated by `;` or `|`) holds one
rating per rater, each a number or an object with `value` (as Argilla exports them; only submitted responses count): the
cell is their mean, and their standard deviation is kept.

Anything else is a fault of the cell: `n/a`, a word, a number outside the scale. It counts as missing, and the other
raters of the cell count.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from armorm.errors import shown

_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d{1,2}")
_RATING_KEYS = ("value", "rating", "Rating", "score")
_NOTHING = ("", "nan", "null", "none")
_DISCARDED = ("draft", "discarded", "pending", "missing")


@dataclass(frozen=True)
class Cell:
    """What a rating cell holds.

    Attributes:
        value: mean of its raters, NaN if missing.
        raters: number of ratings.
        spread: their sample standard deviation, NaN for fewer than two.
        fault: what is wrong with (a part of) it, without the place; '' if nothing is.
        outside: the fault is a number outside the scale.
    """

    value: float = math.nan
    raters: int = 0
    spread: float = math.nan
    fault: str = ""
    outside: bool = False


_MISSING = Cell()


def number_of(value: Any) -> float | bool | None:
    """The number that a value is or that its text says (`true` and `false` as bool), None if there is none."""
    value = _plain(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    if not isinstance(value, str):
        return None
    text = value.strip()
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return float(text.replace(",", ".") if _DECIMAL_COMMA.fullmatch(text) else text)
    except ValueError:
        return None


def is_missing(value: Any) -> bool:
    """Whether a value is null, NaN, an empty list, blank text, or text that stands for null or NaN."""
    value = _plain(value)
    if isinstance(value, float):
        return math.isnan(value)
    if isinstance(value, str):
        return value.strip().lower() in _NOTHING
    return value is None or (isinstance(value, (list, tuple)) and not value)


def rating_cell(value: Any, low: float = -math.inf, high: float = math.inf) -> Cell:
    """Read a cell that was rated from `low` to `high`; booleans are numbers only if that is 0 to 1, or no scale."""
    if is_missing(value):
        return _MISSING
    booleans = (low, high) in ((0, 1), (-math.inf, math.inf))
    found: list[float] = []
    fault, outside = "", False
    for entry in _raters(value):
        number = number_of(entry)
        if number is None and is_missing(entry):
            continue
        if number is not None and not math.isfinite(number):
            number = None
        if number is not None and (booleans or not isinstance(number, bool)) and low <= number <= high:
            found.append(float(number))
        elif not fault:
            scale = f" from {low:g} to {high:g}" if math.isfinite(low) else ""
            fault = f"found {shown(entry)}, expected a number{scale}"
            outside = number is not None
    if not found:
        return Cell(fault=fault, outside=outside)
    if len(found) == 1:
        return Cell(found[0], 1, fault=fault, outside=outside)
    return Cell(fmean(found), len(found), stdev(found), fault, outside)


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy as those of Python. (numpy is not imported here: commands start without it.)"""
    return value.tolist() if hasattr(value, "tolist") else value


def _raters(value: Any) -> Iterable[Any]:
    value = _plain(value)
    if isinstance(value, str):
        value = _listed(value)
    if isinstance(value, (list, tuple)):
        return _submitted(value)
    return _submitted([value])


def _submitted(entries: Sequence[Any]) -> Iterator[Any]:
    for entry in entries:
        if not isinstance(entry, Mapping):
            yield entry
        elif entry.get("status") not in _DISCARDED:
            yield next((entry[key] for key in _RATING_KEYS if key in entry), entry)


def _listed(text: str) -> Any:
    """The list that a text says, or the text."""
    if text.lstrip().startswith("["):
        try:
            found = json.loads(text)
        except ValueError:
            return text
        return found if isinstance(found, list) else text
    parts = re.split(r"[;|]", text)
    return parts if len(parts) > 1 and all(number_of(part) is not None for part in parts) else text
