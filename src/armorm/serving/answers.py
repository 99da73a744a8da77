"""What the routes answer, as types: for the OpenAPI schema, which clients are made from.

In:  nothing. Out: a type for the answer of each route, closed: what is not named here is not sent.

The answers themselves are written by the stacks' modules; tests hold every kind of answer against its type.
"""

from __future__ import annotations

from typing import Any, Literal, Union

from pydantic import ConfigDict, RootModel, with_config
from typing_extensions import NotRequired, TypedDict

_closed = with_config(ConfigDict(extra="forbid", allow_inf_nan=False))


@_closed
class Fault(TypedDict):
    """What is wrong, in one sentence."""

    message: str
    type: str
    code: int


@_closed
class ErrorAnswer(TypedDict):
    """Every error."""

    error: Fault


@_closed
class RowError(TypedDict):
    """A row without a score."""

    index: int
    message: str


@_closed
class Usage(TypedDict):
    """Tokens of all scored rows."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int


@_closed
class ScoredResult(TypedDict):
    """One scored conversation; its parts stand in the order of `objectives`."""

    index: int
    score: float
    tokens: int
    truncated_tokens: NotRequired[int]
    rewards: NotRequired[list[float]]
    ratings: NotRequired[list[float]]
    debiased_rewards: NotRequired[list[float]]
    gating_weights: NotRequired[list[float]]
    gating_output: NotRequired[list[float]]
    coefficients: NotRequired[list[float]]
    contributions: NotRequired[list[float]]
    relative: NotRequired[list[float]]
    uncertainty: NotRequired[list[float]]


@_closed
class RefusedResult(TypedDict):
    """One conversation that was not scored, and why."""

    index: int
    error: str


@_closed
class RewardAnswer(TypedDict):
    """`POST /v1/reward`."""

    model: str
    objectives: list[str]
    normalized: bool
    steering: dict[str, Any]
    results: list[Union[ScoredResult, RefusedResult]]
    usage: Usage


@_closed
class GetRewardAnswer(TypedDict):
    """`POST /get_reward`; lists as long as `query`."""

    rewards: list[Union[float, None]]
    scores: list[Union[float, None]]
    extra_logs: dict[str, list[Union[float, None]]]
    errors: NotRequired[list[RowError]]


@_closed
class ClassifiedRow(TypedDict):
    """One row of `POST /classify`: the score is its only probability, so called."""

    index: int
    label: Union[str, None]
    probs: Union[list[float], None]
    num_classes: int
    error: NotRequired[str]


@_closed
class ClassifyAnswer(TypedDict):
    """`POST /classify`, vLLM's."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ClassifiedRow]
    usage: Usage


@_closed
class PooledRow(TypedDict):
    """One row of `POST /pooling`."""

    index: int
    object: Literal["pooling"]
    data: Union[list[float], None]
    error: NotRequired[str]


@_closed
class PoolingAnswer(TypedDict):
    """`POST /pooling`."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[PooledRow]
    usage: Usage


@_closed
class PairScore(TypedDict):
    """One pair of `POST /score`."""

    index: int
    object: Literal["score"]
    score: Union[float, None]
    error: NotRequired[str]


@_closed
class ScoreAnswer(TypedDict):
    """`POST /score`."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[PairScore]
    usage: Usage


@_closed
class EmbeddedText(TypedDict):
    """One text of SGLang's `POST /classify`."""

    embedding: Union[list[float], None]
    error: NotRequired[str]


class EmbeddedTexts(RootModel[list[EmbeddedText]]):
    """`POST /classify`, SGLang's."""


@_closed
class EmbeddingRow(TypedDict):
    """One row of `POST /v1/embeddings`."""

    object: Literal["embedding"]
    index: int
    embedding: Union[list[float], None]
    error: NotRequired[str]


@_closed
class EmbeddingsAnswer(TypedDict):
    """`POST /v1/embeddings`."""

    object: Literal["list"]
    data: list[EmbeddingRow]
    model: str
    usage: Usage


@_closed
class ScoreEvaluationAnswer(TypedDict):
    """`POST /v1/score/evaluation`."""

    id: str
    object: Literal["score.evaluation"]
    model: str
    scores: list[Union[float, None]]
    errors: NotRequired[list[RowError]]


@_closed
class Attribute(TypedDict):
    """An attribute and its value, where a token and its logarithmic probability would stand."""

    token: str
    logprob: float
    bytes: None
    top_logprobs: list[Any]


@_closed
class Attributes(TypedDict):
    """The score, then the predicted rating of each objective."""

    content: list[Attribute]


@_closed
class Reply(TypedDict):
    """The same as text."""

    role: Literal["assistant"]
    content: str


@_closed
class Choice(TypedDict):
    """The only choice."""

    index: int
    message: Reply
    logprobs: Attributes
    finish_reason: Literal["stop"]


@_closed
class ChatCompletion(TypedDict):
    """`POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


@_closed
class State(TypedDict):
    """`GET /health` and `GET /ready`."""

    status: str


@_closed
class ObjectiveCard(TypedDict):
    """An objective: raw rating = scale * reward + offset."""

    name: str
    source: str
    low: float
    high: float
    scale: float
    offset: float
    direction: Literal["higher", "lower", "neutral"]
    compute: Union[str, None]


@_closed
class Reference(TypedDict):
    """Scores of the model's reference data, where its config holds them."""

    score_mean: Union[float, None]
    score_std: Union[float, None]


@_closed
class ModelCard(TypedDict):
    """The model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: Union[int, None]
    objectives: list[ObjectiveCard]
    debiased_against: list[str]
    steering: dict[str, Any]
    reference: Reference


@_closed
class ModelList(TypedDict):
    """`GET /v1/models`: one."""

    object: Literal["list"]
    data: list[ModelCard]
