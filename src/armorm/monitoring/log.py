"""The log of an RL run: one JSON line per scored sample, numbers only (no text of a conversation).

    {"step": 12, "group": 3, "score": 0.83, "length": 57, "contributions": {...}, "rewards": {...},
     "uncertainty": {...}}

`contributions` is required and names the objectives; their sum is the score. `step` is the training step; a log without
steps is read in its order. `length` is that of the response, in tokens. `group` numbers the prompts of a step. What
needs an absent column is not judged, and the report says so.

A line with a step, without `contributions` and with `kl` or `entropy` holds what the trainer measured of that step;
scored samples may hold them too.

Each batch of lines is appended in one write, so that several processes can share a log, and an interrupted process
leaves it readable.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from armorm.data.rows import Row
from armorm.errors import ArmormError, DataError, shown
from armorm.files import append_text
from armorm.score_batch import ScoreBatch

ROWS_OF_A_STEP = 32  # of a log without steps
METRICS = ("kl", "entropy")  # of a step, as the trainer logs them
_PARTS = ("contributions", "rewards", "uncertainty")  # objects of numbers by objective


class MonitorError(ArmormError, ValueError):
    """A log that cannot be judged, or a row that does not fit it."""


@dataclass(frozen=True)
class RunLog:
    """Samples of a run, ordered by step; arrays float64 unless stated otherwise, None if the log lacks them."""

    names: list[str]  # the k objectives
    steps: np.ndarray  # (n,) training steps, ascending; line numbers if the log has no steps
    contributions: np.ndarray  # (n, k)
    lengths: np.ndarray | None = None  # (n,) tokens of the response
    rewards: np.ndarray | None = None  # (n, k)
    uncertainty: np.ndarray | None = None  # (n, k)
    groups: np.ndarray | None = None  # (n,) int64 prompts within a step
    by_step: bool = True  # whether the log has steps
    skipped: list[tuple[int, str]] = field(default_factory=list)  # (row, reason) of invalid lines
    metrics: list[tuple[float, dict[str, float]]] = field(default_factory=list)  # (step, `METRICS`) in the log's order

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def scores(self) -> np.ndarray:
        """(n,) float64 sums of the contributions."""
        return self.contributions.sum(1)


@dataclass(frozen=True)
class StepSamples:
    """The n samples of one step; arrays as of `RunLog`."""

    step: float
    contributions: np.ndarray  # (n, k)
    lengths: np.ndarray | None = None  # (n,)
    rewards: np.ndarray | None = None  # (n, k)
    uncertainty: np.ndarray | None = None  # (n, k)
    groups: np.ndarray | None = None  # (n,) int64

    def __len__(self) -> int:
        return len(self.contributions)


def sample_line(
    names: Sequence[str],
    *,
    contributions: Sequence[float],
    score: float,
    step: int | None = None,
    group: int | None = None,
    length: int | None = None,
    rewards: Sequence[float] | None = None,
    uncertainty: Sequence[float] | None = None,
    **columns: float | None,
) -> str:
    """One line of a log, with its newline; `columns` are further numbers, such as the time. None is omitted."""
    entry: dict[str, Any] = {"step": step, **columns, "group": group, "score": score, "length": length}
    entry = {name: value for name, value in entry.items() if value is not None}
    for name, values in zip(_PARTS, (contributions, rewards, uncertainty), strict=True):
        if values is not None:
            # seven significant digits, the precision of float32
            entry[name] = {key: float(f"{value:.7g}") for key, value in zip(names, values, strict=True)}
    return json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n"


def batch_lines(
    batch: ScoreBatch,
    prompts: Iterable[Hashable] | None,
    lengths: Sequence[int] | np.ndarray | None,
    scores: Sequence[float] | np.ndarray | None = None,
    **columns: Any,
) -> Iterator[str]:
    """Lines of the scored rows of a batch; those of one prompt are a group.

    Args:
        prompts: (n,) anything that tells prompts apart; None if samples of a prompt are not scored together.
        lengths: (n,) tokens of the responses.
        scores: (n,) by default the sums of the contributions.
        columns: of every line, as of `sample_line`.
    """
    groups: dict[Hashable, int] = {}
    for at, prompt in enumerate([None] * len(batch.scores) if prompts is None else prompts):
        contributions = batch.contributions[at].tolist()
        yield sample_line(
            batch.names,
            contributions=contributions,
            score=sum(contributions) if scores is None else float(scores[at]),
            group=None if prompts is None else groups.setdefault(prompt, len(groups)),
            length=None if lengths is None else int(lengths[at]),
            rewards=batch.rewards[at].tolist(),
            uncertainty=None if batch.uncertainty is None else batch.uncertainty[at].tolist(),
            **columns,
        )


def metrics_line(step: int, metrics: Mapping[str, float]) -> str:
    """The line of a step's `METRICS`, with its newline; other names are left out."""
    kept = {name: float(metrics[name]) for name in METRICS if metrics.get(name) is not None}
    return json.dumps({"step": step, **kept}, allow_nan=False) + "\n"


