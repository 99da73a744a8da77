"""The replies: answers with the spans that people marked, good replies, and good replies with a planted fault."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from random import Random

import numpy as np

from armorm import ArmoRM
from armorm.conversation import Conversation, Message
from armorm.data.edit_texts import Draw
from armorm.data.edits import Edit, insert_text, swap_number
from armorm.data.sources import Location
from armorm.explain.text_spans import sentences

DATA = Path(os.environ.get("ARMORM_DATA", "../shared/data"))
GOOD = ("alpacaeval", "oasst_models", "pandalm")  # the chosen replies
ERROR_TYPES = ("Irrelevant", "Unverifiable", "Redundant", "Wrong-Grounding")  # "Incoherent" marks 11 spans only
SENTENCES, CHARACTERS, PROMPT_CHARACTERS = (4, 9), (200, 900), 1000  # of a good reply, and of its prompt
PLANTED = ("insult", "off-topic sentence", "false number")


@dataclass(frozen=True)
class Reply:
    """A conversation, and parts of its response.

    Attributes:
        conversation: ends with the response.
        errors: type, start and end in characters of each part with a fault.
    """

    conversation: Conversation
    errors: tuple[tuple[str, int, int], ...] = ()

    @property
    def sentences(self) -> list[tuple[int, int]]:
        return sentences(self.conversation.response)

    def marked(self, kind: str | None = None) -> np.ndarray:
        """(characters,) whether each is in a part with a fault of that kind; of any by default."""
        found = np.zeros(len(self.conversation.response), bool)
        for name, start, end in self.errors:
            if kind in (None, name):
                found[start:end] = True
        return found


def marked_answers(limit: int | None) -> list[Reply]:
    """Answers of `finegrained_spans` that are neither wholly marked nor unmarked; `limit` of them at random."""
    found = []
    for row in Location.find(DATA / "benchmarks" / "finegrained_spans.jsonl.gz").rows():
        conversation = Conversation.from_messages(row.values["messages"])
        errors = tuple((error["type"], error["start"], error["end"]) for error in row.values["errors"])
        reply = Reply(conversation, errors)
        visible = np.array([not character.isspace() for character in conversation.response])
        if 0 < (reply.marked() & visible).sum() < visible.sum():
            found.append(reply)
    return _in_random_order(found)[:limit]


def good_replies(rm: ArmoRM, limit: int) -> list[Reply]:
    """Chosen replies of several sentences and with a number, to prompts that the model was not trained on."""
    by_prompt: dict[str, Conversation] = {}
    for name in GOOD:
        for row in Location.find(DATA / "preferences" / f"{name}.jsonl.gz").rows():
            conversation = Conversation.from_messages([*row.values["prompt"], *row.values["chosen"]])
            if _usable(conversation):
                by_prompt.setdefault(conversation.prompt_key, conversation)
    conversations = list(by_prompt.values())
    unseen = rm.seen.find(conversations) == 0
    return _in_random_order([Reply(c) for c, kept in zip(conversations, unseen, strict=True) if kept])[:limit]


def _usable(conversation: Conversation) -> bool:
    text = conversation.response
    return (
        SENTENCES[0] <= len(sentences(text)) <= SENTENCES[1]
        and CHARACTERS[0] <= len(text) <= CHARACTERS[1]
        and sum(len(message.content) for message in conversation.prompt) <= PROMPT_CHARACTERS
        and "```" not in text
        and swap_number(text, Draw(Random(0))) is not None
    )


def plant(kind: str, replies: Sequence[Reply]) -> list[Reply]:
    """The replies with one fault each between or in their sentences, by templates that no training row has."""
    make: dict[str, Callable[[str, Draw, int], Edit | None]] = {
        "insult": lambda text, draw, place: insert_text(text, draw, ("insult",), "inside"),
        "off-topic sentence": lambda text, draw, place: _insert(text, draw, _other_sentence(replies, place, draw)),
        "false number": lambda text, draw, place: swap_number(text, draw),
    }
    found = []
    for place, reply in enumerate(replies):
        text, turns = reply.conversation.response, reply.conversation.prompt
        asked = next((turn.content for turn in reversed(turns) if turn.role == "user"), "")
        edit = make[kind](text, Draw(Random(_digest(f"{kind} {reply.conversation.key}")), asked, held_out=True), place)
        assert edit is not None and edit.span is not None
        planted = Conversation((*turns, Message("assistant", edit.text)))
        found.append(Reply(planted, ((kind, *edit.span),)))
    return found


def _other_sentence(replies: Sequence[Reply], place: int, draw: Draw) -> str:
    """A sentence of the reply to another prompt, of those with at least five words the one at a random place."""
    other = replies[(place + draw.random.randrange(1, len(replies))) % len(replies)]
    parts = [other.conversation.response[low:high] for low, high in other.sentences]
    return draw.random.choice([part for part in parts if len(part.split()) >= 5] or parts)


def _insert(text: str, draw: Draw, sentence: str) -> Edit:
    """The sentence after a random one of the text but the last."""
    end = draw.random.choice(sentences(text)[:-1])[1]
    return Edit(f"{text[:end]} {sentence}{text[end:]}", (end + 1, end + 1 + len(sentence)))


def _in_random_order(replies: Sequence[Reply]) -> list[Reply]:
    return sorted(replies, key=lambda reply: _digest(reply.conversation.key))


def _digest(key: object) -> int:
    return int.from_bytes(blake2b(str(key).encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
