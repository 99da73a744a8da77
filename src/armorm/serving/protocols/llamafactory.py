"""LLaMA-Factory's score server: `POST /v1/score/evaluation` (hiyouga/LLaMA-Factory, `reward_model_type: api`).

Request: `{"model", "messages": [rendered text, ...], "max_length"?}`.
Response: `{"id", "object": "score.evaluation", "model", "scores": [...]}`.

A text longer than `max_length` is rejected or truncated by the model's own overflow policy; it is never truncated at
the end, where the response is.
"""

from __future__ import annotations

from typing import Any, Literal, Union

from pydantic import Field, PositiveInt
from typing_extensions import NotRequired, TypedDict

from armorm.backbone.rendered_text import RenderedReader
from armorm.serving.errors import RequestError
from armorm.serving.protocols import base


class ScoreEvaluationRequest(base.ModelRequest):
    """Body of `POST /v1/score/evaluation`."""

    messages: list[Any] = Field(description="Rendered texts, each a prompt and its response.")
    max_length: Union[PositiveInt, None] = Field(None, description="Most tokens of a text.")


@base.closed
class ScoreEvaluationAnswer(TypedDict):
    """Response of `POST /v1/score/evaluation`."""

    id: str
    object: Literal["score.evaluation"]
    model: str
    scores: list[Union[float, None]]
    errors: NotRequired[list[base.RowError]]


@base.route(
    "/v1/score/evaluation", ScoreEvaluationAnswer, "LLaMA-Factory scores", {"messages": [base.EXAMPLE_RENDERED]}
)
def read(request: ScoreEvaluationRequest, reader: RenderedReader) -> base.ParsedRequest:
    """Texts to score."""
    if not request.messages:
        raise RequestError(400, "messages: found none, expected at least one text")
    return base.ParsedRequest(base.read_input(request.messages, None, reader), _write, max_length=request.max_length)


def _write(scores: base.RequestScores) -> dict[str, Any]:
    body: dict[str, Any] = {
        "id": base.new_id("scoreeval"),
        "object": "score.evaluation",
        "model": scores.model,
        "scores": scores.scores,
    }
    return body | ({"errors": scores.errors} if scores.errors else {})


ROUTES = (read,)
