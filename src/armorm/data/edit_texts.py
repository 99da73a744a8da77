"""Texts that edits of replies insert: insults, dismissals, excuses, refusals, padding and others, from edit_texts.json.

A template has an id (`insult-001`), alternatives (`{a|b}`) and may name the prompt's subject (`{topic}`, `{Topic}`). By
a hash of its id about a quarter of the templates of each kind is held out: no training row of any run contains one, so
what a model does with them shows whether it learned the quality or the wording.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Any, Literal

TextKind = Literal[
    "insult", "dismissal", "dont_know", "excuse", "refusal", "padding", "opening", "confident", "flattery"
]
HELD_OUT_SHARE = 0.25
_HELD_OUT_SALT = "held out 569"  # leaves between 21% and 27% of every kind out

_SLOT = re.compile(r"\{([^{}]*)\}")
_WORD = re.compile(r"[^\W\d_]{4,}")


@dataclass(frozen=True)
class Template:
    """A text of one kind with slots.

    Attributes:
        id: unique, such as `insult-001`.
        text: with slots in braces.
    """

    id: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether no training row may contain it: by a hash of its id."""
        digest = blake2b(f"{_HELD_OUT_SALT} {self.id}".encode(), digest_size=4).digest()
        return int.from_bytes(digest, "big") / 2**32 < HELD_OUT_SHARE

    def fill(self, random: Random, topic: str) -> str:
        """The text with its slots filled."""

        def filled(found: re.Match[str]) -> str:
            choice = random.choice(found[1].split("|"))
            return {"topic": topic, "Topic": topic[:1].upper() + topic[1:]}.get(choice, choice)

        text = self.text
        while _SLOT.search(text):  # alternatives may contain the topic
            text = _SLOT.sub(filled, text)
        return text


@cache
def edit_data() -> dict[str, Any]:
    """`texts` (kind -> id -> text) and `tables` (names, classes of proper nouns, opposites, spellings, ...)."""
    data: dict[str, Any] = json.loads((Path(__file__).parent / "edit_texts.json").read_text(encoding="utf-8"))
    return data


@cache
def templates(kind: TextKind, held_out: bool) -> tuple[Template, ...]:
    """The templates of a kind for measuring (`held_out`) or for training."""
    every = (Template(id, text) for id, text in edit_data()["texts"][kind].items())
    return tuple(template for template in every if template.held_out == held_out)


def topic_of(prompt: str) -> str:
    """The longest word of a prompt that may name its subject; `this` without one."""
    common = edit_data()["tables"]["common_words"]
    words = [word for word in _WORD.findall(prompt[:2000]) if word.lower() not in common]
    if not words:
        return "this"
    longest = max(words, key=len)
    return longest if prompt.find(longest) > 0 else longest.lower()


@dataclass
class Draw:
    """Random choices of one edit.

    Attributes:
        random: decides everything.
        prompt: text of the prompt's last user turn.
        held_out: whether texts are those for measuring, else those for training.
        used: ids of the templates that were drawn.
    """

    random: Random
    prompt: str = ""
    held_out: bool = False
    used: list[str] = field(default_factory=list)

    def text(self, *kinds: TextKind) -> str:
        """A filled text of one of the kinds."""
        template = self.random.choice(templates(self.random.choice(kinds), self.held_out))
        self.used.append(template.id)
        return template.fill(self.random, topic_of(self.prompt))
