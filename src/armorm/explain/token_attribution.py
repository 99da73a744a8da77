"""Attribution of a score to the tokens of the response: an exact sum where the response feature is a mean.

    reward_k             = mean over tokens of (w_k . h_t + b_k)                 pooling `mean`
    token_contributions  = coefficient_k * (w_k . h_t + b_k) / t    (t, k)       sum over tokens: contributions (k,)
                                                                                 sum over both: the score
The coefficients (k,) depend on the prompt alone, through the gate; the rewards by token are what the response adds.

A feature of two parts (`last+mean`) has two terms: the mean, exact as above with the intercept, and what is read from
the state of the last token (`last_contributions`), which has read the whole response and is a sum over nothing. The
second, and the whole score for the pooling `last`, is attributed to tokens by integrated gradients on request: an
estimate. `exact_share` says how much of the score is an exact sum.

What the numbers are not: a token's state has read everything before it, so its contribution is not what the token
alone does. `ArmoRM.occlude` measures what a sentence does, by scoring the response without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.decoder import Backbone, length_sorted_batches
from armorm.backbone.readout import Readout
from armorm.backbone.token_spans import TokenSpans, token_spans
from armorm.conversation import Conversation
from armorm.errors import ConversationError
from armorm.explain.integrated_gradients import attribute_last_state
from armorm.explain.text_spans import sentences, words
from armorm.progress import progress
from armorm.score_batch import ScoreBatch

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class TextPart:
    """A part of a response and what its tokens add to the score.

    Attributes:
        text, start, end: the part and its place in the response, in characters.
        tokens: number of its tokens; a token that is cut counts by its characters (without white space).
        contributions: (k,) sum over its tokens.
        deviations: (k,) contributions minus those of as many average tokens of this response's text: above 0 for a part
            that raises the mean over its text. They sum to 0 over the text.
    """

    text: str
    start: int
    end: int
    tokens: float
    contributions: np.ndarray
    deviations: np.ndarray

    def to_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """Plain values, with sums over objectives and values by objective."""
        found: dict[str, Any] = {"text": self.text, "start": self.start, "end": self.end, "tokens": self.tokens}
        for name, values in (("contribution", self.contributions), ("deviation", self.deviations)):
            found |= {name: float(values.sum()), f"{name}s": dict(zip(names, values.tolist(), strict=True))}
        return found


@dataclass(frozen=True)
class TokenAttribution:
    """A score by tokens t and objectives k; arrays are float64.

    Attributes:
        places: of the tokens in the response.
        names: (k,) objectives.
        coefficients: (k,) weight of each reward in the score: the prompt's part, steering and transform included.
        mean_rewards: (t, k) the rewards' exact sum over tokens: `(w_k . h_t + b_k) / t`; zeros for the pooling `last`.
        last_rewards: (k,) the rewards' part that is read from the last token's state; zeros for the pooling `mean`.
        gradient_rewards: (t, k) `last_rewards` attributed to the tokens by integrated gradients; None if it was not.
        completeness_error: largest difference, over objectives and in units of the score, between the sum of the
            gradient's attributions and the change that they explain; None without them.
    """

    places: TokenSpans
    names: list[str]
    coefficients: np.ndarray
    mean_rewards: np.ndarray
    last_rewards: np.ndarray
    gradient_rewards: np.ndarray | None = None
    completeness_error: float | None = None

    @cached_property
    def token_contributions(self) -> np.ndarray:
        """(t, k): the exact sum, plus the gradient's estimate of the rest if it was made."""
        rewards = self.mean_rewards if self.gradient_rewards is None else self.mean_rewards + self.gradient_rewards
        return self.coefficients * rewards

    @property
    def last_contributions(self) -> np.ndarray:
        """(k,) what is read from the last token's state; with the sum of the means, the contributions."""
        return self.coefficients * self.last_rewards

    @property
    def contributions(self) -> np.ndarray:
        """(k,) of the objectives; they sum to the score."""
        return self.coefficients * (self.mean_rewards.sum(0) + self.last_rewards)

    @property
    def unattributed(self) -> np.ndarray:
        """(k,) contributions that no token has: 0 for the pooling `mean`; else what is read from the last token, or
        what integrated gradients leave of it (its value at the baseline, and their error)."""
        return self.contributions - self.token_contributions.sum(0)

    @property
    def template_contributions(self) -> np.ndarray:
        """(k,) contributions of tokens that the template wrote, such as the end of the turn."""
        found: np.ndarray = self.token_contributions[self.places.template].sum(0)
        return found

    @property
    def exact_share(self) -> float:
        """Share of the score, 0 to 1, that is an exact sum over tokens: 1 for means, 0 for the last token.

        Of two parts, the sum over objectives of the size of the mean's contribution, as a share of both.
        """
        return _exact_share(self.coefficients * self.mean_rewards.sum(0), self.last_contributions)

    @property
    def text_contributions(self) -> np.ndarray:
        """(k,) contributions of all other tokens, those of the text."""
        found: np.ndarray = self.token_contributions[~self.places.template].sum(0)
        return found

    @property
    def token_deviations(self) -> np.ndarray:
        """(t, k) contributions minus their mean over the tokens of the text, which template tokens are no part of."""
        return self.token_contributions - self.text_contributions / max(int((~self.places.template).sum()), 1)

    def words(self) -> list[TextPart]:
        """The response's words (in scripts without spaces, characters)."""
        return self.spans(words(self.places.text))

    def sentences(self) -> list[TextPart]:
        """The response's sentences and lines."""
        return self.spans(sentences(self.places.text))

    def spans(self, spans: Iterable[tuple[int, int]]) -> list[TextPart]:
        """Parts of the response, each given by start and end in characters; they may overlap.

        A token that a part cuts counts by the share of its characters, without white space. Template tokens are in no
        part.

        Raises:
            ConversationError: for a span that is not inside the response.
        """
        found = list(spans)
        shares = self._shares(found)
        return [
            TextPart(self.places.text[low:high], low, high, float(share.sum()), total, deviation)
            for (low, high), share, total, deviation in zip(
                found, shares, shares @ self.token_contributions, shares @ self.token_deviations, strict=True
            )
        ]

    def _shares(self, spans: Sequence[tuple[int, int]]) -> np.ndarray:
        """Share (s, t) of each token that is in each span."""
        text = self.places.text
        for low, high in spans:
            if not 0 <= low < high <= len(text):
                raise ConversationError(f"span {low} to {high}: expected one inside the {len(text)} characters")
        filled = np.cumsum([0, *(not character.isspace() for character in text)])
        starts, ends = self.places.spans.T
        empty = starts == ends
        shares = np.zeros((len(spans), len(starts)))
        for row, (low, high) in enumerate(spans):
            first, last = np.clip(starts, low, high), np.clip(ends, low, high)
            of = filled[ends] - filled[starts]
            visible = (filled[last] - filled[first]) / np.maximum(of, 1)
            white = (last - first) / np.maximum(ends - starts, 1)
            inside = (starts >= low) & (starts < high) & ~self.places.template  # a part of a character
            shares[row] = np.where(empty, inside, np.where(of > 0, visible, white))
        return shares

    def to_dict(self) -> dict[str, Any]:
        """Tokens, sentences and what is not in them, as plain values."""
        places = self.places
        return {
            "exact_share": self.exact_share,
            "completeness_error": self.completeness_error,
            "objectives": list(self.names),
            "coefficients": self._by_name(self.coefficients),
            "tokens": [
                {
                    "token": name,
                    "start": int(start),
                    "end": int(end),
                    "template": bool(template),
                    "contribution": float(row.sum()),
                    "contributions": row.tolist(),
                }
                for name, (start, end), template, row in zip(
                    places.names, places.spans, places.template, self.token_contributions, strict=True
                )
            ],
            "sentences": [part.to_dict(self.names) for part in self.sentences()],
            "template_contributions": self._by_name(self.template_contributions),
            "last_contributions": self._by_name(self.last_contributions),
            "unattributed": self._by_name(self.unattributed),
            "unread": [list(span) for span in places.unread],
        }

    def _by_name(self, values: np.ndarray) -> dict[str, float]:
        return dict(zip(self.names, values.tolist(), strict=True))

    def to_pandas(self) -> pandas.DataFrame:
        """One row per token: `token`, `start`, `end`, `template`, `contribution`, and `contribution/X` by objective."""
        import pandas

        places, values = self.places, self.token_contributions
        columns: dict[str, Any] = {"token": places.names, "start": places.spans[:, 0], "end": places.spans[:, 1]}
        columns |= {"template": places.template, "contribution": values.sum(1)}
        columns |= {f"contribution/{name}": values[:, i] for i, name in enumerate(self.names)}
        return pandas.DataFrame(columns)


