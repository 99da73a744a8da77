"""Ratings: are the predicted ratings in the right order, and how large are their errors?

Of each objective: Spearman, mean absolute error in raw units, accuracy within prompts; and means of the first and the
last over objectives with enough ratings. Between prompts much of a rating is known before the response is read, so
next to the correlation is the accuracy within prompts: of two responses to one prompt with different ratings, how often
the better one is predicted higher (a tie counts half). An unscored response has no prediction: it is excluded from
correlation and error, and loses its comparisons. Bootstrapped correlations use the ranks of the whole set.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
from scipy.stats import rankdata

from armorm.conversation import Conversation
from armorm.data.cells import rating_cell
from armorm.data.ratings import ColumnCheck, objective_name
from armorm.data.rows import Row
from armorm.data.sources import Source
from armorm.errors import ConversationError, DataError, nearest, shown
from armorm.evaluation.benchmarks.base import Benchmark, Loaded, held_out_rows
from armorm.evaluation.examples import Example, Item, make_example
from armorm.evaluation.metrics import GroupSums, GroupValues, Measurements, Metric, nan_mean, ratio
from armorm.objectives import ObjectiveSet

MetricLike = TypeVar("MetricLike")
MIN_ROWS = 3
MIN_RATINGS = 100
SPEARMAN, MAE, WITHIN = "Spearman", "error", "within prompts"
MEAN_SPEARMAN = f"mean Spearman (>= {MIN_RATINGS} ratings)"
MEAN_WITHIN = f"mean within prompts (>= {MIN_RATINGS} pairs)"
_RANKS = ("x", "y", "xx", "yy", "xy")
_NOT_RATED = {"messages", "prompt", "response", "chosen", "rejected", "split", "id", "index", "row", "margin"}


def read(sources: Sequence[Source], objectives: ObjectiveSet | None = None) -> Loaded:
    """Held-out rated rows.

    Args:
        objectives: of the model; None for a model that has none.

    Raises:
        DataError: if no column is an objective of the model, or one was rated on another scale.
    """
    loaded = Loaded(raw=objectives is not None)
    held_out = list(held_out_rows(sources, loaded))
    counts = _rating_counts(held_out)
    columns = {source.name: _columns(source, counts.get(id(source), {}), objectives, loaded) for source in sources}
    used = dict.fromkeys(name for found in columns.values() for name in found.values())
    if not used:
        raise _unmatched(sources[0], held_out, objectives, loaded)
    loaded.names = [name for name in (objectives.names if objectives else used) if name in used]
    checks = {}
    if objectives is not None:
        for place, found in columns.items():
            for column, name in found.items():
                checks[place, column] = ColumnCheck(column, objectives[objectives.position(name)])
    for source, row in held_out:
        ratings = dict.fromkeys(loaded.names, math.nan)
        for column, name in columns[source.name].items():
            check = checks.get((source.name, column))
            cell = check.read(row, loaded.rejections) if check else rating_cell(row.values.get(column))
            if not math.isnan(cell.value):
                ratings[name] = cell.value
        if all(math.isnan(value) for value in ratings.values()):
            loaded.skip("rows without a rating")
        else:
            loaded.examples.append(_example(row, list(ratings.values())))
    for check in checks.values():
        check.require_scale()
    if not loaded.examples:
        raise DataError("no row of the test split is rated", file=sources[0].location.name)
    return loaded


def _rating_counts(held_out: Sequence[tuple[Source, Row]]) -> dict[int, Counter[str]]:
    """Numbers in each column, by the id of the source."""
    counts: dict[int, Counter[str]] = {}
    for source, row in held_out:
        of_source = counts.setdefault(id(source), Counter())
        for column, value in row.values.items():
            if column not in _NOT_RATED and not math.isnan(rating_cell(value).value):
                of_source[column] += 1
    return counts


def _columns(
    source: Source, counts: Mapping[str, int], objectives: ObjectiveSet | None, loaded: Loaded
) -> dict[str, str]:
    """Objective of each numeric column of a source; columns that are no objective of the model are skipped."""
    found: dict[str, str] = {}
    for column, count in counts.items():
        candidates = (column, objective_name(column, source.name))
        known = [name for name in candidates if objectives is None or name in objectives.names]
        if known:
            found[column] = known[-1] if objectives is None else known[0]
        else:
            loaded.skipped[f"ratings of '{column}', no objective of the model"] = count
    return found


def _example(row: Row, ratings: list[float]) -> Example:
    def build() -> Conversation:
        try:
            return row.conversation()
        except DataError as error:
            raise ConversationError(error.problem, error.field) from None

    return make_example(
        [build], ratings, id=row.values.get("id"), prompt_of=partial(_any_reply, row), origin=(row.file, row.number)
    )


def _any_reply(row: Row) -> Conversation:
    """The row's prompt with a placeholder reply."""
    messages = row.values.get("messages")
    if messages is None:
        return Conversation.from_prompt(row.values.get("prompt") or "", "-")
    prompt = list(messages)[:-1] if isinstance(messages, Sequence) else messages
    return Conversation.from_prompt(prompt, "-")


