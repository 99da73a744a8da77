"""Ratings that disagree most with what all others say: probable label errors of a run's training rows.

For each rating of an objective, the head fitted to all other ratings predicts it (leave-one-out, in closed form:
`armorm.heads.influence`); the error is divided by its standard deviation, so objectives can be ranked together. A
rating that disagrees with all others may be the only right one: the ranking says where to look, not what is wrong.

How many of planted label errors are found: `benchmarks/label_errors.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from armorm.heads.influence import noise
from armorm.heads.rated_record import RatedRecord, RatedRun
from armorm.progress import progress


@dataclass(frozen=True)
class LabelErrors:
    """r ratings, the one that disagrees most first.

    Attributes:
        record: of the run's rows.
        rows, columns: (r,) row and objective of each rating in the record.
        expected: (r,) prediction by all other ratings of the objective, raw scale; it may be outside the range.
        deviations: (r,) rating minus prediction in standard deviations; > 0 for a rating that is too large, raw scale.
    """

    record: RatedRecord
    rows: np.ndarray
    columns: np.ndarray
    expected: np.ndarray
    deviations: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def entries(self, count: int | None = None) -> Iterator[dict[str, Any]]:
        """The first `count` ratings as JSON values, all by default."""
        for rank, (row, column) in enumerate(zip(self.rows[:count], self.columns[:count], strict=True)):
            yield {
                "objective": self.record.objectives.names[column],
                "rating": float(self.record.ratings[row, column]),
                "expected": float(self.expected[rank]),
                "deviations": float(self.deviations[rank]),
                **self.record.describe(int(row)),
            }


def label_errors(run: RatedRun, names: Sequence[str] = ()) -> LabelErrors:
    """Rank the ratings of objectives, by default of those that a set rates: labels that are computed or made by a rule
    have no rater who errs.

    Raises:
        ObjectiveError: for an objective that no row of the run rates.
    """
    record = run.record
    columns = [record.objectives.position(name) for name in names]
    if not names:
        rated = [i for i, o in enumerate(record.objectives) if not o.compute and o.source != "constructed"]
        columns = rated or list(range(len(record.objectives)))
    parts: list[tuple[np.ndarray, ...]] = []
    groups = run.row_sets(columns)
    with progress("rated rows", 2 * sum(len(run.rated(group)) for group in groups)) as advance:
        for group in groups:
            sums = list(run.sums(group, advance).values())
            ridge = run.fitted(group, sum(sums[1:], sums[0]))
            rows, left_out, leverage = [], [], []
            for here, features, ratings in run.blocks(group):
                rows.append(here)
                leverage.append(ridge.leverage(run.roots(group, here)[:, None] * ridge.rotated(features)))
                left_out.append(ridge.residuals(features, ratings) / (1 - leverage[-1]))
                advance(len(here))
            place, errors, h = np.concatenate(rows), np.concatenate(left_out), np.concatenate(leverage)
            weighted = run.roots(group, place)[:, None] * errors
            scaled = weighted * np.sqrt(1 - h) / noise(weighted, h)
            for j, column in enumerate(group):
                scale = record.objectives[column].scale
                expected = record.ratings[place, column] - scale * errors[:, j]
                parts.append((place, np.full(len(place), column), expected, np.sign(scale) * scaled[:, j]))
    rows_found, columns_found, expected, deviations = (np.concatenate([part[i] for part in parts]) for i in range(4))
    order = np.argsort(-np.abs(deviations), kind="stable")
    return LabelErrors(record, rows_found[order], columns_found[order], expected[order], deviations[order])
