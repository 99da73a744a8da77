"""LLaMA-Factory's score server (FIELD 5): `POST /v1/score/evaluation`.

In:  `{"model", "messages": [rendered text, ...], "max_length"?}`.
Out: `{"id", "object": "score.evaluation", "model", "scores": [...]}`.

A text longer than `max_length` is refused, or shortened by the model's own overflow policy; it is never cut from
the end, where the response is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Union

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from armorm.backbone.rendered_text import RenderedReader
from armorm.serving.errors import RequestError
from armorm.serving.protocols.base import Exchange, Outcome, answer_id, filled
from armorm.serving.protocols.vllm import read_input


class ScoreEvaluationRequest(BaseModel):
    """Body of `POST /v1/score/evaluation`."""

    model_config = ConfigDict(strict=True)

    model: Union[str, None] = Field(None, description="Ignored: a server holds one model.")
    messages: list[Any] = Field(description="Rendered texts, each a prompt and its response.")
    max_length: Union[PositiveInt, None] = Field(None, description="Most tokens of a text.")


def read(body: Mapping[str, Any], reader: RenderedReader) -> Exchange:
    """A request of LLaMA-Factory's PPO trainer."""
    request = filled(ScoreEvaluationRequest, body)
    if not request.messages:
        raise RequestError(400, "messages: found none, expected at least one text")
    return Exchange(read_input(request.messages, None, reader), answer, max_length=request.max_length)


def answer(outcome: Outcome) -> dict[str, Any]:
    """The scores."""
    found: dict[str, Any] = {
        "id": answer_id("scoreeval"),
        "object": "score.evaluation",
        "model": outcome.model,
        "scores": outcome.scores,
    }
    return found | ({"errors": outcome.errors} if outcome.errors else {})
