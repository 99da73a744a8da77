"""Exchanges: what a stack's format gives to the scorer, and what it gets back.

In:  the body of a request, as a stack's module understands it.
Out: `Exchange`: rows to score, how, and a function that writes the stack's answer from the `Outcome`.

A row that cannot be read or scored stands at its place as a `RefusedRow`; the others are scored. A request of
which nothing can be scored is refused as a whole.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar, Union

import numpy as np
from pydantic import BaseModel, ValidationError

from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.rendered_text import RenderedReader
from armorm.conversation import Conversation
from armorm.errors import ConversationError
from armorm.objectives import ObjectiveSet
from armorm.score_batch import ScoreBatch
from armorm.serving.errors import RequestError

RowInput = Union[Conversation, EncodedConversation, ConversationError]
Form = TypeVar("Form", bound=BaseModel)


@dataclass(frozen=True)
class ScoredRow:
    """One scored conversation: its row of a batch.

    Attributes:
        batch: scores and their parts, plain (not normalised).
        place: row of the batch.
        tokens: length of the conversation.
        truncated: prompt tokens that the model's overflow policy took away.
    """

    batch: ScoreBatch
    place: int
    tokens: int
    truncated: int = 0

    @property
    def score(self) -> float:
        """The plain score."""
        return float(self.batch.scores[self.place])


@dataclass(frozen=True)
class RefusedRow:
    """A conversation without a score.

    Attributes:
        reason: one sentence.
        empty: whether the reason is an empty response.
        failed: whether the fault is the server's.
    """

    reason: str
    empty: bool = False
    failed: bool = False


Result = Union[ScoredRow, RefusedRow]


@dataclass(frozen=True)
class Outcome:
    """Results of one request, in order.

    Attributes:
        results: one a row.
        model: name of the model.
        objectives: its objectives.
        transform: (k, k) float64 reward transform.
        scale: mean and standard deviation to normalise scores by, or None.
        empty_score: score of empty responses, or None.
    """

    results: Sequence[Result]
    model: str
    objectives: ObjectiveSet
    transform: np.ndarray
    scale: tuple[float, float] | None = None
    empty_score: float | None = None

    def score(self, result: Result) -> float | None:
        """Score of a row as asked for, None where it has none."""
        if isinstance(result, RefusedRow):
            return self.empty_score if result.empty else None
        mean, deviation = self.scale or (0.0, 1.0)
        return (result.score - mean) / deviation

    @property
    def scores(self) -> list[float | None]:
        """Scores of all rows."""
        return [self.score(result) for result in self.results]

    @property
    def errors(self) -> list[dict[str, Any]]:
        """Rows without a score, with their place and the reason."""
        return [
            {"index": index, "message": result.reason}
            for index, result in enumerate(self.results)
            if isinstance(result, RefusedRow) and self.score(result) is None
        ]

    @property
    def tokens(self) -> int:
        """Tokens of all scored rows."""
        return sum(result.tokens for result in self.results if isinstance(result, ScoredRow))

    @property
    def usage(self) -> dict[str, int]:
        """Tokens as the field counts them."""
        return {"prompt_tokens": self.tokens, "total_tokens": self.tokens, "completion_tokens": 0}

    def require_something(self) -> None:
        """Refuse a request of which nothing was scored.

        Raises:
            RequestError: with the first reason.
        """
        errors = self.errors
        if errors and len(errors) == len(self.results):
            failed = any(isinstance(result, RefusedRow) and result.failed for result in self.results)
            place = f"row {errors[0]['index']}: " if len(errors) > 1 else ""
            raise RequestError(500 if failed else 422, place + errors[0]["message"])


@dataclass(frozen=True)
class Exchange:
    """What a request asks for.

    Attributes:
        rows: conversations, ids, or why there is none.
        answer: writes the stack's answer.
        normalize: scores in standard deviations from the reference mean; None for the server's setting.
        steering: `{"multiply": {objective: factor}, "drop": [objective]}`, empty for none.
        max_length: most tokens of a conversation, on top of the server's limit.
        partial: whether an answer may lack every score; if not, such a request is refused.
    """

    rows: Sequence[RowInput]
    answer: Callable[[Outcome], Any]
    normalize: bool | None = None
    steering: Mapping[str, Any] = field(default_factory=dict)
    max_length: int | None = None
    partial: bool = False


Read = Callable[[Mapping[str, Any], RenderedReader], Exchange]


def parsed_body(body: bytes) -> dict[str, Any]:
    """A body as a JSON object.

    Raises:
        RequestError: 400 for anything else.
    """
    try:
        value = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RequestError(400, f"the body is not JSON: {what}") from None
    if not isinstance(value, dict):
        raise RequestError(400, f"the body is a JSON {_JSON_NAMES.get(type(value), 'value')}, expected an object")
    return value


def filled(form: type[Form], body: Mapping[str, Any]) -> Form:
    """A request's fields, checked.

    Raises:
        RequestError: 400 naming the first field that is missing or of another type.
    """
    try:
        return form.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("function-", "list[")))
        what = first["msg"].removeprefix("Value error, ")
        raise RequestError(400, f"{place[:100]}: {what}" if place else what) from None


def read_row(read: Callable[[], RowInput]) -> RowInput:
    """A row, or why it cannot be read."""
    try:
        return read()
    except ConversationError as error:
        return error


def answer_id(prefix: str) -> str:
    """A fresh identifier."""
    return f"{prefix}-{uuid.uuid4().hex}"


def listing(prefix: str, outcome: Outcome, data: list[dict[str, Any]]) -> dict[str, Any]:
    """The envelope that vLLM puts around its answers."""
    return {
        "id": answer_id(prefix),
        "object": "list",
        "created": int(time.time()),
        "model": outcome.model,
        "data": data,
        "usage": outcome.usage,
    }


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"found {name}, expected a finite number")


_JSON_NAMES = {list: "list", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}
