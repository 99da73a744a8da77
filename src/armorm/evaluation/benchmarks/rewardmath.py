"""RewardMATH (arXiv 2410.01729): one correct solution of a problem of MATH500 against nine wrong ones.

A problem is right if the correct solution scores strictly above all wrong ones; "ties right" accepts an equal score.
The mean reciprocal rank is that of the correct solution, which comes after wrong ones of the same score. An unscored
solution makes its problem wrong, and in the rank it counts against the correct one.

Rows of `dataset/benchmark/RewardMATH_direct.json` in the repository kimsh0507/RewardMATH_official, one per solution:
`problem`, `problem_id`, `solution_type` (chosen, rejected), `eval_solution` (a list of steps, joined by line feeds,
or a text), `subject`, `level`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from armorm.conversation import Conversation
from armorm.data.rows import Row
from armorm.data.sources import Source
from armorm.errors import shown
from armorm.evaluation.benchmarks.base import (
    Benchmark,
    Loaded,
    first_is_best,
    missing_rows,
    random_order,
    rows_of,
    text,
    with_chance,
)
from armorm.evaluation.benchmarks.pairs import RIGHT
from armorm.evaluation.examples import Example, Item, make_example
from armorm.evaluation.metrics import Measurements, Metric, by_group, mean_metric

PROBLEMS = 483
ALL = "all problems"
TIES_RIGHT, RECIPROCAL_RANK = "right or tied", "reciprocal rank"
_TYPES = ("chosen", "rejected")


def read(sources: Sequence[Source]) -> Loaded:
    """Rows of solutions, grouped by problem; the correct solution comes first."""
    loaded = Loaded()
    problems: dict[str, list[Row]] = {}
    for _, row in rows_of(sources):
        kind = row.values.get("solution_type")
        if kind not in _TYPES:
            raise row.error(f"found {shown(kind)}, expected {' or '.join(_TYPES)}", "solution_type")
        problems.setdefault(str(row.values.get("problem_id", text(row, "problem"))), []).append(row)
    loaded.examples += [_example(rows) for rows in problems.values()]
    return loaded.checked(sources)


def _example(rows: Sequence[Row]) -> Example:
    chosen, rejected = ([row for row in rows if row.values["solution_type"] == kind] for kind in _TYPES)
    first = rows[0]
    if len(chosen) != 1 or not rejected:
        raise first.error(
            f"its problem has {len(chosen)} chosen and {len(rejected)} rejected solutions, expected 1 and at least 1",
            "problem_id",
        )
    problem = text(first, "problem")
    return make_example(
        [partial(Conversation.from_prompt, problem, _solution(row)) for row in (*chosen, *rejected)],
        [1.0] + [0.0] * len(rejected),
        id=first.values.get("problem_id"),
        subset=str(first.values.get("subject") or ""),
        origin=(first.file, first.number),
    )


def _solution(row: Row) -> str:
    steps = row.values.get("eval_solution")
    if isinstance(steps, str):
        return steps
    if not isinstance(steps, Sequence) or not all(isinstance(step, str) for step in steps):
        raise row.error(f"found {shown(steps)}, expected a text or a list of steps", "eval_solution")
    return "\n".join(steps)


def reciprocal_rank(scores: np.ndarray) -> float:
    """1 / rank of the first of scores (c,), after equal ones; unscored others (NaN) are above it."""
    if np.isnan(scores[0]):
        return 1 / len(scores)
    return float(1 / (1 + (~(scores[1:] < scores[0])).sum()))


def measure(items: Sequence[Item], scores: Sequence[np.ndarray]) -> Measurements:
    """`right`, `right or tied` and the reciprocal rank of every problem; `right` also by subject."""
    everywhere = [ALL] * len(items)
    tied = [float(values[0] >= values[1:].max()) for values in scores]
    ranks = [reciprocal_rank(np.asarray(values, np.float64)) for values in scores]
    sizes = [len(values) for values in scores]
    right = first_is_best(scores)
    measured = by_group([item.subset for item in items], RIGHT, right) | by_group(everywhere, RIGHT, right)
    measured |= by_group(everywhere, TIES_RIGHT, np.array(tied))
    harmonic = [sum(1 / rank for rank in range(1, size + 1)) / size for size in sizes]
    return with_chance(measured, [1 / size for size in sizes]) | with_chance(
        by_group(everywhere, RECIPROCAL_RANK, np.array(ranks)), harmonic
    )


def metrics(measurements: Measurements) -> list[Metric]:
    """Accuracy, accuracy with ties, mean reciprocal rank; accuracy by subject."""
    count = len(measurements[ALL, RIGHT].rows) if (ALL, RIGHT) in measurements else 0
    lacking = missing_rows("problems", count, PROBLEMS)
    names = {RIGHT: "accuracy", TIES_RIGHT: "accuracy, ties right", RECIPROCAL_RANK: "mean reciprocal rank"}
    found = [mean_metric("overall", name, (ALL, quantity), lacking=lacking) for quantity, name in names.items()]
    subjects = sorted({group for group, quantity in measurements if quantity == RIGHT and group not in ("", ALL)})
    return found + [mean_metric("subsets", subject, (subject, RIGHT)) for subject in subjects]


BENCHMARK = Benchmark(
    "rewardmath",
    "RewardMATH",
    read,
    measure,
    metrics,
    random_order,
    rule="the correct solution must score strictly above all wrong ones; an unscored one makes its problem wrong",
)
