"""Conversations to score, as token ids: invalid ones are listed, and each assistant turn can be a response.

With `turns="all"` every assistant turn after the first user turn is a row: the conversation up to it, with the template
applied to just that. So a turn has the score that it would have had when it was written, and the rows of a
conversation share the tokens of their common prefix (`features/extract.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from armorm.backbone.chat_template import ChatTemplate
from armorm.backbone.encoding import EncodedRows, encode_rows, same_prompts
from armorm.conversation import Conversation
from armorm.data.rows import entries_of, read_conversation
from armorm.errors import ConversationError
from armorm.progress import progress

Turns = Literal["last", "all"]


@dataclass(frozen=True)
class ScoreInput:
    """Valid conversations and their tokens, as lists of the same length.

    Attributes:
        conversations: each ends with the response that is scored.
        indices: of the conversation that was given.
        turns: place of the response in the messages of the conversation that was given.
        encoded: their tokens.
        rejected: index and reason of each conversation, or turn, that cannot be scored.
    """

    conversations: list[Conversation]
    indices: list[int]
    turns: list[int]
    encoded: EncodedRows
    rejected: list[tuple[int, str]]

    def of_kept(self, values: list[int]) -> np.ndarray:
        """Some of `indices` or `turns` (n,) int64: those of the rows that were encoded."""
        return np.array([values[i] for i in self.encoded.kept], np.int64)


def read_score_input(
    template: ChatTemplate,
    conversations: Any,
    limits: Mapping[str, Any],
    on_refused: Literal["error", "skip"] = "error",
    *,
    same_prompt: bool = False,
    turns: Turns = "last",
) -> ScoreInput:
    """Read and encode conversations.

    Args:
        conversations: as for `ArmoRM.score`.
        limits: `max_length` and `overflow` of the model.
        on_refused, same_prompt, turns: as for `ArmoRM.score`.

    Raises:
        ConversationError: naming the first conversation that cannot be scored, with `error`.
    """
    if turns not in ("last", "all"):
        raise ValueError(f"turns: found {turns!r}, expected 'last' or 'all'")
    if same_prompt and turns == "all":
        raise ValueError("same_prompt: the turns of a conversation have different prompts, expected turns='last'")
    texts: list[Conversation] = []
    indices: list[int] = []
    places: list[int] = []
    rejected: list[tuple[int, str]] = []

    def refuse(index: int, error: ConversationError) -> None:
        if on_refused == "error":
            raise ConversationError(str(error), f"conversation {index}") from None
        rejected.append((index, str(error)))

    for index, entry in enumerate(entries_of(conversations)):
        try:
            conversation = read_conversation(entry)
        except ConversationError as error:
            refuse(index, error)
            continue
        for place, text in answered_turns(conversation, turns):
            if isinstance(text, ConversationError):
                refuse(index, text)
            else:
                texts.append(text)
                indices.append(index)
                places.append(place)
    policy = limits.get("overflow", "error")
    if policy == "error" and on_refused == "skip":
        policy = "skip"
    with progress("tokens", len(texts), "conversations") as advance:
        encoded = encode_rows(template, texts, limits.get("max_length"), policy, advance)
    if same_prompt:
        encoded = same_prompts(template, texts, encoded, [range(len(texts))], limits.get("max_length"))
    for row, reason in encoded.rejected:
        refuse(indices[row], ConversationError(reason, f"messages[{places[row]}]" if turns == "all" else ""))
    return ScoreInput(texts, indices, places, encoded, sorted(rejected))


def answered_turns(conversation: Conversation, turns: Turns) -> list[tuple[int, Conversation | ConversationError]]:
    """Place in the messages of each turn to score, and the conversation up to it, or why it has no score."""
    if turns == "last":
        return [(len(conversation.messages) - 1, conversation)]
    found: list[tuple[int, Conversation | ConversationError]] = []
    for place in conversation.turns:
        try:
            found.append((place, conversation.until(place)))
        except ConversationError as error:
            found.append((place, error))
    return found
