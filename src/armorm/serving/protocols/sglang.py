"""SGLang's reward routes: `POST /classify` with `text`, and `POST /v1/embeddings`, which verl calls (docs.sglang.ai).

Requests: `/classify` takes `text`, a rendered text or several; `/v1/embeddings` takes `input`, as vLLM's `/classify`.
Responses: `/classify`: `[{"embedding": [score]}, ...]`; `/v1/embeddings`: `data[i].embedding` is `[score]`.
"""

from __future__ import annotations

from typing import Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import NotRequired, TypedDict

from armorm.backbone.rendered_text import RenderedReader
from armorm.serving.errors import RequestError
from armorm.serving.protocols import base


class ClassifyRequest(BaseModel):
    """Body of SGLang's `POST /classify`."""

    model_config = ConfigDict(strict=True)

    text: Union[str, list[Any]] = Field(description="A rendered text, or several.")


class EmbeddingsRequest(base.ModelRequest):
    """Body of `POST /v1/embeddings`."""

    input: Any = Field(description="A rendered text, several, token ids, or several lists of them.")
    encoding_format: str = "float"


@base.closed
class EmbeddedText(TypedDict):
    """One text of SGLang's `POST /classify`."""

    embedding: Union[list[float], None]
    error: NotRequired[str]


@base.closed
class EmbeddingRow(TypedDict):
    """One row of `POST /v1/embeddings`."""

    object: Literal["embedding"]
    index: int
    embedding: Union[list[float], None]
    error: NotRequired[str]


@base.closed
class EmbeddingsAnswer(TypedDict):
    """Response of `POST /v1/embeddings`."""

    object: Literal["list"]
    data: list[EmbeddingRow]
    model: str
    usage: base.Usage


# verl drops a sample after any 4xx, and retries after a 5xx: hence `overload_status`.
@base.route(
    "/classify",
    list[EmbeddedText],
    "SGLang classification",
    {"text": [base.EXAMPLE_RENDERED]},
    accepts=lambda body: "text" in body and "input" not in body and "messages" not in body,
    overload_status=503,
)
def read_classify(request: ClassifyRequest, reader: RenderedReader) -> base.ParsedRequest:
    """Texts to score."""
    return base.ParsedRequest(base.read_input(request.text, None, reader), _embeddings)


@base.route(
    "/v1/embeddings",
    EmbeddingsAnswer,
    "SGLang reward, as called by verl",
    {"input": [base.EXAMPLE_RENDERED]},
    overload_status=503,
)
def read_embeddings(request: EmbeddingsRequest, reader: RenderedReader) -> base.ParsedRequest:
    """Texts whose embeddings have one dimension, the score."""
    if request.encoding_format != "float":
        raise RequestError(400, "encoding_format: expected 'float'")

    def write(scores: base.RequestScores) -> dict[str, Any]:
        data = [{"object": "embedding", "index": index, **entry} for index, entry in enumerate(_embeddings(scores))]
        return {"object": "list", "data": data, "model": scores.model, "usage": scores.usage}

    return base.ParsedRequest(base.read_input(request.input, None, reader), write)


def _embeddings(scores: base.RequestScores) -> list[dict[str, Any]]:
    return [
        {"embedding": [score]} if reason is None else {"embedding": None, "error": reason}
        for score, reason in scores.rows
    ]


ROUTES = (read_classify, read_embeddings)
