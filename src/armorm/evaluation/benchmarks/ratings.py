"""Held-out ratings: are the predicted ratings in the right order, and how far off are they?

In:  predicted and given raw ratings (k objectives) of conversations, and their prompts.
Out: of each objective Spearman, mean absolute error in raw units, accuracy within prompts; means of the
     first and the last over objectives with enough ratings.

Between prompts much of a rating is known before the response is read, so the accuracy within prompts
stands beside the correlation: of two responses to one prompt with different ratings, how often the better
one is predicted higher (a tie counts half). A refused response has no prediction: it leaves the
correlation and the error, and loses its comparisons. Resampled correlations use the ranks of the whole set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from scipy.stats import rankdata

from armorm.conversation import Conversation
from armorm.data.ratings import objective_name, rating_value
from armorm.data.rows import Row
from armorm.data.sources import Source
from armorm.errors import ConversationError, DataError, nearest, shown
from armorm.evaluation.examples import Example, Item, make_example
from armorm.evaluation.loaders import Loaded
from armorm.evaluation.metrics import Cells, Figure, Measured, Totals, mean_of, ratio
from armorm.objectives import ObjectiveSet

MIN_ROWS = 3

MIN_RATINGS = 100

SPEARMAN, MAE, WITHIN = "Spearman", "error", "within prompts"

MEAN_SPEARMAN = f"mean Spearman (>= {MIN_RATINGS} ratings)"

MEAN_WITHIN = f"mean within prompts (>= {MIN_RATINGS} pairs)"

_RANKS = ("x", "y", "xx", "yy", "xy")


def rank_columns(prediction: np.ndarray, rating: np.ndarray) -> dict[str, np.ndarray]:
    """Centred ranks (m,) of both and their products, from whose means Spearman follows."""
    x, y = rankdata(prediction), rankdata(rating)
    x, y = x - x.mean(), y - y.mean()
    return {"x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y}


def spearman(totals: Totals, name: str) -> np.ndarray:
    """Rank correlation (...); 0 where one side does not vary, NaN below `MIN_ROWS` rows."""
    x, y, xx, yy, xy = (totals.mean((name, column)) for column in _RANKS)
    norm = np.sqrt(np.clip(xx - x * x, 0, None) * np.clip(yy - y * y, 0, None))
    value = np.nan_to_num(ratio(xy - x * y, norm))
    return np.where(totals.count((name, "x")) >= MIN_ROWS, value, np.nan)


def comparison_columns(
    prediction: np.ndarray, rating: np.ndarray, prompts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Of each row (m,): comparisons won against lower-rated rows of its prompt (ties half), and all of those."""
    right, count = np.zeros(len(rating)), np.zeros(len(rating))
    groups: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    for rows in groups.values():
        better = rating[rows][:, None] > rating[rows][None, :]
        if better.any():
            difference = prediction[rows][:, None] - prediction[rows][None, :]
            won = (difference > 0) + 0.5 * (difference == 0)
            right[rows], count[rows] = (won * better).sum(1), better.sum(1)
    return right, count


def measure(names: Sequence[str], raw: bool, items: Sequence[Item], scores: Sequence[np.ndarray]) -> Cells:
    """Cells of every objective.

    Args:
        names: (k,) objectives, the order of labels and scores.
        raw: whether scores are raw ratings, so that an error means something.
        items: labels are the given ratings, NaN where missing.
        scores: (k,) a row, or (1,) where one score stands for every objective.
    """
    given = np.array([item.labels for item in items], np.float64).reshape(len(items), len(names))
    predicted = np.array([np.broadcast_to(values, len(names)) for values in scores]).reshape(given.shape)
    prompts = [item.prompt for item in items]
    cells: Cells = {}
    for column, name in enumerate(names):
        rated = np.flatnonzero(~np.isnan(given[:, column]))
        known = rated[~np.isnan(predicted[rated, column])]
        if not len(known):
            continue  # nothing was predicted: there is no figure, not a bad one
        x, y = predicted[known, column], given[known, column]
        columns = rank_columns(x, y) | ({MAE: np.abs(x - y)} if raw else {})
        cells |= {(name, label): Measured(known, values) for label, values in columns.items()}
        right, count = comparison_columns(
            predicted[rated, column], given[rated, column], [prompts[row] for row in rated]
        )
        compared = count > 0
        if compared.any():
            cells[name, "right"] = Measured(rated[compared], right[compared])
            cells[name, "pairs"] = Measured(rated[compared], count[compared])
    return cells


