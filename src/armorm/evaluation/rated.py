"""Rated rows as examples: which columns are which objectives of the model.

In:  rows `messages` (or `prompt`, `response`) with a column per objective, and the model's objectives.
Out: `Loaded`: one conversation an example, its labels the raw ratings in the order of `names`.

A column is an objective of the model where it bears its name, or its name after the file's
(`helpfulness` of `helpsteer.jsonl` is `helpsteer-helpfulness`). A model without objectives is measured
against every column of numbers. Of rows with a `split` only those of the test split count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

from armorm.conversation import Conversation
from armorm.data.ratings import objective_name, rating_value, row_conversation, row_split, split_role
from armorm.data.rows import Row
from armorm.errors import ConversationError, DataError, nearest, shown
from armorm.evaluation.examples import Example, make_example
from armorm.evaluation.loaders import Loaded
from armorm.evaluation.sources import Source
from armorm.objectives import ObjectiveSet

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
            if split_role(row_split(row), "train") in ("", "test"):
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
            return row_conversation(row)
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
