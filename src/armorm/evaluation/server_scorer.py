"""Scorers of models on a server: `armorm serve`, or a vLLM server with a classifier.

A server of this library sends everything that scores are made of, so audits and ratings are those of a local model. Two
things stay with the model: prompts that it was trained on are not known, so no example is left out, and features are
not sent, so the baseline of the prompt alone reads its words. Of vLLM's answers only the scores are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from armorm.client import PoolingClient, RewardClient, connect
from armorm.client.pooling import APIS, Encode
from armorm.conversation import Conversation
from armorm.errors import nearest
from armorm.evaluation.scorer import Scored, ScorerError, spread
from armorm.files import embedded_path
from armorm.objectives import ObjectiveSet
from armorm.progress import progress

_COLUMNS = ("rewards", "gating_weights", "gating_output", "coefficients", "contributions", "relative")
_UNCERTAINTY = "uncertainty"
_FIXED = Conversation.from_prompt("What is 2+2?", "4")


def server_client(
    url: str, api: str = "auto", tokenizer: str | None = None, **settings: Any
) -> RewardClient | PoolingClient:
    """A client of a server, detected or named.

    Args:
        api: `auto`, `armorm`, `plugin`, `classify` or `pooling`.
        tokenizer: folder or hub id whose chat template encodes conversations for `classify` and `pooling`.
        settings: api_key, connections, retries, timeout.

    Raises:
        ScorerError: for an unknown api.
        RewardServerError: if no known server answers there.
    """
    if api not in ("auto", *APIS):
        raise ScorerError(f"server api {api!r}{nearest(api, APIS)}: expected auto, {', '.join(APIS)}")
    return connect(url, api, encode=None if tokenizer is None else template_encoder(tokenizer), **settings)


def template_encoder(tokenizer: str) -> Encode:
    """Encodes conversations with a tokenizer's chat template; text inside messages cannot forge a turn."""
    from transformers import AutoTokenizer

    from armorm.backbone.chat_template import ChatTemplate
    from armorm.backbone.encoding import encode_rows

    try:
        template: ChatTemplate = ChatTemplate(AutoTokenizer.from_pretrained(embedded_path(tokenizer) or tokenizer))
    except (OSError, ValueError) as error:
        raise ScorerError(f"{tokenizer}: cannot be loaded as a tokenizer: {error}") from error

    def encode(conversations: Sequence[Conversation], max_length: int | None) -> list[list[int] | str]:
        rows = encode_rows(template, conversations, max_length, "skip")
        reasons = dict(rows.rejected)
        return [reasons[i] if row is None else row.ids.tolist() for i, row in enumerate(rows.rows)]

    return encode


def server_scorer(client: RewardClient | PoolingClient) -> RewardServerScorer | PoolingServerScorer:
    """The scorer of a client."""
    return RewardServerScorer(client) if isinstance(client, RewardClient) else PoolingServerScorer(client)


class RewardServerScorer:
    """A model behind `armorm serve`."""

    def __init__(self, client: RewardClient) -> None:
        self.client = client

    @cached_property
    def card(self) -> dict[str, Any]:
        """The server's model card."""
        return self.client.info()

    @cached_property
    def objectives(self) -> ObjectiveSet:
        """The model's objectives."""
        return ObjectiveSet.from_dicts(self.card["objectives"])

    @property
    def margin_scale(self) -> float | None:
        """That of the model."""
        scale = self.card.get("margin_scale")
        return None if scale is None else float(scale)

    @property
    def score_std(self) -> float | None:
        """Standard deviation of the scores of the reference data."""
        found: float | None = self.card.get("reference", {}).get("score_std")
        return found

    def describe(self) -> dict[str, Any]:
        """Name, address without a key, objectives, the score of a fixed conversation, steering."""
        found = {"name": self.card["id"], "kind": "armorm server", "server": self.client.address}
        found |= {"objectives": self.objectives.names, "fixed_score": _fixed_score(self.client)}
        return found | ({"steering": self.card["steering"]} if self.card.get("steering") else {})

    def score(self, conversations: Sequence[Conversation]) -> Scored:
        """Scores with their columns.

        Raises:
            RewardServerError: if the server fails or sends something else.
        """
        transform = self.card.get("reward_transform")
        if transform is None:
            raise ScorerError(f"{self.client.address}: its model card has no reward_transform, expected a newer server")
        with progress("scores", len(conversations), "conversations") as advance:
            batch = self.client.score(conversations, on_refused="skip", advance=advance, include=self._columns())
        prompts: dict[str, int] = {}
        index = [prompts.setdefault(conversations[row].prompt_key, len(prompts)) for row in batch.rows]
        scored = spread(batch, np.array(index, np.int64), batch.rows, len(conversations))
        return Scored(
            scored.scores,
            dict(batch.rejected),
            tuple(batch.truncated),
            scored,
            self.objectives,
            np.array(transform, np.float64),
            margin_scale=self.margin_scale,
        )

    def _columns(self) -> tuple[str, ...]:
        """Parts of the scores to request; uncertainty if the model has it."""
        one = self.client.score([_FIXED], on_refused="skip")
        return (*_COLUMNS, _UNCERTAINTY) if one.uncertainty is not None else _COLUMNS


class PoolingServerScorer:
    """A classifier behind vLLM's pooling server."""

    def __init__(self, client: PoolingClient) -> None:
        self.client = client

    def describe(self) -> dict[str, Any]:
        """Name, address without a key, route, and the score of a fixed conversation."""
        return {
            "name": str(self.client.card.get("id", self.client.address)),
            "kind": "pooling server",
            "server": self.client.address,
            "api": self.client.api,
            "encoded_by": "the server" if self.client.encode is None else "the client",
            "fixed_score": _fixed_score(self.client),
        }

    def score(self, conversations: Sequence[Conversation]) -> Scored:
        """Scores; conversations that the server rejects are unscored.

        Raises:
            RewardServerError: if the server fails, rejects all, or sends something else.
        """
        with progress("scores", len(conversations), "conversations") as advance:
            batch = self.client.score(conversations, on_refused="skip", advance=advance)
        scores = np.full(len(conversations), np.nan)
        scores[batch.rows] = batch.scores
        return Scored(scores, dict(batch.rejected))


def _fixed_score(client: RewardClient | PoolingClient) -> float | None:
    """Score of a fixed conversation, six digits: other weights under the same name have another one."""
    found = client.score([_FIXED], on_refused="skip")
    return float(f"{found.scores[0]:.6g}") if len(found.scores) else None
