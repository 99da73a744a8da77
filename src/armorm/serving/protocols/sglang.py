"""SGLang's reward routes (FIELD 5): `POST /classify` with `text`, and `POST /v1/embeddings`, which verl calls.

In:  `/classify`: `text`, a rendered text or several; `/v1/embeddings`: `input`, as for vLLM.
Out: `/classify`: `[{"embedding": [score]}, ...]`; `/v1/embeddings`: `data[i].embedding` is `[score]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Union

from pydantic import BaseModel, ConfigDict, Field

from armorm.backbone.rendered_text import RenderedReader
from armorm.serving.errors import RequestError
from armorm.serving.protocols.base import Exchange, Outcome, RefusedRow, filled
from armorm.serving.protocols.vllm import read_input


class ClassifyRequest(BaseModel):
    """Body of SGLang's `POST /classify`."""

    model_config = ConfigDict(strict=True)

    text: Union[str, list[Any]] = Field(description="A rendered text, or several.")


class EmbeddingsRequest(BaseModel):
    """Body of `POST /v1/embeddings`."""

    model_config = ConfigDict(strict=True)

    model: Union[str, None] = Field(None, description="Ignored: a server holds one model.")
    input: Any = Field(description="A rendered text, several, token ids, or several lists of them.")
    encoding_format: str = "float"


def read_classify(body: Mapping[str, Any], reader: RenderedReader) -> Exchange:
    """A request for the pooled output of texts."""
    request = filled(ClassifyRequest, body)
    return Exchange(read_input(request.text, None, reader), _embeddings)


def read_embeddings(body: Mapping[str, Any], reader: RenderedReader) -> Exchange:
    """A request for embeddings, which here have one dimension: the score."""
    request = filled(EmbeddingsRequest, body)
    if request.encoding_format != "float":
        raise RequestError(400, "encoding_format: expected 'float'")

    def answer(outcome: Outcome) -> dict[str, Any]:
        data = [{"object": "embedding", "index": index, **entry} for index, entry in enumerate(_embeddings(outcome))]
        return {"object": "list", "data": data, "model": outcome.model, "usage": outcome.usage}

    return Exchange(read_input(request.input, None, reader), answer)


def _embeddings(outcome: Outcome) -> list[dict[str, Any]]:
    entries = []
    for result in outcome.results:
        score = outcome.score(result)
        entry: dict[str, Any] = {"embedding": None if score is None else [score]}
        if score is None and isinstance(result, RefusedRow):
            entry["error"] = result.reason
        entries.append(entry)
    return entries
