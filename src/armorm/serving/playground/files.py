"""Rows of an uploaded file as prompts with up to four responses.

In:  a JSON lines file: `{"prompt", "responses"}`, `{"prompt", "response"}`, `{"messages"}` or `{"prompt", "chosen",
     "rejected"}` a line.
Out: `Example`s, and how many lines were none. A prompt of several turns is shown, and read, as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from armorm.conversation import Conversation, Message
from armorm.data.rows import Location, Row
from armorm.errors import ConversationError, shown
from armorm.serving.playground.reweighting import LETTERS

MOST_ROWS = 1000


@dataclass(frozen=True)
class Example:
    """One row: its number, the prompt as text (or JSON messages), the texts of its responses."""

    number: int
    prompt: str
    responses: list[str]

    @property
    def title(self) -> str:
        """The row's number and how its prompt begins."""
        return f"{self.number}: {' '.join(self.prompt.split())[:60]}"


def read_examples(path: str | Path) -> tuple[list[Example], int]:
    """The first rows of a file, and the number of lines among them that could not be used.

    Raises:
        DataError: for a file that cannot be read at all.
    """
    examples: list[Example] = []
    unusable = 0
    for row in islice(Location.find(path).rows_or_faults(), MOST_ROWS):
        try:
            if isinstance(row, Row):
                examples.append(_example(row))
            else:
                unusable += 1
        except ConversationError:
            unusable += 1
    return examples, unusable


def read_prompt(text: str) -> str | list[Any]:
    """What stands in the prompt's box: text, or messages where it is a JSON list of such."""
    if text.lstrip().startswith("["):
        try:
            value = json.loads(text)
        except ValueError:
            return text
        if isinstance(value, list) and value and all(isinstance(entry, dict) and "role" in entry for entry in value):
            return value
    return text


def _example(row: Row) -> Example:
    values = row.values
    if values.get("messages") is not None:
        conversation = Conversation.from_messages(values["messages"])
        return Example(row.number, _prompt_text(conversation.prompt), [conversation.response])
    if values.get("prompt") is None:
        raise ConversationError(f"found columns {shown(row.filled)}, expected messages or prompt")
    given = values.get("responses")
    if given is None:
        given = [values[name] for name in ("response", "chosen", "rejected") if values.get(name) is not None]
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise ConversationError(f"found {shown(given)}, expected responses")
    read = [Conversation.from_prompt(values["prompt"], response) for response in given[: len(LETTERS)]]
    return Example(row.number, _prompt_text(read[0].prompt), [conversation.response for conversation in read])


def _prompt_text(prompt: Sequence[Message]) -> str:
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    return json.dumps([message.to_dict() for message in prompt], ensure_ascii=False, indent=1)
