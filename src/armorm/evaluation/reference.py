"""Reference rows: published figures that may stand beside one's own, each only where it means the same.

In:  `Results`.
Out: `PublishedTable`: columns that the result has in full, rows of published models, what was left out.

The figures lie in reference.json, by benchmark: column -> heading, rows with their source. A column is
shown only where the result covers the whole published benchmark (`FigureResult.is_complete`): a section
without one of its subsets, or on a part of its rows, is another quantity. Figures that are known only on
another basis are named, never set beside.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from armorm.evaluation.results import Results


@dataclass(frozen=True)
class PublishedTable:
    """Published rows for one result.

    Attributes:
        columns: heading by figure (`level/name`), those that may be compared.
        own: the result's figures.
        rows: model, figures and source of each published row that has any of the columns.
        withheld: heading of each column that the result lacks something for, with what it lacks.
        unplaced: published figures on another basis.
    """

    columns: Mapping[str, str]
    own: Mapping[str, float]
    rows: Sequence[Mapping[str, Any]]
    withheld: Mapping[str, str]
    unplaced: Sequence[str]


def published(results: Results) -> PublishedTable:
    """The published rows that may stand beside a result."""
    entry = reference().get(results.benchmark, {"columns": {}, "rows": []})
    own: dict[str, float] = {}
    columns: dict[str, str] = {}
    withheld: dict[str, str] = {}
    for place, heading in entry["columns"].items():
        level, _, name = place.partition("/")
        figure = results.level(level).get(name)
        if figure is not None and figure.is_complete:
            columns[place], own[place] = heading, figure.value
        else:
            lacking = figure.lacking if figure is not None else ()
            withheld[heading] = ", ".join(lacking) or "not measured"
    rows = [row for row in entry["rows"] if any(place in columns for place in row["figures"])]
    return PublishedTable(columns, own, rows, withheld, entry.get("unplaced", ()))


@lru_cache(maxsize=1)
def reference() -> dict[str, Any]:
    """The data file."""
    return json.loads(files("armorm.evaluation").joinpath("reference.json").read_text(encoding="utf-8"))