def token_rewards(states: torch.Tensor, head: torch.nn.Linear, readout: Readout) -> tuple[np.ndarray, np.ndarray]:
    """Rewards by token (t, k), and what is read from the last token (k,), float64; their sum is the rewards.

    Args:
        states: (t, d) of the response's tokens.
        head: the regression layer. Its intercept is spread evenly over the tokens of a mean.
    """
    count, objectives = len(states), head.out_features
    states = states.cpu().double()
    last_weight, mean_weight = readout.split(head.weight.detach().cpu().double())
    intercept = np.zeros(objectives) if head.bias is None else head.bias.detach().cpu().double().numpy()
    last = np.zeros(objectives) if last_weight is None else (last_weight @ states[-1]).numpy()
    if mean_weight is None:
        return np.zeros((count, objectives)), last + intercept
    return ((states @ mean_weight.T).numpy() + intercept) / count, last


@dataclass(frozen=True)
class TokenScores:
    """One score as a sum over the t tokens of the response and a rest.

    Attributes:
        values: (t,) float64, the exact sum over tokens; zeros for the pooling `last`.
        rest: what is read from the last token's state.
        exact_share: as in `TokenAttribution`.
    """

    values: np.ndarray
    rest: float
    exact_share: float

    @classmethod
    def of(cls, mean: np.ndarray, last: np.ndarray, coefficients: np.ndarray) -> TokenScores:
        """From the two results of `token_rewards`, and coefficients (k,)."""
        weights = coefficients.astype(np.float64)
        share = _exact_share(weights * mean.sum(0), weights * last)
        return cls(mean @ weights, float(last @ weights), share)

    def scaled(self, score: float, deviation: float = 1.0) -> TokenScores:
        """With the sum `score`, which is the plain score divided by `deviation` and shifted.

        The shift, and the rounding difference of the forward pass, are spread evenly over the tokens.
        """
        values, rest = self.values / deviation, self.rest / deviation
        return replace(self, values=values + (score - rest - values.sum()) / len(values), rest=rest)


