"""vLLM's pooling routes: `POST /classify`, `/pooling`, `/score` (docs.vllm.ai, "Pooling models").

Requests: `/classify` and `/pooling` take `input` (a text, texts, ids, lists of ids) or `messages` (one conversation);
`/score` takes `text_1` (a prompt, or one per response) and `text_2` (responses).
Response: `{"id", "object": "list", "created", "model", "data": [...], "usage"}`; the score is in `data[i].probs`,
`data[i].data` or `data[i].score`.

Texts are rendered (verl sends the reward model's own template without its BOS), those of `/score` plain. The raw score
is sent, since a reward has no activation; `activation` (or `use_activation`) `true` requests its sigmoid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp
from typing import Any, Literal, Union

from pydantic import AliasChoices, Field
from typing_extensions import NotRequired, TypedDict

from armorm.backbone.rendered_text import RenderedReader
from armorm.conversation import Conversation
from armorm.serving.errors import RequestError
from armorm.serving.protocols import base


class PoolingRequest(base.ModelRequest):
    """Body of `POST /classify` and `POST /pooling`."""

    input: Any = Field(None, description="A rendered text, several, token ids, or several lists of them.")
    messages: Union[list[Any], None] = Field(None, description="One conversation.")
    activation: Union[bool, None] = Field(None, validation_alias=AliasChoices("activation", "use_activation"))
    encoding_format: str = "float"
    truncate_prompt_tokens: Union[int, None] = None


class ScoreRequest(base.ModelRequest):
    """Body of `POST /score`."""

    text_1: Any = Field(description="A prompt, or one for each response; plain text.")
    text_2: Any = Field(description="A response, or several; plain text.")
    activation: Union[bool, None] = Field(None, validation_alias=AliasChoices("activation", "use_activation"))
    truncate_prompt_tokens: Union[int, None] = None


class _Listing(TypedDict):
    id: str
    object: Literal["list"]
    created: int
    model: str
    usage: base.Usage


@base.closed
class ClassifiedRow(TypedDict):
    """One row of `POST /classify`: one class, whose `probs` is the score."""

    index: int
    label: Union[str, None]
    probs: Union[list[float], None]
    num_classes: int
    error: NotRequired[str]


@base.closed
class ClassifyAnswer(_Listing):
    """Response of vLLM's `POST /classify`."""

    data: list[ClassifiedRow]


@base.closed
class PooledRow(TypedDict):
    """One row of `POST /pooling`."""

    index: int
    object: Literal["pooling"]
    data: Union[list[float], None]
    error: NotRequired[str]


@base.closed
class PoolingAnswer(_Listing):
    """Response of `POST /pooling`."""

    data: list[PooledRow]


@base.closed
class PairScore(TypedDict):
    """One pair of `POST /score`."""

    index: int
    object: Literal["score"]
    score: Union[float, None]
    error: NotRequired[str]


@base.closed
class ScoreAnswer(_Listing):
    """Response of `POST /score`."""

    data: list[PairScore]


# verl drops a sample after any 4xx, and retries after a 5xx: hence `overload_status`.
@base.route(
    "/classify",
    ClassifyAnswer,
    "vLLM classification",
    {"input": base.EXAMPLE_RENDERED, "activation": False},
    overload_status=503,
)
def read_classify(request: PoolingRequest, reader: RenderedReader) -> base.ParsedRequest:
    """Texts or a conversation, each a row of one class."""

    def entry(score: float | None) -> dict[str, Any]:
        found = {"label": None, "probs": None} if score is None else {"label": "LABEL_0", "probs": [score]}
        return {**found, "num_classes": 1}

    return _read_pooling(request, reader, "classify", entry)


@base.route("/pooling", PoolingAnswer, "vLLM pooling", {"messages": base.EXAMPLE_MESSAGES})
def read_pooling(request: PoolingRequest, reader: RenderedReader) -> base.ParsedRequest:
    """Texts or a conversation, each a row of one value."""
    return _read_pooling(
        request, reader, "pool", lambda score: {"object": "pooling", "data": None if score is None else [score]}
    )


@base.route("/score", ScoreAnswer, "vLLM score of text pairs", {"text_1": "What is 2+2?", "text_2": ["4", "5"]})
def read_score(request: ScoreRequest, reader: RenderedReader) -> base.ParsedRequest:
    """Pairs of a prompt and its response."""
    prompts, responses = ([text] if isinstance(text, str) else text for text in (request.text_1, request.text_2))
    for name, texts in (("text_1", prompts), ("text_2", responses)):
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise RequestError(400, f"{name}: expected a text, or a list of texts")
    if len(prompts) not in (1, len(responses)):
        raise RequestError(
            400, f"found {len(prompts)} texts in text_1 and {len(responses)} in text_2, expected one or as many"
        )
    pairs = zip(prompts * len(responses) if len(prompts) == 1 else prompts, responses, strict=True)
    rows = [base.read_row(Conversation.from_prompt, prompt, reply) for prompt, reply in pairs]
    return _parsed(request, rows, "score", lambda score: {"object": "score", "score": score})


def _read_pooling(
    request: PoolingRequest, reader: RenderedReader, prefix: str, entry: Callable[[float | None], dict[str, Any]]
) -> base.ParsedRequest:
    if request.encoding_format != "float":
        raise RequestError(400, "encoding_format: expected 'float'")
    return _parsed(request, base.read_input(request.input, request.messages, reader), prefix, entry)


def _parsed(
    request: PoolingRequest | ScoreRequest,
    rows: Sequence[base.RowInput],
    prefix: str,
    entry: Callable[[float | None], dict[str, Any]],
) -> base.ParsedRequest:
    """A request answered by a list of `entry(score)`, one for each row."""
    if request.truncate_prompt_tokens is not None:
        raise RequestError(400, "truncate_prompt_tokens: not supported, expected a request without it")

    def write(scores: base.RequestScores) -> dict[str, Any]:
        data = []
        for index, (score, reason) in enumerate(scores.rows):
            if request.activation and score is not None:
                score = exp(min(score, 0.0)) / (1 + exp(-abs(score)))  # the sigmoid, without overflow
            data.append({"index": index, **entry(score), **({} if reason is None else {"error": reason})})
        return base.openai_body(scores, prefix, "list", data=data)

    return base.ParsedRequest(rows, write)


ROUTES = (read_classify, read_pooling, read_score)
