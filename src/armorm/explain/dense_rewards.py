"""Dense rewards: a score as a sum over the tokens of a policy, or over sentences.

The score is a sum over the reward model's own tokens (`token_attribution`): exact where the response feature is a mean.
A policy has other tokens, so the sum is moved to them by characters:

- A token's reward is divided among its characters (white space has no part, unless the token is nothing else), and each
  character's share goes to the policy's token that the character belongs to. Sums are kept.
- A character in several tokens of the policy (the bytes of an emoji) belongs to the last of them. White space in none
  belongs to the token after it; at the end of the text, to the last one with text.
- The end of the turn, and what is read from the state of the last token alone (`rest`: all of a score with the pooling
  `last`, a part with `last+mean`), is the reward of the policy's last token, its end of text if it sends one. No
  potential is subtracted and nothing is moved to earlier tokens: it is a reward of the whole response, paid at its end.

The undiscounted sum is the score, whatever the tokens and the length. A discounted one is not: see
docs/dense-rewards.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from armorm.errors import ConversationError, shown
from armorm.explain.text_spans import sentences

Unit = Literal["token", "sentence"]


@dataclass(frozen=True)
class DenseReward:
    """A score as a sum over u tokens or sentences.

    Attributes:
        rewards: (u,) float64; their sum is the score.
        spans: (u, 2) int64, start and end of each part in the characters of the response.
        rest: the part of the last reward that is read from the last token's state, and is no sum over tokens.
        exact_share: share of the score, 0 to 1, that is an exact sum over tokens.
        last_tokens: (u,) int64, index of the policy's token that each sentence ends in; None for tokens, and without
            tokens of a policy.
    """

    rewards: np.ndarray
    spans: np.ndarray
    rest: float
    exact_share: float
    last_tokens: np.ndarray | None = None


@dataclass(frozen=True)
class Division:
    """How the scores of one response are divided: the same whatever the model, its steering or the scale.

    Attributes:
        text: the response.
        places: (t, 2) int64, characters of each token of the reward model; empty spans for those without text.
        spans: (u, 2) int64, characters of the parts that get rewards.
        last_tokens: as in `DenseReward`.
    """

    text: str
    places: np.ndarray
    spans: np.ndarray
    last_tokens: np.ndarray | None = None

    @classmethod
    def of(cls, text: str, places: np.ndarray, unit: Unit = "token", policy: np.ndarray | None = None) -> Division:
        """Division by tokens or sentences.

        Args:
            policy: (u, 2) characters of the policy's tokens (`policy_spans`); None for the reward model's own.

        Raises:
            ConversationError: for tokens that leave out text.
        """
        if unit == "token":
            if policy is not None:
                character_owners(policy, text)
            return cls(text, places, places if policy is None else policy)
        spans = np.array(sentences(text) or [(0, len(text))], np.int64)
        if policy is None:
            return cls(text, places, spans)
        ends = character_owners(policy, text)[np.maximum(spans[:, 1] - 1, 0)] if text else np.zeros(1, np.int64)
        ends[-1] = len(policy) - 1
        return cls(text, places, spans, ends)

    def reward(self, values: np.ndarray, rest: float, exact_share: float) -> DenseReward:
        """The rewards of all parts.

        Args:
            values: (t,) rewards of the reward model's tokens, without the rest.
        """
        own = self.spans is self.places
        rewards = values.copy() if own else align_rewards(values, self.places, self.spans, self.text)
        rewards[-1] += rest
        return DenseReward(rewards, self.spans, rest, exact_share, self.last_tokens)


def align_rewards(values: np.ndarray, places: np.ndarray, spans: np.ndarray, text: str) -> np.ndarray:
    """Rewards (u,) of parts of a text, from those of its tokens; the sums are the same.

    Args:
        values: (t,) such as `ScoreBatch.token_scores[i]`.
        places: (t, 2) characters of each token, such as `ScoreBatch.token_spans[i]`: ascending, not overlapping.
        spans: (u, 2) characters of each part, such as those of `policy_spans` or `sentences`.

    Raises:
        ConversationError: for parts that leave out text.
    """
    owner = character_owners(spans, text)
    count = len(text)
    empty = places[:, 0] == places[:, 1]
    token = np.full(count, -1, np.int64)
    for index in np.flatnonzero(~empty):
        token[places[index, 0] : places[index, 1]] = index
    inside = np.flatnonzero(token >= 0)
    visible = np.array([not text[place].isspace() for place in inside], np.float64)
    seen = np.bincount(token[inside], visible, len(values))
    weights = np.where(seen[token[inside]] > 0, visible, 1.0)
    totals = np.bincount(token[inside], weights, len(values))
    shares = weights * values[token[inside]] / totals[token[inside]]
    rewards = np.bincount(owner[inside], shares, len(spans)).astype(np.float64)
    # Tokens without text: a piece of a character goes with the character, the tokens after the text to the last part.
    filled = np.flatnonzero(~empty)
    after = filled[-1] + 1 if len(filled) else 0
    for index in np.flatnonzero(empty):
        place = int(places[index, 0])
        rewards[len(spans) - 1 if index >= after or place >= count else owner[place]] += values[index]
    return rewards


def character_owners(spans: np.ndarray, text: str) -> np.ndarray:
    """Index (c,) of the part that each character belongs to.

    Raises:
        ConversationError: for a character, not white space, that is in no part.
    """
    owner = np.full(len(text), -1, np.int64)
    for index, (low, high) in enumerate(spans.tolist()):
        owner[low:high] = index
    missing = np.flatnonzero(owner < 0)
    lost = next((place for place in missing.tolist() if not text[place].isspace()), None)
    if lost is not None:
        raise ConversationError(
            f"character {lost} of the response, {shown(text[lost])}, is in no token; expected every one in a token",
            "policy_tokens",
        )
    following = int(owner.max(initial=-1))
    for place in missing[::-1].tolist():
        owner[place] = owner[place + 1] if place + 1 < len(text) else following
    return owner


def policy_spans(tokens: Any, text: str) -> np.ndarray:
    """Characters (u, 2) of the tokens of a policy, from any of three forms.

    Args:
        tokens: texts, which joined are the response (empty for a token without text, such as the end of the turn, and
            for all pieces of a character but the last); or numbers of characters, which sum to its length; or
            [start, end] in characters, ascending, as tokenizers give them (`return_offsets_mapping`).

    Raises:
        ConversationError: for any other value, or tokens that do not fit the text.
    """
    if not isinstance(tokens, Sequence) or isinstance(tokens, str) or not tokens:
        raise _misfit(f"found {shown(tokens)}, expected texts, numbers of characters, or [start, end] of each token")
    if all(isinstance(token, str) for token in tokens):
        joined = "".join(tokens)
        if joined != text:
            at = next((i for i, (a, b) in enumerate(zip(joined, text, strict=False)) if a != b), None)
            at = min(len(joined), len(text)) if at is None else at
            raise _misfit(
                f"joined they differ from the response at character {at}: found {shown(joined[at : at + 20])}, "
                f"expected {shown(text[at : at + 20])}"
            )
        return _spans_of_lengths([len(token) for token in tokens])
    if all(_is_count(token) for token in tokens):
        if sum(tokens) != len(text):
            raise _misfit(f"found {sum(tokens)} characters in all, expected {len(text)}, the length of the response")
        return _spans_of_lengths(tokens)
    before = (0, 0)
    for index, token in enumerate(tokens):
        pair = tuple(token) if isinstance(token, Sequence) and not isinstance(token, str) else ()
        if len(pair) != 2 or not all(map(_is_count, pair)) or not pair[0] <= pair[1] <= len(text):
            raise _misfit(
                f"found {shown(token)} at position {index}, expected [start, end] inside the {len(text)} characters"
            )
        if pair[0] < before[0] or pair[1] < before[1]:
            raise _misfit(f"found {shown(token)} at position {index} after {list(before)}, expected ascending ones")
        before = pair
    return np.array([list(token) for token in tokens], np.int64)


class PolicyTokenizer:
    """A fast tokenizer of transformers, copied without its truncation and padding; threads may share it.

    A policy may have generated other tokens with the same text, so it is better to send those.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def spans(self, text: str) -> np.ndarray:
        """Characters (u, 2) of the text's tokens, without special tokens around it."""
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return np.array(offsets or [(0, len(text))], np.int64)


def _spans_of_lengths(lengths: Sequence[int]) -> np.ndarray:
    ends = np.cumsum(np.array(lengths, np.int64))
    return np.stack([ends - lengths, ends], 1)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _misfit(problem: str) -> ConversationError:
    return ConversationError(problem, "policy_tokens")
