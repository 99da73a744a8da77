"""Logs that trainers write with texts instead of scores: their rows are scored by a model and become samples of a run.

TRL writes `completions/completions_STEP.parquet` into its output folder (`log_completions=True`), with columns `step`,
`prompt` and `completion`. Any rows with a conversation and a `step` will do; samples of one prompt in one step are a
group.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from armorm.conversation import Conversation
from armorm.data.rows import Row
from armorm.errors import DataError
from armorm.monitoring.log import batch_lines, step_metrics

if TYPE_CHECKING:
    from armorm.reward_model import ArmoRM

_ROWS_AT_ONCE = 1024


def holds_text(row: Row) -> bool:
    """Whether a row of a log holds neither scores nor metrics, so that it has to be scored."""
    return "contributions" not in row.columns and step_metrics(row) is None


def rescored(rows: Iterable[Row | DataError], rm: ArmoRM) -> Iterator[Row | DataError]:
    """The rows of a log; those of text are scored, step by step, and those with scores stay as they are.

    A conversation that cannot be scored becomes its error.
    """
    waiting: list[tuple[Row, Conversation]] = []
    for row in rows:
        if isinstance(row, DataError) or not holds_text(row):
            yield row
            continue
        if waiting and (row.columns.get("step") != waiting[0][0].columns.get("step") or len(waiting) >= _ROWS_AT_ONCE):
            yield from _scored(waiting, rm)
            waiting = []
        try:
            waiting.append((row, row.conversation()))
        except DataError as error:
            yield error
    if waiting:
        yield from _scored(waiting, rm)


def _scored(waiting: list[tuple[Row, Conversation]], rm: ArmoRM) -> Iterator[Row | DataError]:
    batch = rm.score([conversation for _, conversation in waiting], on_refused="skip")
    kept = [waiting[int(index)] for index in batch.rows]
    prompts = (conversation.prompt_key for _, conversation in kept)
    for (row, _), line in zip(kept, batch_lines(batch, prompts, batch.response_tokens), strict=True):
        yield Row(row.file, row.number, {"step": row.columns.get("step"), **json.loads(line)})
    for index, reason in batch.rejected:
        yield waiting[index][0].error(reason)
