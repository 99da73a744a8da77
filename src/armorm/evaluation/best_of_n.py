"""Best of n: rank several responses to a prompt, with the objectives that decide, and write preference pairs.

Unscored responses have no rank; they are listed with their reason. Equal scores keep the order of the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from armorm.conversation import Conversation
from armorm.data.candidates import Candidates
from armorm.evaluation.scorer import Scored, Scorer, deciding_objectives
from armorm.evaluation.scorers import ArmoRMScorer


@dataclass(frozen=True)
class RankedPrompt:
    """Ranked responses to one prompt.

    Attributes:
        row, id, rows, columns: of the input, as of `Candidates`.
        order: positions of the scored responses, best first.
        scores: by position, NaN if unscored.
        unscored: reason by position.
        deciding: (objective, contribution to the margin) of those that decide between the first two, largest first.
        conversations: as given.
    """

    row: int
    id: Any
    order: list[int]
    scores: np.ndarray
    unscored: dict[int, str]
    deciding: list[tuple[str, float]]
    conversations: list[Conversation | None]
    rows: list[int] = field(default_factory=list)
    columns: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without texts."""
        entry: dict[str, Any] = {"row": self.row}
        entry |= {} if self.id is None else {"id": self.id}
        entry |= {"rows": self.rows} if self.rows else {}
        entry |= {
            "best": self.order[0] if self.order else None,
            "order": self.order,
            "scores": [None if np.isnan(score) else float(score) for score in self.scores],
        }
        if self.deciding:
            entry["decided_by"] = [{"objective": name, "contribution": value} for name, value in self.deciding]
        if self.unscored:
            entry["refused"] = {str(position): reason for position, reason in self.unscored.items()}
        return entry


def rank(scorer: Scorer, candidates: Sequence[Candidates]) -> list[RankedPrompt]:
    """Rank the responses of each prompt; every distinct conversation is scored once."""
    index: dict[str, int] = {}
    unique: list[Conversation] = []
    for entry in candidates:
        for conversation in entry.conversations:
            if conversation is not None and index.setdefault(conversation.key, len(unique)) == len(unique):
                unique.append(conversation)
    if isinstance(scorer, ArmoRMScorer):
        rows = [[index[c.key] for c in entry.conversations if c is not None] for entry in candidates]
        scored = scorer.score(unique, rows)
    else:
        scored = scorer.score(unique)
    return [_ranked(entry, scored, index) for entry in candidates]


def preference_row(ranked: RankedPrompt, min_margin: float = 0.0) -> dict[str, Any] | None:
    """Best against worst as `{"prompt", "chosen", "rejected", "margin"}`, messages each, as TRL reads them.

    None if fewer than two responses are scored, or the margin is not above `min_margin`.
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


def _ranked(entry: Candidates, scored: Scored, index: dict[str, int]) -> RankedPrompt:
    at = [-1 if conversation is None else index[conversation.key] for conversation in entry.conversations]
    scores = np.array([np.nan if row < 0 else scored.scores[row] for row in at], np.float64)
    unscored = dict(entry.faults) | {p: scored.unscored[row] for p, row in enumerate(at) if row in scored.unscored}
    order = [int(p) for p in np.argsort(-scores, kind="stable") if not np.isnan(scores[p])]
    reasons: list[tuple[str, float]] = []
    if scored.batch is not None and len(order) > 1 and scores[order[0]] > scores[order[1]]:
        contributions = scored.batch.contributions
        difference = contributions[at[order[0]]] - contributions[at[order[1]]]
        reasons = deciding_objectives(scored.batch.names, difference)
    given = entry.conversations, entry.rows, entry.columns
    return RankedPrompt(entry.row, entry.id, order, scores, unscored, reasons, *given)
