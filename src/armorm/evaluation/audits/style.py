"""Style: what a response looks like, apart from what it says.

In:  the text of a response.
Out: its length in characters, and how many list items and Markdown elements it has.

Length is counted in characters, so that audits of different models, with tokenizers of their own, are
about the same quantity.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from armorm.conversation import Conversation

_LIST_ITEM = re.compile(r"^[ \t]*(?:[-*+•]|\d{1,3}[.)])[ \t]+\S", re.MULTILINE)
_ELEMENTS = (
    _LIST_ITEM,
    re.compile(r"^#{1,6}[ \t]+\S", re.MULTILINE),  # headings
    re.compile(r"\*\*\S(?:[^*\n]*\S)?\*\*"),  # bold
    re.compile(r"^```[^\n]*\n.*?^```", re.MULTILINE | re.DOTALL),  # blocks of code
    re.compile(r"(?<!`)`[^`\n]+`(?!`)"),  # code within a line
    re.compile(r"^\|.*\|[ \t]*$", re.MULTILINE),  # rows of tables
    re.compile(r"\[[^\]\n]+\]\([^)\s]+\)"),  # links
)
QUANTITIES = ("length", "markdown", "lists")


def list_items(text: str) -> int:
    """Lines that begin like an item of a list."""
    return len(_LIST_ITEM.findall(text))


def markdown_elements(text: str) -> int:
    """Headings, bold passages, list items, code, rows of tables, links."""
    return sum(len(element.findall(text)) for element in _ELEMENTS)


def quantities(conversations: Sequence[Conversation]) -> dict[str, np.ndarray]:
    """Each of `QUANTITIES` as (n,) float64."""
    texts = [conversation.response for conversation in conversations]
    return {
        "length": lengths(conversations),
        "markdown": np.array([markdown_elements(text) for text in texts], np.float64),
        "lists": np.array([list_items(text) for text in texts], np.float64),
    }


def lengths(conversations: Sequence[Conversation]) -> np.ndarray:
    """Characters of each response, (n,) float64."""
    return np.array([len(conversation.response) for conversation in conversations], np.float64)
