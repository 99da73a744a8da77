"""Three sets of conversations that extraction is compared on: nothing shared, short prompts, long prompts.

    distinct         500 conversations, each with a prompt of its own
    short-prompts    62 prompts, 8 responses to each
    long-prompts     4 prompts, each with solved examples before the question; 8 responses to each

They are drawn from the real data sets where the folder has them, else from generated words of about the same lengths.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from armorm.conversation import Conversation, Message
from armorm.data.sources import Location

RESPONSES = 8
SIZES = {"distinct": 500, "short-prompts": 62, "long-prompts": 4}  # number of prompts
# Sets of the distinct conversations, and the one with many responses to a prompt.
_DISTINCT = ("preferences/hh_harmless.jsonl.gz", "ratings/justeval.jsonl.gz")
_REPEATED = "ratings/humaneval.jsonl.gz"
_SHORT, _LONG = (150, 350), 300  # characters: of a short prompt, and the fewest of a long one


def load_set(path: Path) -> list[Conversation]:
    """Every conversation of a set: the rated ones, or both sides of each pair."""
    found = []
    for row in Location.find(path).rows():
        values = row.values
        if "messages" in values:
            texts = [values["messages"]]
        else:
            texts = [values["prompt"] + values[side] for side in ("chosen", "rejected")]
        found += [Conversation.from_messages(messages) for messages in texts]
    return found


def by_prompt(conversations: list[Conversation]) -> dict[str, list[Conversation]]:
    """Distinct conversations of each prompt, by its key."""
    groups: dict[str, list[Conversation]] = {}
    for conversation in {one.key: one for one in conversations}.values():
        groups.setdefault(conversation.prompt_key, []).append(conversation)
    return groups


def conversation_sets(root: Path, seed: int = 0) -> tuple[dict[str, list[Conversation]], str]:
    """The sets by name, and where they are from: `real` or `generated`.

    Args:
        root: folder of the real data sets; need not exist.
    """
    if not all((root / name).exists() for name in (*_DISTINCT, _REPEATED)):
        return _generated(np.random.default_rng(seed)), "generated"
    rng = np.random.default_rng(seed)
    distinct = []
    for name in _DISTINCT:
        groups = by_prompt(load_set(root / name))
        keys = rng.permutation(sorted(groups))[: SIZES["distinct"] // len(_DISTINCT)]
        distinct += [groups[key][int(rng.integers(len(groups[key])))] for key in keys]
    repeated = by_prompt(load_set(root / _REPEATED))
    enough = [repeated[key][:RESPONSES] for key in rng.permutation(sorted(repeated)) if len(repeated[key]) >= RESPONSES]
    short = [group for group in enough if _SHORT[0] <= len(group[0].messages[0].content) <= _SHORT[1]]
    short = short[: SIZES["short-prompts"]]
    used = {group[0].prompt_key for group in short}
    rest = [group for group in enough if group[0].prompt_key not in used]
    long = []
    for _ in range(SIZES["long-prompts"]):
        question, size = rest.pop(), 0
        examples: list[Message] = []
        while size < _LONG:
            solved = rest.pop()[0].messages
            examples += solved
            size += sum(len(message.content) for message in solved)
        long += [Conversation((*examples, *one.messages)) for one in question]
    return {
        "distinct": distinct,
        "short-prompts": [one for group in short for one in group],
        "long-prompts": long,
    }, "real"


def _generated(rng: np.random.Generator) -> dict[str, list[Conversation]]:
    def words(count: int) -> str:
        return " ".join(f"w{number}" for number in rng.integers(0, 1000, count))

    def prompts(name: str, length: int, responses: int, reply: int) -> list[Conversation]:
        return [
            Conversation.from_prompt(prompt, words(int(rng.integers(reply // 4, 2 * reply))))
            for prompt in (words(length) for _ in range(SIZES[name]))
            for _ in range(responses)
        ]

    return {
        "distinct": prompts("distinct", 15, 1, 30),
        "short-prompts": prompts("short-prompts", 22, RESPONSES, 19),
        "long-prompts": prompts("long-prompts", 115, RESPONSES, 20),
    }
