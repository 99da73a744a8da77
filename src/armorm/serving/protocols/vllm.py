"""vLLM's pooling routes (FIELD 5): `POST /classify`, `/pooling`, `/score`.

In:  `/classify` and `/pooling`: `input` (a text, texts, ids, lists of ids) or `messages` (one conversation);
     `/score`: `text_1` (a prompt, or as many as responses) and `text_2` (responses).
Out: `{"id", "object": "list", "created", "model", "data": [...], "usage"}`; the score stands in
     `data[i].probs`, `data[i].data` or `data[i].score`.

Texts are rendered ones (verl sends the reward model's own template without its BOS); what `/score` gets is plain.
The raw score is what is sent: a reward has no activation. `activation` (or `use_activation`) `true` asks for its
sigmoid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Union

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from armorm.backbone.rendered_text import RenderedReader
from armorm.conversation import Conversation
from armorm.serving.errors import RequestError
from armorm.serving.protocols.base import Exchange, Outcome, RefusedRow, Result, RowInput, filled, listing, read_row


class PoolingRequest(BaseModel):
    """Body of `POST /classify` and `POST /pooling`."""

    model_config = ConfigDict(strict=True)

    model: Union[str, None] = Field(None, description="Ignored: a server holds one model.")
    input: Any = Field(None, description="A rendered text, several, token ids, or several lists of them.")
    messages: Union[list[Any], None] = Field(None, description="One conversation.")
    activation: Union[bool, None] = Field(None, validation_alias=AliasChoices("activation", "use_activation"))
    encoding_format: str = "float"
    truncate_prompt_tokens: Union[int, None] = None


class ScoreRequest(BaseModel):
    """Body of `POST /score`."""

    model_config = ConfigDict(strict=True)

    model: Union[str, None] = Field(None, description="Ignored: a server holds one model.")
    text_1: Any = Field(description="A prompt, or one for each response; plain text.")
    text_2: Any = Field(description="A response, or several; plain text.")
    activation: Union[bool, None] = Field(None, validation_alias=AliasChoices("activation", "use_activation"))
    truncate_prompt_tokens: Union[int, None] = None


def read_classify(body: Mapping[str, Any], reader: RenderedReader) -> Exchange:
    """A request for classes, of which a reward model has one."""
    request = _pooling(body)

    def answer(outcome: Outcome) -> dict[str, Any]:
        data = []
        for index, score, refusal in _values(outcome, request.activation):
            found = {"label": "LABEL_0", "probs": [score]} if refusal is None else {"label": None, "probs": None}
            data.append({"index": index, **found, "num_classes": 1, **_error(refusal)})
        return listing("classify", outcome, data)

    return Exchange(read_input(request.input, request.messages, reader), answer)


def read_pooling(body: Mapping[str, Any], reader: RenderedReader) -> Exchange:
    """A request for pooled outputs, which here is the score."""
    request = _pooling(body)

    def answer(outcome: Outcome) -> dict[str, Any]:
        data = [
            {"index": index, "object": "pooling", "data": [score] if refusal is None else None, **_error(refusal)}
            for index, score, refusal in _values(outcome, request.activation)
        ]
        return listing("pool", outcome, data)

    return Exchange(read_input(request.input, request.messages, reader), answer)


def read_score(body: Mapping[str, Any], reader: RenderedReader) -> Exchange:
    """A request to score pairs of a prompt and a response."""
    request = filled(ScoreRequest, body)
    _refuse_truncation(request.truncate_prompt_tokens)
    prompts, responses = ([text] if isinstance(text, str) else text for text in (request.text_1, request.text_2))
    for name, texts in (("text_1", prompts), ("text_2", responses)):
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise RequestError(400, f"{name}: expected a text, or a list of texts")
    if len(prompts) not in (1, len(responses)):
        raise RequestError(
            400, f"found {len(prompts)} texts in text_1 and {len(responses)} in text_2, expected one or as many"
        )
    pairs = zip(prompts * len(responses) if len(prompts) == 1 else prompts, responses, strict=True)
    rows = [
        read_row(lambda prompt=prompt, reply=reply: Conversation.from_prompt(prompt, reply))  # type: ignore[misc]
        for prompt, reply in pairs
    ]

    def answer(outcome: Outcome) -> dict[str, Any]:
        data = [
            {"index": index, "object": "score", "score": score, **_error(refusal)}
            for index, score, refusal in _values(outcome, request.activation)
        ]
        return listing("score", outcome, data)

    return Exchange(rows, answer)


def read_input(value: Any, messages: list[Any] | None, reader: RenderedReader) -> list[RowInput]:
    """Rows of `input` (a text, texts, ids, lists of ids) or of `messages`.

    Raises:
        RequestError: 400 where neither or both are given.
    """
    if (value is None) == (messages is None):
        raise RequestError(400, "expected either input or messages")
    if messages is not None:
        return [read_row(lambda: Conversation.from_messages(messages))]
    if isinstance(value, str) or (isinstance(value, list) and value and all(type(entry) is int for entry in value)):
        value = [value]
    if not isinstance(value, list):
        raise RequestError(400, "input: expected a text, texts, token ids, or lists of token ids")
    return [
        read_row(lambda entry=entry: reader.from_ids(entry) if isinstance(entry, list) else reader.conversation(entry))  # type: ignore[misc]
        for entry in value
    ]


def _pooling(body: Mapping[str, Any]) -> PoolingRequest:
    request = filled(PoolingRequest, body)
    _refuse_truncation(request.truncate_prompt_tokens)
    if request.encoding_format != "float":
        raise RequestError(400, "encoding_format: expected 'float'")
    return request


def _refuse_truncation(tokens: int | None) -> None:
    if tokens is not None:
        raise RequestError(400, "truncate_prompt_tokens: conversations are not cut at a client's wish; leave it out")


def _values(outcome: Outcome, activation: bool | None) -> list[tuple[int, float | None, str | None]]:
    """Place, score (or its sigmoid) and reason of refusal of each row."""
    return [(index, *_value(outcome, result, activation)) for index, result in enumerate(outcome.results)]


def _value(outcome: Outcome, result: Result, activation: bool | None) -> tuple[float | None, str | None]:
    score = outcome.score(result)
    if score is None:
        return None, result.reason if isinstance(result, RefusedRow) else None
    return (_sigmoid(score) if activation else score), None


def _error(refusal: str | None) -> dict[str, str]:
    return {} if refusal is None else {"error": refusal}


def _sigmoid(value: float) -> float:
    if value >= 0:
        return 1 / (1 + math.exp(-value))
    odds = math.exp(value)
    return odds / (1 + odds)
