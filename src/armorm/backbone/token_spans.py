"""Where the tokens of a response are in its text: each character belongs to exactly one token.

The tokenizer gives offsets in the rendered conversation; templates may strip the reply, drop a part of it or write
around it. So the rendered reply is aligned with the original text, and characters are assigned by these rules:

- A character that several tokens share (the bytes of an emoji) belongs to the last of them, the first one whose state
  has read all of it. The others have an empty span where the character starts.
- White space that no token covers (stripped by the template, or swallowed by a turn token) belongs to the token after
  it; at the end of the text, to the last one with text.
- Text that the template does not render, or writes before the first token (Qwen3's `<think>`), belongs to no token:
  `unread` lists it.
- A token with nothing of the text (the end of the turn, a tool call) is a template token: its span is empty, its name
  is what the vocabulary calls it.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import SequenceMatcher
from re import findall
from typing import Any

import numpy as np

from armorm.backbone.chat_template import ChatTemplate, EncodedConversation
from armorm.conversation import Conversation
from armorm.errors import ConversationError


@dataclass(frozen=True)
class TokenSpans:
    """The t tokens that a response feature is read from, and their places in the response.

    Attributes:
        text: the response as it was given.
        spans: (t, 2) int64, start and end of each token's characters in the text, ascending.
        template: (t,) bool, whether a token has nothing of the text.
        names: (t,) text of each token; of template tokens, and of a part of a character, the vocabulary's name.
        unread: start and end of each part of the text that is in none of the tokens.
    """

    text: str
    spans: np.ndarray
    template: np.ndarray
    names: list[str]
    unread: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.spans)


def token_spans(
    template: ChatTemplate, conversation: Conversation, encoded: EncodedConversation, start: int
) -> TokenSpans:
    """Spans of the tokens from `start` on.

    Args:
        conversation: with its whole prompt.
        encoded: its ids; the prompt may have been truncated.
        start: index of the first token of the response (`Backbone.response_start`).

    Raises:
        ConversationError: if the ids from `start` on are not those of the conversation.
    """
    whole, offsets, rendered, reply_start = template.encode_with_offsets(conversation)
    count, text = len(encoded) - start, conversation.response
    if not np.array_equal(whole.ids[-count:], encoded.ids[start:]):
        raise ConversationError("its tokens are not those of the encoded response; expected the same conversation")
    places = _aligned(rendered[reply_start:], text)  # place in the text of each rendered character, or -1
    owner = np.full(len(text), -1, np.int64)
    first = np.full(count, -1, np.int64)  # place of the first character that a token has a part of
    for token, (low, high) in enumerate(offsets[-count:] - reply_start):
        covered = places[max(low, 0) : max(high, 0)]
        covered = covered[covered >= 0]
        if len(covered):
            owner[covered], first[token] = token, covered[0]
    _assign_uncovered(owner, np.isin(np.arange(len(text)), places), text)
    owned = np.flatnonzero(owner >= 0)
    spans = np.tile(np.array([len(text), -1], np.int64), (count, 1))
    np.minimum.at(spans[:, 0], owner[owned], owned)
    np.maximum.at(spans[:, 1], owner[owned], owned + 1)
    end = 0
    for token in range(count):  # without a character of its own: before the one that has it, or after the one before
        if spans[token, 1] < 0:
            spans[token] = end if first[token] < 0 else spans[owner[first[token]], 0]
        end = int(spans[token, 1])
    names = [
        text[low:high] or _name(template.tokenizer, int(token))
        for (low, high), token in zip(spans, encoded.ids[start:], strict=True)
    ]
    return TokenSpans(text, spans, first < 0, names, _runs(owner < 0))


def _aligned(rendered: str, text: str) -> np.ndarray:
    """Place in the text of each character of the rendered reply and what follows it; -1 for none."""
    places = np.full(len(rendered), -1, np.int64)
    lead = len(text) - len(text.lstrip())
    for kept, start in ((text, 0), (text.lstrip(), lead), (text.rstrip(), 0), (text.strip(), lead)):
        if rendered.startswith(kept):
            places[: len(kept)] = np.arange(start, start + len(kept))
            return places
    # A template that restructures the reply, such as one that drops its reasoning (so it keeps the end).
    pieces = [findall(r"\w+|\s+|[^\w\s]", side)[::-1] for side in (rendered, text)]
    ends = [len(side) - np.cumsum([0, *map(len, found)]) for side, found in zip((rendered, text), pieces, strict=True)]
    for block in SequenceMatcher(None, pieces[0], pieces[1], autojunk=False).get_matching_blocks():
        here, there = int(ends[0][block.a]), int(ends[1][block.b])
        length = here - int(ends[0][block.a + block.size])
        places[here - length : here] = np.arange(there - length, there)
    return places


def _assign_uncovered(owner: np.ndarray, rendered: np.ndarray, text: str) -> None:
    """Give characters without a token that are white space, or rendered, to the token after them."""
    following = int(owner.max(initial=-1))
    for place in range(len(text) - 1, -1, -1):
        if owner[place] < 0 and (rendered[place] or text[place].isspace()):
            owner[place] = following
        following = int(owner[place])


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """Start and end of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [(int(low), int(high)) for low, high in edges.reshape(-1, 2)]


def _name(tokenizer: Any, token: int) -> str:
    """The text of a token, or its entry in the vocabulary if it is no whole text."""
    text = tokenizer.decode([token])
    return str(tokenizer.convert_ids_to_tokens(token) if not text or "\ufffd" in text else text)
