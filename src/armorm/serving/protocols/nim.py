"""NVIDIA NIM's reward format (FIELD 5): `POST /v1/chat/completions` with a user and an assistant message.

In:  `messages`, the last one the assistant's.
Out: a chat completion. `choices[0].logprobs.content[i]` holds an attribute as `token` and its value as `logprob`:
     first `reward`, the score; then the predicted rating of each objective on its raw scale. The same stands as
     text in `choices[0].message.content`: `reward:0.61,helpfulness:2.78,...`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Union

from pydantic import BaseModel, ConfigDict, Field

from armorm.backbone.rendered_text import RenderedReader
from armorm.conversation import Conversation
from armorm.serving.errors import RequestError
from armorm.serving.protocols.base import Exchange, Outcome, ScoredRow, answer_id, filled, read_row


class ChatCompletionRequest(BaseModel):
    """Body of `POST /v1/chat/completions`."""

    model_config = ConfigDict(strict=True)

    model: Union[str, None] = Field(None, description="Ignored: a server holds one model.")
    messages: list[Any] = Field(description="One conversation that ends with the assistant's reply.")
    stream: Union[bool, None] = False
    n: Union[int, None] = 1


def read(body: Mapping[str, Any], reader: RenderedReader) -> Exchange:
    """A request to rate the last message."""
    request = filled(ChatCompletionRequest, body)
    if request.stream:
        raise RequestError(400, "stream: found true, expected false: a score comes at once")
    if request.n not in (None, 1):
        raise RequestError(400, f"n: found {request.n}, expected 1")
    return Exchange([read_row(lambda: Conversation.from_messages(request.messages))], answer)


def answer(outcome: Outcome) -> dict[str, Any]:
    """A chat completion that lists attributes and values."""
    result = outcome.results[0]
    values = [("reward", outcome.score(result))]
    if isinstance(result, ScoredRow):
        ratings = outcome.objectives.to_raw(result.batch.rewards[result.place])
        values += zip(outcome.objectives.names, map(float, ratings), strict=True)
    content: list[dict[str, Any]] = [
        {"token": name, "logprob": value, "bytes": None, "top_logprobs": []} for name, value in values
    ]
    text = ",".join(f"{name}:{value:.4g}" for name, value in values)
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "logprobs": {"content": content},
        "finish_reason": "stop",
    }
    return {
        "id": answer_id("chatcmpl"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": outcome.model,
        "choices": [choice],
        "usage": outcome.usage,
    }
