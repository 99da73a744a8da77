"""Results of an evaluation as one JSON file, which `armorm evaluate --against` compares with another.

The file holds an entry per example (scores, margin, deciding objectives), the metrics of every level with interval,
number of prompts and baselines, and the names of model, backbone, data and program. It holds no text of a
conversation: examples are identified by content keys and by the benchmark's own ids.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from armorm.errors import DataError, read_fault
from armorm.evaluation.metrics import LEVELS
from armorm.files import plain, write_json
from armorm.notebook import html_table

FORMAT = "armorm-evaluation"
VERSION = 1
_ENTRY = ("value", "interval", "prompts", "examples", "baselines", "lacking", "unit")
_FIELDS = ("armorm_version", "benchmark", "model", "data", "counts", "audits", "refused", "examples")


class NothingHeldOutError(DataError):
    """Data of which a model was trained on every prompt."""


@dataclass(frozen=True)
class MetricResult:
    """One metric of the results.

    Attributes:
        level, name: as in `Metric`.
        value: NaN if the data lacks what it needs.
        prompts, examples: numbers that it is computed from.
        interval: 95% bootstrap interval, None below 50 effective prompts.
        baselines: value of `length`, `shortest`, `prompt_only` and `chance`, each if applicable.
        lacking: parts of the published benchmark that it covers and the data does not have.
        unit: `share`, `correlation` or `raw` (lower is better).
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
        """Whether it is comparable with published numbers: nothing is lacking, and it has a value."""
        return not self.lacking and bool(np.isfinite(self.value))