def append_samples(path: str | Path, lines: Iterable[str]) -> None:
    """Append the lines of one batch in one write."""
    text = "".join(lines)
    if text:
        append_text(Path(path), text)


def read_log(rows: Iterable[Row | DataError], file: str) -> RunLog:
    """Read a log from its lines; an invalid line is given as its error.

    Raises:
        MonitorError: for a log without valid lines, or whose lines have different objectives.
    """
    names: list[str] = []
    first_row = 0
    skipped: list[tuple[int, str]] = []
    metrics: list[tuple[float, dict[str, float]]] = []
    table = array("d")
    for row in rows:
        if isinstance(row, DataError):
            skipped.append((row.row or 0, row.problem))
            continue
        found_metrics = step_metrics(row)
        if found_metrics is not None:
            metrics.append(found_metrics)
            if "contributions" not in row.values:
                continue
        found = row.values.get("contributions")
        if not isinstance(found, Mapping) or not found:
            skipped.append(
                (
                    row.number,
                    f"contributions: found {shown(found)}, expected an object, as written by score --details; "
                    "texts are scored with --model",
                )
            )
            continue
        if not names:
            names, first_row = [str(name) for name in found], row.number
        if odd := sorted(set(found) ^ set(names)):
            raise MonitorError(
                f"{file}, row {row.number}: found objectives different from row {first_row} ({', '.join(odd[:3])}), "
                "expected the scores of one model"
            )
        try:
            table.extend(row_numbers(row, names))
        except DataError as error:
            skipped.append((row.number, f"{error.field}: {error.problem}"))
    if not table:
        reason = f"; row {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise MonitorError(f"{file}: found no scored samples{reason}")
    return replace(_ordered(names, table_of(table, names), skipped, file), metrics=metrics)


def step_metrics(row: Row) -> tuple[float, dict[str, float]] | None:
    """Step and `METRICS` of a row that has a step and any of them as a finite number, else None."""
    values: dict[str, Any] = {name: row.values.get(name) for name in ("step", *METRICS)}
    numbers = {name: float(value) for name, value in values.items() if _is_number(value)}
    step = numbers.pop("step", None)
    return (step, numbers) if step is not None and numbers else None


def table_of(numbers: array[float] | Sequence[float], names: Sequence[str]) -> np.ndarray:
    """Numbers of `row_numbers` of n rows, one after the other, as (n, 4 + 3k); those of an array are not copied."""
    flat = np.frombuffer(numbers) if isinstance(numbers, array) else np.array(numbers, np.float64)
    return flat.reshape(-1, 4 + 3 * len(names))


def samples_of(step: float, table: np.ndarray) -> StepSamples:
    """The samples of rows (n, 4 + 3k) of `row_numbers`, all of one step; a column with gaps is absent."""
    groups, lengths, contributions, rewards, uncertainty = _columns(table)
    assert contributions is not None  # required in every row
    groups = None if groups is None else groups.astype(np.int64)
    return StepSamples(step, contributions, lengths, rewards, uncertainty, groups)


