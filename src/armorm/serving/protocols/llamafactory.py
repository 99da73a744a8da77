"""LLaMA-Factory's score server: `POST /v1/score/evaluation` (hiyouga/LLaMA-Factory, `reward_model_type: api`).

Request: `{"model", "messages": [rendered text, ...], "max_length"?}`.
Response: `{"id", "object": "score.evaluation", "model", "scores": [...]}`.

A text longer than `max_length` is rejected or truncated by the model's own overflow policy; it is never truncated at
the end, where the response is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from typing_extensions import NotRequired, TypedDict

from armorm.backbone.rendered_text import RenderedReader
from armorm.serving.errors import RequestError
from armorm.serving.protocols.base import (
    EXAMPLE_RENDERED,
    ParsedRequest,
    RequestScores,
    Route,
    RowError,
    closed,
    new_id,
    read_input,
    validated,
)


class ScoreEvaluationRequest(BaseModel):
    """Body of `POST /v1/score/evaluation`."""

    model_config = ConfigDict(strict=True)

    model: Union[str, None] = Field(None, description="Ignored: a server holds one model.")
    messages: list[Any] = Field(description="Rendered texts, each a prompt and its response.")
    max_length: Union[PositiveInt, None] = Field(None, description="Most tokens of a text.")


@closed
class ScoreEvaluationAnswer(TypedDict):
    """Response of `POST /v1/score/evaluation`."""

    id: str
    object: Literal["score.evaluation"]
    model: str
    scores: list[Union[float, None]]
    errors: NotRequired[list[RowError]]


def read(body: Mapping[str, Any], reader: RenderedReader) -> ParsedRequest:
    """Read a body of `POST /v1/score/evaluation`."""
    request = validated(ScoreEvaluationRequest, body)
    if not request.messages:
        raise RequestError(400, "messages: found none, expected at least one text")
    return ParsedRequest(read_input(request.messages, None, reader), _write, max_length=request.max_length)


def _write(scores: RequestScores) -> dict[str, Any]:
    body: dict[str, Any] = {
        "id": new_id("scoreeval"),
        "object": "score.evaluation",
        "model": scores.model,
        "scores": scores.scores,
    }
    return body | ({"errors": scores.errors} if scores.errors else {})


ROUTES = (
    Route(
        "/v1/score/evaluation",
        read,
        ScoreEvaluationRequest,
        ScoreEvaluationAnswer,
        "LLaMA-Factory scores",
        {"messages": [EXAMPLE_RENDERED]},
    ),
)
