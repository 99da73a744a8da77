"""Ranking: the best of several responses to a prompt, why it is, and pairs to train on.

In:  rows `{"prompt", "responses"}`, or one response a row as `armorm score` reads them, grouped by prompt.
Out: `RankedPrompt`s: responses from best to worst with their scores, and the objectives that decide between
     the first two; preference rows in TRL's explicit layout, with margins.

A refused response has no rank; it is listed with its reason. Equal scores keep the order of the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from armorm.attribution import deciding
from armorm.conversation import Conversation, prompt_messages
from armorm.data.rows import Row
from armorm.errors import ConversationError, shown
from armorm.evaluation.scorers import Scored, Scorer


@dataclass
class Candidates:
    """Responses to one prompt.

    Attributes:
        row: number of the row, or of the first one.
        id: of the row, None where it has none.
        conversations: one a response, None where it is no conversation.
        faults: reason by position.
    """

    row: int
    id: Any
    conversations: list[Conversation | None]
    faults: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RankedPrompt:
    """Responses to one prompt in order.

    Attributes:
        row, id: of the input.
        order: positions of the scored responses, best first.
        scores: by position, NaN where refused.
        refused: reason by position.
        deciding: (objective, contribution to the margin) of what decides between the first two, largest first.
        conversations: as given.
    """

    row: int
    id: Any
    order: list[int]
    scores: np.ndarray
    refused: dict[int, str]
    deciding: list[tuple[str, float]]
    conversations: list[Conversation | None]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without texts."""
        entry: dict[str, Any] = {"row": self.row}
        entry |= {} if self.id is None else {"id": self.id}
        entry |= {
            "best": self.order[0] if self.order else None,
            "order": self.order,
            "scores": [None if np.isnan(score) else float(score) for score in self.scores],
        }
        if self.deciding:
            entry["decided_by"] = [{"objective": name, "contribution": value} for name, value in self.deciding]
        if self.refused:
            entry["refused"] = {str(position): reason for position, reason in self.refused.items()}
        return entry


def read_candidates(rows: Iterable[Row]) -> Iterator[Candidates]:
    """Responses by prompt, in the order in which prompts appear.

    Raises:
        DataError: for rows of no known layout, or a prompt that is none.
    """
    grouped: dict[str, Candidates] = {}
    for row in rows:
        if row.values.get("responses") is None:
            conversation = row.conversation()
            held = grouped.setdefault(conversation.prompt_key, Candidates(row.number, row.values.get("id"), []))
            held.conversations.append(conversation)
            continue
        yield _several(row)
    yield from grouped.values()


def rank(scorer: Scorer, candidates: Sequence[Candidates]) -> list[RankedPrompt]:
    """Rank the responses of each prompt; every distinct conversation is scored once."""
    index: dict[str, int] = {}
    unique: list[Conversation] = []
    for entry in candidates:
        for conversation in entry.conversations:
            if conversation is not None and index.setdefault(conversation.key, len(unique)) == len(unique):
                unique.append(conversation)
    scored = scorer.score(unique)
    return [_ranked(entry, scored, index) for entry in candidates]


def preference_row(ranked: RankedPrompt, min_margin: float = 0.0) -> dict[str, Any] | None:
    """Best against worst as `{"prompt", "chosen", "rejected", "margin"}`, messages each, as TRL reads them.

    None where fewer than two responses are scored, or the margin is not above `min_margin`.
    """
    if len(ranked.order) < 2:
        return None
    best, worst = ranked.order[0], ranked.order[-1]
    margin = float(ranked.scores[best] - ranked.scores[worst])
    chosen, rejected = ranked.conversations[best], ranked.conversations[worst]
    if not margin > min_margin or chosen is None or rejected is None:
        return None
    return {
        "prompt": [message.to_dict() for message in chosen.prompt],
        "chosen": [chosen.messages[-1].to_dict()],
        "rejected": [rejected.messages[-1].to_dict()],
        "margin": margin,
    }


def decided(scored: Scored, better: int, worse: int) -> list[tuple[str, float]]:
    """(objective, contribution to the margin) of those that decide between two scored rows, largest first."""
    if scored.parts is None:
        return []
    difference = scored.parts.contributions[better] - scored.parts.contributions[worse]
    mask = deciding(difference[None])[0]
    columns = sorted(np.flatnonzero(mask), key=lambda column: -abs(difference[column]))
    return [(scored.parts.names[column], float(difference[column])) for column in columns]


def _ranked(entry: Candidates, scored: Scored, index: dict[str, int]) -> RankedPrompt:
    at = [-1 if conversation is None else index[conversation.key] for conversation in entry.conversations]
    scores = np.array([np.nan if row < 0 else scored.scores[row] for row in at], np.float64)
    refused = dict(entry.faults) | {p: scored.refused[row] for p, row in enumerate(at) if row in scored.refused}
    order = [int(p) for p in np.argsort(-scores, kind="stable") if not np.isnan(scores[p])]
    reasons: list[tuple[str, float]] = []
    if len(order) > 1 and scores[order[0]] > scores[order[1]]:
        reasons = decided(scored, at[order[0]], at[order[1]])
    return RankedPrompt(entry.row, entry.id, order, scores, refused, reasons, entry.conversations)


def _several(row: Row) -> Candidates:
    prompt, responses = row.values.get("prompt", row.values.get("messages")), row.values["responses"]
    if prompt is None:
        raise row.error(f"found columns {shown(row.filled, 80)}, expected 'prompt' beside 'responses'")
    if not isinstance(responses, Sequence) or isinstance(responses, str) or not responses:
        raise row.error(f"found {shown(responses)}, expected a list of responses", "responses")
    try:
        prompt_messages(prompt)
    except ConversationError as error:
        raise row.error(error.problem, error.field) from None
    held = Candidates(row.number, row.values.get("id"), [])
    for position, response in enumerate(responses):
        try:
            held.conversations.append(Conversation.from_prompt(prompt, response, f"responses[{position}]"))
        except ConversationError as error:
            held.conversations.append(None)
            held.faults[position] = str(error)
    return held
