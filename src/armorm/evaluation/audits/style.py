"""Style: what a response looks like, apart from what it says.

In:  the text of a response.
Out: its length in characters, and how many list items and Markdown elements it has.

Length is counted in characters, so that audits of different models, with tokenizers of their own, are
about the same quantity.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from armorm.conversation import Conversation
from armorm.data.markdown import list_items, markdown_elements

QUANTITIES = ("length", "markdown", "lists")


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