def figures(cells: Cells) -> list[Figure]:
    """Means over objectives with enough ratings, then the figures of each objective."""
    names = list(dict.fromkeys(name for name, _ in cells))
    ratings = {name: len(cells[name, "x"].rows) for name in names if (name, "x") in cells}
    pairs = {name: cells[name, "pairs"].values.sum() for name in names if (name, "pairs") in cells}
    found: list[Figure] = []
    many = [name for name in names if ratings.get(name, 0) >= MIN_RATINGS]
    compared = [name for name in names if pairs.get(name, 0) >= MIN_RATINGS]
    if many:
        used = tuple((name, column) for name in many for column in _RANKS)
        found.append(
            Figure(
                "overall",
                MEAN_SPEARMAN,
                used,
                partial(_mean, names=many, value=spearman),
                unit="correlation",
            )
        )
    if compared:
        used = tuple((name, column) for name in compared for column in ("right", "pairs"))
        found.append(Figure("overall", MEAN_WITHIN, used, partial(_mean, names=compared, value=_within)))
    for name in names:
        if name in ratings:
            used = tuple((name, column) for column in _RANKS)
            found.append(
                Figure("subsets", f"{name}: {SPEARMAN}", used, partial(spearman, name=name), unit="correlation")
            )
        if (name, MAE) in cells:
            found.append(Figure("subsets", f"{name}: {MAE}", ((name, MAE),), partial(_error, name=name), unit="raw"))
        if name in pairs:
            used = ((name, "right"), (name, "pairs"))
            found.append(Figure("subsets", f"{name}: {WITHIN}", used, partial(_within, name=name)))
    return found


def by_objective(figures: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """Figures named `objective: kind` as objective -> kind -> figure."""
    result: dict[str, dict[str, object]] = {}
    for name, figure in figures.items():
        objective, _, kind = name.rpartition(": ")
        result.setdefault(objective, {})[kind] = figure
    return result


def _mean(totals: Totals, names: Sequence[str], value: Callable[[Totals, str], np.ndarray]) -> np.ndarray:
    return mean_of([value(totals, name) for name in names])


def _error(totals: Totals, name: str) -> np.ndarray:
    return totals.mean((name, MAE))


def _within(totals: Totals, name: str) -> np.ndarray:
    return ratio(totals.sum((name, "right")), totals.sum((name, "pairs")))


_NOT_RATED = {"messages", "prompt", "response", "chosen", "rejected", "split", "id", "index", "row", "margin"}


def load_ratings(sources: Sequence[Source], objectives: ObjectiveSet | None) -> Loaded:
    """Held-out rated rows.

    Args:
        objectives: of the model; None for a model that has none.

    Raises:
        DataError: where no column is an objective of the model, or a rating is out of its range.
    """
    left_out: dict[str, int] = {}
    held_out: list[tuple[Source, Row]] = []
    for source in sources:
        for row in source.rows():
            if row.split_role() in ("", "test"):
                held_out.append((source, row))
            else:
                left_out["rows of other splits than test"] = left_out.get("rows of other splits than test", 0) + 1
    columns = {source.name: _columns(source, held_out, objectives, left_out) for source in sources}
    used = {name for found in columns.values() for name in found.values()}
    if not used:
        raise _unmatched(sources[0], held_out, objectives)
    names = [name for name in (objectives.names if objectives else dict.fromkeys(_in_order(columns))) if name in used]
    examples = []
    for source, row in held_out:
        ratings = dict.fromkeys(names, math.nan)
        for column, name in columns[source.name].items():
            value = (
                rating_value(row, column, objectives[objectives.position(name)]) if objectives else _number(row, column)
            )
            if not math.isnan(value):
                ratings[name] = value
        if all(math.isnan(value) for value in ratings.values()):
            left_out["rows without a rating"] = left_out.get("rows without a rating", 0) + 1
        else:
            examples.append(_example(row, list(ratings.values())))
    if not examples:
        raise DataError("no row of the test split is rated", file=sources[0].location.name)
    return Loaded(examples, left_out, names, raw=objectives is not None)


def _columns(
    source: Source, held_out: Sequence[tuple[Source, Row]], objectives: ObjectiveSet | None, left_out: dict[str, int]
) -> dict[str, str]:
    """Objective of each column of numbers of a source; columns without one are counted in `left_out`."""
    counts: dict[str, int] = {}
    for owner, row in held_out:
        if owner is source:
            for column, value in row.values.items():
                if column not in _NOT_RATED and isinstance(value, (bool, int, float)):
                    counts[column] = counts.get(column, 0) + 1
    found: dict[str, str] = {}
    for column, count in counts.items():
        candidates = (column, objective_name(column, source.name))
        if objectives is None:
            found[column] = candidates[1]
        else:
            name = next((name for name in candidates if name in objectives.names), None)
            if name is not None:
                found[column] = name
            else:
                left_out[f"ratings of '{column}', no objective of the model"] = count
    return found


def _in_order(columns: Mapping[str, Mapping[str, str]]) -> list[str]:
    return [name for found in columns.values() for name in found.values()]


def _number(row: Row, column: str) -> float:
    value = row.values.get(column)
    if value is None:
        return math.nan
    if not isinstance(value, (bool, int, float)) or math.isinf(value):
        raise row.error(f"found {shown(value)}, expected a number", column)
    return float(value)


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
    """The row's prompt with a reply that stands for any."""
    messages = row.values.get("messages")
    if messages is None:
        return Conversation.from_prompt(row.values.get("prompt") or "", "-")
    prompt = list(messages)[:-1] if isinstance(messages, Sequence) else messages
    return Conversation.from_prompt(prompt, "-")


def _unmatched(source: Source, held_out: Sequence[tuple[Source, Row]], objectives: ObjectiveSet | None) -> DataError:
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
