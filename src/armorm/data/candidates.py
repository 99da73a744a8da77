"""Candidates: several responses to one prompt, in one row (a list, or the sides of a preference pair) or in rows with
the same prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from armorm.conversation import Conversation, prompt_messages
from armorm.data.layout_detection import LAYOUTS
from armorm.data.preferences import preference_pair
from armorm.data.rows import Row
from armorm.errors import ConversationError, DataError, shown


@dataclass
class Candidates:
    """Responses to one prompt.

    Attributes:
        row: number of the (first) row.
        id: of the row, None if absent.
        conversations: one per response, None if invalid.
        faults: reason by position.
        rows: number of each response's row, where they are several.
        columns: the rows' columns, as they are in the file; a list of one value per response where they differ.
        chosen: position of the preferred response, None if the data do not say.
    """

    row: int
    id: Any
    conversations: list[Conversation | None]
    faults: dict[int, str] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    columns: dict[str, Any] = field(default_factory=dict)
    chosen: int | None = None


def read_candidates(rows: Iterable[Row | DataError], rejected: list[DataError] | None = None) -> Iterator[Candidates]:
    """Responses by prompt, in the order in which prompts appear; of a preference pair, the chosen one first.

    Args:
        rejected: rows that hold no responses are added to it; without it, the first one is an error.

    Raises:
        DataError: for rows of an unknown layout, or an invalid prompt.
    """
    grouped: dict[str, Candidates] = {}
    columns: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            if row.kind == "candidates":
                yield several_responses(row)
                continue
            if row.kind == "pairs":
                pair = preference_pair(row)
                sides: list[Conversation | None] = [pair.chosen, pair.rejected]
                yield Candidates(row.number, row.values.get("id"), sides, columns=dict(row.columns), chosen=0)
                continue
            if not {"messages", "response"} & set(row.values):
                raise row.layout_error(LAYOUTS)
            conversation = row.conversation()
        except DataError as error:
            if rejected is None:
                raise
            rejected.append(error)
            continue
        held = grouped.setdefault(conversation.prompt_key, Candidates(row.number, None, []))
        held.conversations.append(conversation)
        held.rows.append(row.number)
        columns.setdefault(conversation.prompt_key, []).append(row.columns)
    for key, held in grouped.items():
        held.columns = _merged(columns.pop(key))
        held.id = held.columns.get("id")
        yield held


def several_responses(row: Row) -> Candidates:
    """The candidates of one row.

    Raises:
        DataError: for a row without a valid prompt, or without a list of responses.
    """
    prompt, responses = row.values.get("prompt", row.values.get("messages")), row.values["responses"]
    if prompt is None:
        raise row.error(f"found columns {shown(row.filled, 80)}, expected 'prompt' next to 'responses'")
    if not isinstance(responses, Sequence) or isinstance(responses, str) or not responses:
        raise row.error(f"found {shown(responses)}, expected a list of responses", "responses")
    try:
        prompt_messages(prompt)
    except ConversationError as error:
        raise row.error(error.problem, error.field) from None
    held = Candidates(row.number, row.values.get("id"), [], columns=dict(row.columns))
    for position, response in enumerate(responses):
        try:
            held.conversations.append(Conversation.from_prompt(prompt, response, f"responses[{position}]", row.tools))
        except ConversationError as error:
            held.conversations.append(None)
            held.faults[position] = str(error)
    return held


def _merged(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The columns of rows: one value where all have the same, else a list."""
    merged = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        merged[name] = values[0] if all(value == values[0] for value in values[1:]) else values
    return merged
