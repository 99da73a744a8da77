"""Results: everything an evaluation found, as one JSON file that two runs can be compared by.

In:  figures, audits, what was evaluated on what.
Out: a file with one entry an example (scores, margin, what decided), the figures of every level with
     interval, number of prompts and baselines, and the names of model, backbone, data and program.

No text of a conversation is in it: examples are addressed by content keys, and by the benchmark's ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from armorm.errors import DataError
from armorm.evaluation.examples import Item
from armorm.evaluation.metrics import LEVELS
from armorm.files import plain, write_json

FORMAT = "armorm-evaluation"

VERSION = 1


@dataclass(frozen=True)
class FigureResult:
    """One figure of a result.

    Attributes:
        level, name: as in `Figure`.
        value: NaN where the data lacks what it needs.
        prompts, examples: that it rests on.
        interval: 95%, None below thirty prompts.
        baselines: the same figure by `length`, `prompt_only` and `chance`, each where it makes sense.
        lacking: what the full benchmark has in it and the data has not.
        unit: `share`, `correlation` or `raw` (less is better).
    """

    level: str
    name: str
    value: float
    prompts: int
    examples: int
    interval: tuple[float, float] | None = None
    baselines: Mapping[str, float] = field(default_factory=dict)
    lacking: tuple[str, ...] = ()
    unit: str = "share"

    @property
    def is_complete(self) -> bool:
        """Whether it is the published benchmark's own figure: nothing is lacking, and it has a value."""
        return not self.lacking and bool(np.isfinite(self.value))


@dataclass(frozen=True)
class Results:
    """What an evaluation found.

    Attributes:
        benchmark: its name.
        model: name, kind, backbone, fingerprints.
        data: where it came from, its fingerprint, rows left out.
        counts: examples, prompts, distinct conversations, refused, truncated, ties.
        figures: of all levels.
        audits: length, format, objectives, gate, calibration, where they apply.
        examples: one entry an example.
        objectives: names of the objectives, for ratings.
        raw: whether scores are raw ratings.
        refused: place and reason of every refused response.
        armorm_version: of the program.
    """

    benchmark: str
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    counts: Mapping[str, int]
    figures: Sequence[FigureResult]
    audits: Mapping[str, Any]
    examples: Sequence[Mapping[str, Any]]
    objectives: Sequence[str] = ()
    raw: bool = False
    refused: Sequence[Mapping[str, Any]] = ()
    armorm_version: str = ""

    def level(self, name: str) -> dict[str, FigureResult]:
        """Figures of one level by name."""
        return {figure.name: figure for figure in self.figures if figure.level == name}

    @property
    def items(self) -> list[Item]:
        """The items of its examples."""
        return [Item.from_dict(entry) for entry in self.examples]

    @property
    def scores(self) -> list[np.ndarray]:
        """The scores of its examples, NaN where refused."""
        return [
            np.array([np.nan if score is None else score for score in entry["scores"]], np.float64)
            for entry in self.examples
        ]

    def to_dict(self, *, examples: bool = True) -> dict[str, Any]:
        """Plain values in the order of the file."""
        found: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "armorm_version": self.armorm_version,
            "benchmark": self.benchmark,
            "model": dict(self.model),
            "data": dict(self.data),
            "counts": dict(self.counts),
        }
        found |= {level: {name: _entry(f) for name, f in self.level(level).items()} for level in LEVELS}
        if self.objectives:
            found |= {"objectives": list(self.objectives), "raw": self.raw}
        found |= {"audits": self.audits, "refused": list(self.refused)}
        if examples:
            found["examples"] = list(self.examples)
        return plain(found)

    def save(self, path: str | Path) -> None:
        """Write the file, whole."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read a file.

        Raises:
            DataError: for a file that is no result of an evaluation.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"cannot be read: {error}", file=path) from None
        if not isinstance(found, dict) or (found.get("format"), found.get("version")) != (FORMAT, VERSION):
            raise DataError(f"expected results of armorm evaluate (format {FORMAT}, version {VERSION})", file=path)
        try:
            figures = [
                FigureResult(
                    level=level,
                    name=name,
                    value=np.nan if entry["value"] is None else entry["value"],
                    prompts=entry["prompts"],
                    examples=entry["examples"],
                    interval=tuple(entry["interval"]) if entry["interval"] else None,
                    baselines={key: np.nan if v is None else v for key, v in entry["baselines"].items()},
                    lacking=tuple(entry["lacking"]),
                    unit=entry["unit"],
                )
                for level in LEVELS
                for name, entry in found[level].items()
            ]
            return cls(
                benchmark=found["benchmark"],
                model=found["model"],
                data=found["data"],
                counts=found["counts"],
                figures=figures,
                audits=found["audits"],
                examples=found["examples"],
                objectives=found.get("objectives", ()),
                raw=found.get("raw", False),
                refused=found["refused"],
                armorm_version=found["armorm_version"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"damaged results: {type(error).__name__} {error}", file=path) from None


def _entry(figure: FigureResult) -> dict[str, Any]:
    return {
        "value": figure.value,
        "interval": None if figure.interval is None else list(figure.interval),
        "prompts": figure.prompts,
        "examples": figure.examples,
        "baselines": dict(figure.baselines),
        "lacking": list(figure.lacking),
        "unit": figure.unit,
    }


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
