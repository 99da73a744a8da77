"""Protocol adapters: request body -> rows to score; scores -> response body.

A protocol is one module of this package. For each of its routes it defines a pydantic model of the request, a
TypedDict of the response and, under the decorator `route`, a function that turns a request into a `ParsedRequest`; its
`ROUTES` list them. Naming the module in `PROTOCOLS` (`protocols/__init__.py`) adds its routes to the server and to
/openapi.json.

A row that cannot be read or scored becomes a `RejectedRow` at its index, and the other rows are scored. A request is
rejected as a whole if none of its rows can be scored.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Union, get_type_hints
from uuid import uuid4

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, with_config
from typing_extensions import TypedDict

from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.encoding import Overflow
from armorm.backbone.rendered_text import RenderedReader
from armorm.conversation import Conversation
from armorm.errors import ConversationError
from armorm.explain.dense_rewards import DenseReward, Unit
from armorm.objectives import ObjectiveSet
from armorm.score_batch import ScoreBatch
from armorm.serving.errors import RequestError

RowInput = Union[Conversation, EncodedConversation, ConversationError]

# Responses contain no field that their type does not name.
closed = with_config(ConfigDict(extra="forbid", allow_inf_nan=False))


@closed
class Fault(TypedDict):
    """Message, type and HTTP status of an error."""

    message: str
    type: str
    code: int


@closed
class ErrorAnswer(TypedDict):
    """Body of every error response."""

    error: Fault


@closed
class RowError(TypedDict):
    """A row without a score, and the reason."""

    index: int
    message: str


@closed
class Usage(TypedDict):
    """Tokens of all scored rows."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class RejectedRow:
    """A conversation without a score, and the reason as one sentence."""

    reason: str
    empty: bool = False  # the response is empty
    failed: bool = False  # the model failed on it; the client is not at fault


@dataclass(frozen=True)
class RequestScores:
    """Scores of one request."""

    batch: ScoreBatch  # the m scored rows with plain (not normalised) scores; `rows` are their indices in the request
    tokens: Sequence[int]  # (m,) tokens of each scored conversation
    truncated: Mapping[int, int]  # prompt tokens removed by the model's overflow policy, by row index
    rejected: Mapping[int, RejectedRow]  # the other rows, by index
    model: str  # its name
    objectives: ObjectiveSet  # k
    transform: np.ndarray  # (k, k) float64 reward transform
    scale: tuple[float, float] | None = None  # mean and standard deviation that normalise scores; None for plain scores
    empty_score: float | None = None  # of empty responses; None rejects them
    dense: Mapping[int, DenseReward] = field(default_factory=dict)  # of the scored rows, by index, if requested

    @property
    def scores(self) -> list[float | None]:
        """Score of every row of the request, normalised if requested; None for rows without one."""
        mean, deviation = self.scale or (0.0, 1.0)
        found: list[float | None] = [None] * (len(self.batch) + len(self.rejected))
        scores = (self.batch.scores.astype(np.float64) - mean) / deviation
        for index, score in zip(self.batch.rows.tolist(), scores.tolist(), strict=True):
            found[index] = score
        for index, row in self.rejected.items():
            found[index] = self.empty_score if row.empty else None
        return found

    @property
    def rows(self) -> list[tuple[float | None, str | None]]:
        """(score, None) or (None, reason) of every row of the request."""
        return [
            (score, self.rejected[index].reason if score is None else None) for index, score in enumerate(self.scores)
        ]

    @property
    def errors(self) -> list[dict[str, Any]]:
        """Index and reason of the rows without a score, as `RowError`."""
        return [
            {"index": index, "message": reason} for index, (_, reason) in enumerate(self.rows) if reason is not None
        ]

    @property
    def usage(self) -> dict[str, int]:
        """Token counts as in the OpenAI API, as `Usage`."""
        tokens = sum(self.tokens)
        return {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}

    def require_a_score(self) -> None:
        """Raise a RequestError if no row of the request has a score: 500 if the model failed on one, else 422."""
        errors = self.errors
        if errors and len(errors) == len(self.batch) + len(self.rejected):
            failed = any(row.failed for row in self.rejected.values())
            place = f"row {errors[0]['index']}: " if len(errors) > 1 else ""
            raise RequestError(500 if failed else 422, place + errors[0]["message"])


