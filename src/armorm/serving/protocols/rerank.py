"""Reranking: `POST /rerank`, `/v1/rerank`, `/v2/rerank`, as vLLM 0.32 answers clients of Jina and Cohere.

Request: `{"query", "documents": [...], "top_n"}`; a document is a text, `{"text": ...}` or `{"content": [text parts]}`.
Response: `{"id", "model", "results": [{"index", "document": {"text", "multi_modal": null}, "relevance_score"}],
"usage"}`, best first, at most `top_n` (0: all). `return_documents: false` leaves the documents out.

The query is a prompt and the documents are its responses: the order is that of their rewards, not of how relevant a
text is. `relevance_score` is the raw score, which is not between 0 and 1; `use_activation: true` requests its sigmoid.
Documents that cannot be scored, such as empty ones, are in `errors` with their index, and the others are ranked.
"""

from __future__ import annotations

from typing import Any, Union

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from armorm.backbone.rendered_text import RenderedReader
from armorm.conversation import Conversation
from armorm.serving.errors import RequestError
from armorm.serving.protocols import base, vllm


class RerankRequest(vllm.Options):
    """Body of `POST /rerank`."""

    query: Any = Field(description="The prompt; plain text.")
    documents: Any = Field(description="Its responses; plain texts.")
    top_n: Union[int, None] = Field(None, ge=0, description="Number of results; all by default, and for 0.")
    return_documents: Union[bool, None] = Field(None, description="false: results without their documents.")


@base.closed
class RankedText(TypedDict):
    """A document."""

    text: str
    multi_modal: None


@base.closed
class RankedDocument(TypedDict):
    """A document's place in the request, and its score."""

    index: int
    document: NotRequired[RankedText]
    relevance_score: float


@base.closed
class RerankUsage(TypedDict):
    """Tokens of all scored documents, each with the query."""

    prompt_tokens: int
    total_tokens: int


@base.closed
class RerankAnswer(TypedDict):
    """Response of `POST /rerank`: documents by descending score, ties in the order of the request."""

    id: str
    model: str
    usage: RerankUsage
    results: list[RankedDocument]
    errors: NotRequired[list[base.RowError]]


def _read(request: RerankRequest, reader: RenderedReader) -> base.ParsedRequest:
    """The documents as responses to the query."""
    query, documents = vllm.texts("query", request.query), vllm.texts("documents", request.documents)
    if len(query) > 1:
        raise RequestError(400, f"query: found {len(query)} texts, expected one")
    rows = [base.read_row(Conversation.from_prompt, query[0], text, "document") for text in documents]

    def write(scores: base.RequestScores) -> dict[str, Any]:
        found = [(index, score) for index, score in enumerate(scores.scores) if score is not None]
        best = sorted(found, key=lambda entry: -entry[1])[: request.top_n or None]
        with_text = request.return_documents is not False
        results = [
            {
                "index": index,
                **({"document": {"text": documents[index], "multi_modal": None}} if with_text else {}),
                "relevance_score": request.activated(score),
            }
            for index, score in best
        ]
        usage = {name: scores.usage[name] for name in ("prompt_tokens", "total_tokens")}
        answer = {"id": base.new_id("score"), "model": scores.model, "usage": usage, "results": results}
        return answer | ({"errors": scores.errors} if scores.errors else {})

    return request.parsed(rows, write, same_prompt=True)


_EXAMPLE = {"query": "What is 2+2?", "documents": ["5", "4"], "top_n": 1}
ROUTES = tuple(
    base.route(path, RerankAnswer, "vLLM reranking", _EXAMPLE)(_read)
    for path in ("/rerank", "/v1/rerank", "/v2/rerank")
)