def _exact_share(mean: np.ndarray, last: np.ndarray) -> float:
    exact = float(np.abs(mean).sum())
    whole = exact + float(np.abs(last).sum())
    return exact / whole if whole else 1.0


def attribute_tokens(
    backbone: Backbone,
    head: torch.nn.Linear,
    conversations: Sequence[Conversation],
    encoded: Sequence[EncodedConversation],
    batch: ScoreBatch,
    *,
    gradient: bool = False,
) -> list[TokenAttribution]:
    """Attribution of each of n scores, for a forward pass each.

    Args:
        head: the regression layer.
        conversations, encoded, batch: n rows, as they were scored.
        gradient: attribute what is read from the last token by integrated gradients; this costs a forward and k
            backward passes for each of `integrated_gradients.STEPS` steps. Always so for the pooling `last`.
    """
    last_weight, mean_weight = backbone.readout.split(head.weight.detach())
    gradient = last_weight is not None and (gradient or mean_weight is None)
    found = []
    for conversation, row, values in zip(conversations, encoded, batch.coefficients, strict=True):
        mean, last = token_rewards(backbone.response_states([row])[0], head, backbone.readout)
        coefficients, by_gradient, error = values.astype(np.float64), None, None
        if gradient and last_weight is not None:
            by_gradient, errors = attribute_last_state(backbone, row, last_weight)
            error = float(np.abs(coefficients * errors).max())
        places = token_spans(backbone.template, conversation, row, backbone.response_start(row))
        found.append(TokenAttribution(places, list(batch.names), coefficients, mean, last, by_gradient, error))
    return found


def score_by_token(
    backbone: Backbone,
    head: torch.nn.Linear,
    conversations: Sequence[Conversation],
    encoded: Sequence[EncodedConversation],
    batch: ScoreBatch,
    *,
    scale: float = 1.0,
    batch_tokens: int,
) -> ScoreBatch:
    """The batch with its scores as sums over tokens.

    What is read from the last token's state is given to the last token. A shift of the scores, and the rounding
    difference of this second forward pass, are spread evenly over the tokens.

    Args:
        conversations, encoded: of its n rows.
        scale: that the scores were divided by.
    """
    found: list[np.ndarray] = [np.zeros(0)] * len(encoded)
    lengths = np.array([len(row) for row in encoded], np.int64)
    with progress("tokens' scores", int(lengths.sum()), "tokens") as advance:
        for rows in length_sorted_batches(lengths, batch_tokens):
            for row, states in zip(rows, backbone.response_states([encoded[i] for i in rows]), strict=True):
                scores = TokenScores.of(*token_rewards(states, head, backbone.readout), batch.coefficients[row])
                scores = scores.scaled(float(batch.scores[row]), scale)
                found[row] = scores.values
                found[row][-1] += scores.rest
            advance(int(lengths[rows].sum()))
    places = [
        token_spans(backbone.template, conversation, row, backbone.response_start(row)).spans
        for conversation, row in zip(conversations, encoded, strict=True)
    ]
    return replace(batch, token_scores=found, token_spans=places)
