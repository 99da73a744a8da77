"""Markdown in a response: how many list items and elements it has.

In:  text. Out: counts.
"""

from __future__ import annotations

import re

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


def list_items(text: str) -> int:
    """Lines that begin like an item of a list."""
    return len(_LIST_ITEM.findall(text))


def markdown_elements(text: str) -> int:
    """Headings, bold passages, list items, code, rows of tables, links."""
    return sum(len(element.findall(text)) for element in _ELEMENTS)


def filled_lines(text: str) -> int:
    """Lines that hold more than blanks; at least 1."""
    return max(sum(not line.isspace() for line in text.splitlines() if line), 1)
