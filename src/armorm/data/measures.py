"""Measured objectives: labels computed from the response's text instead of rated.

`response_length` is log1p of the response's tokens; `list_density` and `markdown_density` are list items and Markdown
elements per non-blank line; `refusal` is 1 for a response that refuses or declines to answer (data/refusals.py), else
0. `python:MODULE:FUNCTION` is the user's own function of a conversation's messages, which returns a number: naming it
imports that module and runs its code; nothing else does. The reward maps the 1st and 99th percentiles of the training
rows to 0 and 1, without clipping; that of `refusal` is the measure itself. A measured objective is fitted like a rated
one; its reward is predicted from features.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from armorm.conversation import Conversation
from armorm.data.refusals import is_refusal
from armorm.errors import FitError, nearest, shown
from armorm.objectives import Objective, ObjectiveError

Measure = Callable[[Conversation, int], float]


def response_length(conversation: Conversation, response_tokens: int) -> float:
    """log1p of the response's tokens, without template tokens."""
    return float(np.log1p(response_tokens))


def list_density(conversation: Conversation, response_tokens: int) -> float:
    """List items per non-blank line, 0 to 1."""
    return list_items(conversation.response) / filled_lines(conversation.response)


def markdown_density(conversation: Conversation, response_tokens: int) -> float:
    """Markdown elements (`markdown_elements`) per non-blank line."""
    return markdown_elements(conversation.response) / filled_lines(conversation.response)


def refusal(conversation: Conversation, response_tokens: int) -> float:
    """1 if the response refuses or declines to answer, else 0."""
    return float(is_refusal(conversation.response))


MEASURES: dict[str, Measure] = {
    "response_length": response_length,
    "list_density": list_density,
    "markdown_density": markdown_density,
    "refusal": refusal,
}
_RANGES = {"refusal": (0.0, 1.0)}  # of measures whose scale is not taken from the training rows

OWN_FUNCTION = "python:"


def find_measure(name: str) -> Measure:
    """The function of a measure.

    Raises:
        ObjectiveError: for an unknown measure, with the nearest name; for a module or function that does not exist.
    """
    if name.startswith(OWN_FUNCTION):
        return _own_function(name)
    if name not in MEASURES:
        raise ObjectiveError(
            f"unknown measure {name!r}{nearest(name, MEASURES)}; there are {', '.join(MEASURES)}, "
            f"and {OWN_FUNCTION}MODULE:FUNCTION for your own"
        )
    return MEASURES[name]


def _own_function(name: str) -> Measure:
    module_name, _, function_name = name.removeprefix(OWN_FUNCTION).partition(":")
    if not module_name or not function_name:
        raise ObjectiveError(f"measure {name!r}, expected {OWN_FUNCTION}MODULE:FUNCTION")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ObjectiveError(f"measure {name!r} cannot be imported: {error}") from None
    if not callable(function):
        raise ObjectiveError(f"measure {name!r}: {function_name} of {module_name} is not a function")

    def own(conversation: Conversation, response_tokens: int) -> float:
        value = function(conversation.to_list())
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise FitError(f"measure {name!r} returned {shown(value)} for a conversation, expected a finite number")
        return number

    return own


def measure(name: str, conversations: Sequence[Conversation], response_tokens: Sequence[int]) -> np.ndarray:
    """Raw values (n,) float64 of a measure.

    Args:
        response_tokens: (n,) tokens of each response.

    Raises:
        ObjectiveError: for an unknown measure, with the nearest name.
        FitError: for a user's function that does not return a finite number.
    """
    function = find_measure(name)
    return np.array([function(c, t) for c, t in zip(conversations, response_tokens, strict=True)], np.float64)


def computed_objective(name: str, measure_name: str, training: np.ndarray) -> Objective:
    """The objective of a measure, scaled by the 1st to 99th percentile of its training values, `refusal` by 0 to 1.

    Raises:
        FitError: if the training values do not vary.
    """
    low, high = (float(q) for q in np.percentile(training, (1, 99))) if len(training) else (0.0, 0.0)
    if measure_name in _RANGES and len(training) and np.ptp(training) > 0:
        low, high = _RANGES[measure_name]
    if not low < high:
        raise FitError(f"measured objective {name} does not vary over the {len(training)} training rows")
    return Objective(name, "computed", low, high, high - low, low, "neutral", measure_name)


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
    """Number of lines that begin like a list item."""
    return len(_LIST_ITEM.findall(text))


def markdown_elements(text: str) -> int:
    """Number of headings, bold passages, list items, code blocks and spans, table rows and links."""
    return sum(len(element.findall(text)) for element in _ELEMENTS)


def filled_lines(text: str) -> int:
    """Number of non-blank lines, at least 1."""
    return max(sum(not line.isspace() for line in text.splitlines() if line), 1)
