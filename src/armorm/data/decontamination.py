"""Decontamination: match training prompts with evaluation prompts up to formatting.

A benchmark's prompt may be in a training set with another line break, other quotation marks or a system turn before
it: the key ignores case, spaces, Unicode forms, punctuation around words, and system turns. Signs inside and between
words count: 2+2 and 2-2, 1.5 and 15 are different questions. A longer dialogue that begins with a benchmark's prompt
is another prompt, and is kept.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable

from armorm.conversation import Conversation

_AROUND_WORDS = ".,;:!?\"'`\u2018\u2019\u201c\u201d\u00ab\u00bb\u2026()[]*_#"


def normalised(text: str) -> str:
    """The words of a text in lower case, without the punctuation around them, one space between them."""
    words = unicodedata.normalize("NFKC", text).casefold().split()
    bare = [word.strip(_AROUND_WORDS) for word in words]
    return " ".join(word for word in bare if word) or text.strip()


def overlap_key(conversation: Conversation) -> str:
    """16 hex digits of the normalised prompt."""
    turns = [f"{turn.role} {normalised(turn.content)}" for turn in conversation.prompt if turn.role != "system"]
    return hashlib.blake2b("\n".join(turns).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


class KnownPrompts:
    """Prompts to exclude from training."""

    def __init__(self, conversations: Iterable[Conversation] = ()) -> None:
        self.keys: set[str] = set()  # exact
        self.normal: set[str] = set()  # normalised
        self.add(conversations)

    def add(self, conversations: Iterable[Conversation]) -> None:
        for conversation in conversations:
            if conversation.prompt_key not in self.keys:
                self.keys.add(conversation.prompt_key)
                self.normal.add(overlap_key(conversation))

    def holds(self, conversation: Conversation) -> bool:
        return conversation.prompt_key in self.keys or overlap_key(conversation) in self.normal
