"""Ratings that a visitor of the playground gives: one line each, appended to a file that `armorm extend` reads.

Lines hold the conversation and one rating in its objective's raw scale, as `armorm suggest` asks for them. A reply that
is rated on several objectives, or by several visitors, has several lines.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from armorm.conversation import Conversation
from armorm.data.cells import number_of
from armorm.errors import ArmormError, shown
from armorm.files import append_text, json_text
from armorm.objectives import Objective


class RatingError(ArmormError, ValueError):
    """A rating that is no number on its objective's scale."""


def rating_entry(conversation: Conversation, objective: Objective, value: Any) -> dict[str, Any]:
    """A row of a ratings file.

    Raises:
        RatingError: naming the objective, what was found, and its scale.
    """
    number = number_of(value)
    if number is None or not math.isfinite(number) or not objective.low <= number <= objective.high:
        scale = f"a number from {objective.low:g} to {objective.high:g}"
        raise RatingError(f"{objective.name}: found {shown(value)}, expected {scale}")
    tools = {"tools": list(conversation.tools)} if conversation.tools else {}
    return {"messages": conversation.to_list(), **tools, objective.name: float(number)}


def save_rating(path: Path, conversation: Conversation, objective: Objective, value: Any) -> None:
    """Append a rating to a file.

    Raises:
        RatingError: as `rating_entry`.
        OutputError: if the file cannot be written.
    """
    append_text(path, json_text(rating_entry(conversation, objective, value)) + "\n")
