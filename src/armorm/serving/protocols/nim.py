"""NVIDIA NIM's reward format: `POST /v1/chat/completions` with a user and an assistant message (docs.nvidia.com/nim).

Request: `messages`, the last one the assistant's.
Response: a chat completion. `choices[0].logprobs.content[i]` holds an attribute as `token` and its value as `logprob`:
first `reward`, the score, then the predicted rating of each objective on its raw scale. The text in
`choices[0].message.content` repeats them: `reward:0.61,helpfulness:2.78,...`.
"""

from __future__ import annotations

from typing import Any, Literal, Union

from pydantic import Field
from typing_extensions import TypedDict

from armorm.backbone.rendered_text import RenderedReader
from armorm.conversation import Conversation
from armorm.serving.errors import RequestError
from armorm.serving.protocols import base


class ChatCompletionRequest(base.ModelRequest):
    """Body of `POST /v1/chat/completions`."""

    messages: list[Any] = Field(description="One conversation that ends with the assistant's reply.")
    stream: Union[bool, None] = False
    n: Union[int, None] = 1


@base.closed
class Attribute(TypedDict):
    """An attribute as `token` and its value as `logprob`."""

    token: str
    logprob: float
    bytes: None
    top_logprobs: list[Any]


@base.closed
class Attributes(TypedDict):
    """The score, then the predicted rating of each objective."""

    content: list[Attribute]


@base.closed
class Reply(TypedDict):
    """The same attributes as text."""

    role: Literal["assistant"]
    content: str


@base.closed
class Choice(TypedDict):
    """The only choice."""

    index: int
    message: Reply
    logprobs: Attributes
    finish_reason: Literal["stop"]


@base.closed
class ChatCompletion(TypedDict):
    """Response of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: base.Usage


@base.route("/v1/chat/completions", ChatCompletion, "NVIDIA NIM reward", {"messages": base.EXAMPLE_MESSAGES})
def read(request: ChatCompletionRequest, reader: RenderedReader) -> base.ParsedRequest:
    """The conversation to score."""
    if request.stream:
        raise RequestError(400, "stream: found true, expected false (a score is not streamed)")
    if request.n not in (None, 1):
        raise RequestError(400, f"n: found {request.n}, expected 1")
    return base.ParsedRequest([base.read_row(Conversation.from_messages, request.messages)], _write)


def _write(scores: base.RequestScores) -> dict[str, Any]:
    values = [("reward", scores.scores[0])]
    for ratings in scores.objectives.to_raw(scores.batch.rewards).tolist():  # one row, or none
        values += zip(scores.objectives.names, ratings, strict=True)
    content: list[dict[str, Any]] = [
        {"token": name, "logprob": value, "bytes": None, "top_logprobs": []} for name, value in values
    ]
    reply = {"role": "assistant", "content": ",".join(f"{name}:{value:.4g}" for name, value in values)}
    choice = {"index": 0, "message": reply, "logprobs": {"content": content}, "finish_reason": "stop"}
    return base.openai_body(scores, "chatcmpl", "chat.completion", choices=[choice])


ROUTES = (read,)
