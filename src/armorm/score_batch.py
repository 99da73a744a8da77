"""Scores of many conversations with everything they are made of: the columns that every layer above passes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from armorm.errors import ConversationError
from armorm.notebook import MOST_ROWS, html_table

if TYPE_CHECKING:
    import pandas


_BY_ROW = {"by_row": True}  # lists with an entry for each row


@dataclass(frozen=True, repr=False)
class ScoreBatch:
    """Scores of n conversations over k objectives. Arrays are float32 unless stated otherwise.

    Attributes:
        scores: (n,), normalised or lowered by their uncertainty if requested.
        rewards: (n, k) predicted rewards, mapped scale.
        gating_weights: (n, k), each row sums to 1.
        gating_output: (n, k), weights times logit_scale.
        coefficients: (n, k), weight of each reward in the score.
        contributions: (n, k), sum over k is the (plain) score.
        relative: (n, k), contributions against a response of average rewards.
        names: (k,) objectives.
        rows: (n,) int64, index of each scored conversation in the input.
        turns: (n,) int64, place of each scored reply in the messages of its conversation; None unless every assistant
            turn was scored (`score(..., turns="all")`), where a conversation has several rows.
        rejected: (index, reason) of each conversation that was not scored.
        truncated: index of each conversation whose prompt was truncated to the length limit.
        uncertainty: (n, k) epistemic standard deviation of the rewards, mapped scale. This and the next three are None
            for a model without uncertainty (definitions: `armorm.heads.uncertainty`).
        predictive_std: (n, k) standard deviation of one rating: rater and feature noise included.
        leverage: (n, k), distance of the response from the rated rows of each objective.
        score_std: (n,) epistemic standard deviation of the plain score, gating weights taken as fixed.
        response_tokens: (n,) int64 tokens of each response's text; None for scores of stored features.
        prompt_index: (n,) int64, rows with the same value share their prompt; None if unknown.
        quantiles: (n, k, q) of each rating, mapped scale, ascending; NaN for objectives without quantile heads, None
            for a model without any.
        quantile_levels: (q,) between 0 and 1.
        token_scores: an array (t,) float64 for each row, the scores as sums over the response's tokens; this and the
            next are None unless `score(..., per_token=True)`.
        token_spans: an array (t, 2) int64 for each row, start and end of each token in the text of the response; a
            token of the template has an empty span.
    """

    scores: np.ndarray
    rewards: np.ndarray
    gating_weights: np.ndarray
    gating_output: np.ndarray
    coefficients: np.ndarray
    contributions: np.ndarray
    relative: np.ndarray
    names: list[str]
    rows: np.ndarray
    rejected: list[tuple[int, str]] = field(default_factory=list)
    truncated: list[int] = field(default_factory=list)
    uncertainty: np.ndarray | None = None
    predictive_std: np.ndarray | None = None
    leverage: np.ndarray | None = None
    score_std: np.ndarray | None = None
    response_tokens: np.ndarray | None = None
    prompt_index: np.ndarray | None = None
    quantiles: np.ndarray | None = None
    quantile_levels: tuple[float, ...] = ()
    token_scores: list[np.ndarray] | None = field(default=None, metadata=_BY_ROW)
    token_spans: list[np.ndarray] | None = field(default=None, metadata=_BY_ROW)
    turns: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, rows: Sequence[int] | np.ndarray | slice) -> ScoreBatch:
        """Some of the n scored rows, by position, mask or slice; `rejected` is empty."""
        arrays = {item.name: getattr(self, item.name) for item in fields(self)}
        taken: dict[str, Any] = {name: value[rows] for name, value in arrays.items() if isinstance(value, np.ndarray)}
        left = set(taken["rows"].tolist())
        places = np.arange(len(self))[rows].tolist()
        lists = [item.name for item in fields(self) if item.metadata.get("by_row")]
        taken |= {name: [arrays[name][i] for i in places] for name in lists if arrays[name] is not None}
        return replace(self, **taken, rejected=[], truncated=[row for row in self.truncated if row in left])

    def finite(self, on_refused: Literal["error", "skip"]) -> ScoreBatch:
        """The rows whose score is a number; the others are an error or rejected, like conversations that cannot be
        scored.

        Raises:
            ConversationError: naming the first of them, with `error`.
        """
        finite = np.isfinite(self.scores)
        if finite.all():
            return self
        reason, bad = "the model's score is not a finite number", self.rows[~finite].tolist()
        if on_refused == "error":
            raise ConversationError(reason, f"conversation {bad[0]}")
        return replace(self.take(finite), rejected=sorted([*self.rejected, *((row, reason) for row in bad)]))

    def __repr__(self) -> str:
        left_out = f", {len(self.rejected)} rejected" if self.rejected else ""
        if not len(self):
            return f"ScoreBatch(0 scores{left_out})"
        low, mean, high = self.scores.min(), self.scores.mean(), self.scores.max()
        return (
            f"ScoreBatch({len(self)} scores of {len(self.names)} objectives{left_out}: "
            f"{low:+.4f} to {high:+.4f}, mean {mean:+.4f})"
        )

    def _repr_html_(self) -> str:
        rows = []
        for row in range(min(len(self), MOST_ROWS)):
            ranked = np.argsort(-np.abs(self.relative[row]))[:3]
            largest = ", ".join(f"{self.names[i]} {self.relative[row, i]:+.3f}" for i in ranked)
            rows.append([int(self.rows[row]), f"{self.scores[row]:+.4f}", largest])
        notes = [f"and {len(self) - len(rows):,} more"] if len(self) > len(rows) else []
        notes += [f"{len(self.rejected):,} rejected, the first because {self.rejected[0][1]}"] if self.rejected else []
        notes += [f"{len(self.truncated):,} with a truncated prompt"] if self.truncated else []
        columns = ["row", "score", "largest contributions against an average response"]
        return html_table(
            f"{len(self):,} score{'' if len(self) == 1 else 's'}", columns, rows, "; ".join(notes), left=[2]
        )

    def to_pandas(self) -> pandas.DataFrame:
        """One row per conversation, or per `turn` of one: `score`, then `reward/X`, `weight/X`, `contribution/X` of
        each objective X; with `score_std` and `uncertainty/X` if the model has uncertainty."""
        import pandas

        columns: dict[str, np.ndarray] = {"score": self.scores}
        for label, values in (
            ("reward", self.rewards),
            ("weight", self.gating_weights),
            ("contribution", self.contributions),
            ("uncertainty", self.uncertainty),
        ):
            if values is not None:
                columns |= {f"{label}/{name}": values[:, i] for i, name in enumerate(self.names)}
        if self.score_std is not None:
            columns["score_std"] = self.score_std
        if self.turns is not None:
            columns = {"turn": self.turns, **columns}
        return pandas.DataFrame(columns, index=pandas.Index(self.rows, name="row"))
