"""Best of n: rank several responses to a prompt, with the objectives that decide, and write preference pairs.

Unscored responses have no rank; they are listed with their reason. Equal scores keep the order of the input.

A pair is written only if its margin is beyond the noise, by the rule of verdicts (`explain/verdict.py`): from a
calibrated probability of 0.60, or else a quarter of the standard deviation of reference scores. A chosen response that
refuses or gives no answer (`data/refusals.py`) is marked or left out: a reward model may prefer "I don't know" to a
wrong answer, but a policy that is trained on such pairs learns to give none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
from scipy.special import expit, logit

from armorm.conversation import Conversation
from armorm.data.candidates import Candidates
from armorm.data.refusals import declines
from armorm.evaluation.scorer import Scored, Scorer, ScorerError, deciding_objectives
from armorm.evaluation.scorers import ArmoRMScorer
from armorm.explain.verdict import CLOSE_PROBABILITY, CLOSE_STD, Reason, pair_verdict


@dataclass(frozen=True)
class RankedPrompt:
    """Ranked responses to one prompt.

    Attributes:
        row, id, rows, columns: of the input, as of `Candidates`.
        order: positions of the scored responses, best first.
        scores: by position, NaN if unscored.
        unscored: reason by position.
        deciding: (objective, contribution to the margin) of the smallest set without which the first would not be
            preferred to the second, largest first.
        conversations: as given.
        verdict: one sentence on the best two; empty if fewer than two are scored.
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
    verdict: str = ""

    @property
    def declining(self) -> list[int]:
        """Positions of the responses that refuse or give no answer."""
        return [p for p, c in enumerate(self.conversations) if c is not None and declines(c.response)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without texts."""
        entry: dict[str, Any] = {"row": self.row}
        entry |= {} if self.id is None else {"id": self.id}
        entry |= {"rows": self.rows} if self.rows else {}
        entry |= {"verdict": self.verdict} if self.verdict else {}
        entry |= {
            "best": self.order[0] if self.order else None,
            "order": self.order,
            "scores": [None if np.isnan(score) else float(score) for score in self.scores],
        }
        if self.deciding:
            entry["decided_by"] = [{"objective": name, "contribution": value} for name, value in self.deciding]
        if self.declining:
            entry["no_answer"] = self.declining
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
    return [_ranked(entry, scored, index, getattr(scorer, "score_std", None)) for entry in candidates]


class LeftOut(Enum):
    """Why a prompt gives no preference pair."""

    ONE_RESPONSE = "fewer than two scored responses"
    NOISE = "margin within the noise"
    NO_ANSWER = "the best response gives no answer"


@dataclass(frozen=True)
class PairRule:
    """Which best and worst responses become a preference pair.

    Attributes:
        least: a pair has a margin above this.
        basis: what `least` follows from; empty for one that was given.
        answers_only: whether the chosen response must give an answer.
    """

    least: float = 0.0
    basis: str = ""
    answers_only: bool = False

    @classmethod
    def of(
        cls,
        scorer: Scorer,
        *,
        min_margin: float | None = None,
        min_probability: float | None = None,
        answers_only: bool = False,
    ) -> PairRule:
        """The rule for the margins of a scorer; by default they must be beyond the noise.

        Args:
            min_margin: instead of the default.
            min_probability: of the calibrated margin, 0.5 to 1; with `min_margin`, both must hold.

        Raises:
            ScorerError: for a `min_probability` and a scorer without calibration.
        """
        scale: float | None = getattr(scorer, "margin_scale", None)
        if min_probability is not None and scale is None:
            name = scorer.describe()["name"]
            raise ScorerError(
                f"{name}: margins are not calibrated, or steered; expected a model that `armorm calibrate` wrote to "
                "apply a minimum probability, or a minimum margin"
            )
        if min_margin is not None and min_probability is None:
            return cls(min_margin, answers_only=answers_only)
        if scale is not None:
            probability = CLOSE_PROBABILITY if min_probability is None else min_probability
            least = max(float(logit(probability)) / scale, min_margin or 0.0)
            return cls(least, f"probability {probability:g}", answers_only)
        if spread := getattr(scorer, "score_std", None):
            return cls(CLOSE_STD * spread, f"{CLOSE_STD:g} standard deviations of reference scores", answers_only)
        return cls(answers_only=answers_only)


def preference_row(ranked: RankedPrompt, rule: PairRule) -> dict[str, Any] | LeftOut:
    """Best against worst as `{"prompt", "chosen", "rejected", "margin"}`, messages each, as TRL reads them.

    `chosen_gives_no_answer` marks a chosen response that refuses or gives no answer.
    """
    if len(ranked.order) < 2:
        return LeftOut.ONE_RESPONSE
    best, worst = ranked.order[0], ranked.order[-1]
    margin = float(ranked.scores[best] - ranked.scores[worst])
    chosen, rejected = ranked.conversations[best], ranked.conversations[worst]
    if chosen is None or rejected is None:
        return LeftOut.ONE_RESPONSE
    if not margin > rule.least:
        return LeftOut.NOISE
    if rule.answers_only and best in ranked.declining:
        return LeftOut.NO_ANSWER
    return {
        "prompt": [message.to_dict() for message in chosen.prompt],
        "chosen": [chosen.messages[-1].to_dict()],
        "rejected": [rejected.messages[-1].to_dict()],
        "margin": margin,
        "chosen_gives_no_answer": best in ranked.declining,
    }


def _ranked(entry: Candidates, scored: Scored, index: dict[str, int], std: float | None) -> RankedPrompt:
    at = [-1 if conversation is None else index[conversation.key] for conversation in entry.conversations]
    scores = np.array([np.nan if row < 0 else scored.scores[row] for row in at], np.float64)
    unscored = dict(entry.faults) | {p: scored.unscored[row] for p, row in enumerate(at) if row in scored.unscored}
    order = [int(p) for p in np.argsort(-scores, kind="stable") if not np.isnan(scores[p])]
    reasons: list[tuple[str, float]] = []
    if scored.batch is not None and len(order) > 1 and scores[order[0]] > scores[order[1]]:
        contributions = scored.batch.contributions
        difference = contributions[at[order[0]]] - contributions[at[order[1]]]
        reasons = deciding_objectives(scored.batch.names, difference)
    verdict = "" if len(order) < 2 else _verdict(scored, order[:2], [at[p] for p in order[:2]], std)
    given = entry.conversations, entry.rows, entry.columns, verdict
    return RankedPrompt(entry.row, entry.id, order, scores, unscored, reasons, *given)


def _verdict(scored: Scored, positions: Sequence[int], rows: Sequence[int], std: float | None) -> str:
    """The verdict between the best two responses, of two positions and their rows in the scores."""
    margin, reasons = float(scored.scores[rows[0]] - scored.scores[rows[1]]), []
    if scored.batch is not None and scored.objectives is not None:
        difference = scored.batch.contributions[rows[0]] - scored.batch.contributions[rows[1]]
        higher = scored.ratings[rows[0]] > scored.ratings[rows[1]]
        names = scored.batch.names
        reasons = [Reason(*found) for found in zip(names, difference.tolist(), higher.tolist(), strict=True)]
    return pair_verdict(
        f"Response {positions[0]}",
        f"response {positions[1]}",
        margin,
        reasons,
        probability=None if scored.margin_scale is None else float(expit(scored.margin_scale * margin)),
        margin_in_std=margin / std if std else None,
    )