@dataclass(frozen=True)
class Results:
    """Results of an evaluation.

    Attributes:
        benchmark: its name.
        model: name, kind, backbone, fingerprints.
        data: sources, fingerprint, skipped rows, examples seen in training.
        counts: examples, prompts, distinct conversations, unscored, truncated, ties.
        metrics: of all levels.
        audits: length, format, objectives, gate, calibration, as applicable.
        examples: one entry per example.
        objectives: names of the objectives, for ratings.
        raw: whether scores are raw ratings.
        refused: file, row and reason of every response that could not be scored.
        armorm_version: of the program.
    """

    benchmark: str
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    counts: Mapping[str, int]
    metrics: Sequence[MetricResult]
    audits: Mapping[str, Any]
    examples: Sequence[Mapping[str, Any]]
    objectives: Sequence[str] = ()
    raw: bool = False
    refused: Sequence[Mapping[str, Any]] = ()
    armorm_version: str = ""

    def level(self, name: str) -> dict[str, MetricResult]:
        """Metrics of one level by name."""
        return {metric.name: metric for metric in self.metrics if metric.level == name}

    @property
    def scores(self) -> list[np.ndarray]:
        """Scores of the examples, NaN if unscored."""
        return [number_array(entry["scores"]) for entry in self.examples]

    def __repr__(self) -> str:
        values = [f"{m.name} {number(m.value, m.unit)} ({span(m.interval, m.unit)})" for m in self._shown]
        return f"Results({self._title}: {'; '.join(values)})".replace(" ()", "")

    def _repr_html_(self) -> str:
        rows = [
            [m.name, number(m.value, m.unit), span(m.interval, m.unit).replace(" ", " to "), f"{m.prompts:,}",
             number(m.baselines.get("length"), m.unit)]
            for m in self._shown
        ]  # fmt: skip
        columns = ["metric", "value", "95% interval", "prompts", "by length alone"]
        shares = any(m.unit == "share" for m in self._shown)
        note = "Shares are in percent. " if shares else ""
        return html_table(self._title, columns, rows, f"{note}`save` writes every subset, audit and example.")

    @property
    def _title(self) -> str:
        count = self.counts.get("examples", len(self.examples))
        return f"{self.benchmark} by {self.model.get('name', '')}, {count:,} examples"

    @property
    def _shown(self) -> list[MetricResult]:
        """The overall metrics that have a value."""
        return [metric for metric in self.level("overall").values() if np.isfinite(metric.value)]

    def to_dict(self, *, examples: bool = True) -> dict[str, Any]:
        """Plain values in the order of the file."""
        found: dict[str, Any] = {"format": FORMAT, "version": VERSION}
        found |= {name: getattr(self, name) for name in _FIELDS[:5]}
        for level in LEVELS:
            found[level] = {
                name: {key: getattr(metric, key) for key in _ENTRY} for name, metric in self.level(level).items()
            }
        if self.objectives:
            found |= {"objectives": self.objectives, "raw": self.raw}
        found |= {name: getattr(self, name) for name in _FIELDS[5 : None if examples else -1]}
        return plain(found)

    def save(self, path: str | Path) -> None:
        """Write the file atomically."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read a file.

        Raises:
            DataError: for a file that is not the results of an evaluation.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(read_fault(path, error), file=path) from None
        if not isinstance(found, dict) or (found.get("format"), found.get("version")) != (FORMAT, VERSION):
            raise DataError(f"expected results of armorm evaluate (format {FORMAT}, version {VERSION})", file=path)
        try:
            metrics = [_metric(level, name, entry) for level in LEVELS for name, entry in found[level].items()]
            fields = {name: found[name] for name in _FIELDS}
            return cls(metrics=metrics, objectives=found.get("objectives", ()), raw=found.get("raw", False), **fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"damaged results: {type(error).__name__} {error}", file=path) from None


def number(value: float | None, unit: str, *, sign: bool = False) -> str:
    """A value: shares in percent, others as they are; empty for None and NaN."""
    if value is None or math.isnan(value):
        return ""
    signed = "+" if sign else ""
    return f"{100 * value:{signed}.1f}" if unit == "share" else f"{value:{signed}.3f}"


def span(interval: Sequence[float] | None, unit: str, *, sign: bool = False) -> str:
    """The two ends of an interval; empty for None."""
    return "" if interval is None else " ".join(number(end, unit, sign=sign) for end in interval)


def _metric(level: str, name: str, entry: Mapping[str, Any]) -> MetricResult:
    values = {key: entry[key] for key in _ENTRY}
    values["value"] = np.nan if entry["value"] is None else entry["value"]
    values["interval"] = tuple(entry["interval"]) if entry["interval"] else None
    values["baselines"] = {key: np.nan if v is None else v for key, v in entry["baselines"].items()}
    return MetricResult(level, name, **values | {"lacking": tuple(entry["lacking"])})


def number_array(values: Sequence[float | None]) -> np.ndarray:
    """Float64 of numbers as JSON stores them, None as NaN."""
    return np.array([np.nan if value is None else value for value in values], np.float64)


def seen_in_training(seen: Mapping[str, Any]) -> str:
    """Which examples a model was trained on, in one line, from `seen` in the data of its results."""
    if not seen["examples"]:
        return f"seen in training: {'unknown, the model has no record of it' if seen['partial'] else 'none'}"
    count = f"seen in training: {seen['examples']:,} of {seen['of']:,} examples"
    used = ", ".join(f"{role} {prompts:,}" for role, prompts in seen["roles"].items() if prompts)
    kept = "included" if seen["included"] else "skipped"
    return f"{count} (prompts: {seen['prompts']:,}; {used}), {kept}{'; others unknown' if seen['partial'] else ''}"


@dataclass(frozen=True)
class PublishedTable:
    """Published numbers that are comparable with the results.

    Attributes:
        columns: heading by metric (`level/name`).
        own: the results' own values.
        rows: model, values (`figures`) and source of each published row that has any of the columns.
        withheld: heading of each metric that is not comparable, with what the results lack for it.
        unplaced: published numbers that are computed otherwise.
    """

    columns: Mapping[str, str]
    own: Mapping[str, float]
    rows: Sequence[Mapping[str, Any]]
    withheld: Mapping[str, str]
    unplaced: Sequence[str]


def published(results: Results) -> PublishedTable:
    """The published numbers to compare the results with."""
    entry = reference().get(results.benchmark, {"columns": {}, "rows": []})
    own: dict[str, float] = {}
    columns: dict[str, str] = {}
    withheld: dict[str, str] = {}
    for place, heading in entry["columns"].items():
        level, _, name = place.partition("/")
        metric = results.level(level).get(name)
        if metric is not None and metric.is_complete:
            columns[place], own[place] = heading, metric.value
        else:
            withheld[heading] = ", ".join(metric.lacking if metric is not None else ()) or "not measured"
    rows = [row for row in entry["rows"] if any(place in columns for place in row["figures"])]
    return PublishedTable(columns, own, rows, withheld, entry.get("unplaced", ()))


@lru_cache(maxsize=1)
def reference() -> dict[str, Any]:
    """The published numbers by benchmark (reference.json)."""
    return json.loads(files("armorm.evaluation").joinpath("reference.json").read_text(encoding="utf-8"))