@dataclass(frozen=True)
class PerToken:
    """A request for the scores of all rows as sums over tokens or sentences."""

    unit: Unit
    # Tokens of the policy for each row (`dense_rewards.policy_spans`), None for a row without; or those of the server's
    # policy tokenizer.
    policy_tokens: Sequence[Any] | Literal["tokenizer"] | None = None


@dataclass(frozen=True)
class ParsedRequest:
    """A request in a form common to all protocols."""

    rows: Sequence[RowInput]  # conversations, token ids, or why a row has neither
    write: Callable[[RequestScores], Any]
    normalize: bool | None = None  # scores in standard deviations from the reference mean; None: the server's setting
    steering: Mapping[str, Any] = field(default_factory=dict)  # arguments of `ArmoRM.steer`; empty for none
    max_length: int | None = None  # most tokens of a conversation, in addition to the server's limit
    overflow: Overflow | None = None  # what happens to longer ones; None: what the model's config says
    same_prompt: bool = False  # the rows are compared: a prompt that is truncated loses the same part in all
    per_token: PerToken | None = None
    partial: bool = False  # a response without any score is valid; otherwise such a request is rejected


class ModelRequest(BaseModel):
    """Request body with a model name."""

    model_config = ConfigDict(strict=True)

    model: Union[str, None] = Field(None, description="Ignored: a server holds one model.")


@dataclass(frozen=True)
class Route:
    """A scoring route of a protocol."""

    path: str  # of a POST request
    request: type[BaseModel]  # type of its body
    response: Any  # type of its body
    read: Callable[[Any, RenderedReader], ParsedRequest]
    summary: str  # one phrase for /openapi.json
    example: dict[str, Any]  # of a request body
    # Whether a body belongs to this route, for a path that several protocols use.
    accepts: Callable[[Mapping[str, Any]], bool] = lambda body: True
    overload_status: int = 429  # sent in place of 429, for clients that do not retry after it


def route(
    path: str, response: Any, summary: str, example: dict[str, Any], **options: Any
) -> Callable[[Callable[[Any, RenderedReader], ParsedRequest]], Route]:
    """Decorator that makes a `Route` of a function, which has the type of the body as annotation of its `request`."""
    return lambda read: Route(path, get_type_hints(read)["request"], response, read, summary, example, **options)


# Example texts of the routes.
EXAMPLE_MESSAGES = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4"}]
EXAMPLE_PROMPT = "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
EXAMPLE_RENDERED = f"{EXAMPLE_PROMPT}4<|im_end|>"


def read_row(read: Callable[..., RowInput], *arguments: Any) -> RowInput:
    """`read(*arguments)`, or the error that it raises."""
    try:
        return read(*arguments)
    except ConversationError as error:
        return error


def read_input(value: Any, messages: list[Any] | None, reader: RenderedReader) -> list[RowInput]:
    """Rows of `input` (a rendered text, texts, token ids, lists of token ids) or of `messages` (one conversation)."""
    if (value is None) == (messages is None):
        raise RequestError(400, "expected either input or messages")
    if messages is not None:
        return [read_row(Conversation.from_messages, messages)]
    if isinstance(value, str) or (isinstance(value, list) and value and all(type(entry) is int for entry in value)):
        value = [value]
    if not isinstance(value, list):
        raise RequestError(400, "input: expected a text, texts, token ids, or lists of token ids")
    return [read_row(reader.from_ids if isinstance(entry, list) else reader.conversation, entry) for entry in value]


def new_id(prefix: str) -> str:
    """A unique identifier."""
    return f"{prefix}-{uuid4().hex}"


def openai_body(scores: RequestScores, prefix: str, kind: str, **content: Any) -> dict[str, Any]:
    """A response in the form of the OpenAI API."""
    head = {"id": new_id(prefix), "object": kind, "created": int(time.time()), "model": scores.model}
    return {**head, **content, "usage": scores.usage}
