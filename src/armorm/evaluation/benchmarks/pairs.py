"""Preference pairs of any source: how often the better response scores strictly higher.

A tie is wrong, and so is a pair with a response that cannot be scored (NaN).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from armorm.conversation import Conversation
from armorm.data.preferences import preference_pair
from armorm.data.rows import Row
from armorm.data.sources import Source
from armorm.errors import ConversationError, DataError
from armorm.evaluation.benchmarks.base import Benchmark, Loaded, held_out_rows
from armorm.evaluation.examples import Example, Item, make_example
from armorm.evaluation.metrics import Measurements, Metric, by_group, mean_metric

RIGHT = "right"
ALL = "all pairs"


def read(sources: Sequence[Source]) -> Loaded:
    """Preference rows in any layout; of rows with a `split` only those of the test split."""
    loaded = Loaded()
    for source, row in held_out_rows(sources, loaded):
        subset = row.values.get("subset") or (source.name if len(sources) > 1 else "")
        try:
            loaded.examples.append(pair_example(row, str(subset)))
        except DataError as error:
            loaded.rejections.reject_row(error)
    return loaded.checked(sources)


def pair_example(row: Row, subset: str) -> Example:
    """The pair of a row; if one side is not a valid conversation, the other one is still read."""
    try:
        pair = preference_pair(row)
        builds: list[Callable[[], Conversation]] = [lambda: pair.chosen, lambda: pair.rejected]
    except DataError:
        if row.kind != "pairs":
            raise
        builds = [partial(_side, row, "chosen"), partial(_side, row, "rejected")]
        if all(_is_valid(build) for build in builds):
            raise  # each side is a conversation, so the fault is in the row, such as two different prompts
    return make_example(builds, (1, 0), id=row.values.get("id"), subset=subset, origin=(row.file, row.number))


def _side(row: Row, name: str) -> Conversation:
    both = {"chosen": row.values[name], "rejected": row.values[name]}
    try:
        return preference_pair(Row(row.file, row.number, {**row.values, **both})).chosen
    except DataError as error:
        raise ConversationError(error.problem, name) from None


def _is_valid(build: Callable[[], Conversation]) -> bool:
    try:
        build()
    except ConversationError:
        return False
    return True


def strictly_right(better: np.ndarray, worse: np.ndarray) -> np.ndarray:
    """1.0 where the better response scores strictly higher, else 0.0 (also for ties and NaN)."""
    return (np.asarray(better, np.float64) > np.asarray(worse, np.float64)).astype(np.float64)


def pairs_right(scores: Sequence[np.ndarray]) -> np.ndarray:
    """1.0 or 0.0 of every item (n,), of which the first response is the better one."""
    both = np.array([values[:2] for values in scores], np.float64).reshape(-1, 2)
    return strictly_right(both[:, 0], both[:, 1])


def measure(items: Sequence[Item], scores: Sequence[np.ndarray]) -> Measurements:
    """`right` of every pair, by subset and over all."""
    right = pairs_right(scores)
    return by_group([item.subset for item in items], RIGHT, right) | by_group([ALL] * len(items), RIGHT, right)


def metrics(measurements: Measurements) -> list[Metric]:
    """Accuracy over all pairs and of each named subset."""
    subsets = sorted({subset for subset, _ in measurements if subset not in ("", ALL)})
    return [
        mean_metric("overall", "accuracy", (ALL, RIGHT)),
        *(mean_metric("subsets", subset, (subset, RIGHT)) for subset in subsets),
    ]


BENCHMARK = Benchmark("pairs", "preference pairs", read, measure, metrics)
