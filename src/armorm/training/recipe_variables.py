"""Environment variables in a recipe, `${NAME}` or `${NAME:-default}`: expanded for a run, kept as written in files.

A recipe is stored next to the model that it makes, so what a variable held when the run started is never written out:
`references_kept` puts the references back at their places. Variables that hold credentials are rejected by name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from armorm.errors import RecipeError

Path = tuple[str | int, ...]  # keys and positions from the top of a recipe
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
_CREDENTIAL = re.compile(r"(^|_)(TOKEN|(API|ACCESS|SECRET|PRIVATE|AUTH)_?KEY|SECRET|PASSWORD|CREDENTIALS?)$", re.I)
# Keys of a section that may be written in short: `[low, high]` for a range, a name for a set.
_SHORT_LIST, _SHORT_TEXT = "range", "set"
# Names of fields that are written otherwise in a file.
_FIELDS = {"from_": "from", "constructed": "construct"}


def expanded(values: Any, place: Path = ()) -> tuple[Any, dict[Path, str]]:
    """The values with every variable replaced, and the texts that had any, by their place.

    Raises:
        RecipeError: for a variable that is not set and has no default, or that holds credentials.
    """
    found: dict[Path, str] = {}
    if isinstance(values, (dict, list)):
        entries = list(values.items() if isinstance(values, dict) else enumerate(values))
        replaced: dict[Any, Any] = {}
        for key, entry in entries:
            replaced[key], inner = expanded(entry, (*place, key))
            found |= inner
        return (replaced if isinstance(values, dict) else list(replaced.values())), found
    if isinstance(values, str) and _VARIABLE.search(values):
        return _VARIABLE.sub(lambda match: _value(match, place), values), {place: values}
    return values, found


def references_kept(values: dict[str, Any], references: Mapping[Path, str]) -> dict[str, Any]:
    """Values of a recipe as they are stored: with its references instead of what they stood for.

    Args:
        values: the recipe as plain dictionaries and lists; changed in place.

    Raises:
        RecipeError: for a reference whose place is not in the values, so that it cannot be kept.
    """
    for place, text in references.items():
        holder: Any = None
        key: Any = None
        found: Any = values
        for part in place:
            if isinstance(part, int) and isinstance(found, dict):
                found = found.get(_SHORT_LIST)
            holder, key = found, _FIELDS.get(part, part) if isinstance(part, str) else part
            if not (isinstance(holder, dict) and key in holder) and not (
                isinstance(holder, list) and isinstance(key, int) and key < len(holder)
            ):
                raise RecipeError(f"{dotted(place)}: a variable cannot be used here, expected the value itself")
            found = holder[key]
        if isinstance(found, dict) and _SHORT_TEXT in found:
            holder, key = found, _SHORT_TEXT
        assert holder is not None
        holder[key] = text
    return values


def _value(match: re.Match[str], place: Path) -> str:
    name = match[1]
    if _CREDENTIAL.search(name):
        raise RecipeError(
            f"{dotted(place)}: found ${{{name}}}, which holds credentials; expected none: a recipe is stored with its "
            "model, and libraries read credentials from the environment themselves"
        )
    value = os.environ.get(name) or match[2]
    if value is None:
        raise RecipeError(
            f"{dotted(place)}: environment variable {name} is not set and has no default (${{{name}:-default}})"
        )
    return value


def dotted(place: Path) -> str:
    """A place as messages name it: `ratings.0.data`."""
    return ".".join(map(str, place))
