"""TODO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.prefix_tree import lexicographic_order, shared_with_previous
from armorm.features.store import KEY

SHARD_TOKENS = 400_000


@dataclass(frozen=True)
class PlanFigures:
    """What a plan is about.

    Attributes:
        conversations: asked for.
        unique: distinct among them.
        stored: of the unique, those that the store has.
        prompts: distinct prompts.
        asked_tokens: of all conversations.
        computed_tokens: that go through the backbone.
    """

    conversations: int
    unique: int
    stored: int
    prompts: int
    asked_tokens: int
    computed_tokens: int

    @property
    def saving(self) -> float:
        """Tokens asked for by one computed; infinite where nothing is left to compute."""
        return self.asked_tokens / self.computed_tokens if self.computed_tokens else float("inf")

    def __str__(self) -> str:
        repeated, shared = self.conversations - self.unique, self.unique - self.prompts
        parts = [
            f"{self.conversations:,} conversations"
            + (f" ({repeated:,} identical to another)" if repeated else "")
            + (f", {self.stored:,} stored" if self.stored else ""),
            f"{self.prompts:,} prompts" + (f" (shared by {shared:,} more responses)" if shared else ""),
            f"{self.asked_tokens:,} tokens asked for",
            f"{self.computed_tokens:,} to compute" + (f", {self.saving:.2f} times fewer" if self.saving > 1 else ""),
        ]
        return "; ".join(parts)


@dataclass(frozen=True)
class ExtractionPlan:
    """What is computed, in order.

    Attributes:
        rows: (m,) indices of the conversations.
        lengths: (m,) tokens of each.
        shared: (m,) ids each has in common with the one before.
        bounds: where each shard ends in `rows`.
    """

    rows: np.ndarray
    lengths: np.ndarray
    shared: np.ndarray
    bounds: list[int]

    @property
    def tree_tokens(self) -> int:
        """Tokens to compute where every shard shares beginnings within itself."""
        first = [0, *self.bounds[:-1]] if self.bounds else []
        return int(self.lengths.sum() - self.shared.sum() + sum(self.shared[start] for start in first))


def plan_extraction(encoded: Sequence[EncodedConversation], rows: Sequence[int] | np.ndarray) -> ExtractionPlan:
    """Order the rows, which are all distinct conversations, and cut them into shards of about `SHARD_TOKENS` tokens
    that are left when beginnings are shared."""
    order = np.asarray(rows, np.int64)
    order = order[lexicographic_order(_Ids(encoded, order))]
    lengths = np.array([len(encoded[i]) for i in order], np.int64)
    shared = shared_with_previous(_Ids(encoded, order))
    computed = lengths - shared
    gates = np.array([encoded[i].gate_position for i in order], np.int64)
    new_prompt = shared <= gates
    bounds: list[int] = []
    total = 0
    for row, tokens in enumerate(computed.tolist()):
        full = total >= SHARD_TOKENS and new_prompt[row]
        if row and (full or total >= 2 * SHARD_TOKENS):
            bounds.append(row)
            total = 0
        total += tokens
    return ExtractionPlan(order, lengths, shared, [*bounds, len(order)] if len(order) else [])


def plan_figures(keys: np.ndarray, prompt_keys: np.ndarray, lengths: np.ndarray, plan: ExtractionPlan) -> PlanFigures:
    """What a request is about: keys (n,), prompt keys (n,) and lengths (n,) of its conversations, and its plan."""
    unique = len(np.unique(keys))
    return PlanFigures(
        conversations=len(keys),
        unique=unique,
        stored=unique - len(plan.rows),
        prompts=len(np.unique(prompt_keys)),
        asked_tokens=int(lengths.sum()),
        computed_tokens=plan.tree_tokens,
    )


class _Ids(Sequence[np.ndarray]):
    """Ids of some conversations, each read when it is asked for."""

    def __init__(self, encoded: Sequence[EncodedConversation], rows: np.ndarray) -> None:
        self._encoded, self._rows = encoded, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: Any) -> Any:
        return self._encoded[int(self._rows[place])].ids


BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Settings:
    """How features are computed.

    Attributes:
        batch_tokens: most tokens of a forward pass: of a tree, or of a plain batch with its padding.
        sharing: whether conversations share their beginnings; by default where that is exact for the model.
        compiled: whether layers are compiled; by default where that pays.
        description: for the progress line.
    """

    batch_tokens: int = BATCH_TOKENS
    sharing: bool | None = None
    compiled: bool | None = None
    description: str = "features"


class Rows(Sequence[EncodedConversation]):
    """Some conversations of a sequence, each read when it is asked for.

    Attributes:
        encoded: the sequence.
        rows: (n,) positions in it.
    """

    def __init__(self, encoded: Sequence[EncodedConversation], rows: np.ndarray) -> None:
        self.encoded, self.rows = encoded, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        return self.encoded[int(self.rows[place])]


def keys_of(encoded: Sequence[EncodedConversation]) -> np.ndarray:
    """Keys (n,) of the response features."""
    found = getattr(encoded, "keys", None)
    return found if isinstance(found, np.ndarray) else np.array([c.key for c in encoded], KEY)


def prompt_keys_of(encoded: Sequence[EncodedConversation]) -> np.ndarray:
    """Keys (n,) of the prompt features."""
    found = getattr(encoded, "prompt_keys", None)
    return found if isinstance(found, np.ndarray) else np.array([c.prompt_key for c in encoded], KEY)


def lengths_of(encoded: Sequence[EncodedConversation]) -> np.ndarray:
    """Tokens (n,) of each conversation."""
    found = getattr(encoded, "lengths", None)
    return found if isinstance(found, np.ndarray) else np.array([len(c) for c in encoded], np.int64)