def log_steps(log: RunLog, most: int | None = None) -> Iterator[StepSamples]:
    """The steps of a log, in order; in a log without steps, runs of `ROWS_OF_A_STEP` samples.

    Args:
        most: of more steps than that, neighbours are read as one.
    """
    if log.by_step:
        cuts = np.flatnonzero(np.diff(log.steps)) + 1
    else:
        cuts = np.arange(ROWS_OF_A_STEP, len(log), ROWS_OF_A_STEP)
    starts = np.concatenate([[0], cuts])
    starts = starts[:: 1 if most is None else -(-len(starts) // most)]
    for start, end in zip(starts, np.append(starts[1:], len(log)), strict=True):
        groups = log.groups
        if groups is not None:  # numbered anew in each step
            pairs = np.stack([log.steps[start:end], groups[start:end]], 1)
            groups = np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)
        parts = (log.lengths, log.rewards, log.uncertainty)
        lengths, rewards, uncertainty = (None if part is None else part[start:end] for part in parts)
        contributions = log.contributions[start:end]
        yield StepSamples(float(log.steps[start]), contributions, lengths, rewards, uncertainty, groups)


def _columns(table: np.ndarray) -> Iterator[np.ndarray | None]:
    """Groups, lengths, contributions, rewards and uncertainty of a table; None for a column with gaps."""
    parts = (table[:, 2], table[:, 3], *np.split(table[:, 4:], 3, axis=1))
    return (None if np.isnan(part).any() else part for part in parts)


def _ordered(names: list[str], table: np.ndarray, skipped: list[tuple[int, str]], file: str) -> RunLog:
    """The log of rows (n, 4 + 3k) of `row_numbers`; a column with gaps is absent."""
    missing = np.isnan(table[:, 1])
    by_step = not missing.any()
    if not by_step and not missing.all():
        row = int(table[missing, 0][0])
        raise MonitorError(f"{file}, row {row}: found no step, expected one in every row or in none")
    if (np.diff(table[:, int(by_step)]) < 0).any():  # (a log of millions of rows would be copied)
        table = table[np.argsort(table[:, int(by_step)], kind="stable")]
    groups, lengths, contributions, rewards, uncertainty = _columns(table)
    assert contributions is not None  # required in every row
    groups = None if groups is None else groups.astype(np.int64)
    steps = table[:, int(by_step)]
    return RunLog(names, steps, contributions, lengths, rewards, uncertainty, groups, by_step, skipped)


def with_objects(row: Row) -> Row:
    """A row of a table of `armorm score --details`: columns such as `rewards.NAME` become objects of numbers."""
    if not any(name.startswith("contributions.") for name in row.values):
        return row
    values: dict[str, Any] = {}
    for name, value in row.values.items():
        part, dot, objective = name.partition(".")
        number = _from_text(value) if row.textual else value
        if dot and part in _PARTS:
            if number is not None:
                values.setdefault(part, {})[objective] = number
        else:
            values[name] = number
    return replace(row, values=values, given=None, textual=False)


def _from_text(value: Any) -> Any:
    """The number that a cell of text is, None for an empty cell, else the text."""
    if not isinstance(value, str) or not value.strip():
        return None
    try:
        return float(value)
    except ValueError:
        return value


def row_numbers(row: Row, names: Sequence[str]) -> list[float]:
    """Row number, step, group, length, then k contributions, k rewards, k uncertainties; NaN for what is absent."""
    values = [float(row.number)]
    for name in ("step", "group", "length"):
        found = row.values.get(name)
        values.append(math.nan if found is None else _number(row, found, name))
    if values[3] < 0:
        raise row.error(f"found {values[3]:g}, expected a length >= 0", "length")
    for part in _PARTS:
        found = row.values.get(part)
        if found is None:
            values += [math.nan] * len(names)
        elif isinstance(found, Mapping):
            values += [_number(row, found.get(name), f"{part}.{name}") for name in names]
        else:
            raise row.error(f"found {shown(found)}, expected an object of numbers", part)
    return values


def _number(row: Row, value: Any, field: str) -> float:
    if not _is_number(value):
        raise row.error(f"found {shown(value)}, expected a finite number", field)
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
