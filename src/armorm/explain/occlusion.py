"""Occlusion: how the score changes when a part of the response is removed.

It measures what attribution to tokens approximates: the states of all later tokens change too, and the mean is over
fewer tokens. Each part costs one more response to the same prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from armorm.conversation import Conversation
from armorm.errors import ConversationError
from armorm.score_batch import ScoreBatch


@dataclass(frozen=True)
class OccludedPart:
    """A part of a response.

    Attributes:
        text, start, end: the part and its place in the response, in characters.
        change: score of the response minus its score without the part: above 0 for a part that raises the score. NaN
            if nothing would remain.
        changes: (k,) the same by objective.
    """

    text: str
    start: int
    end: int
    change: float
    changes: np.ndarray


def occluded(conversation: Conversation, spans: Sequence[tuple[int, int]]) -> list[Conversation | None]:
    """The conversation without each span of its response (start and end in characters); None if nothing remains.

    White space around a removed span is kept once.

    Raises:
        ConversationError: for a span that is not inside the response.
    """
    text, last = conversation.response, conversation.messages[-1]
    found: list[Conversation | None] = []
    for low, high in spans:
        if not 0 <= low < high <= len(text):
            raise ConversationError(f"span {low} to {high}: expected one inside the {len(text)} characters")
        before, after = text[:low], text[high:]
        if not before or before[-1].isspace():
            after = after.lstrip()
        rest = before + after if after else before.rstrip()
        kept = rest.strip() or last.extra
        found.append(conversation.with_messages([*conversation.prompt, replace(last, content=rest)]) if kept else None)
    return found


def occlusion_changes(
    conversation: Conversation,
    spans: Sequence[tuple[int, int]],
    without: Sequence[Conversation | None],
    batch: ScoreBatch,
) -> list[OccludedPart]:
    """The changes, from the scores of the conversation and of those of `without` that are not None."""
    changes = iter(batch.contributions[0].astype(np.float64) - batch.contributions[1:])
    nothing = np.full(len(batch.names), np.nan)
    by_part = [nothing if part is None else next(changes) for part in without]
    return [
        OccludedPart(conversation.response[low:high], low, high, float(change.sum()), change)
        for (low, high), change in zip(spans, by_part, strict=True)
    ]
