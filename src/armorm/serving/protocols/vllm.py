"""vLLM's pooling routes: `POST /classify`, `/pooling`, `/score`, as of vLLM 0.32; `/v1/classify` and `/v1/score`.

Requests: `/classify` and `/pooling` take `input` (a text, texts, ids, lists of ids) or `messages` (one conversation);
`/score` takes prompts and responses as `text_1` and `text_2`, `queries` and `documents` (or `items`), or `data_1` and
`data_2`: one prompt for all responses, or one for each.
Response: `{"id", "object": "list", "created", "model", "data": [...], "usage"}`; the score is in `data[i].probs`,
`data[i].data` or `data[i].score`. (`rerank.py` has the other form of `/score`.)

Texts are rendered (verl sends the reward model's own template without its BOS), those of `/score` plain.

- `use_activation` (before: `activation`): true requests the sigmoid of the score. By default vLLM applies the model's
  activation; a reward has none, so here the default is the raw score.
- `truncate_prompt_tokens` (-1: the model's limit) is the most tokens of a row. vLLM cuts longer ones at the end, or at
  the beginning with `truncation_side: left`. The end is the response, and the score of a part of it is another score:
  the row is an error. With `left` the prompt loses its oldest turns, then the beginning of its last one, as in training
  (`overflow: truncate_prompt`), and never the template's own tokens or a system turn. Token ids are not shortened.
- What would change the text or the output in another way (`UNSUPPORTED`) is an error and not ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp
from typing import Any, Literal, Union

from pydantic import AliasChoices, ConfigDict, Field
from typing_extensions import NotRequired, TypedDict

from armorm.backbone.rendered_text import RenderedReader
from armorm.conversation import Conversation
from armorm.errors import shown
from armorm.serving.errors import RequestError
from armorm.serving.protocols import base

# Fields of vLLM's requests, and the values with which they change nothing here.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "encoding_format": ("float",),
    "embed_dtype": ("float32",),
    "dimensions": (None,),
    "task": (None, "classify"),
    "padding": (None, "do_not_pad"),
    "add_generation_prompt": (False,),
    "continue_final_message": (False,),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "instruction": (None,),
    "max_tokens_per_query": (0, None),
    "max_tokens_per_doc": (0, None),
    "max_chunks_per_doc": (None,),
    "mm_processor_kwargs": (None, {}),
    "normalize": (None,),
}


class Options(base.ModelRequest):
    """Fields that all pooling requests share."""

    model_config = ConfigDict(strict=True, extra="allow")  # (`check` reads the fields of `UNSUPPORTED`)

    use_activation: Union[bool, None] = Field(
        None,
        validation_alias=AliasChoices("use_activation", "activation"),
        description="true: the sigmoid of the score.",
    )
    truncate_prompt_tokens: Union[int, None] = Field(None, ge=-1, description="Most tokens of a row; -1: of the model.")
    truncation_side: Union[Literal["left", "right"], None] = Field(
        None, description="left: the prompt is shortened; otherwise a longer row is an error."
    )

    def check(self) -> None:
        """Raise a RequestError for a field that the server cannot follow."""
        for name, values in UNSUPPORTED.items():
            found = (self.model_extra or {}).get(name, values[0])
            if found not in values:
                expected = f"{values[0]!r}, or a request without it"
                raise RequestError(400, f"{name}: found {shown(found)}, not supported here; expected {expected}")

    def parsed(
        self, rows: Sequence[base.RowInput], write: Callable[[base.RequestScores], Any], *, same_prompt: bool = False
    ) -> base.ParsedRequest:
        """The request for the scores of rows."""
        self.check()
        limit = self.truncate_prompt_tokens
        left, given = self.truncation_side == "left", limit is not None and limit >= 0
        return base.ParsedRequest(
            rows,
            write,
            max_length=limit if given else None,
            overflow=None if limit is None else "truncate_prompt" if left else "skip" if given else None,
            same_prompt=same_prompt,
        )

    def activated(self, score: float | None) -> float | None:
        """The score, or its sigmoid (without overflow) if requested."""
        if score is None or not self.use_activation:
            return score
        return exp(min(score, 0.0)) / (1 + exp(-abs(score)))


class PoolingRequest(Options):
    """Body of `POST /classify` and `POST /pooling`."""

    input: Any = Field(None, description="A rendered text, several, token ids, or several lists of them.")
    messages: Union[list[Any], None] = Field(None, description="One conversation.")


class ScoreRequest(Options):
    """Body of `POST /score`."""

    text_1: Any = Field(
        validation_alias=AliasChoices("text_1", "queries", "data_1"),
        description="A prompt, or one for each response; plain text. Also named `queries` or `data_1`.",
    )
    text_2: Any = Field(
        validation_alias=AliasChoices("text_2", "documents", "items", "data_2"),
        description="A response, or several; plain text. Also named `documents`, `items` or `data_2`.",
    )


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
def _classify(path: str) -> Callable[[Callable[[Any, RenderedReader], base.ParsedRequest]], base.Route]:
    example = {"input": base.EXAMPLE_RENDERED, "use_activation": False}
    return base.route(path, ClassifyAnswer, "vLLM classification", example, overload_status=503)


def _read_classify(request: PoolingRequest, reader: RenderedReader) -> base.ParsedRequest:
    """Texts or a conversation, each a row of one class."""

    def entry(score: float | None) -> dict[str, Any]:
        found = {"label": None, "probs": None} if score is None else {"label": "LABEL_0", "probs": [score]}
        return {**found, "num_classes": 1}

    return _listed(request, base.read_input(request.input, request.messages, reader), "classify", entry)


@base.route("/pooling", PoolingAnswer, "vLLM pooling", {"messages": base.EXAMPLE_MESSAGES})
def read_pooling(request: PoolingRequest, reader: RenderedReader) -> base.ParsedRequest:
    """Texts or a conversation, each a row of one value."""

    def entry(score: float | None) -> dict[str, Any]:
        return {"object": "pooling", "data": None if score is None else [score]}

    return _listed(request, base.read_input(request.input, request.messages, reader), "pool", entry)


def _read_score(request: ScoreRequest, reader: RenderedReader) -> base.ParsedRequest:
    """Pairs of a prompt and its response."""
    prompts, responses = texts("text_1", request.text_1), texts("text_2", request.text_2)
    if len(prompts) not in (1, len(responses)):
        raise RequestError(400, f"found {len(prompts)} prompts and {len(responses)} responses, expected one or as many")
    pairs = zip(prompts * len(responses) if len(prompts) == 1 else prompts, responses, strict=True)
    rows = [base.read_row(Conversation.from_prompt, prompt, reply) for prompt, reply in pairs]
    return _listed(request, rows, "score", lambda score: {"object": "score", "score": score}, len(prompts) == 1)


def texts(name: str, value: Any) -> list[str]:
    """A text, or several, as `{"content": [text parts]}` or `{"text": ...}` too; a RequestError for anything else."""
    values = value if isinstance(value, list) else [value]
    found = [_text(entry) for entry in values]
    if not found or None in found:
        bad = next((shown(entry) for entry, text in zip(values, found, strict=True) if text is None), "none")
        raise RequestError(400, f"{name}: found {bad}, expected a text, or a list of texts")
    return [text for text in found if text is not None]


def _text(value: Any) -> str | None:
    """The text of a query or document, None if it is none (an image, a number)."""
    if isinstance(value, dict):
        value = value.get("text", value.get("content"))
    if isinstance(value, list):
        parts = [part.get("text") for part in value if isinstance(part, dict) and part.get("type") == "text"]
        found = [text for text in parts if isinstance(text, str)]
        value = "".join(found) if found and len(found) == len(value) else None
    return value if isinstance(value, str) else None


def _listed(
    request: Options,
    rows: Sequence[base.RowInput],
    prefix: str,
    entry: Callable[[float | None], dict[str, Any]],
    same_prompt: bool = False,
) -> base.ParsedRequest:
    """A request answered by a list of `entry(score)`, one for each row."""

    def write(scores: base.RequestScores) -> dict[str, Any]:
        data = [
            {"index": index, **entry(request.activated(score)), **({} if reason is None else {"error": reason})}
            for index, (score, reason) in enumerate(scores.rows)
        ]
        return base.openai_body(scores, prefix, "list", data=data)

    return request.parsed(rows, write, same_prompt=same_prompt)


_SCORE_EXAMPLE = {"text_1": "What is 2+2?", "text_2": ["4", "5"]}
ROUTES = (
    *(_classify(path)(_read_classify) for path in ("/classify", "/v1/classify")),
    read_pooling,
    *(
        base.route(path, ScoreAnswer, "vLLM score of text pairs", _SCORE_EXAMPLE)(_read_score)
        for path in ("/score", "/v1/score")
    ),
)
