"""Overlap: whether a prompt is, but for its writing, one that is evaluated on.

In:  conversations.
Out: a key of each prompt that ignores case, spaces, Unicode forms, punctuation around words, and system turns; and
     whether it is among those of a set of prompts.

A benchmark's prompt stands in training sets with another line break, another quotation mark, a system turn before
it, and at times as the first turn of a longer dialogue whose later turns are not the benchmark's: the last is
another prompt, and is kept. Signs inside and between words stay: 2+2 and 2-2, 1.5 and 15 are not the same question.
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
    """Prompts to keep apart from training.

    Attributes:
        keys: exact content keys.
        normal: normalised keys.
    """

    def __init__(self, conversations: Iterable[Conversation] = ()) -> None:
        self.keys: set[str] = set()
        self.normal: set[str] = set()
        self.add(conversations)

    def add(self, conversations: Iterable[Conversation]) -> None:
        """Add the prompts of conversations."""
        for conversation in conversations:
            if conversation.prompt_key not in self.keys:
                self.keys.add(conversation.prompt_key)
                self.normal.add(overlap_key(conversation))

    def holds(self, conversation: Conversation) -> bool:
        """Whether its prompt is one of them."""
        return conversation.prompt_key in self.keys or overlap_key(conversation) in self.normal
