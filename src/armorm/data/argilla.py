"""Records of Argilla 2: conversations to rate, and ratings by several people, as its `records.from_json` reads them.

A file is a JSON list of records

    {"id": ..., "fields": {"messages": [...]}, "metadata": {...}, "suggestions": {},
     "responses": {"polite": [{"value": 4, "user_id": ...}, ...]}}

whose field is a chat field and whose questions are rating questions. `Location.rows` reads such a file again
(data/layout_detection.py), with each question's answers as the ratings of several raters. Argilla takes whole numbers
as answers of a rating question, so other ratings are not written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from armorm.conversation import Conversation


def argilla_record(
    conversation: Conversation,
    metadata: Mapping[str, Any] | None = None,
    ratings: Mapping[str, Mapping[str, float] | Sequence[float]] | None = None,
) -> dict[str, Any]:
    """A record.

    Args:
        conversation: shown as one chat; tool calls are not shown.
        metadata: of the record.
        ratings: by question, of each rater by their id (a UUID of Argilla), or in a list without ids.

    Raises:
        ValueError: for a rating that is no whole number.
    """
    responses: dict[str, list[dict[str, Any]]] = {}
    for question, given in (ratings or {}).items():
        raters = given.items() if isinstance(given, Mapping) else ((None, value) for value in given)
        responses[question] = [_answer(question, user, value) for user, value in raters]
    messages = [{"role": message.role, "content": message.content} for message in conversation.messages]
    return {
        "id": conversation.key,
        "fields": {"messages": messages},
        "metadata": dict(metadata or {}),
        "suggestions": {},
        "responses": responses,
        "vectors": {},
    }


def _answer(question: str, user: str | None, value: float) -> dict[str, Any]:
    if not float(value).is_integer():
        raise ValueError(f"{question}: found {value}, expected a whole number, as Argilla's rating questions take")
    return {"value": int(value), **({"user_id": user} if user is not None else {})}