def _unmatched(
    source: Source, held_out: Sequence[tuple[Source, Row]], objectives: ObjectiveSet | None, loaded: Loaded
) -> DataError:
    if not held_out and loaded.rejections.errors:
        return loaded.rejections.errors[0]
    if not held_out:
        return DataError("no row has split 'test'", file=source.location.name, field="split")
    columns = held_out[0][1].filled
    if objectives is None:
        return DataError(f"found columns {shown(columns, 80)}, expected a column of ratings", file=source.location.name)
    candidates = [column for column in columns if column not in _NOT_RATED]
    hint = nearest(candidates[0], objectives.names) if candidates else ""
    return DataError(
        f"found columns {shown(columns, 80)}, none of them an objective of the model{hint}: "
        f"{shown(', '.join(objectives.names), 200)}",
        file=source.location.name,
    )


def rank_columns(prediction: np.ndarray, rating: np.ndarray) -> dict[str, np.ndarray]:
    """Centred ranks (m,) of both and their products, whose means give Spearman."""
    x, y = rankdata(prediction), rankdata(rating)
    x, y = x - x.mean(), y - y.mean()
    return {"x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y}


def spearman(sums: GroupSums, name: str) -> np.ndarray:
    """Rank correlation (...); 0 if one side is constant, NaN below `MIN_ROWS` rows."""
    x, y, xx, yy, xy = (sums.mean((name, column)) for column in _RANKS)
    norm = np.sqrt(np.clip(xx - x * x, 0, None) * np.clip(yy - y * y, 0, None))
    value = np.nan_to_num(ratio(xy - x * y, norm))
    return np.where(sums.count((name, "x")) >= MIN_ROWS, value, np.nan)


def comparison_columns(
    prediction: np.ndarray, rating: np.ndarray, prompts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Of each row (m,): comparisons won against lower-rated rows of its prompt (ties count half), and their number."""
    right, count = np.zeros(len(rating)), np.zeros(len(rating))
    codes: dict[str, int] = {}
    groups = np.array([codes.setdefault(prompt, len(codes)) for prompt in prompts], np.int64)
    by_prediction = np.argsort(prediction, kind="stable")
    by_prediction = by_prediction[~np.isnan(rating[by_prediction])]
    levels, level = np.unique(rating[by_prediction], return_inverse=True)
    # Of two ratings, the better has a one in the highest bit in which their ranks differ. So for each bit, ones are
    # compared with zeros of the same prompt and higher bits, by counting in the order of predictions: a matrix of all
    # pairs of a prompt would take gigabytes for ten thousand candidates.
    for bit in range(max(len(levels) - 1, 0).bit_length()):
        group = groups[by_prediction] * len(levels) + (level >> (bit + 1))
        order = np.argsort(group, kind="stable")
        rows, group, is_higher = by_prediction[order], group[order], (level[order] >> bit) % 2 == 1
        x = prediction[rows]
        lower = np.append(0, np.cumsum(~is_higher))  # lower-rated rows before each place
        is_new = np.append(True, group[1:] != group[:-1])
        start, end = (lower[places] for places in _runs(is_new))
        first, last = (lower[places] for places in _runs(is_new | np.append(True, x[1:] != x[:-1])))
        won = np.where(np.isnan(x), 0, first - start) + 0.5 * np.where(np.isfinite(x), last - first, 0)
        right[rows] += np.where(is_higher, won, 0)
        count[rows] += np.where(is_higher, end - start, 0)
    return right, count


def _runs(is_new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and end of the run that each place is in."""
    starts, run = np.flatnonzero(is_new), np.cumsum(is_new) - 1
    return starts[run], np.append(starts[1:], len(is_new))[run]


def measure(
    items: Sequence[Item], scores: Sequence[np.ndarray], names: Sequence[str] = (), raw: bool = True
) -> Measurements:
    """Measurements of every objective.

    Args:
        items: labels are the given ratings, NaN if missing.
        scores: (k,) per item, or (1,) if one score is used for every objective.
        names: (k,) objectives, in the order of labels and scores.
        raw: whether scores are raw ratings, so that their error can be measured.
    """
    given = np.array([item.labels for item in items], np.float64).reshape(len(items), len(names))
    predicted = np.array([np.broadcast_to(values, len(names)) for values in scores]).reshape(given.shape)
    prompts = [item.prompt for item in items]
    measurements: Measurements = {}
    for column, name in enumerate(names):
        rated = np.flatnonzero(~np.isnan(given[:, column]))
        known = rated[~np.isnan(predicted[rated, column])]
        if not len(known):
            continue  # without predictions there is no metric, rather than a bad one
        x, y = predicted[known, column], given[known, column]
        columns = rank_columns(x, y) | ({MAE: np.abs(x - y)} if raw else {})
        measurements |= {(name, label): GroupValues(known, values) for label, values in columns.items()}
        right, count = comparison_columns(
            predicted[rated, column], given[rated, column], [prompts[row] for row in rated]
        )
        compared = count > 0
        if compared.any():
            measurements[name, "right"] = GroupValues(rated[compared], right[compared])
            measurements[name, "pairs"] = GroupValues(rated[compared], count[compared])
    return measurements


def metrics(measurements: Measurements) -> list[Metric]:
    """Means over objectives with enough ratings, then the metrics of each objective."""
    names = list(dict.fromkeys(name for name, _ in measurements))
    ratings = {name: len(measurements[name, "x"].rows) for name in names if (name, "x") in measurements}
    pairs = {name: measurements[name, "pairs"].values.sum() for name in names if (name, "pairs") in measurements}
    found: list[Metric] = []
    many = [name for name in names if ratings.get(name, 0) >= MIN_RATINGS]
    compared = [name for name in names if pairs.get(name, 0) >= MIN_RATINGS]
    if many:
        groups = tuple((name, column) for name in many for column in _RANKS)
        value = partial(_mean, names=many, value=spearman)
        found.append(Metric("overall", MEAN_SPEARMAN, groups, value, unit="correlation"))
    if compared:
        groups = tuple((name, column) for name in compared for column in ("right", "pairs"))
        found.append(Metric("overall", MEAN_WITHIN, groups, partial(_mean, names=compared, value=_within)))
    for name in names:
        if name in ratings:
            groups = tuple((name, column) for column in _RANKS)
            value = partial(spearman, name=name)
            found.append(Metric("subsets", f"{name}: {SPEARMAN}", groups, value, unit="correlation"))
        if (name, MAE) in measurements:
            value = partial(_error, name=name)
            found.append(Metric("subsets", f"{name}: {MAE}", ((name, MAE),), value, unit="raw"))
        if name in pairs:
            groups = ((name, "right"), (name, "pairs"))
            found.append(Metric("subsets", f"{name}: {WITHIN}", groups, partial(_within, name=name)))
    return found


def _mean(sums: GroupSums, names: Sequence[str], value: Callable[[GroupSums, str], np.ndarray]) -> np.ndarray:
    return nan_mean([value(sums, name) for name in names])


def _error(sums: GroupSums, name: str) -> np.ndarray:
    return sums.mean((name, MAE))


def _within(sums: GroupSums, name: str) -> np.ndarray:
    return ratio(sums.sum((name, "right")), sums.sum((name, "pairs")))


def by_objective(metrics: Mapping[str, MetricLike], kind: str) -> dict[str, MetricLike]:
    """Metrics of one kind (such as `SPEARMAN`) by objective, from those of level `subsets` by name."""
    suffix = f": {kind}"
    return {name.removesuffix(suffix): metric for name, metric in metrics.items() if name.endswith(suffix)}


BENCHMARK = Benchmark(
    "ratings",
    "ratings",
    read,
    measure,
    metrics,
    chance=None,
    rule="a tie counts half within prompts; an unscored response has no prediction, and loses its comparisons",
    rated=True,
)
