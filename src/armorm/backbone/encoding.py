"""Encode conversations under a length limit: the one place where rows become token ids.

Overflow policies for conversations that are longer than the limit: `error` stops at the first one; `skip` rejects
it; `truncate_prompt` removes the oldest turns of the prompt (never system turns or the reply), then the beginning of
the last prompt turn, so the gate sees what remains. A row whose reply alone does not fit is rejected in any case.

A row alone keeps as much of its prompt as its own reply leaves. Responses that are compared must not: the gate would
weight the objectives of the two by different texts. `same_prompts` gives them what the longest of them leaves.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Literal

import numpy as np

from armorm.backbone.chat_template import ChatTemplate, EncodedConversation
from armorm.conversation import Conversation, Message
from armorm.errors import ConversationError

Overflow = Literal["error", "truncate_prompt", "skip"]
_CHUNK = 512


@dataclass(frozen=True)
class EncodedRows:
    """Encoded conversations."""

    rows: list[EncodedConversation | None]  # one entry per conversation, in order; None if it was rejected
    rejected: list[tuple[int, str]]  # (index, reason) of each rejected row

    @cached_property
    def kept(self) -> list[int]:
        """Indices of the rows that were encoded."""
        return [i for i, row in enumerate(self.rows) if row is not None]

    @cached_property
    def encoded(self) -> list[EncodedConversation]:
        """The encoded conversations, one for each of `kept`."""
        return [row for row in self.rows if row is not None]

    @property
    def truncated(self) -> list[int]:
        """Indices of the rows that lost prompt tokens."""
        return [i for i, row in enumerate(self.rows) if row is not None and row.truncated_tokens]


def encode_rows(
    template: ChatTemplate,
    conversations: Sequence[Conversation],
    max_length: int | None,
    overflow: Overflow = "error",
    advance: Callable[[int], None] = lambda count: None,
) -> EncodedRows:
    """Encode conversations under a length limit.

    Args:
        max_length: most tokens of a conversation; None for no limit.
        advance: called with the number of conversations just done.

    Raises:
        ConversationError: for the first row that cannot be encoded, under the policy `error`.
    """
    rows: list[EncodedConversation | None] = []
    rejected: list[tuple[int, str]] = []
    for start in range(0, len(conversations), _CHUNK):
        chunk = conversations[start : start + _CHUNK]
        for offset, whole in enumerate(_encode_chunk(template, chunk)):
            encoded = whole
            if isinstance(whole, EncodedConversation) and max_length is not None and len(whole) > max_length:
                if overflow == "truncate_prompt":
                    encoded = _shorten(template, chunk[offset], whole, max_length)[0]
                else:
                    encoded = ConversationError(f"found {len(whole)} tokens, expected at most {max_length}")
            if isinstance(encoded, ConversationError):
                if overflow == "error":
                    raise ConversationError(encoded.problem, f"conversation {start + offset}") from None
                rejected.append((start + offset, encoded.problem))
                rows.append(None)
            else:
                rows.append(encoded)
        advance(len(chunk))
    return EncodedRows(rows, rejected)


def _encode_chunk(
    template: ChatTemplate, chunk: Sequence[Conversation]
) -> Sequence[EncodedConversation | ConversationError]:
    """Encode a batch; if a conversation is rejected, one by one, so that only that one is lost."""
    try:
        return template.encode(chunk)
    except ConversationError as error:
        if len(chunk) == 1:
            return [error]
        return [_encode_chunk(template, [conversation])[0] for conversation in chunk]


def same_prompts(
    template: ChatTemplate,
    conversations: Sequence[Conversation],
    encoded: EncodedRows,
    compared: Iterable[Sequence[int] | np.ndarray],
    max_length: int | None,
) -> EncodedRows:
    """The rows with one prompt for all responses that are compared: what the longest of them leaves of it.

    Args:
        encoded: of the conversations, each alone.
        compared: indices of responses to one prompt, -1 for an invalid one; groups with a response in common are one.
    """
    if max_length is None or not encoded.truncated:
        return encoded
    truncated = {conversations[i].prompt_key for i in encoded.truncated}
    parents: dict[int, int] = {}

    def root(i: int) -> int:
        while parents.setdefault(i, i) != i:
            parents[i] = parents[parents[i]]  # so that the way is shorter next time
            i = parents[i]
        return i

    for indices in compared:
        kept = [int(i) for i in indices if i >= 0 and encoded.rows[i] is not None]
        if len(kept) > 1 and conversations[kept[0]].prompt_key in truncated:
            for i in kept:
                parents[root(i)] = root(kept[0])
    groups: dict[int, list[int]] = {}
    for i in sorted(parents):
        groups.setdefault(root(i), []).append(i)
    rows, rejected = list(encoded.rows), dict(encoded.rejected)
    for members in groups.values():
        found = _encode_group(template, [conversations[i] for i in members], max_length)
        for i, row in zip(members, found, strict=True):
            alone = rows[i]
            assert alone is not None
            if isinstance(row, ConversationError):
                rejected[i], rows[i] = row.problem, None
            elif row.key != alone.key:
                rows[i] = replace(row, truncated_tokens=len(alone) + alone.truncated_tokens - len(row))
    return EncodedRows(rows, sorted(rejected.items()))


def _encode_group(
    template: ChatTemplate, group: Sequence[Conversation], max_length: int
) -> list[EncodedConversation | ConversationError]:
    """Encode responses to one prompt, which loses what the longest of them needs; one that never fits is an error."""
    found: dict[int, EncodedConversation | ConversationError] = {}
    left = dict(enumerate(group))
    while left:
        rows = dict(zip(left, _encode_chunk(template, list(left.values())), strict=True))
        lengths = {i: len(row) for i, row in rows.items() if isinstance(row, EncodedConversation)}
        longest = max(left, key=lambda i: lengths.get(i, 0))
        row = rows[longest]
        if isinstance(row, ConversationError) or len(row) <= max_length:
            return [(found | rows)[i] for i in range(len(group))]
        shorter, prompt = _shorten(template, left[longest], row, max_length)
        if isinstance(shorter, ConversationError):
            found[longest] = shorter
            del left[longest]
        else:
            left = {i: shown.with_messages([*prompt, shown.messages[-1]]) for i, shown in left.items()}
    return [found[i] for i in range(len(group))]


def _shorten(
    template: ChatTemplate, conversation: Conversation, encoded: EncodedConversation, max_length: int
) -> tuple[EncodedConversation | ConversationError, list[Message]]:
    """The conversation with as much of its prompt as fits, and that prompt."""
    whole = len(encoded)
    prompt, reply = list(conversation.prompt), conversation.messages[-1]

    @cache
    def shortened(start: int) -> EncodedConversation | ConversationError:
        return _encode_chunk(template, [conversation.with_messages([*_from_turn(prompt, start), reply])])[0]

    def suffices(start: int) -> bool:
        found = shortened(start)
        return isinstance(found, ConversationError) or len(found) <= max_length

    # (By bisection: a dialogue may have thousands of turns, and each attempt encodes the remaining ones.)
    oldest = next((i for i, message in enumerate(prompt) if message.role != "system"), len(prompt))
    starts = [i for i in range(oldest + 1, len(prompt)) if prompt[i].role == "user"]  # after the first exchange
    first = bisect_left(starts, True, key=suffices)
    rest: EncodedConversation | ConversationError = encoded
    if starts:
        start = starts[min(first, len(starts) - 1)]
        prompt, rest = _from_turn(prompt, start), shortened(start)
    while not isinstance(rest, ConversationError) and len(rest) > max_length:
        shorter = _without_beginning(template, prompt, len(rest) - max_length)
        if shorter is None:
            problem = f"found {whole} tokens, {len(rest)} without the prompt's text, expected at most {max_length}"
            return ConversationError(problem), prompt
        prompt = shorter
        rest = _encode_chunk(template, [conversation.with_messages([*prompt, reply])])[0]
    if isinstance(rest, ConversationError):
        problem = f"found {whole} tokens, expected at most {max_length}; shortened: {rest.problem}"
        return ConversationError(problem), prompt
    return replace(rest, truncated_tokens=whole - len(rest)), prompt


def _from_turn(prompt: Sequence[Message], start: int) -> list[Message]:
    """The turns from `start` on, and the system turns before it."""
    return [*(message for message in prompt[:start] if message.role == "system"), *prompt[start:]]


def _without_beginning(template: ChatTemplate, prompt: Sequence[Message], excess: int) -> list[Message] | None:
    """Remove `excess` tokens from the beginning of the last prompt turn; None if nothing would be left of it."""
    last = prompt[-1]
    if last.role == "system":
        return None
    pieces = template.text_pieces(last.content)
    if len(pieces) <= 1:
        return None
    cut = pieces[min(excess, len(pieces) - 1)][0]
    rest = last.content[max(cut, 1) :]
    return [*prompt[:-1], Message(last.role, rest, last.extra)] if rest.strip() else None
